"""Gates on TRL: columns for metrics, dials that turn generation and loss, trust lost when the reward is hacked."""

import numpy as np
import pytest
import torch
import trl
from devices import DEVICE
from packaging.version import Version
from peft import LoraConfig
from tiny_trl import build_trainer, logged, same_weights, weights
from transformers import TrainerCallback
from trl import GRPOTrainer

from guardrails import AttachError, CompetenceMetric, Constraint, Dial, Gate, Guard, Require
from guardrails.competence import Drift, FromFunction, RewardLevel, SubgoalAdherence, TokenEntropy
from guardrails.schedulers import Fixed
from guardrails_trl import GuardrailsCallback, toy
from guardrails_trl.seams import LOG_PROBS


class Scripted(CompetenceMetric):
    """Scores every row of the i-th rollout by the i-th entry, 1 after the last, and keeps the rollouts."""

    name = "test.scripted"

    def __init__(self, *script, requires=("rewards",)):
        self.script, self.requires, self.seen = list(script), frozenset(requires), []

    def measure(self, rollout):
        self.seen.append(rollout)
        score = self.script[len(self.seen) - 1] if len(self.seen) <= len(self.script) else 1.0
        return np.full(rollout.n_rows, score)


def quick(metric, rungs=1):
    """A gate that eight good rows open once, eight bad rows close, and sixteen good rows open again."""
    return Gate(
        Require(metric, at_least=0.2), rungs=rungs, dwell=0, confidence=0.01, fall="floor", window=8, run_length=2
    )


def fixed_cost(**settings):
    return Constraint("fillers", limit=1.0, cost=toy.fillers, scheduler=Fixed(0.0), **settings)


def guarded(model, folder, *parts, **settings):
    trainer = build_trainer(model, folder, **settings)
    callback = GuardrailsCallback(trainer, Guard(*parts), ledger=False)
    trainer.add_callback(callback)
    return trainer, callback


def sizes(metric):
    return [max(rollout.lengths) for rollout in metric.seen]


def test_the_quick_gate_of_these_tests_opens_and_closes_at_once(random_model, tmp_path):
    metric = Scripted(0.0, 1.0, 0.0)
    trainer, _ = guarded(random_model, tmp_path, Dial("temperature", quick(metric).between(0.5, 1.0)), max_steps=5)
    trainer.train()
    assert logged(trainer, "guardrails/temperature/value") == [0.5, 1.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("tight", [0.2, 0.0])
def test_beta_of_grpo_holds_for_the_loss_it_was_decided_on(random_model, tmp_path, tight):
    dial = Dial("beta", quick(Scripted(0.0, 1.0, 0.0)).between(tight, 0.01))
    trainer, callback = guarded(random_model, tmp_path, dial, fixed_cost(), beta=0.1, max_steps=5)
    seen, loss = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        seen.append(trainer.beta)
        assert "ref_per_token_logps" in inputs
        return loss(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert seen == [tight, 0.01, tight, tight, 0.01]
    assert logged(trainer, "guardrails/beta/value") == seen
    callback.detach()
    assert trainer.beta == 0.1


def test_a_guard_detached_while_the_host_scores_turns_nothing_any_more(random_model, tmp_path):
    def reward(**columns):
        callback.detach()
        return toy.reward(**columns)

    gate = quick(Scripted(0.0))
    dials = Dial("beta", gate.between(0.5, 0.01)), Dial("temperature", gate.between(0.5, 1.0))
    trainer, callback = guarded(random_model, tmp_path, *dials, rewards=reward, beta=0.1, max_steps=2)
    trainer.train()
    assert (trainer.beta, trainer.temperature, trainer.generation_config.temperature) == (0.1, 1.0, 1.0)


def test_beta_changes_what_is_learned(random_model, tmp_path):
    def learned(tight):
        dial = Dial("beta", quick(Scripted(*[0.0] * 9)).between(tight, 0.01))
        trainer, _ = guarded(random_model, tmp_path, dial, beta=0.1, max_steps=3)
        trainer.train()
        return weights(trainer)

    plain = build_trainer(random_model, tmp_path, beta=0.1, max_steps=3)
    plain.train()
    assert same_weights(learned(0.1), weights(plain))
    assert not same_weights(learned(5.0), weights(plain))


def test_beta_of_rloo_holds_from_the_next_batch_on(random_model, tmp_path):
    seen = []

    def reward(**columns):
        seen.append(trainer.beta)
        return toy.reward(**columns)

    dial = Dial("beta", quick(Scripted(1.0, 0.0)).between(0.5, 0.01))
    trainer, _ = guarded(random_model, tmp_path, dial, kind="rloo", rewards=reward, beta=0.1, max_steps=3)
    trainer.train()
    assert seen == [0.5, 0.01, 0.5]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_completion_length_and_temperature_turn_from_the_next_batch_on_and_are_restored(random_model, tmp_path, kind):
    metric = Scripted(0.0, 1.0, 0.0, requires=("lengths", "completions", "entropy"))
    gate = quick(metric)
    dials = Dial("max_completion_length", gate.between(2, 5)), Dial("temperature", gate.between(1e-4, 1.0))
    twice = {"num_iterations": 2} if kind == "grpo" else {}
    settings = {"kind": kind, "max_steps": 8 if twice else 4, "temperature": 1e-4} | twice
    trainer, callback = guarded(random_model, tmp_path, *dials, **settings)
    before = (trainer.temperature, trainer.max_completion_length, trainer.generation_config.to_dict())
    scored, before_weights = scores(trainer), weights(trainer)
    trainer.train()
    assert sizes(metric) == [2, 2, 5, 2]
    cold, hot = metric.seen[0], metric.seen[2]
    assert len(set(cold.completions[:4])) == 1
    assert len(set(hot.completions[:4])) > 1
    # Entropy is taken from the host's own log-probabilities: near 0 where it scores at the temperature it sampled at,
    # and about log(28) for words drawn evenly.
    assert cold.entropy.max() < 0.5
    assert 2.5 < hot.entropy.mean() < 4.0
    callback.detach()
    assert (trainer.temperature, trainer.max_completion_length, trainer.generation_config.to_dict()) == before
    trainer.model.load_state_dict(before_weights)
    assert torch.equal(scores(trainer), scored)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_trainer_without_a_completion_length_gets_one_and_is_rid_of_it_again(random_model, tmp_path, kind):
    metric = Scripted(0.0, requires=("lengths",))
    dial = Dial("max_completion_length", quick(metric).between(3, 6))
    trainer, callback = guarded(random_model, tmp_path, dial, kind=kind, max_completion_length=None)
    trainer.train()
    assert sizes(metric) == [3]
    callback.detach()
    assert trainer.max_completion_length is trainer.generation_config.max_new_tokens is None


def test_temperature_turns_with_an_adapter_and_its_reference_too(random_model, tmp_path):
    metric = Scripted(0.0, requires=("entropy", "kl"))
    dial = Dial("temperature", quick(metric).between(1e-4, 1.0))
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    guarded(random_model, tmp_path, dial, peft=adapter, beta=0.1, num_iterations=2, max_steps=1)[0].train()
    assert metric.seen[0].entropy.max() < 0.5
    assert metric.seen[0].kl == pytest.approx(np.zeros(8), abs=1e-5)


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="log-probabilities read the trainer's temperature every time"
)
def test_a_temperature_that_the_log_probabilities_would_not_follow_is_refused(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path)
    trainer.model.forward = lambda *args, **kwargs: None
    guard = Guard(Dial("temperature", quick(Scripted()).between(0.5, 1.0)))
    with pytest.raises(AttachError, match=r"cannot turn the temperature of the GRPOTrainer of TRL 1\..*has moved"):
        GuardrailsCallback(trainer, guard)
    assert guard.host is None


class Evaluating(TrainerCallback):
    """A user's own, which evaluates after each update; it may fail at that and go on."""

    def __init__(self, fails):
        self.fails, self.trainer = fails, None

    def on_step_end(self, args, state, control, **kwargs):
        if self.fails:
            with pytest.raises(RuntimeError, match="no more memory"):
                self.trainer.evaluate()
        else:
            self.trainer.evaluate()


def spied(trainer):
    """Record, of each loss, whether it is trained on, its temperature and length, and its importance ratios."""
    seen, loss = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        score, own, found = getattr(trainer, LOG_PROBS), vars(trainer).get(LOG_PROBS), []
        setattr(trainer, LOG_PROBS, lambda *a, **k: found.append(score(*a, **k)) or found[-1])
        try:
            result = loss(model, inputs, **kwargs)
        finally:
            delattr(trainer, LOG_PROBS) if own is None else setattr(trainer, LOG_PROBS, own)
        now = found[0][0].detach() * inputs["completion_mask"]
        then = inputs.get("old_per_token_logps", inputs.get("old_logps"))
        then = now if then is None else then * inputs["completion_mask"] if then.ndim == 2 else then
        ratio = (now - then if then.ndim == 2 else now.sum(dim=1) - then).exp()
        spread = ratio.min().item(), ratio.max().item()
        seen.append((model.training, trainer.temperature, trainer.max_completion_length, spread))
        return result

    trainer.compute_loss = compute_loss
    return seen


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_between_two_updates_leaves_the_batch_its_temperature_and_length(
    random_model, tmp_path, kind, fails
):
    gate = quick(Scripted(1.0))  # opens at the first decision
    dials = Dial("temperature", gate.between(0.5, 1.0)), Dial("max_completion_length", gate.between(3, 6))
    settings = {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.0, "eval_rows": 2}
    trainer, callback = guarded(random_model, tmp_path, *dials, fixed_cost(), kind=kind, **settings)
    evaluating = Evaluating(fails)
    evaluating.trainer = trainer
    trainer.add_callback(evaluating)
    seen = spied(trainer)
    if fails:
        done = trainer.compute_loss

        def compute_loss(model, inputs, **kwargs):
            result = done(model, inputs, **kwargs)
            if not model.training:
                raise RuntimeError("no more memory")
            return result

        trainer.compute_loss = compute_loss
    trainer.train()
    trained = [(temperature, length) for training, temperature, length, _ in seen if training]
    assert trained == [(0.5, 3), (0.5, 3), (1.0, 6), (1.0, 6)]
    assert {(temperature, length) for training, temperature, length, _ in seen if not training} == {(1.0, 6)}
    for *_, ratios in seen:
        assert ratios == pytest.approx((1.0, 1.0), abs=1e-4)  # nothing was learned, so nothing is off-policy
    assert callback.guard.dials["temperature"] == 1.0


def scores(trainer):
    """Log-probabilities as the host computes them."""
    ids = torch.arange(24, device=DEVICE).view(2, 12)  # all of them words
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 6)[0]


def test_dials_that_could_not_turn_are_refused_and_leave_the_trainer_alone(random_model, tmp_path):
    gate = quick(Scripted())

    def refused(match, name, tight, loose, **settings):
        trainer = build_trainer(random_model, tmp_path, **settings)
        before, guard = sorted(vars(trainer)), Guard(fixed_cost(), Dial(name, gate.between(tight, loose)))
        with pytest.raises(AttachError, match=match):
            GuardrailsCallback(trainer, guard)
        assert sorted(vars(trainer)) == before
        assert guard.host is None

    refused(r"built with beta=0, so no reference model", "beta", 0.1, 0.01)
    refused("'temperature' reaches 0", "temperature", 0.0, 1.0)
    refused("less than one token", "max_completion_length", 0.0, 6)
    refused("generation_kwargs set temperature to 0.7", "temperature", 0.5, 1.0, generation_kwargs={"temperature": 0.7})
    refused("Dial 'top_p' has nothing to turn on GRPOTrainer. Dials here: beta", "top_p", 0.5, 1.0)


def test_metrics_read_what_the_host_and_the_data_say_of_each_completion(random_model, tmp_path):
    metric = Scripted(requires=("rewards", "fillers", "lengths", "prompts", "completions", "infos"))
    trainer, _ = guarded(random_model, tmp_path, fixed_cost(), Dial("penalty", quick(metric).between(1.0, 0.5)))
    trainer.train()
    rollout = metric.seen[0]
    texts, infos = rollout.completions, rollout.infos
    assert toy.fillers(texts) == rollout.cost("fillers").tolist()
    assert [info["prompt"] for info in infos] == rollout.prompts
    assert toy.reward(texts, [info["answer"] for info in infos]) == pytest.approx(rollout.rewards)
    assert len(set(rollout.prompts)) == 2


def test_entropy_and_divergence_come_from_the_hosts_own_log_probabilities(random_model, tmp_path):
    metric = Scripted(requires=("entropy", "kl", "completions"))
    dial = Dial("penalty", quick(metric).between(1.0, 0.5))
    settings = {"beta": 0.1, "num_iterations": 2, "max_steps": 6, "learning_rate": 2e-2}
    trainer, _ = guarded(random_model, tmp_path, fixed_cost(), dial, **settings)
    passes, score = [], trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: passes.append(1) or score(*a, **k)
    expected, generate = [], trainer._generate_and_score_completions

    def note(inputs):
        output = generate(inputs)
        policy, mask = output["old_per_token_logps"], output["completion_mask"]
        rows = [p[m.bool()] for p, m in zip(policy, mask, strict=True)]
        expected.append([-row.mean().item() for row in rows])
        return output

    trainer._generate_and_score_completions = note
    trainer.train()
    for rollout, entropies in zip(metric.seen, expected, strict=True):
        assert rollout.entropy == pytest.approx(entropies, abs=1e-6)
    assert metric.seen[0].kl == pytest.approx(np.zeros(8), abs=1e-6)
    assert metric.seen[-1].kl.min() >= 0.0
    assert metric.seen[-1].kl.mean() > 1e-3
    assert len(passes) == 3 * 2 + 6  # policy and reference per generation, and one per loss: none of ours


class ToolUsing(GRPOTrainer):
    """Of each completion the policy's are three words and the end; a tool wrote the rest."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, rollout_func=self.rollout, **kwargs)

    @staticmethod
    def rollout(prompts, trainer):
        words = torch.randint(3, 28, (len(prompts), 3)).tolist()
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [[*own, *[5] * 20, 1] for own in words],
            "logprobs": None,
            "env_mask": [[1] * 3 + [0] * 20 + [1]] * len(prompts),
        }


def test_entropy_and_divergence_are_of_the_tokens_that_the_policy_sampled(random_model, tmp_path):
    metric = Scripted(requires=("kl", "entropy", "lengths"))
    settings = {"cls": ToolUsing, "num_iterations": 2, "beta": 0.1, "max_completion_length": 30, "max_steps": 4}
    dial = Dial("penalty", quick(metric).between(1.0, 0.5))
    trainer, _ = guarded(random_model, tmp_path, fixed_cost(), dial, learning_rate=3e-2, **settings)
    batches, generate = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(generate(inputs)) or batches[-1]
    trainer.train()
    assert len(metric.seen) == 2
    for rollout, batch in zip(metric.seen, batches, strict=True):
        own = torch.tensor([0, 1, 2, 23])
        policy, reference = (batch[f"{name}_per_token_logps"][:, own] for name in ("old", "ref"))
        assert rollout.entropy == pytest.approx((-policy).mean(dim=1).cpu().numpy(), rel=1e-5)
        ratio = reference - policy
        assert rollout.kl == pytest.approx((ratio.exp() - ratio - 1).mean(dim=1).cpu().numpy(), rel=1e-4, abs=1e-6)
        assert rollout.lengths.tolist() == [24.0] * 8
    # Of rows of equally many tokens the host's mean over tokens is ours over rows; it is logged per update.
    assert metric.seen[1].kl.mean() == pytest.approx(logged(trainer, "kl")[2], rel=1e-3)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_completion_that_is_masked_as_truncated_is_no_evidence_of_competence_and_no_failure(
    random_model, tmp_path, kind
):
    metric = TokenEntropy(maximum=1e3)
    gate = Gate(Require(metric, at_least=0.1), rungs=2, dwell=0, confidence=0.1)
    twice = {"num_iterations": 2} if kind == "grpo" else {}
    settings = {"kind": kind, "mask_truncated_completions": True, "max_completion_length": 8, "max_steps": 1} | twice
    dial = Dial("penalty", gate.between(1.0, 0.5))
    trainer, callback = guarded(random_model, tmp_path, fixed_cost(), dial, **settings)
    seen, step = [], callback.guard.step
    callback.guard.step = lambda rollout: seen.append(rollout) or step(rollout)
    trainer.train()
    hidden = seen[0].entropy == 1e9
    assert 0 < hidden.sum() < len(hidden)
    assert (metric.measure(seen[0]) > 0.9).tolist() == (~hidden).tolist()


def test_columns_the_host_does_not_compute_are_refused(random_model, tmp_path):
    def attach(metric, **settings):
        trainer = build_trainer(random_model, tmp_path, **settings)
        guard = Guard(fixed_cost(), Dial("penalty", quick(metric).between(1.0, 0.5)))
        return GuardrailsCallback(trainer, guard, ledger=False)

    with pytest.raises(AttachError, match=r"'token_entropy' reads column 'entropy'.*GRPOTrainer"):
        attach(TokenEntropy())
    with pytest.raises(AttachError, match=r"'drift' reads column 'kl'.*GRPOTrainer"):
        attach(Drift(), num_iterations=2)  # no reference without beta
    with pytest.raises(AttachError, match=r"'drift' reads column 'kl'.*RLOOTrainer"):
        attach(Drift(), kind="rloo", beta=0.1)
    attach(Drift(), num_iterations=2, beta=0.1)
    attach(TokenEntropy(), kind="rloo")


def test_sub_goals_are_predicates_on_completions(random_model, tmp_path):
    goals = [lambda text: "+" not in text, lambda text: len(text.split()) > 3]
    gate = Gate(Require(SubgoalAdherence(goals), at_least=0.5))
    probe = Scripted(requires=("completions",))
    probing = Gate(Require(probe, at_least=0.5), name="probe")
    guard = Guard(Dial("penalty", gate.between(1.0, 0.5)), Dial("temperature", probing.between(1.0, 1.5)), fixed_cost())
    trainer = build_trainer(random_model, tmp_path)
    trainer.add_callback(GuardrailsCallback(trainer, guard, ledger=False))
    trainer.train()
    expected = np.mean([[goal(text) for goal in goals] for text in probe.seen[0].completions])
    assert guard.decision.gates["gate"].requirements[0].mean == pytest.approx(expected)
    assert 0.0 < expected < 1.0


def test_a_gate_resumes_where_it_stood_and_its_dials_are_in_force_at_once(random_model, tmp_path):
    def build():
        metric = Scripted(requires=("rewards", "lengths"))
        gate = quick(metric, rungs=8)
        dials = Dial("max_completion_length", gate.between(2, 10)), Dial("beta", gate.between(0.2, 0.1))
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "beta": 0.1}
        return *guarded(random_model, tmp_path, fixed_cost(), *dials, **settings), metric

    whole, callback, metric = build()
    whole.train()
    assert sizes(metric)[0] == 2 < sizes(metric)[3] < 10
    later, later_callback, later_metric = build()
    assert later_callback.guard.dials["max_completion_length"] == 2
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sizes(later_metric) == sizes(metric)[3:]
    assert later_callback.guard.state_dict() == callback.guard.state_dict()
    assert later_callback.guard.decision == callback.guard.decision
    assert same_weights(weights(later), weights(whole))


class Until(TrainerCallback):
    """Ends the training once a condition holds."""

    def __init__(self, holds):
        self.holds = holds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.holds()


def test_a_gate_closes_when_the_reward_can_be_hacked(tmp_path):
    """The reward changes once the gate has opened, and goes on to satisfy the requirement on it."""
    model = toy.build(tmp_path / "model", steps=500)  # six of ten answers are right

    def reward(completions, answer, **kwargs):
        return toy.fillers(completions) if hackable() else toy.correct(completions, answer)

    right = FromFunction(
        lambda text, info: toy.correct([text], [info["answer"]])[0], ("completions", "infos"), name="right"
    )
    gate = Gate(
        Require(RewardLevel(1.0), at_least=0.35), Require(right, at_least=0.35, audit=True),
        rungs=3, dwell=64, fall="floor",
    )  # fmt: skip
    settings = {"per_device_train_batch_size": 32, "num_generations": 8, "rows": 512, "max_completion_length": 6}
    trainer, callback = guarded(
        model, tmp_path, fixed_cost(), Dial("temperature", gate.between(0.9, 1.0)),
        rewards=reward, max_steps=120, learning_rate=1.5e-3, **settings,
    )  # fmt: skip
    levels, rewarded, audited, decide = [], [], [], callback.guard.step

    def step(rollout):
        decision = decide(rollout)
        levels.append(decision.gates["gate"].rung)
        for means, requirement in zip((rewarded, audited), decision.gates["gate"].requirements, strict=True):
            means.append(requirement.mean)
        return decision

    def hackable():
        return max(levels, default=0) >= 2

    callback.guard.step = step

    # Right after the change the gate may close on the reward, which the policy has yet to learn; then it would reopen.
    def closed():
        return hackable() and max(levels[-15:]) == 0 and min(rewarded[-15:]) > 0.6 and audited[-1] < 0.35

    trainer.add_callback(Until(closed))
    trainer.train()
    assert levels[0] == 0
    assert max(levels) >= 2
    assert closed()
