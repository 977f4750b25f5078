"""Attaching to a Trainer, living beside other callbacks, evaluating, and leaving without a trace."""

import json
import logging
from typing import NamedTuple

import pytest
import torch
from devices import DEVICE
from tiny_trainer import (
    Rows,
    Sentences,
    build,
    classifier,
    first_words,
    language_model,
    logged,
    positives,
    same,
    weights,
)
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from guardrails import AttachError, Constraint, Dial, Gate, Guard, Refinement, Require, RolloutError
from guardrails.competence import ConstraintSatisfaction, FromFunction
from guardrails.refine import FunctionRefiner
from guardrails.schedulers import PID, AdaptiveKL, Fixed
from guardrails_transformers import GuardrailsCallback


def guarded(folder, *parts, model=None, rows=64, columns=None, drives=None, **settings):
    trainer = build(model or classifier(), folder, Rows(rows), **settings)
    guard = Guard(*(parts or [Constraint("c", limit=0.1, cost=positives)]))
    trainer.add_callback(GuardrailsCallback(trainer, guard, columns=columns, drives=drives))
    return trainer, guard


def wrong(outputs, inputs):
    return (outputs["logits"].argmax(-1) != inputs["labels"]).float()


def report(prediction):
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean()), "wrong": float(1.0 - right.mean())}


def evaluated(folder, *parts, columns=None, drives=None, **settings):
    """A guarded trainer that evaluates after every second step."""
    trainer = build(
        classifier(),
        folder,
        Rows(64),
        eval_data=Rows(40, seed=1),
        extra={"compute_metrics": report},
        **{"eval_strategy": "steps", "eval_steps": 2} | settings,
    )
    guard = Guard(*parts)
    trainer.add_callback(GuardrailsCallback(trainer, guard, columns=columns, drives=drives))
    return trainer, guard


# What is measured, and when


def test_the_log_has_the_means_since_the_last_time(tmp_path):
    every, _ = guarded(tmp_path, max_steps=4)
    every.train()
    part = Constraint("c", limit=0.1, cost=positives)
    second, _ = evaluated(tmp_path, part, max_steps=4, logging_steps=2, eval_steps=1)
    second.train()
    costs = logged(every, "guardrails/c/cost")
    assert logged(second, "guardrails/c/cost") == [sum(costs[:2]) / 2, sum(costs[2:]) / 2]
    assert not any("eval_loss" in entry and "guardrails/c/cost" in entry for entry in second.state.log_history)


def test_a_step_of_the_guard_is_a_step_of_the_optimizer_and_the_log_has_its_figures(tmp_path):
    trainer, guard = guarded(tmp_path, gradient_accumulation_steps=3, max_steps=3, logging_steps=1)
    trainer.train()
    assert guard.decision.step == 3
    assert guard.decision.n_rows == 16  # an epoch has 8 batches of 8, so that its third step has two
    lines = [json.loads(line) for line in (tmp_path / "guardrails" / "ledger.jsonl").read_text().splitlines()]
    costs = [line["decision"]["constraints"]["c"]["cost"] for line in lines if line["kind"] == "step"]
    assert logged(trainer, "guardrails/c/cost") == costs
    assert len(logged(trainer, "guardrails/c/multiplier")) == 3
    assert lines[0]["host"] == "Trainer"
    assert lines[0]["seed"] == 3


def test_evaluation_is_not_measured_and_changes_nothing(tmp_path):
    alone, guard = guarded(tmp_path, max_steps=6)
    alone.train()
    part = Constraint("c", limit=0.1, cost=positives)
    beside, other = evaluated(tmp_path, part, max_steps=6)
    beside.train()
    beside.evaluate()
    assert other.state_dict() == guard.state_dict()
    assert same(weights(beside), weights(alone))
    assert len(logged(beside, "eval_loss")) == 4


def test_a_loss_that_is_not_trained_on_is_the_hosts_own_and_not_measured(tmp_path):
    batch = {"features": torch.randn(5, 3, device=DEVICE), "labels": torch.tensor([0, 1, 0, 1, 1], device=DEVICE)}
    found = []

    class Looks(TrainerCallback):
        """Computes a loss between two accumulated batches, as a callback of a user's may."""

        def on_substep_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            found.append((trainer.compute_loss(model, dict(batch)), model(**batch)["loss"]))

    part = Constraint("c", limit=0.1, cost=positives, scheduler=Fixed(9.0))
    trainer, guard = guarded(tmp_path, part, gradient_accumulation_steps=2, max_steps=2)
    trainer.add_callback(Looks())
    trainer.train()
    assert guard.decision.n_rows == 16
    trainer.model.train()
    found.append((trainer.compute_loss(trainer.model, dict(batch)), trainer.model(**batch)["loss"]))
    assert len(found) == 3
    assert all(torch.equal(loss, own) for loss, own in found)


def test_an_evaluations_metric_is_measured_when_it_is_reported_and_held_in_between(tmp_path):
    trainer, guard = evaluated(
        tmp_path,
        Constraint("c", limit=0.1, cost=positives),
        Constraint("gap", limit=0.01, cost="eval_wrong", scheduler=PID(kp=0.5, ki=0.5)),
        drives={"gap": "args.max_grad_norm"},
        max_steps=4,
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "guardrails" / "ledger.jsonl").read_text().splitlines()]
    steps = [line["decision"] for line in lines if line["kind"] == "step"]
    gaps = [step["constraints"]["gap"]["cost"] for step in steps]
    own = [step["constraints"]["c"]["cost"] for step in steps]
    measured = [2, 5]  # after steps 2 and 4
    assert [index for index, gap in enumerate(gaps) if gap != "NaN"] == measured
    assert [gaps[index] for index in measured] == logged(trainer, "eval_wrong")
    assert [index for index, cost in enumerate(own) if cost == "NaN"] == measured
    multipliers = [step["constraints"]["gap"]["multiplier"] for step in steps]
    assert multipliers[2] == multipliers[3] == multipliers[4] > multipliers[1]
    assert multipliers[5] > multipliers[4]
    assert trainer.args.max_grad_norm == guard.multipliers["gap"] == multipliers[-1]


def several(folder, *parts, names=("one", "two"), compute=report, **settings):
    """A guarded trainer that evaluates on several data sets, and that has a number to turn for each."""
    trainer = build(
        classifier(),
        folder,
        Rows(64),
        eval_data={name: Rows(24 + 8 * index, seed=index + 1) for index, name in enumerate(names)},
        extra={"compute_metrics": compute},
        **{"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3} | settings,
    )
    trainer.one = trainer.two = 0.5
    guard = Guard(*(parts or [Constraint(name, limit=0.2, cost=f"eval_{name}_wrong") for name in names]))
    drives = {part.name: part.name for part in guard.constraints if part.name in names}
    trainer.add_callback(GuardrailsCallback(trainer, guard, drives=drives))
    return trainer, guard


def means(folder, *names):
    """Mean cost of each constraint in each step of the ledger."""
    lines = [json.loads(line) for line in (folder / "guardrails" / "ledger.jsonl").read_text().splitlines()]
    costs = [line["evidence"]["costs"] for line in lines if line["kind"] == "step"]
    return [tuple(each[name]["mean"] for name in names) for each in costs]


def test_a_round_of_evaluations_on_several_data_sets_is_one_step_when_all_have_reported(tmp_path):
    trainer, guard = several(tmp_path)
    seen = []

    class Looks(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(guard.state_dict()["step"])

    trainer.add_callback(Looks())
    trainer.train()
    reported = list(zip(logged(trainer, "eval_one_wrong"), logged(trainer, "eval_two_wrong"), strict=True))
    assert len(reported) == 2  # after step 2, and at the end
    assert means(tmp_path, "one", "two") == reported
    assert seen == [0, 0, 1, 1]
    assert (trainer.one, trainer.two) == (guard.multipliers["one"], guard.multipliers["two"])


def test_a_gate_opens_on_several_data_sets_together(tmp_path):
    needed = [Require(FromFunction(float, f"eval_{name}_accuracy", name=name), at_least=0.2) for name in ("one", "two")]
    gate = Gate(*needed, confidence=0.5, rungs=1, dwell=8)
    part = Constraint("c", limit=gate.between(0.2, 0.9), cost=positives)
    trainer, guard = several(tmp_path, part, max_steps=40, eval_steps=1)
    trainer.train()
    assert guard.state_dict()["gates"][gate.name]["total_rows"] == 40
    assert logged(trainer, "guardrails/c/limit")[-1] == 0.9
    assert guard.decision.step == 80


def test_a_users_evaluation_on_one_of_several_data_sets_is_a_step_of_its_own(tmp_path):
    class OnOne(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.evaluate(trainer.eval_dataset["two"], metric_key_prefix="eval_two")
                trainer.evaluate(eval_dataset={"one": trainer.eval_dataset["one"]})

    trainer, _ = several(tmp_path, max_steps=2)
    trainer.add_callback(OnOne())
    trainer.train()
    one, two = (logged(trainer, f"eval_{name}_wrong") for name in ("one", "two"))
    assert means(tmp_path, "one", "two") == [("NaN", two[0]), (one[0], "NaN"), (one[1], two[1])]


def test_a_round_of_evaluations_that_fails_is_forgotten(tmp_path):
    calls = []

    def fails(prediction):
        calls.append(len(prediction.label_ids))
        if len(calls) == 2:
            raise ValueError("boom")
        return report(prediction)

    trainer, guard = several(tmp_path, compute=fails, max_steps=2)
    with pytest.raises(ValueError, match="boom"):
        trainer.train()
    assert guard.decision is None
    trainer.evaluate()  # not while training: none of the guard's business
    assert guard.decision is None
    trainer.train()
    one, two = (logged(trainer, f"eval_{name}_wrong")[-1] for name in ("one", "two"))
    assert means(tmp_path, "one", "two") == [(one, two)]
    assert calls == [24, 32] * 3


def test_a_gate_opens_on_evaluations_alone(tmp_path):
    accuracy = FromFunction(float, "eval_accuracy", name="accuracy")
    gate = Gate(Require(accuracy, at_least=0.2), confidence=0.5, rungs=1, dwell=8)
    trainer, guard = evaluated(
        tmp_path, Constraint("c", limit=gate.between(0.2, 0.9), cost=positives), max_steps=40, eval_steps=1
    )
    trainer.train()
    limits = logged(trainer, "guardrails/c/limit")
    assert limits[0] == 0.2
    assert limits[-1] == 0.9
    state = guard.state_dict()["gates"][gate.name]
    assert state["total_rows"] == 40
    assert guard.decision.step == 80


def test_a_metric_that_no_evaluation_reports_stops_the_training(tmp_path):
    part = Constraint("gap", limit=0.1, cost="eval_wrongness")
    trainer, _ = evaluated(tmp_path, part, drives={"gap": "args.max_grad_norm"})
    with pytest.raises(RolloutError, match=r"reports no 'eval_wrongness'.*eval_wrong"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_metric_that_is_none_is_a_violation_and_one_that_is_no_number_is_named(tmp_path):
    part = Constraint("gap", limit=0.1, cost="eval_gap", scheduler=PID())
    trainer, guard = evaluated(tmp_path, part, drives={"gap": "args.max_grad_norm"}, max_steps=2)
    trainer.compute_metrics = lambda prediction: {"gap": None}
    trainer.train()
    assert guard.decision.constraints["gap"].invalid_rows == 1
    assert guard.multipliers["gap"] > 0.0
    trainer.compute_metrics = lambda prediction: {"gap": [0.1, 0.2]}
    with pytest.raises(RolloutError, match=r"reports 'eval_gap', which the guard reads, as list.*return one number"):
        trainer.train()


@pytest.mark.parametrize("prefix", ["train", "eval_train"])
def test_a_users_evaluation_under_another_prefix_is_not_taken_for_one_that_lacks_the_metric(tmp_path, prefix):
    class OnTrainingRows(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.evaluate(trainer.train_dataset, metric_key_prefix=prefix)

    part = Constraint("gap", limit=0.1, cost="eval_wrong")
    trainer, guard = evaluated(tmp_path, part, drives={"gap": "args.max_grad_norm"})
    trainer.add_callback(OnTrainingRows())
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert guard.decision.step > 0


def test_an_evaluation_outside_of_the_training_is_none_of_the_guards_business(tmp_path):
    part = Constraint("gap", limit=0.1, cost="eval_wrong")
    trainer, guard = evaluated(tmp_path, part, drives={"gap": "args.max_grad_norm"}, max_steps=2)
    trainer.evaluate()
    assert guard.decision is None
    trainer.train()
    before = guard.decision.step
    trainer.evaluate()
    assert guard.decision.step == before


# Constraints that could not act


@pytest.mark.parametrize("cost", [None, "speed", "c"])
def test_a_cost_that_is_no_function_and_no_metric_is_refused(tmp_path, cost):
    with pytest.raises(AttachError, match=r"Constraint 'c' .*function\(outputs, inputs\).*cost='eval_"):
        guarded(tmp_path, Constraint("c", limit=0.1, cost=cost))


def test_a_cost_without_gradient_that_nothing_follows_is_refused_at_the_first_step_and_nothing_was_trained(tmp_path):
    trainer, guard = guarded(
        tmp_path, Constraint("c", limit=0.1, cost=positives), Constraint("wrong", limit=0.1, cost=wrong)
    )
    before = weights(trainer)
    with pytest.raises(AttachError, match=r"'wrong' could never act.*no gradient.*drives="):
        trainer.train()
    assert same(weights(trainer), before)
    assert guard.decision is None


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_cost_is_judged_by_its_first_step_that_has_rows(tmp_path, alone, gradient):
    steps = []

    def late(outputs, inputs):
        steps.append(len(steps) < 2)
        if steps[-1]:
            return torch.zeros(0)
        return (positives if gradient else wrong)(outputs, inputs)[:4]

    parts = [Constraint("late", limit=0.1, cost=late), Constraint("c", limit=0.1, cost=positives)]
    trainer, _ = guarded(tmp_path, *parts[: 1 if alone else 2])
    if gradient:
        trainer.train()
    else:
        with pytest.raises(AttachError, match=r"'late' could never act.*no gradient"):
            trainer.train()
    facts = [entry for entry in trainer.state.log_history if "guardrails/late/multiplier" in entry]
    assert len(facts) == (5 if gradient else 2)
    assert ["guardrails/late/cost" in entry for entry in facts] == [False, False, True, True, True][: len(facts)]


def test_a_cost_without_gradient_may_turn_a_dial_through_a_gate_or_drive_an_attribute(tmp_path):
    gate = Gate(Require(ConstraintSatisfaction("wrong", 0.5), at_least=0.99))
    trainer, guard = guarded(
        tmp_path,
        Constraint("wrong", limit=0.1, cost=wrong),
        Constraint("driver", limit=0.1, cost=wrong, scheduler=Fixed(0.7)),
        Dial("learning_rate", gate.between(0.5, 1.0)),
        drives={"driver": "args.max_grad_norm"},
    )
    assert trainer.args.max_grad_norm == 0.7
    plain = build(classifier(), tmp_path, Rows(64), max_grad_norm=0.7, learning_rate=0.5e-2)
    plain.train()
    trainer.train()
    assert guard.decision.constraints["wrong"].cost > 0.0
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=1e-5, atol=1e-7)  # lr in two roundings


def test_a_metric_of_evaluations_that_nothing_follows_is_refused_at_once(tmp_path):
    with pytest.raises(AttachError, match=r"'gap' could never act.*'eval_wrong' has no gradient"):
        evaluated(tmp_path, Constraint("gap", limit=0.1, cost="eval_wrong"))


def test_a_host_that_never_evaluates_cannot_serve_a_metric_of_evaluations(tmp_path):
    with pytest.raises(AttachError, match=r"'eval_wrong', but this Trainer never evaluates.*eval_strategy='steps'"):
        guarded(tmp_path, Constraint("gap", limit=0.1, cost="eval_wrong"), drives={"gap": "args.max_grad_norm"})


def test_a_gate_that_waits_for_steps_and_evaluations_at_once_is_refused(tmp_path):
    gate = Gate(
        Require(ConstraintSatisfaction("c", 0.5), at_least=0.5),
        Require(FromFunction(float, "eval_accuracy", name="accuracy"), at_least=0.5),
    )
    with pytest.raises(AttachError, match="every step and something of evaluations"):
        evaluated(tmp_path, Constraint("c", limit=gate.between(0.1, 0.5), cost=positives))


def test_a_metric_that_reads_what_is_not_here_is_refused(tmp_path):
    gate = Gate(Require("reward_level", at_least=0.5))
    with pytest.raises(AttachError, match="reads column 'rewards', which the Trainer host does not provide"):
        guarded(tmp_path, Constraint("c", limit=gate.between(0.1, 0.5), cost=positives))


# Functions that fail


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda o, i: o["logits"], r"returned a tensor of shape \(8, 2\); return one number"),
        (lambda o, i: "much", "returned str .*return a tensor"),
    ],
)
def test_a_function_that_returns_something_else_is_named(tmp_path, cost, message):
    trainer, _ = guarded(tmp_path, Constraint("c", limit=0.1, cost=cost))
    with pytest.raises(RolloutError, match=f"Constraint 'c': its function '<lambda>' {message}"):
        trainer.train()


def test_what_a_function_raises_names_its_constraint(tmp_path):
    trainer, _ = guarded(tmp_path, Constraint("c", limit=0.1, cost=lambda outputs, inputs: outputs["speed"]))
    with pytest.raises(KeyError, match="speed") as caught:
        trainer.train()
    assert "Constraint 'c': this was raised by its function '<lambda>'." in caught.value.__notes__


# Hosts that cannot be served


class TwoPasses(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs)["loss"] + model(**inputs)["loss"]


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**inputs)["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("cls", "message"),
    [(TwoPasses, "TwoPasses.compute_loss called the model .* 2 times"), (OwnStep, "trains without calling")],
)
def test_a_trainer_whose_loss_comes_from_elsewhere_stops_before_its_first_step(tmp_path, cls, message):
    trainer, _ = guarded(tmp_path, cls=cls)
    before = weights(trainer)
    with pytest.raises(AttachError, match=message):
        trainer.train()
    assert same(weights(trainer), before)


def test_what_is_no_trainer_is_refused(tmp_path):
    with pytest.raises(AttachError, match=r"an instance of transformers' Trainer.*not Classifier"):
        GuardrailsCallback(classifier(), Guard(Constraint("c", limit=0.1, cost=positives)))
    with pytest.raises(AttachError, match="needs a Guard second, not Constraint"):
        GuardrailsCallback(build(classifier(), tmp_path, Rows(8)), Constraint("c", limit=0.1, cost=positives))


def test_a_refinement_has_nothing_to_correct_here(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(8))
    guard = Guard(Refinement(FunctionRefiner(lambda prompt, completion: completion)))
    with pytest.raises(AttachError, match=r"has nothing to correct on Trainer"):
        GuardrailsCallback(trainer, guard)
    assert "compute_loss" not in vars(trainer)


def test_a_host_whose_methods_have_changed_names_its_version(tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model: None)
    with pytest.raises(AttachError, match=rf"{transformers.__version__}: its method _save_checkpoint\(model, trial\)"):
        guarded(tmp_path)


def test_a_second_guard_is_refused_and_the_first_goes_on(tmp_path):
    trainer, guard = guarded(tmp_path)
    other = Guard(Constraint("d", limit=0.1, cost=positives))
    with pytest.raises(AttachError, match=r"guarded already.*detach"):
        GuardrailsCallback(trainer, other)
    assert other.host is None
    trainer.train()
    assert guard.decision.step == 5


def test_a_callback_that_was_not_added_or_is_anothers_stops_the_training(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64))
    callback = GuardrailsCallback(trainer, Guard(Constraint("c", limit=0.1, cost=positives)))
    with pytest.raises(AttachError, match="its callback was not added"):
        trainer.train()
    other = build(classifier(), tmp_path, Rows(64))
    other.add_callback(callback)
    with pytest.raises(AttachError, match="built for another trainer"):
        other.train()


def test_a_callback_that_was_added_twice_stops_the_training_with_the_cure(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64))
    callback = GuardrailsCallback(trainer, Guard(Constraint("c", limit=0.1, cost=positives)), ledger=False)
    for _ in range(2):
        trainer.add_callback(callback)
    with pytest.raises(AttachError, match=r"added to the trainer 2 times.*Call trainer.add_callback\(callback\) once"):
        trainer.train()
    callback.detach()
    assert callback not in trainer.callback_handler.callbacks


# Beside others


class Seen(TrainerCallback):
    """A logger like those of experiment trackers."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_see_the_same_in_either_order(tmp_path, first):
    trainer = build(
        classifier(),
        tmp_path,
        Rows(64),
        eval_data=Rows(40, seed=1),
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first is the best, so that it stops early
    )
    guard = Guard(Constraint("c", limit=0.1, cost=positives))
    ours, seen, stopping = GuardrailsCallback(trainer, guard), Seen(), EarlyStoppingCallback(3)
    for callback in (ours, seen, stopping) if first else (stopping, seen, ours):
        trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == guard.decision.step == 4
    assert [logs["guardrails/c/cost"] for logs in seen.logs if "loss" in logs] == logged(trainer, "guardrails/c/cost")
    assert len(logged(trainer, "guardrails/c/cost")) == 4
    assert (tmp_path / "checkpoint-1" / "guardrails.json").exists()


def test_training_twice_goes_on_with_the_multipliers_of_the_first_and_logs_its_own_steps(tmp_path):
    trainer, guard = guarded(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    first = guard.multipliers["c"]
    trainer.train()
    assert guard.decision.step == 6
    assert guard.multipliers["c"] > first > 0.0
    lines = [json.loads(line) for line in (tmp_path / "guardrails" / "ledger.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("end") == 2
    costs = [line["decision"]["constraints"]["c"]["cost"] for line in lines if line["kind"] == "step"]
    assert len(costs) == 6
    assert logged(trainer, "guardrails/c/cost") == [sum(costs[3:5]) / 2]


# Leaving


def test_detached_nothing_of_the_guard_is_left_and_the_run_is_the_unguarded_one(tmp_path):
    plain, trainer = (build(classifier(dropout=0.2), tmp_path, Rows(64)) for _ in range(2))
    own, keys, classes = dict(vars(trainer)), set(vars(trainer.args)), list(trainer.callback_handler.callbacks)
    guard = Guard(
        Constraint("c", limit=0.1, cost=positives), Constraint("d", limit=0.1, cost=wrong, scheduler=Fixed(0.3))
    )
    callback = GuardrailsCallback(trainer, guard, drives={"d": "args.max_grad_norm"})
    trainer.add_callback(callback)
    assert {"compute_loss", "log", "_save_checkpoint"} <= set(vars(trainer)) - set(own)
    callback.detach()
    callback.detach()
    assert vars(trainer) == own
    assert set(vars(trainer.args)) == keys
    assert trainer.args.max_grad_norm == 1.0
    assert trainer.callback_handler.callbacks == classes
    assert guard.host is None
    assert not any(module._forward_hooks for module in trainer.model.modules())
    for each in (plain, trainer):
        torch.manual_seed(5)
        each.train()
    assert same(weights(trainer), weights(plain))
    assert not any(key.startswith("guardrails") for entry in trainer.state.log_history for key in entry)


def test_after_a_training_or_an_error_no_hook_is_left_on_the_model(tmp_path):
    trainer, _ = guarded(tmp_path)
    trainer.train()
    failing, _ = guarded(tmp_path, Constraint("c", limit=0.1, cost=lambda outputs, inputs: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        failing.train()
    for each in (trainer, failing):
        assert not any(module._forward_hooks for module in each.model.modules())


def test_a_loss_that_the_user_put_in_the_trainer_stays_and_one_put_over_the_guard_blocks_detaching(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64))
    calls, original = [], trainer.compute_loss
    trainer.compute_loss = own = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    callback = GuardrailsCallback(trainer, Guard(Constraint("c", limit=0.1, cost=positives)))
    trainer.add_callback(callback)
    trainer.train()
    assert len(calls) == 5
    ours = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(AttachError, match=r"Trainer\.compute_loss was replaced after the guard was attached"):
        callback.detach()
    trainer.compute_loss = ours
    callback.detach()
    assert trainer.compute_loss is own


def test_an_attach_that_fails_changes_neither_trainer_nor_guard(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(8))
    own = dict(vars(trainer))
    guard = Guard(
        Constraint("c", limit=0.1, cost=positives, scheduler=Fixed(0.5)),
        Constraint("d", limit=0.1, cost=positives, scheduler=Fixed(0.5)),
    )
    with pytest.raises(AttachError, match="has no 'speed'"):
        GuardrailsCallback(trainer, guard, drives={"c": "args.max_grad_norm", "d": "args.speed"})
    assert vars(trainer) == own
    assert trainer.args.max_grad_norm == 1.0
    assert guard.host is None


# Precision, memory, compilation


@pytest.mark.parametrize("setting", ["bf16", "gradient_checkpointing", "accumulation"])
def test_a_language_model_holds_its_limit_however_the_host_computes(tmp_path, setting):
    settings = {
        "bf16": {"bf16": True},
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "accumulation": {"gradient_accumulation_steps": 2},
    }[setting]
    costs = {}
    for name in ("plain", "guarded"):
        trainer = build(language_model(), tmp_path, Sentences(64), max_steps=25, **settings)
        scheduler = PID(kp=2.0, ki=2.0, kd=0.0) if name == "guarded" else Fixed(0.0)
        guard = Guard(Constraint("c", limit=0.05, cost=first_words, scheduler=scheduler))
        trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train()
        costs[name] = logged(trainer, "guardrails/c/cost")[-5:]
    assert min(costs["plain"]) > 0.1
    assert max(costs["guarded"]) < 0.05


@pytest.mark.slow
def test_a_compiled_model_is_guarded_as_it_is_uncompiled(tmp_path):
    costs = {}
    for compiled in (False, True):
        trainer = build(language_model(), tmp_path, Sentences(64), max_steps=6, torch_compile=compiled)
        guard = Guard(Constraint("c", limit=0.05, cost=first_words, scheduler=Fixed(1.0)))
        trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train()
        costs[compiled] = logged(trainer, "guardrails/c/cost")
    assert costs[True] == pytest.approx(costs[False], rel=1e-3)  # fused kernels round differently
    assert costs[True][-1] < 0.9 * costs[True][0]


def test_nothing_is_read_off_the_device_per_batch(tmp_path, monkeypatch):
    """On a GPU each of these calls would wait for the device."""
    counts = {}
    reads = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero")

    def counting(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(self, *args, **kwargs)

        return counted

    def run(batches, *parts):
        trainer = build(
            classifier(), tmp_path, Rows(256), max_steps=4, gradient_accumulation_steps=batches, logging_steps=100
        )
        if parts:
            trainer.add_callback(GuardrailsCallback(trainer, Guard(*parts), ledger=False))
        with monkeypatch.context() as patch:
            for name in reads:
                patch.setattr(torch.Tensor, name, counting(name))
            counts.clear()
            trainer.train()
        return dict(counts)

    parts = [Constraint(f"c{i}", limit=0.1, cost=positives, scheduler=Fixed(0.5)) for i in range(3)]
    for batches in (1, 4):
        plain, with_guard = run(batches), run(batches, *parts)
        more = {name: with_guard.get(name, 0) - plain.get(name, 0) for name in reads}
        assert {name: count for name, count in more.items() if count} == {"cpu": 4, "numpy": 4}  # once per step


def test_costs_of_any_precision_and_kind_are_taken(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    costs = {
        "half": lambda o, i: positives(o, i).bfloat16(),
        "double": lambda o, i: positives(o, i).double(),
        "whole": lambda o, i: positives(o, i) * torch.ones(8, dtype=torch.int64, device=DEVICE),
    }
    trainer, guard = guarded(
        tmp_path, *(Constraint(name, limit=0.1, cost=cost, scheduler=Fixed(0.1)) for name, cost in costs.items())
    )
    trainer.train()
    found = [facts.cost for facts in guard.decision.constraints.values()]
    assert found == pytest.approx([found[1]] * 3, rel=0.01)  # bfloat16 has 8 bits
    assert all(value.isfinite().all() for value in weights(trainer).values())


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, features, labels=None):
        logits = self.layer(features)
        return nn.functional.cross_entropy(logits, labels), logits


def test_a_model_that_returns_a_named_tuple_gives_costs_its_names(tmp_path):
    class Named(Bare):
        def forward(self, features, labels=None):
            return Output(*super().forward(features, labels))

    cost = Constraint(
        "c", limit=0.1, cost=lambda outputs, inputs: outputs.logits.softmax(-1)[:, 1], scheduler=Fixed(2.0)
    )
    trainer, _ = guarded(tmp_path, cost, model=Named(), max_steps=4)
    trainer.train()
    assert len(logged(trainer, "guardrails/c/cost")) == 4


def test_a_model_that_returns_a_tuple_is_served(tmp_path):
    cost = Constraint("c", limit=0.1, cost=lambda outputs, inputs: outputs[1].softmax(-1)[:, 1], scheduler=Fixed(2.0))
    trainer, _ = guarded(tmp_path, cost, model=Bare(), max_steps=40)
    trainer.train()
    costs = logged(trainer, "guardrails/c/cost")
    assert sum(costs[-8:]) < 0.7 * sum(costs[:8])


class Unpacking(Trainer):
    """Its batches are lists, as torch's own data sets of tensors give them, and it takes them apart."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop()
        return model(*inputs, labels)["loss"]


@pytest.mark.parametrize("n_rows", [8, 2])
def test_batches_that_are_no_mappings_are_given_to_costs_as_they_are(tmp_path, n_rows):
    def false_alarms(outputs, inputs):
        _, labels = inputs
        assert len(labels) == n_rows
        return outputs["logits"].softmax(-1)[:, 1] * (labels == 0)

    def collate(rows):
        return [torch.stack([row[name] for row in rows]) for name in ("features", "labels")]

    cost = Constraint("c", limit=0.01, cost=false_alarms, scheduler=Fixed(1.0))
    settings = {"cls": Unpacking, "extra": {"data_collator": collate}, "per_device_train_batch_size": n_rows}
    trainer, guard = guarded(tmp_path, cost, max_steps=40, **settings)
    trainer.train()
    assert guard.decision.n_rows == n_rows
    costs = logged(trainer, "guardrails/c/cost")
    assert sum(costs[-8:]) < 0.7 * sum(costs[:8])


def test_divergence_is_held_at_a_target_from_both_sides(tmp_path):
    start = classifier().to(DEVICE)

    def divergence(outputs, inputs):
        with torch.no_grad():
            reference = start(**inputs)["logits"].log_softmax(-1)
        policy = outputs["logits"].log_softmax(-1)
        return (policy.exp() * (policy - reference)).sum(-1)

    scheduler = AdaptiveKL(0.02, batch_size=64, horizon=1280, clip=1.0)
    part = Constraint("kl", limit=0.05, cost=divergence, sense="==", scheduler=scheduler)
    found = {}
    for name in ("free", "held"):
        trainer = build(classifier(), tmp_path, Rows(256), max_steps=160, per_device_train_batch_size=64)
        one = part if name == "held" else Constraint("kl", limit=0.1, cost=divergence, scheduler=Fixed(0.0))
        trainer.add_callback(GuardrailsCallback(trainer, Guard(one)))
        trainer.train()
        found[name] = sum(logged(trainer, "guardrails/kl/cost")[-20:]) / 20
    assert found["free"] > 0.15
    assert 0.04 < found["held"] < 0.06
