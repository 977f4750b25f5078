"""A constraint on the divergence from the reference: its multiplier is the host's beta, and nothing else."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny_trl import build_trainer, logged, same_weights, weights

from guardrails import AttachError, Constraint, Dial, Gate, Guard, Refinement, Require
from guardrails.refine import FunctionRefiner
from guardrails.schedulers import PID, AdaptiveKL, DualAscent, Fixed
from guardrails_trl import GuardrailsCallback, toy


def on_kl(scheduler, *, limit=0.1, sense="<=", name="divergence"):
    return Constraint(name, limit=limit, sense=sense, cost="kl", scheduler=scheduler)


def guarded(model, folder, *parts, **settings):
    trainer = build_trainer(model, folder, **settings)
    callback = GuardrailsCallback(trainer, Guard(*parts), ledger=False)
    trainer.add_callback(callback)
    return trainer, callback


def trained(trainer):
    trainer.train()
    return weights(trainer)


def test_a_target_is_held_where_a_fixed_beta_drifts_away(speaking_model, tmp_path):
    target = 0.2
    settings = {
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": toy.MAX_COMPLETION_LENGTH,
        "rows": 512,
        "beta": 0.1,
        "learning_rate": 5e-4,
        "max_steps": 120,
    }
    fixed = build_trainer(speaking_model, tmp_path, **settings)
    fixed.train()
    # β may change by about 2% per step, slower than the policy moves, or the two would chase each other.
    scheduler = AdaptiveKL(0.5, batch_size=32, horizon=320)
    constraint = on_kl(scheduler, limit=target, sense="==")
    trainer, _ = guarded(speaking_model, tmp_path, constraint, **settings)
    trainer.train()
    # Means of 60 steps: the loop still swings by about a half around its target, with a period of about 60.
    drifted, held = (sum(logged(host, "kl")[-60:]) / 60 for host in (fixed, trainer))
    assert drifted > 3 * target
    assert held == pytest.approx(target, rel=1 / 3)
    betas = logged(trainer, "guardrails/divergence/multiplier")
    assert min(betas) < 0.45  # it came down from 0.5, and up again from there
    assert betas[-1] > min(betas)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_multiplier_is_beta_and_enters_nothing_else(random_model, tmp_path, kind, adapter):
    common = {"kind": kind, "max_steps": 3, "learning_rate": 1e-2}
    common["peft"] = LoraConfig(r=2, target_modules="all-linear") if adapter else None
    plain = trained(build_trainer(random_model, tmp_path, beta=0.3, **common))
    other = trained(build_trainer(random_model, tmp_path, beta=0.7, **common))
    trainer, callback = guarded(random_model, tmp_path, on_kl(Fixed(0.3)), beta=0.7, **common)
    assert same_weights(trained(trainer), plain)
    assert not same_weights(plain, other)
    assert callback.guard.decision.constraints["divergence"].cost > 0
    callback.detach()
    assert trainer.beta == 0.7
    assert "_get_per_token_logps_and_entropies" not in vars(trainer)


def test_a_multiplier_of_zero_on_rloo_trains_without_a_divergence_and_still_measures_it(random_model, tmp_path):
    common = {"kind": "rloo", "max_steps": 3, "learning_rate": 1e-2}
    plain = trained(build_trainer(random_model, tmp_path, beta=0.0, **common))
    trainer, callback = guarded(random_model, tmp_path, on_kl(Fixed(0.0)), beta=0.7, **common)
    assert same_weights(trained(trainer), plain)
    assert callback.guard.decision.constraints["divergence"].cost > 0


def test_beta_stays_out_of_what_other_costs_are_mixed_by(random_model, tmp_path):
    cost = Constraint("fillers", limit=0.5, cost=toy.fillers, scheduler=Fixed(0.5))
    common = {"max_steps": 3, "learning_rate": 1e-2}
    alone = trained(guarded(random_model, tmp_path, cost, beta=0.3, **common)[0])
    both = trained(guarded(random_model, tmp_path, cost, on_kl(Fixed(0.3)), beta=0.7, **common)[0])
    assert same_weights(alone, both)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {}),
        ("grpo", {"num_iterations": 2}),
        ("grpo", {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        ("rloo", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", [False, True])
def test_the_cost_is_the_divergence_of_what_was_sampled(random_model, tmp_path, kind, settings, adapter):
    peft = LoraConfig(r=2, target_modules="all-linear") if adapter else None
    trainer, callback = guarded(
        random_model, tmp_path, on_kl(Fixed(0.1)), kind=kind, beta=0.1, peft=peft, learning_rate=3e-2, **settings
    )
    trainer.train()  # away from the reference, else there is nothing to measure
    trainer.model.train()
    rows = [{"prompt": f"{i} + 2 =", "answer": i + 2} for i in (1, 1, 1, 1, 2, 2, 2, 2)]
    batch = trainer._generate_and_score_completions(rows)

    def log_probs(model):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        n_tokens = batch["completion_ids"].shape[1]
        with torch.no_grad():
            # Positions as the host has them: it leaves left-padded prompts to the model's own default.
            logits = model(input_ids=ids, attention_mask=attention).logits[:, -n_tokens - 1 : -1]
        return logits.double().log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0]

    policy = log_probs(trainer.model)
    if adapter:
        with trainer.model.disable_adapter():
            reference = log_probs(trainer.model)
    else:
        reference = log_probs(trainer.ref_model)
    ratio, mask = reference - policy, batch["completion_mask"]
    expected = ((ratio.exp() - ratio - 1) * mask).sum(1) / mask.sum(1)
    assert expected.min() > 1e-5
    # The host computes log-probabilities in float32, and exp(r) - r - 1 cancels most of its digits.
    assert callback.guard.sanitised("divergence") == pytest.approx(expected.cpu().numpy(), rel=2e-2, abs=1e-5)


def moved(trainer):
    """Take the policy away from its reference."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))


def masking(model, folder, kind, scheduler, **settings):
    settings = {"mask_truncated_completions": True, "beta": 0.5, "learning_rate": 0.0, "seed": 1} | settings
    trainer, callback = guarded(model, folder, on_kl(scheduler, limit=0.2), kind=kind, **settings)
    moved(trainer)
    seen, step = [], callback.guard.step
    callback.guard.step = lambda rollout: seen.append(rollout.costs["divergence"]) or step(rollout)
    return trainer, callback, seen


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_hidden_completions_are_left_out_of_the_mean(random_model, tmp_path, kind):
    trainer, callback, seen = masking(random_model, tmp_path, kind, Fixed(0.5), max_completion_length=12)
    bare = masking(random_model, tmp_path, kind, Fixed(0.5), max_completion_length=12, mask_truncated_completions=False)
    for host in (trainer, bare[0]):
        torch.manual_seed(2)
        host.train()
    cut = logged(trainer, "completions/clipped_ratio")[0]
    assert 0.0 < cut < 1.0
    shown = np.isclose(seen[0], bare[2][0], rtol=1e-3)  # of the same completions without the mask
    assert shown.sum() == round((1 - cut) * 8)
    assert seen[0][~shown] == pytest.approx(seen[0][shown].mean(), rel=1e-5)
    assert callback.guard.decision.constraints["divergence"].cost == pytest.approx(seen[0][shown].mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_where_all_completions_are_hidden_beta_rises(random_model, tmp_path, kind):
    settings = {"max_completion_length": 2, "max_steps": 2, "generation_kwargs": {"min_new_tokens": 2}}  # none ends
    trainer, callback, seen = masking(random_model, tmp_path, kind, DualAscent(0.1, initial=0.5), **settings)
    trainer.train()
    assert logged(trainer, "completions/clipped_ratio") == [1.0, 1.0]
    assert np.isnan(seen).all()
    assert callback.guard.decision.constraints["divergence"].violation > 0
    betas = logged(trainer, "guardrails/divergence/multiplier")
    assert 0.5 < betas[0] < betas[1]


def test_a_change_of_beta_holds_for_the_very_batch_on_grpo_and_for_the_next_on_rloo(random_model, tmp_path):
    for kind, lag in (("grpo", 0), ("rloo", 1)):
        seen = []

        def reward(**columns):
            seen.append(trainer.beta)  # noqa: B023
            return toy.reward(**columns)

        scheduler = AdaptiveKL(0.5, batch_size=1, horizon=1, clip=0.5)  # halves β while nothing diverges
        target = on_kl(scheduler, limit=1e3, sense="==")
        rewards = reward if kind == "rloo" else toy.reward
        trainer, _ = guarded(random_model, tmp_path, target, kind=kind, rewards=rewards, beta=0.7, max_steps=3)
        if kind == "grpo":
            original = trainer.compute_loss

            def compute_loss(*args, **kwargs):
                seen.append(trainer.beta)  # noqa: B023
                return original(*args, **kwargs)  # noqa: B023

            trainer.compute_loss = compute_loss
        trainer.train()
        assert logged(trainer, "guardrails/divergence/multiplier") == [0.25, 0.125, 0.0625]
        assert seen == [0.5, 0.25, 0.125, 0.0625][1 - lag :][:3]


def test_evaluation_logs_the_divergence_and_leaves_beta_alone(random_model, tmp_path):
    target = on_kl(AdaptiveKL(0.5), sense="==")
    trainer, callback = guarded(random_model, tmp_path, target, beta=0.7, eval_rows=8, max_steps=2, learning_rate=1e-2)
    trainer.train()
    before = callback.guard.state_dict(), trainer.beta
    metrics = trainer.evaluate()
    assert metrics["eval_guardrails/divergence/cost"] > 0
    assert (callback.guard.state_dict(), trainer.beta) == before


@pytest.mark.parametrize(
    ("parts", "beta", "message"),
    [
        ([on_kl(PID()), on_kl(PID(), name="again")], 0.1, "'divergence' and 'again' both read cost='kl'"),
        ([on_kl(PID(), sense=">=")], 0.1, "'divergence': a larger beta only lowers.*AdaptiveKL"),
        ([on_kl(PID())], 0.0, "'divergence'.*built with beta=0.*Build it with any beta above 0"),
    ],
    ids=["two", "lower", "no reference"],
)
def test_what_cannot_turn_beta_is_refused(random_model, tmp_path, parts, beta, message):
    trainer = build_trainer(random_model, tmp_path, beta=beta)
    attributes, guard = dict(vars(trainer)), Guard(*parts)
    with pytest.raises(AttachError, match=f"(?s)^Constraint {message}"):
        GuardrailsCallback(trainer, guard)
    assert vars(trainer) == attributes
    assert guard.host is None


def test_beta_has_one_master(random_model, tmp_path):
    gate = Gate(Require("reward_level", at_least=0.9))
    guard = Guard(on_kl(PID()), Dial("beta", gate.between(0.1, 0.01)))
    with pytest.raises(AttachError, match="turns beta, and so does the dial 'beta'"):
        GuardrailsCallback(build_trainer(random_model, tmp_path, beta=0.1), guard)


def test_the_weight_of_a_refinement_cannot_be_beta(random_model, tmp_path):
    guard = Guard(Refinement(FunctionRefiner(lambda prompt, text: text), weight=on_kl(PID())))
    trainer = build_trainer(random_model, tmp_path, beta=0.1)
    with pytest.raises(AttachError, match=r"'divergence' is the weight of a Refinement .*whose multiplier is beta"):
        GuardrailsCallback(trainer, guard)
    assert guard.host is None
    own = Constraint("edits", limit=0.1)
    beside = Guard(on_kl(PID()), Refinement(FunctionRefiner(lambda prompt, text: text), weight=own))
    assert GuardrailsCallback(trainer, beside, ledger=False).guard is beside


def test_completions_that_the_policy_did_not_sample_alone_are_refused(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, beta=0.1)
    trainer.rollout_func = lambda prompts, trainer: {}
    with pytest.raises(AttachError, match="with tools or a rollout_func"):
        GuardrailsCallback(trainer, Guard(on_kl(PID())))
