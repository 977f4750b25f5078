"""OnlineDPO: pairs ranked by reward less weighted cost; decisions per optimizer step; resume; refusals."""

import functools
import gc
import json
import weakref

import pytest
import torch
from devices import ON_CPU
from tiny_trl import logged, same_weights, weights
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from guardrails import AttachError, Constraint, Dial, Gate, Guard, Refinement, Require, StateError
from guardrails.competence import FromFunction
from guardrails.ledger import verify
from guardrails.refine import FunctionRefiner
from guardrails.schedulers import PID, Fixed
from guardrails_trl import GuardrailsCallback, toy


def build(model, folder, *, rewards=toy.reward, cls=OnlineDPOTrainer, **settings):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_new_tokens": 6,
        "max_length": 32,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": ON_CPU,
        "disable_tqdm": True,
    } | settings
    trainer = cls(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=rewards,
        args=OnlineDPOConfig(**arguments),
        train_dataset=toy.dataset(512),
        processing_class=toy.tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def guarded(model, folder, *constraints, missing_ok=False, ledger=False, **settings):
    trainer = build(model, folder, **settings)
    callback = GuardrailsCallback(trainer, Guard(*constraints), missing_ok=missing_ok, ledger=ledger)
    trainer.add_callback(callback)
    return trainer, callback


def on_fillers(scheduler, *, limit=0.5, cost=toy.fillers, **settings):
    return Constraint("fillers", limit=limit, cost=cost, scheduler=scheduler, **settings)


def words_of(completions, **columns):
    return [float(len(text.split())) for text in completions]


def scored(trainer, prompts, completions, **columns):
    """What the host ranks these completions by."""
    return trainer._calculate_rewards_from_functions(
        prompts=prompts, completions=completions, completion_ids_list=[[0]] * len(completions), **columns
    )


def test_guarded_run_holds_a_limit_the_unguarded_one_breaks(speaking_model, tmp_path):
    last = {}
    for name in ("unguarded", "guarded"):
        seen = []

        def reward(completions, **columns):
            seen.append(sum(toy.fillers(completions)) / len(completions))  # noqa: B023
            return toy.reward(completions, **columns)

        settings = {"rewards": reward, "per_device_train_batch_size": 32, "max_new_tokens": 12, "max_steps": 40}
        if name == "guarded":
            constraint = on_fillers(PID(kp=0.1, ki=0.05, smoothing_p=0.9))
            trainer, _ = guarded(speaking_model, tmp_path, constraint, **settings)
        else:
            trainer = build(speaking_model, tmp_path, **settings)
        trainer.train()
        last[name] = sum(seen[-10:]) / 10
        if name == "guarded":
            assert max(seen) > 0.5  # it was violated on the way, so something had to hold it
    assert last["unguarded"] > 4.0
    assert last["guarded"] <= 0.5


def test_pairs_are_ranked_by_the_reward_less_the_weighted_costs(random_model, tmp_path):
    texts = ["3", "well 3", "so so", "4"] * 2
    costs = [1.0, 0.0, None, 3.0, 0.0, float("nan"), 2.0, 0.0]
    trainer, _ = guarded(
        random_model,
        tmp_path,
        on_fillers(Fixed(0.7), limit=0.5),
        Constraint("other", limit=4.0, cost=lambda prompts, **columns: costs, scheduler=Fixed(0.3)),
        Constraint("words", limit=2.0, cost=words_of, scheduler=Fixed(0.2), sense=">="),
    )
    plain = build(random_model, tmp_path)
    columns = {"answer": [3] * 8}
    reward = scored(plain, ["1 + 2 ="] * 8, texts, **columns).cpu()
    fillers = torch.tensor(toy.fillers(texts))
    # Unmeasurable rows take the worst of the batch or one scale beyond the limit, whichever is worse.
    other = torch.tensor([8.0 if value is None or value != value else value for value in costs])
    words = torch.tensor(words_of(texts))
    expected = reward - 0.7 * fillers / 0.5 - 0.3 * other / 4.0 + 0.2 * words / 2.0
    assert torch.allclose(scored(trainer, ["1 + 2 ="] * 8, texts, **columns).cpu(), expected)


@pytest.mark.parametrize("scheduler", [Fixed(0.0), PID()], ids=["fixed", "never violated"])
def test_training_with_zero_multipliers_is_the_unguarded_one_bit_for_bit(random_model, tmp_path, scheduler):
    plain = build(random_model, tmp_path, max_steps=3)
    start = weights(plain)
    plain.train()
    trainer, callback = guarded(random_model, tmp_path, on_fillers(scheduler, limit=100.0), max_steps=3)
    trainer.train()
    assert callback.guard.decision.step == 3
    assert same_weights(weights(plain), weights(trainer))
    assert not same_weights(start, weights(trainer))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_rewards_that_metrics_read_are_the_hosts_scores_whatever_the_multiplier(random_model, tmp_path, weight):
    seen = []
    level = FromFunction(lambda reward: seen.append(reward) or 0.0, "rewards", name="level")
    limit = Gate(Require(level, at_least=0.5)).between(0.5, 1.0)
    trainer, _ = guarded(
        random_model,
        tmp_path,
        on_fillers(Fixed(weight), limit=limit),
        rewards=lambda completions, **columns: [1.0] * len(completions),
        missing_eos_penalty=100.0,
        max_new_tokens=1,
        max_steps=1,
    )
    trainer.train()
    assert set(seen) == {1.0}  # the host takes its penalty of a missing end off in place, later


def test_a_multiplier_changes_what_is_preferred(random_model, tmp_path):
    runs = []
    for lam in (0.0, 1.0):
        trainer, _ = guarded(random_model, tmp_path, on_fillers(Fixed(lam)), max_steps=3)
        trainer.train()
        runs.append(weights(trainer))
    assert not same_weights(*runs)


def test_guard_decides_once_per_optimizer_step_on_all_its_completions(random_model, tmp_path):
    trainer, callback = guarded(random_model, tmp_path, on_fillers(PID()), gradient_accumulation_steps=3)
    trainer.train()
    assert callback.guard.decision.step == 2
    assert callback.guard.decision.n_rows == 4 * 2 * 3
    assert callback.traffic.collectives == 0
    multipliers = logged(trainer, "guardrails/fillers/multiplier")
    assert len(multipliers) == 2
    assert multipliers[-1] == callback.guard.multipliers["fillers"] > 0


def test_metrics_see_rewards_and_costs_together(random_model, tmp_path):
    gate = Gate(Require("reward_level", at_least=0.9))
    trainer, callback = guarded(random_model, tmp_path, on_fillers(PID(), limit=gate.between(0.5, 1.0)))
    trainer.train()
    (requirement,) = next(iter(callback.guard.gates.values())).requirements
    assert requirement.rows == 16


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(random_model, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, callback = guarded(random_model, tmp_path, on_fillers(PID()), ledger=True, **settings)
    whole.train()
    assert verify(tmp_path).ok
    later, again = guarded(random_model, tmp_path / "later", on_fillers(PID()), **settings)
    torch.rand(7)  # a process of its own has another past
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.guard.state_dict() == callback.guard.state_dict()
    assert callback.guard.multipliers["fillers"] > 0
    assert same_weights(weights(later), weights(whole))
    (tmp_path / "checkpoint-2" / "guardrails.json").write_text(json.dumps({"schema": 1}))
    third, _ = guarded(random_model, tmp_path / "third", on_fillers(PID()), **settings)
    with pytest.raises(StateError, match=r"checkpoint-2.*is damaged"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Fails(TrainerCallback):
    """Raises at the end of a step, while the batches are as large as given."""

    def __init__(self, error, step):
        self.error, self.step = error, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.train_batch_size == 4:
            raise self.error


def test_begun_anew_with_smaller_batches_the_guard_is_the_one_it_began_with(random_model, tmp_path):
    trainer, callback = guarded(random_model, tmp_path, on_fillers(PID()), auto_find_batch_size=True)
    trainer.add_callback(Fails(RuntimeError("CUDA out of memory."), 1))
    trainer.train()
    assert trainer.state.train_batch_size == 3
    assert callback.guard.decision.step == 2


def test_a_training_logs_nothing_of_an_earlier_one_that_failed(random_model, tmp_path):
    """An earlier training that ended before its log would enter the means of the next one's."""
    trainer, callback = guarded(random_model, tmp_path, on_fillers(PID()), logging_steps=2)
    failing = Fails(ValueError("boom"), 1)
    trainer.add_callback(failing)
    with pytest.raises(ValueError, match="boom"):
        trainer.train()
    trainer.remove_callback(failing)
    seen = []
    step = callback.guard.step
    callback.guard.step = lambda rollout: seen.append(step(rollout)) or seen[-1]
    trainer.train()
    costs = [decision.constraints["fillers"].cost for decision in seen]
    assert len(costs) == 2
    assert logged(trainer, "guardrails/fillers/cost") == [sum(costs) / 2]


def test_a_detached_callback_does_not_keep_the_trainer_alive(random_model, tmp_path):
    trainer, callback = guarded(random_model, tmp_path, on_fillers(PID()))
    callback.detach()
    alive = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None


def test_detach_leaves_the_trainer_as_it_was(random_model, tmp_path):
    trainer = build(random_model, tmp_path, max_steps=1)
    attributes, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    guard = Guard(on_fillers(Fixed(1.0)))
    callback = GuardrailsCallback(trainer, guard)
    trainer.add_callback(callback)
    with pytest.raises(AttachError, match=r"guarded already.*Call detach\(\)"):
        GuardrailsCallback(trainer, Guard(on_fillers(Fixed(1.0))))
    callback.detach()
    callback.detach()
    assert vars(trainer) == attributes
    assert trainer.callback_handler.callbacks == callbacks
    assert guard.host is None
    trainer.train()
    assert guard.decision is None
    assert not logged(trainer, "guardrails/fillers/cost")


def test_what_the_user_put_around_the_log_stays(random_model, tmp_path):
    trainer = build(random_model, tmp_path, max_steps=1)
    seen, original = [], trainer.log

    def log(logs, *args):
        seen.append(dict(logs))
        original(logs, *args)

    trainer.log = log
    callback = GuardrailsCallback(trainer, Guard(on_fillers(Fixed(1.0))), ledger=False)
    trainer.add_callback(callback)
    trainer.train()
    assert seen[0]["guardrails/fillers/cost"] == callback.guard.decision.constraints["fillers"].cost
    callback.detach()
    assert trainer.log is log


def test_training_without_add_callback_stops_with_the_cure(random_model, tmp_path):
    trainer = build(random_model, tmp_path)
    GuardrailsCallback(trainer, Guard(on_fillers(PID())))
    with pytest.raises(AttachError, match=r"trainer\.add_callback\(callback\)"):
        trainer.train()


async def judge(completions, **columns):
    return [0.0] * len(completions)


class OwnStep(OnlineDPOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


def test_what_cannot_act_on_pairs_is_refused_and_the_trainer_untouched(random_model, tmp_path):
    gate = Gate(Require("reward_level", at_least=0.9))
    cases = [
        ([on_fillers(PID(), cost=judge)], "asynchronous.*Give a plain function"),
        ([on_fillers(PID(), cost="kl")], "names the cost 'kl'"),
        ([on_fillers(PID()), Dial("beta", gate.between(0.1, 0.01))], "Dial 'beta' has nothing to turn on OnlineDPO"),
        ([on_fillers(PID()), Refinement(FunctionRefiner(lambda p, c: c))], "Refinement 'refinement'"),
    ]
    trainer = build(random_model, tmp_path)
    attributes = dict(vars(trainer))
    for parts, message in cases:
        guard = Guard(*parts)
        with pytest.raises(AttachError, match=f"(?s){message}"):
            GuardrailsCallback(trainer, guard)
        assert vars(trainer) == attributes
        assert guard.host is None
    own = build(random_model, tmp_path, cls=OwnStep)
    with pytest.raises(AttachError, match="OwnStep replaces training_step of OnlineDPOTrainer"):
        GuardrailsCallback(own, Guard(on_fillers(PID())))
    own = build(random_model, tmp_path)
    own.judge = functools.partial(print)
    with pytest.raises(AttachError, match="a judge rank its pairs"):
        GuardrailsCallback(own, Guard(on_fillers(PID())))
