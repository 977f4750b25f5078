"""Every refusal names cause and cure, and leaves trainer and guard as they were."""

import functools

import pytest
import torch
import trl
from tiny_trl import build_trainer
from trl import GRPOTrainer

from guardrails import AttachError, CompetenceMetric, Constraint, Dial, Gate, Guard, Require, RolloutError
from guardrails_trl import GuardrailsCallback, toy


@pytest.fixture
def trainer(random_model, tmp_path):
    return build_trainer(random_model, tmp_path)


def cost_without_keywords(prompts, completions):
    return [0.0] * len(completions)


def cost_of_another_column(completions, harm_label, **kwargs):
    return harm_label


def cost_by_place(completions, /, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (None, "has no cost function.*cost=function"),
        ("toxicity", "names the cost 'toxicity'.*cost=function"),
        (torch.nn.Linear(2, 1), "is a Linear, a module.*Wrap it in a function"),
        (cost_without_keywords, r"'cost_without_keywords' takes no \*\*kwargs.*Add \*\*kwargs"),
        (functools.partial(cost_without_keywords), r"'cost_without_keywords' takes no \*\*kwargs"),
        (cost_of_another_column, "reads column 'harm_label'.*Columns here: answer, completion_ids"),
        (cost_by_place, "cannot take .'completions'. by place"),
    ],
)
def test_a_cost_the_host_cannot_score_is_refused_at_attach(trainer, cost, message):
    attributes = dict(vars(trainer))
    guard = Guard(Constraint("fine", limit=1.0, cost=toy.fillers), Constraint("c", limit=1.0, cost=cost))
    with pytest.raises(AttachError, match=f"(?s)Constraint 'c'.*{message}"):
        GuardrailsCallback(trainer, guard)
    assert vars(trainer) == attributes
    assert guard.host is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0] * 3, "returned 3 values for 8 completions"),
        ([0.0] * 9, "returned 9 values for 8 completions"),
        (0.5, "it returned float"),
        (["rude"] * 8, "it returned list .*could not convert"),
        ([[0.0, 1.0]] * 8, "it returned list"),
        (None, "it returned NoneType"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_malformed_cost_stops_the_run_and_names_the_constraint(trainer, values, message, is_async):
    def judge(prompts, **kwargs):
        return values

    async def async_judge(prompts, **kwargs):
        return values

    guard = Guard(Constraint("toxicity", limit=0.5, cost=async_judge if is_async else judge))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    with pytest.raises(RolloutError, match=f"Constraint 'toxicity': the cost function '.*judge'.*{message}"):
        trainer.train()
    assert guard.decision is None


@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_cost_raises_passes_with_a_note_that_names_the_constraint(trainer, is_async):
    def judge(prompts, **kwargs):
        raise KeyError("label")

    async def async_judge(prompts, **kwargs):
        raise KeyError("label")

    guard = Guard(Constraint("toxicity", limit=0.5, cost=async_judge if is_async else judge))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    with pytest.raises(KeyError, match="label") as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert note.startswith("Constraint 'toxicity': this was raised by its cost function '")


def test_guarding_a_trainer_twice_is_refused(trainer):
    first = GuardrailsCallback(trainer, Guard(Constraint("a", limit=1.0, cost=toy.fillers)))
    other = Guard(Constraint("b", limit=1.0, cost=toy.fillers))
    with pytest.raises(AttachError, match=r"GRPOTrainer is guarded already.*Call detach\(\).*one Guard"):
        GuardrailsCallback(trainer, other)
    assert other.host is None
    first.detach()
    GuardrailsCallback(trainer, other)


def test_a_guard_of_another_host_is_refused_and_the_trainer_untouched(trainer):
    guard = Guard(Constraint("a", limit=1.0, cost=toy.fillers))
    guard.attach("PPO")
    attributes = dict(vars(trainer))
    with pytest.raises(AttachError, match="already attached to PPO"):
        GuardrailsCallback(trainer, guard)
    assert vars(trainer) == attributes
    assert guard.host == "PPO"


@pytest.mark.parametrize("other", [GRPOTrainer, "trainer", None])
def test_only_instances_of_trainers_are_guarded(other):
    guard = Guard(Constraint("a", limit=1.0, cost=toy.fillers))
    name = other.__name__ if isinstance(other, type) else type(other).__name__
    with pytest.raises(AttachError, match=f"an instance of one of TRL's trainers.*not {name}"):
        GuardrailsCallback(other, guard)
    assert guard.host is None


def test_a_guard_is_asked_for_where_none_was_given(trainer):
    with pytest.raises(AttachError, match="needs a Guard second, not Constraint"):
        GuardrailsCallback(trainer, Constraint("a", limit=1.0, cost=toy.fillers))


class OwnScoring(GRPOTrainer):
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


class OwnLoss(GRPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs)


def test_subclasses_are_guarded_unless_they_replace_the_scoring(random_model, tmp_path):
    guard = Guard(Constraint("a", limit=1.0, cost=toy.fillers))
    with pytest.raises(AttachError, match="OwnScoring replaces _calculate_rewards of GRPOTrainer"):
        GuardrailsCallback(build_trainer(random_model, tmp_path, cls=OwnScoring), guard)
    trainer = build_trainer(random_model, tmp_path, cls=OwnLoss)
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    assert guard.decision.step == 1


def test_a_version_of_trl_whose_advantages_mean_something_else_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.5.1")
    with pytest.raises(AttachError, match=r"TRL 1\.5\.1: it computes the spread.*Install trl>=1\.6,<2"):
        GuardrailsCallback(trainer, Guard(Constraint("a", limit=1.0, cost=toy.fillers)))


@pytest.mark.parametrize("change", ["method gone", "signature changed", "attribute gone", "log column gone"])
def test_an_unknown_version_of_trl_is_refused_by_its_number(trainer, monkeypatch, change):
    if change == "method gone":
        monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    elif change == "signature changed":
        monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, rollout: None)
    elif change == "attribute gone":
        del trainer.scale_rewards
    else:
        del trainer._logs["advantages"]
    missing = {"attribute gone": "scale_rewards", "log column gone": r"_logs\['advantages'\]"}
    names = missing.get(change, "_calculate_rewards")
    with pytest.raises(AttachError, match=f"(?s)TRL {trl.__version__}.*{names}.*Install trl>=1.6,<2"):
        GuardrailsCallback(trainer, Guard(Constraint("a", limit=1.0, cost=toy.fillers)))
    assert "_generate_and_score_completions" not in vars(trainer)


def test_a_metric_that_reads_a_column_no_completion_has_is_refused_at_attach(trainer):
    class Smooth(CompetenceMetric):
        name = "tests.smooth"
        requires = frozenset({"actions"})

        def measure(self, rollout):
            return [1.0] * rollout.n_rows

    gate = Gate(Require(Smooth(), at_least=0.9))
    guard = Guard(Constraint("a", limit=gate.between(1.0, 2.0), cost=toy.fillers))
    with pytest.raises(AttachError, match=r"(?s)tests\.smooth.*actions.*GRPOTrainer"):
        GuardrailsCallback(trainer, guard)
    assert guard.host is None
    assert "_calculate_rewards" not in vars(trainer)


def test_a_dial_this_host_does_not_turn_is_refused_at_attach(trainer):
    class Short(CompetenceMetric):
        name = "tests.short"
        requires = frozenset({"completions"})

        def measure(self, rollout):
            return [1.0] * rollout.n_rows

    gate = Gate(Require(Short(), at_least=0.9))
    guard = Guard(Constraint("a", limit=1.0, cost=toy.fillers), Dial("action_scale", gate.between(0.1, 1.0)))
    with pytest.raises(AttachError, match="action_scale"):
        GuardrailsCallback(trainer, guard)
    assert "_calculate_rewards" not in vars(trainer)
