"""The effect of λ on advantages, against what TRL itself makes of a cost that is the only reward."""

import math

import pytest
import torch
from devices import DEVICE
from tiny_trl import build_trainer, record_loss_inputs, same_weights, weights

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Fixed
from guardrails_trl import GuardrailsCallback, toy
from guardrails_trl.seams import Host

ESTIMATORS = [
    *(
        ("grpo", {"scale_rewards": scale, "multi_objective_aggregation": aggregation})
        for scale in ("group", "batch", "none")
        for aggregation in ("sum_then_normalize", "normalize_then_sum")
    ),
    ("rloo", {"normalize_advantages": False}),
    ("rloo", {"normalize_advantages": True}),
]
LOSSES = [("grpo", {"loss_type": loss}) for loss in ("dapo", "grpo", "bnpo", "dr_grpo")]


def brevity(completions, **kwargs):
    return [float(len(text.split())) for text in completions]


def guarded(trainer, *constraints):
    guard = Guard(*constraints)
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    return guard


def advantages_in_loss(trainer):
    seen = record_loss_inputs(trainer)
    trainer.train()
    return seen


def score(trainer):
    """One generation batch, in training mode, without a step."""
    trainer.model.train()
    rows = [{"prompt": "1 + 2 ="}] * trainer.args.per_device_train_batch_size
    return trainer._generate_and_score_completions(rows)["advantages"]


@pytest.mark.parametrize("n_rows", [8, 148])
@pytest.mark.parametrize(("kind", "settings"), ESTIMATORS, ids=str)
def test_cost_advantages_are_bit_for_bit_those_of_the_host(random_model, tmp_path, kind, settings, n_rows):
    draw = torch.Generator().manual_seed(3)
    values = 10 * torch.rand(n_rows, generator=draw)
    values[4:8] = 0.25  # a group in which every cost is the same
    trainer = build_trainer(
        random_model,
        tmp_path,
        kind=kind,
        rewards=lambda completions, **kwargs: values.tolist(),
        per_device_train_batch_size=n_rows,
        **settings,
    )
    assert torch.equal(Host(trainer).advantages(values.to(DEVICE)), score(trainer))


@pytest.mark.parametrize(("kind", "settings"), ESTIMATORS + LOSSES, ids=str)
def test_loss_sees_the_documented_mixture_of_reward_and_cost_advantages(random_model, tmp_path, kind, settings):
    lam = 0.7
    reward_only = advantages_in_loss(build_trainer(random_model, tmp_path, kind=kind, **settings))
    cost_only = advantages_in_loss(build_trainer(random_model, tmp_path, kind=kind, rewards=toy.fillers, **settings))
    trainer = build_trainer(random_model, tmp_path, kind=kind, **settings)
    guarded(trainer, Constraint("fillers", limit=0.5, cost=toy.fillers, scheduler=Fixed(lam)))
    mixed = advantages_in_loss(trainer)

    assert [ids for ids, _ in mixed] == [ids for ids, _ in reward_only] == [ids for ids, _ in cost_only]
    for (_, a), (_, a_r), (_, a_c) in zip(mixed, reward_only, cost_only, strict=True):
        # float32 in the trainer against float64 here
        assert a == pytest.approx((a_r - lam * a_c) / (1 + lam), rel=1e-5, abs=1e-6)
    assert any(abs(a - a_r) > 0.05 for (_, a), (_, a_r) in zip(mixed, reward_only, strict=True))


def test_two_constraints_and_a_lower_limit_enter_with_their_own_sign(random_model, tmp_path):
    runs = [
        advantages_in_loss(build_trainer(random_model, tmp_path, rewards=function))
        for function in (toy.reward, toy.fillers, brevity)
    ]
    trainer = build_trainer(random_model, tmp_path)
    guarded(
        trainer,
        Constraint("fillers", limit=0.5, cost=toy.fillers, scheduler=Fixed(0.5)),
        Constraint("words", limit=3.0, cost=brevity, scheduler=Fixed(2.0), sense=">="),
    )
    mixed = [a for _, a in advantages_in_loss(trainer)]
    expected = [(a_r - 0.5 * a_f + 2.0 * a_w) / 3.5 for (_, a_r), (_, a_f), (_, a_w) in zip(*runs, strict=True)]
    assert mixed == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_values_of_several_cost_functions_are_summed(random_model, tmp_path):
    def together(completions, **kwargs):
        return [a + b for a, b in zip(toy.fillers(completions), brevity(completions), strict=True)]

    runs = []
    for cost in (together, [toy.fillers, brevity]):
        trainer = build_trainer(random_model, tmp_path)
        guard = guarded(trainer, Constraint("talk", limit=1.0, cost=cost, scheduler=Fixed(1.0)))
        runs.append((advantages_in_loss(trainer), guard.decision.constraints["talk"].cost))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("scheduler", [Fixed(0.0), PID()], ids=["fixed", "never violated"])
def test_training_with_zero_multipliers_is_the_unguarded_one_bit_for_bit(random_model, tmp_path, kind, scheduler):
    plain = build_trainer(random_model, tmp_path, kind=kind, max_steps=3)
    plain.train()
    trainer = build_trainer(random_model, tmp_path, kind=kind, max_steps=3)
    guard = guarded(trainer, Constraint("fillers", limit=100.0, cost=toy.fillers, scheduler=scheduler))
    trainer.train()
    assert guard.multipliers == {"fillers": 0.0}
    assert same_weights(weights(plain), weights(trainer))
    assert not same_weights(weights(build_trainer(random_model, tmp_path)), weights(trainer))


def test_unmeasurable_costs_count_as_the_worst_of_the_batch(random_model, tmp_path):
    costs = [0.0, 1.0, None, 2.0, 1.0, math.nan, 0.0, 1.0]
    trainer = build_trainer(random_model, tmp_path, rewards=lambda prompts, **kwargs: [0.0] * 8, scale_rewards="none")
    guard = guarded(
        trainer,
        Constraint("c", limit=0.5, cost=lambda completions, **kwargs: costs, scheduler=Fixed(1.0)),
    )
    advantages = score(trainer)
    worst = torch.tensor([0.0, 1.0, 2.0, 2.0, 1.0, 2.0, 0.0, 1.0])
    expected = -(worst - worst.view(2, 4).mean(dim=1).repeat_interleave(4)) / 2
    assert torch.allclose(advantages.cpu(), expected)
    assert guard.decision.constraints["c"].invalid_rows == 2
    assert not guard.decision.constraints["c"].satisfied


def test_a_completion_no_reward_function_scored_is_moved_by_its_cost_alone(random_model, tmp_path, caplog):
    def half(completions, **kwargs):
        return [None, 1.0, 2.0, 3.0, None, 1.0, 2.0, 3.0]

    costs = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 4.0])
    plain = build_trainer(random_model, tmp_path, rewards=half)
    a_r = score(plain)
    trainer = build_trainer(random_model, tmp_path, rewards=half)
    guarded(trainer, Constraint("c", limit=0.5, cost=lambda prompts, **kwargs: costs, scheduler=Fixed(1.0)))
    a = score(trainer)
    assert a_r[0] == a_r[4] == 0.0
    assert torch.allclose(a, (a_r - Host(plain).advantages(costs.to(DEVICE))) / 2)
    assert trainer._metrics["train"]["reward"] == plain._metrics["train"]["reward"] == [2.0]
    assert "All reward functions returned None for 2 completions" in caplog.text
