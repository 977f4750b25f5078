"""A training that ends by an error, an interruption or a search leaves the host as it was, and the guard out of it."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from devices import DEVICE
from tiny_trainer import Classifier, Rows, build, classifier, logged, positives, same, weights
from transformers import TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from guardrails import AttachError, Constraint, Dial, Gate, Guard, Require
from guardrails.competence import ConstraintSatisfaction
from guardrails.schedulers import PID, Fixed
from guardrails_transformers import GuardrailsCallback


class Raises(TrainerCallback):
    """Raises in one of the host's events, from a step on, or where a condition holds."""

    def __init__(self, event, error, step, when=lambda args: True):
        self.error, self.step, self.when = error, step, when
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step >= self.step and self.when(args):
            raise self.error


def wrong(prediction):
    return {"wrong": float((prediction.predictions.argmax(-1) != prediction.label_ids).mean())}


def on_rate(factor, cost=positives):
    """A guard whose cost never acts and whose dial scales the learning rate."""
    gate = Gate(Require(ConstraintSatisfaction("c", 0.0), at_least=0.5))
    return Guard(
        Constraint("c", limit=0.1, cost=cost, scheduler=Fixed(0.0)), Dial("learning_rate", gate.between(factor, 1.0))
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")], ids=["interrupt", "error"])
def test_after_an_interrupted_training_an_evaluation_or_a_loss_is_none_of_the_guards_business(tmp_path, error):
    trainer = build(
        classifier(),
        tmp_path,
        Rows(64),
        eval_data=Rows(40, seed=1),
        extra={"compute_metrics": wrong},
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
    )
    guard = Guard(
        Constraint("c", limit=0.01, cost=positives, scheduler=Fixed(9.0)),
        Constraint("gap", limit=0.1, cost="eval_wrong", scheduler=PID()),
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard, drives={"gap": "args.max_grad_norm"}))
    stop = Raises("on_step_end", error, 3)
    trainer.add_callback(stop)
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.is_in_train  # what the host says of itself is of no use
    before = guard.state_dict()
    assert before["step"] == 4  # three steps and an evaluation
    recorded = (Path(trainer.args.output_dir) / "guardrails" / "ledger.jsonl").read_text().splitlines()
    assert len(recorded) == 1 + 4
    trainer.evaluate()
    assert guard.state_dict() == before
    batch = {"features": torch.randn(5, 3, device=DEVICE), "labels": torch.tensor([0, 1, 0, 1, 1], device=DEVICE)}
    trainer.model.train()
    assert torch.equal(trainer.compute_loss(trainer.model, dict(batch)), trainer.model(**batch)["loss"])
    trainer.remove_callback(stop)
    trainer.train()
    assert guard.state_dict()["step"] == 4 + 4 + 2


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_an_error_around_the_optimizers_step_leaves_the_hosts_learning_rate(tmp_path, event):
    trainer = build(classifier(), tmp_path, Rows(64))
    ours = GuardrailsCallback(trainer, on_rate(0.5))
    for callback in (Raises(event, RuntimeError("boom"), 2), ours)[:: 1 if event == "on_optimizer_step" else -1]:
        trainer.add_callback(callback)  # raised while the rate is scaled: after our first event, before our second
    with pytest.raises(RuntimeError, match="boom"):
        trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 1e-2]


@pytest.mark.parametrize("schedule", ["constant", "linear", "reduce_lr_on_plateau"])
def test_begun_anew_with_smaller_batches_guard_and_learning_rate_are_those_it_began_with(tmp_path, schedule):
    settings = {"lr_scheduler_type": schedule, "max_steps": 4}
    if schedule == "reduce_lr_on_plateau":
        settings |= {"eval_strategy": "steps", "eval_steps": 9, "metric_for_best_model": "loss", "eval_data": Rows(8)}
    plain = build(classifier(), tmp_path, Rows(64), **settings)
    plain.train()
    trainer = build(classifier(), tmp_path, Rows(64), auto_find_batch_size=True, **settings)
    guard = on_rate(0.5)
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    scarce = RuntimeError("CUDA out of memory.")
    trainer.add_callback(Raises("on_pre_optimizer_step", scarce, 2, lambda args: trainer._train_batch_size == 8))
    trainer.train()
    assert trainer.state.train_batch_size == 7
    assert guard.decision.step == 4
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")
    assert logged(trainer, "guardrails/learning_rate/value") == [0.5] * 4


def test_a_training_after_one_that_failed_goes_on_with_what_is_in_force(tmp_path):
    """Only what the host itself begins anew, within a training, begins with the guard of its beginning."""
    trainer = build(classifier(), tmp_path, Rows(64), auto_find_batch_size=True, max_steps=4)
    guard = Guard(Constraint("c", limit=0.1, cost=positives, scheduler=PID()))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    stop = Raises("on_step_end", ValueError("boom"), 2)
    trainer.add_callback(stop)
    with pytest.raises(ValueError, match="boom"):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()
    assert guard.decision.step == 2 + 4


def test_a_search_over_hyperparameters_is_refused(tmp_path, monkeypatch):
    # The host takes a trial for one where it could have been asked for it, whatever is installed.
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    trainer = build(classifier(), tmp_path, Rows(64))
    guard = Guard(Constraint("c", limit=0.1, cost=positives))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    with pytest.raises(AttachError, match="hyperparameter_search trains several models"):
        trainer.train(trial={"learning_rate": 0.1})
    assert guard.decision is None


def test_a_detached_callback_does_not_keep_the_trainer_alive(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64), max_steps=2)
    gate = Gate(Require(ConstraintSatisfaction("c", 0.0), at_least=0.5))
    guard = Guard(
        Constraint("c", limit=0.1, cost=positives, scheduler=Fixed(0.5)),
        Constraint("d", limit=0.1, cost=positives, scheduler=Fixed(0.5)),
        Dial("learning_rate", gate.between(0.5, 1.0)),
    )
    callback = GuardrailsCallback(trainer, guard, drives={"d": "args.max_grad_norm"})
    trainer.add_callback(callback)
    trainer.train()
    callback.detach()
    alive = weakref.ref(trainer), weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert [each() for each in alive] == [None, None]
    assert callback.traffic.collectives == 0
    assert callback.guard.decision.step == 2
    other = build(classifier(), tmp_path, Rows(64))
    other.add_callback(callback)
    with pytest.raises(AttachError, match="was detached"):
        other.train()


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adafactor_layerwise", "apollo_adamw_layerwise"])
def test_the_rate_of_an_optimizer_that_steps_in_the_backward_pass_is_no_dial(tmp_path, name):
    trainer = build(classifier(), tmp_path, Rows(8), optim=name)
    with pytest.raises(AttachError, match=f"the optimizer {name} steps while the gradients are computed"):
        GuardrailsCallback(trainer, on_rate(0.5))
    assert "compute_loss" not in vars(trainer)


def optimized(folder, make):
    model = classifier()
    return build(model, folder, Rows(64), extra={"optimizers": make(model)})


def test_the_rate_of_an_optimizer_that_was_given_is_no_dial_where_it_is_not_read(tmp_path):
    def adafactor(model):
        optimizer = Adafactor(model.parameters(), relative_step=True)
        return optimizer, AdafactorSchedule(optimizer)

    for make, message in (
        (lambda model: (LayerWiseDummyOptimizer(lr=1e-2), None), "LayerWiseDummyOptimizer steps while the gradients"),
        (adafactor, r"this Adafactor sets a rate of its own.*relative_step=False"),
    ):
        trainer = optimized(tmp_path, make)
        with pytest.raises(AttachError, match=message):
            GuardrailsCallback(trainer, on_rate(0.5))
    given = optimized(tmp_path, lambda model: (torch.optim.SGD(model.parameters(), lr=1e-2), None))
    half = optimized(tmp_path, lambda model: (torch.optim.SGD(model.parameters(), lr=0.5e-2), None))
    given.args.optim = "galore_adamw_layerwise"  # which is not what steps
    given.add_callback(GuardrailsCallback(given, on_rate(0.5)))
    given.train()
    half.train()
    assert same(weights(given), weights(half))


class OwnRate(torch.optim.SGD):
    """Gets a rate of its own when it is made by the host, while a training begins."""

    def __init__(self, params, **kwargs):
        super().__init__(params, lr=1e-2)
        for group in self.param_groups:
            group["relative_step"] = True


def test_a_rate_that_turns_out_to_be_the_optimizers_own_stops_before_the_first_step(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64), extra={"optimizer_cls_and_kwargs": (OwnRate, {})})
    trainer.add_callback(GuardrailsCallback(trainer, on_rate(0.5)))
    before = weights(trainer)
    with pytest.raises(AttachError, match="this OwnRate sets a rate of its own"):
        trainer.train()
    assert same(weights(trainer), before)


class Scarce(Classifier):
    """Has no memory for eight rows after two steps."""

    steps = 0

    def forward(self, features, labels=None):
        self.steps += 1
        if self.steps == 3 and len(features) == 8:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(features, labels)


def test_a_host_that_begins_anew_says_so_in_the_ledger(tmp_path):
    torch.manual_seed(0)
    trainer = build(Scarce(), tmp_path, Rows(64), auto_find_batch_size=True, max_steps=4)
    guard = Guard(Constraint("c", limit=0.1, cost=positives, scheduler=PID()))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "guardrails" / "ledger.jsonl").read_text().splitlines()]
    kinds = [(line["kind"], line.get("step")) for line in lines if line["kind"] in ("step", "seam")]
    assert [kind for kind, _ in kinds] == ["step"] * 2 + ["seam"] + ["step"] * 4
    assert [step for kind, step in kinds if kind == "step"] == [1, 2, 1, 2, 3, 4]
