"""Dials of a Trainer: what they turn, that it acts, and what is refused because it would not."""

import pytest
import torch
from tiny_trainer import Rows, Sentences, build, classifier, language_model, logged, positives, same, weights
from transformers import Trainer

from guardrails import AttachError, Constraint, Dial, Gate, Guard, Require
from guardrails.competence import ConstraintSatisfaction
from guardrails.schedulers import Fixed
from guardrails_transformers import GuardrailsCallback


def turned(trainer, name, tight, loose, *, opens=False):
    """Guard ``trainer`` with one dial, which stays at its tight end or opens after the first steps."""
    gate = Gate(Require(ConstraintSatisfaction("c", 1.0 if opens else 0.0), at_least=0.5), dwell=0, rungs=1)
    guard = Guard(
        Constraint("c", limit=0.1, cost=positives, scheduler=Fixed(0.0)), Dial(name, gate.between(tight, loose))
    )
    callback = GuardrailsCallback(trainer, guard)
    trainer.add_callback(callback)
    return callback


class Smoothing(Trainer):
    """A host with a number of its own that its loss reads anew."""

    weight = 0.5
    n_classes = 2

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = self.weight * outputs["loss"]
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_learning_rate_is_scaled_for_the_step_and_the_hosts_schedule_stays(tmp_path, schedule):
    """A schedule that is not stepped each time leaves the rates as they are, so a factor must not stay on them."""
    settings = {"lr_scheduler_type": schedule, "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 5}
    if schedule != "linear":
        settings |= {"eval_strategy": "steps", "eval_steps": 9, "metric_for_best_model": "loss"}
        settings |= {"eval_data": Rows(8)}
    half = build(classifier(), tmp_path / "half", Rows(64), **settings | {"learning_rate": 0.5e-2})
    half.train()
    trainer = build(classifier(), tmp_path / "own", Rows(64), **settings)
    turned(trainer, "learning_rate", 0.5, 1.0)
    trainer.train()
    assert same(weights(trainer), weights(half))  # a factor of two is exact
    assert logged(trainer, "learning_rate") == [2.0 * rate for rate in logged(half, "learning_rate")]
    assert logged(trainer, "guardrails/learning_rate/value") == [0.5] * 5
    saved = torch.load(tmp_path / "own" / "checkpoint-5" / "optimizer.pt", weights_only=True)
    ours = torch.load(tmp_path / "half" / "checkpoint-5" / "optimizer.pt", weights_only=True)
    rates = [group["lr"] for group in saved["param_groups"]]
    assert rates == [2.0 * group["lr"] for group in ours["param_groups"]]


def test_a_dial_that_opens_turns_the_host_while_it_trains(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(256), per_device_train_batch_size=32, max_steps=6)
    turned(trainer, "args.max_grad_norm", 0.25, 4.0, opens=True)
    assert trainer.args.max_grad_norm == 0.25
    trainer.train()
    assert trainer.args.max_grad_norm == 4.0


def test_a_number_of_a_subclass_is_found_by_its_path_and_put_back(tmp_path):
    plain = build(classifier(), tmp_path, Rows(64), cls=Smoothing, optim="sgd", max_grad_norm=0.0)
    trainer = build(classifier(), tmp_path, Rows(64), cls=Smoothing, optim="sgd", max_grad_norm=0.0)
    plain.weight = trainer.weight = 0.25
    callback = turned(trainer, "weight", 0.75, 0.5)
    assert trainer.weight == 0.75
    trainer.train()
    plain.train()
    assert not same(weights(trainer), weights(plain))
    callback.detach()
    assert trainer.weight == 0.25
    plain = build(classifier(), tmp_path, Rows(64), cls=Smoothing, optim="sgd", max_grad_norm=0.0)
    plain.weight = 0.75
    plain.train()
    assert same(weights(trainer), weights(plain))


def test_a_whole_number_stays_whole(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64), cls=Smoothing)
    trainer.n_classes = 2
    turned(trainer, "n_classes", 3.4, 2.0)
    assert trainer.n_classes == 3
    assert isinstance(trainer.n_classes, int)


def test_a_number_that_was_given_as_1_but_is_declared_a_float_is_not_rounded(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64), max_grad_norm=1)
    guard = Guard(Constraint("c", limit=0.1, cost=positives, scheduler=Fixed(0.4)))
    callback = GuardrailsCallback(trainer, guard, drives={"c": "args.max_grad_norm"})
    assert trainer.args.max_grad_norm == 0.4  # 0 would switch clipping off
    callback.detach()
    assert trainer.args.max_grad_norm == 1


def initialised(folder, make):
    """A trainer that makes its model itself, anew for each training."""
    return build(None, folder, Rows(64), extra={"model_init": make})


def test_a_number_of_the_model_is_that_of_the_one_that_the_host_makes_for_a_training(tmp_path):
    plain = initialised(tmp_path, lambda: classifier(dropout=0.4))
    plain.args.max_grad_norm = 0.6
    plain.train()
    trainer = initialised(tmp_path, lambda: classifier(dropout=0.1))
    parts = [Constraint("c", limit=0.1, cost=positives, scheduler=Fixed(0.4))]
    parts += [Constraint("d", limit=0.1, cost=positives, scheduler=Fixed(0.6))]
    callback = GuardrailsCallback(trainer, Guard(*parts), drives={"c": "model.layers.2.p", "d": "args.max_grad_norm"})
    trainer.add_callback(callback)
    models = [trainer.model]
    for _ in range(2):
        trainer.train()
        models.append(trainer.model)
        assert [model.layers[2].p for model in models] == [0.1] * (len(models) - 1) + [0.4]
        assert trainer.args.max_grad_norm == 0.6
        assert same(weights(trainer), weights(plain))
    callback.detach()
    assert [model.layers[2].p for model in models] == [0.1] * 3
    assert trainer.args.max_grad_norm == 1.0


def test_a_model_that_the_host_makes_without_the_number_stops_before_it_is_trained(tmp_path):
    made = []

    def make():
        made.append(classifier(dropout=0.1))
        if len(made) > 1:
            made[-1].layers[2] = torch.nn.Identity()
        return made[-1]

    trainer = initialised(tmp_path, make)
    guard = Guard(Constraint("c", limit=0.1, cost=positives, scheduler=Fixed(0.4)))
    callback = GuardrailsCallback(trainer, guard, drives={"c": "model.layers.2.p"})
    trainer.add_callback(callback)
    with pytest.raises(AttachError, match=r"drives 'model.layers.2.p'.*ends at Identity"):
        trainer.train()
    assert guard.decision is None
    callback.detach()
    assert made[0].layers[2].p == 0.1


@pytest.mark.parametrize("name", ["label_smoothing", "args.label_smoothing_factor"])
def test_label_smoothing_turns_what_the_loss_reads_and_costs_still_see_the_labels(tmp_path, name):
    def rows(outputs, inputs):
        return 0.0 * outputs.logits.mean((1, 2)) + (inputs["labels"] >= -100).float().mean(-1)

    def run(factor, dial=None):
        trainer = build(language_model(), tmp_path, Sentences(64), label_smoothing_factor=factor)
        callback = None
        if dial is not None:
            gate = Gate(Require(ConstraintSatisfaction("c", 0.0), at_least=0.5))
            guard = Guard(
                Constraint("c", limit=0.1, cost=rows, scheduler=Fixed(0.0)),
                Dial(name, gate.between(dial, 0.0)),
            )
            callback = GuardrailsCallback(trainer, guard)
            trainer.add_callback(callback)
        trainer.train()
        return trainer, callback

    wanted, _ = run(0.4)
    trainer, callback = run(0.1, dial=0.4)
    assert same(weights(trainer), weights(wanted))
    callback.detach()
    assert trainer.label_smoother.epsilon == 0.1
    assert trainer.args.label_smoothing_factor == 0.1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("label_smoothing", (0.1, 0.0), "built without label smoothing. Build it with a label_smoothing_factor"),
        ("args.learning_rate", (0.1, 1.0), "reads only once.*Use the dial 'learning_rate'"),
        ("args.weight_decay", (0.1, 1.0), "args.weight_decay, which this Trainer reads only once"),
        ("speed", (0.1, 1.0), "the path 'speed' ends at Trainer, which has no 'speed'"),
        ("model.layers.speed", (0.1, 1.0), "'model.layers.speed' ends at Sequential"),
        ("args.output_dir", (0.1, 1.0), "reads only once"),
        ("model.training", (0.1, 1.0), "it is .*, not a number"),
        ("accelerator.num_processes", (1.0, 2.0), "it cannot be set"),
    ],
)
def test_a_dial_that_would_turn_nothing_is_refused(tmp_path, name, value, message):
    trainer = build(classifier(), tmp_path, Rows(8))
    own = dict(vars(trainer))
    with pytest.raises(AttachError, match=message):
        turned(trainer, name, *value)
    assert vars(trainer) == own


def test_the_share_of_smoothed_labels_is_one(tmp_path):
    trainer = build(language_model(), tmp_path, Sentences(8), label_smoothing_factor=0.1)
    with pytest.raises(AttachError, match=r"share of the smoothed labels: give values in \[0, 1\)"):
        turned(trainer, "label_smoothing", 1.5, 0.0)


def test_two_parts_cannot_turn_one_number(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(8))
    gate = Gate(Require(ConstraintSatisfaction("c", 0.0), at_least=0.5))
    guard = Guard(Constraint("c", limit=0.1, cost=positives), Dial("args.max_grad_norm", gate.between(0.1, 1.0)))
    with pytest.raises(AttachError, match="Two parts of the guard would turn 'max_grad_norm'"):
        GuardrailsCallback(trainer, guard, drives={"c": "args.max_grad_norm"})
    with pytest.raises(AttachError, match="drives names 'd', but the guard has no such constraint"):
        GuardrailsCallback(trainer, guard, drives={"d": "args.max_grad_norm"})
    assert trainer.args.max_grad_norm == 1.0


def test_an_argument_that_the_trainer_keeps_a_copy_of_is_named(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(8), cls=Smoothing)
    trainer.args.weight = 0.5
    with pytest.raises(AttachError, match=r"args.weight, which this Smoothing reads only once.*Name 'weight'"):
        turned(trainer, "args.weight", 0.1, 1.0)
