"""The loss of a guarded trainer: the penalty's gradient against autograd's own, and what it must not do."""

import copy
import dataclasses

import pytest
import torch
from tiny_trainer import (
    Classifier,
    Gradients,
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
from transformers.modeling_outputs import SequenceClassifierOutput

from guardrails import Constraint, Gate, Guard, Require, RolloutError
from guardrails.competence import ConstraintSatisfaction
from guardrails.schedulers import Augmented, AugmentedLagrangian, Cap, Fixed, Margin, Smooth, Warmup, augmented_penalty
from guardrails_transformers import GuardrailsCallback

CASES = {"classifier": (classifier, Rows, positives), "language model": (language_model, Sentences, first_words)}


def gradients(kind, folder, *parts, **settings):
    """The first step's gradients of a guarded or unguarded trainer, and the batches it was made of."""
    make, data, _ = CASES[kind]
    seen, batches = Gradients(), []
    trainer = build(make(), folder, data(64), max_steps=1, max_grad_norm=0.0, callbacks=[seen], **settings)
    collate = trainer.data_collator

    def recorded(rows):
        batches.append(collate(rows))
        return copy.deepcopy(batches[-1])

    trainer.data_collator = recorded
    if parts:
        trainer.add_callback(GuardrailsCallback(trainer, Guard(*parts)))
    trainer.train()
    return seen.steps[0], batches[: settings.get("gradient_accumulation_steps", 1)]


def slopes(kind, batches):
    """Mean cost of each batch and its gradient, from the model's own forward pass in double precision."""
    make, _, cost = CASES[kind]
    found = []
    for batch in batches:
        model = make().double()
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        mean = cost(model(**inputs), inputs).mean()
        mean.backward()
        found.append((mean.item(), {name: value.grad for name, value in model.named_parameters()}))
    return found


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("scheduler", ["linear", "augmented"])
@pytest.mark.parametrize("sense", ["<=", ">="])
def test_gradient_is_the_hosts_own_and_that_of_the_penalty(tmp_path, kind, accumulated, scheduler, sense):
    limit, lam, rho = 0.1 if sense == "<=" else 0.8, 0.7, 2.0
    make = {"linear": Fixed(lam), "augmented": AugmentedLagrangian(rho, initial=lam)}[scheduler]
    part = Constraint("c", limit=limit, cost=CASES[kind][2], scheduler=make, sense=sense)
    settings = {"gradient_accumulation_steps": accumulated}
    plain, batches = gradients(kind, tmp_path, **settings)
    guarded, same_batches = gradients(kind, tmp_path, part, **settings)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(batches, same_batches, strict=True) for key in a)

    expected, sign, seen = {}, 1.0 if sense == "<=" else -1.0, []
    for mean, slope in slopes(kind, batches):
        seen.append(mean)
        known = sign * (sum(seen) / len(seen) - limit) / limit  # all batches are equally large
        effective = lam if scheduler == "linear" else max(0.0, lam + rho * known)
        for name, value in slope.items():
            term = sign * effective * value / (limit * accumulated)
            expected[name] = expected.get(name, 0.0) + term
    close(guarded, plain, expected)


def close(guarded, plain, expected):
    """What guarding added to the gradients is ``expected``."""
    added = torch.cat([(guarded[name] - value).cpu().double().flatten() for name, value in plain.items()])
    wanted = torch.cat([expected[name].flatten() for name in plain])
    assert wanted.norm() > 0.01
    # single precision in the trainer, double here
    assert (added - wanted).norm() < 1e-4 * wanted.norm()


def test_a_number_counts_as_often_as_its_batch_has_rows_whichever_of_them_another_cost_concerns(tmp_path):
    numbers, concerned = [], []

    def few(outputs, inputs):
        concerned.append(sum(concerned) < 3)  # the first three batches have one row that it concerns, then all have
        return outputs["logits"][: 1 if concerned[-1] else None, 1]

    def number(outputs, inputs):
        numbers.append(outputs["logits"][:, 1].mean())
        return numbers[-1]

    trainer = build(classifier(), tmp_path, Rows(64), max_steps=1, gradient_accumulation_steps=4)
    guard = Guard(*(Constraint(cost.__name__, limit=1.0, cost=cost, scheduler=Fixed(0.0)) for cost in (few, number)))
    trainer.add_callback(GuardrailsCallback(trainer, guard, ledger=False))
    trainer.train()
    assert concerned == [True, True, True, False]
    means = [value.item() for value in numbers]
    assert guard.decision.constraints["number"].cost == pytest.approx(sum(means) / 4, rel=1e-5)


def test_a_number_beside_what_a_gate_reads_of_each_pair_counts_as_often_as_there_are_pairs(tmp_path):
    def pairs(outputs, inputs):
        return outputs["logits"].softmax(-1)[::2, 1]

    gate = Gate(Require(ConstraintSatisfaction("pairs", 1.0), at_least=0.5))
    guard = Guard(
        Constraint("pairs", limit=gate.between(0.5, 1.0), cost=pairs, scheduler=Fixed(0.0)),
        Constraint("number", limit=1.0, cost=lambda outputs, inputs: outputs["logits"].mean(), scheduler=Fixed(0.0)),
    )
    trainer = build(classifier(), tmp_path, Rows(64), max_steps=1)
    trainer.add_callback(GuardrailsCallback(trainer, guard, ledger=False))
    trainer.train()
    assert guard.decision.n_rows == trainer.args.per_device_train_batch_size / 2


@pytest.mark.parametrize("average", [True, False])
def test_the_penalty_does_not_depend_on_how_many_words_a_batch_predicts(tmp_path, average):
    part = Constraint("c", limit=0.1, cost=first_words, scheduler=Fixed(1.0))
    settings = {"gradient_accumulation_steps": 2, "average_tokens_across_devices": average}
    plain, batches = gradients("language model", tmp_path, **settings)
    guarded, _ = gradients("language model", tmp_path, part, **settings)
    words = [(batch["labels"][:, 1:] != -100).sum().item() for batch in batches]
    assert words[0] != words[1]
    found = slopes("language model", batches)
    close(guarded, plain, {name: sum(slope[name] for _, slope in found) / 2 / 0.1 for name in plain})


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(
    "scheduler",
    [Fixed(0.0), Warmup(Fixed(3.0), 99), AugmentedLagrangian(5.0), Warmup(AugmentedLagrangian(5.0, initial=2.0), 99)],
    ids=["fixed", "warmup", "augmented", "warmup augmented"],
)
def test_a_penalty_of_weight_zero_changes_no_bit(tmp_path, kind, scheduler):
    make, data, cost = CASES[kind]
    settings = {"gradient_accumulation_steps": 2, "max_steps": 6}
    plain = build(make(dropout=0.2), tmp_path, data(64), **settings)
    plain.train()
    trainer = build(make(dropout=0.2), tmp_path, data(64), **settings)
    limit = 0.99 if isinstance(scheduler, AugmentedLagrangian) else 0.01  # the augmented one pushes where violated
    guard = Guard(Constraint("c", limit=limit, cost=cost, scheduler=scheduler))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    assert same(weights(trainer), weights(plain))
    assert logged(trainer, "guardrails/c/cost")[-1] > 0.0
    assert guard.decision.step == 6


@pytest.mark.parametrize("wrapper", [lambda s: Cap(s, 50.0), lambda s: Margin(s, 0.1), lambda s: Smooth(s, 0.5)])
def test_wrapped_schedulers_act_too(tmp_path, wrapper):
    for inner in (Fixed(5.0), AugmentedLagrangian(5.0, initial=5.0)):
        trainer = build(classifier(), tmp_path, Rows(64), max_steps=10)
        guard = Guard(Constraint("c", limit=0.05, cost=positives, scheduler=wrapper(inner)))
        trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train()
        costs = logged(trainer, "guardrails/c/cost")
        assert costs[-1] < 0.8 * costs[0]


class Quadratic(Cap):
    """A third party's wrapper, with a penalty of its own."""

    def penalty(self, state, violation):
        return augmented_penalty(violation, state.multiplier, 2.0)


@pytest.mark.parametrize("scheduler", [Augmented(Fixed(0.7), 2.0), Smooth(Quadratic(Fixed(0.7), 9.0))])
def test_a_penalty_that_a_wrapper_adds_is_that_of_the_augmented_lagrangian(tmp_path, scheduler):
    made = [
        gradients("classifier", tmp_path, Constraint("c", limit=0.1, cost=positives, scheduler=each))[0]
        for each in (scheduler, AugmentedLagrangian(2.0, initial=0.7))
    ]
    assert same(*made)


def test_several_functions_of_one_constraint_are_summed(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64), max_steps=1)
    cost = [positives, lambda outputs, inputs: 2.0 * positives(outputs, inputs)]
    guard = Guard(
        Constraint("sum", limit=1.0, cost=cost, scheduler=Fixed(0.0)),
        Constraint("one", limit=1.0, cost=positives, scheduler=Fixed(0.0)),
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    facts = guard.decision.constraints
    assert facts["sum"].cost == pytest.approx(3 * facts["one"].cost, rel=1e-6)


def test_a_number_for_a_batch_counts_as_often_as_the_batch_has_rows(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(11), max_steps=1, gradient_accumulation_steps=2)
    guard = Guard(
        Constraint("rows", limit=1.0, cost=positives, scheduler=Fixed(0.0)),
        Constraint("number", limit=1.0, cost=lambda o, i: positives(o, i).mean(), scheduler=Fixed(0.0)),
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    facts = guard.decision.constraints
    assert guard.decision.n_rows == 11  # 8 and 3
    assert facts["rows"].cost == pytest.approx(facts["number"].cost, rel=1e-6)


def test_a_function_with_fewer_rows_than_another_keeps_its_own_mean(tmp_path):
    def nothing(outputs, inputs):
        return positives(outputs, inputs)[:0]

    trainer = build(classifier(), tmp_path, Rows(64), max_steps=1)
    guard = Guard(
        *(Constraint(f.__name__, limit=1.0, cost=f, scheduler=Fixed(1.0)) for f in (positives, labelled, nothing))
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    kept = []
    trainer.data_collator, collate = lambda rows: kept.append(collate(rows)) or kept[-1], trainer.data_collator
    trainer.train()
    batch = kept[0]
    with torch.no_grad():
        expected = classifier()(**batch)["logits"].softmax(-1)[:, 1]
    assert 0 < (batch["labels"] == 0).sum() < 8
    facts = guard.decision.constraints
    assert facts["labelled"].cost == pytest.approx(expected[batch["labels"] == 0].mean().item(), rel=1e-6)
    assert facts["positives"].cost == pytest.approx(expected.mean().item(), rel=1e-6)
    assert facts["nothing"].cost != facts["nothing"].cost
    assert facts["nothing"].multiplier == 1.0


def labelled(outputs, inputs):
    """Rows of one label alone."""
    return positives(outputs, inputs)[inputs["labels"] == 0]


def test_a_cost_with_rows_in_some_batches_weighs_by_batches_and_one_that_subtracts_its_limit_by_rows(tmp_path):
    limit = 0.1

    def beyond(outputs, inputs):
        return (positives(outputs, inputs) - limit) * (inputs["labels"] == 0)

    by_batch = Constraint("c", limit=limit, cost=labelled, scheduler=Fixed(1.0))
    by_row = Constraint("c", limit=0.0, scale=limit, cost=beyond, scheduler=Fixed(1.0))
    settings = {"gradient_accumulation_steps": 3}
    plain, batches = gradients("classifier", tmp_path, **settings)
    rows = [(batch["labels"] == 0).sum().item() for batch in batches]
    assert len(set(rows)) > 1
    sums = []
    for batch in batches:
        model = classifier().double()
        inputs = {"features": batch["features"].double(), "labels": batch["labels"]}
        labelled(model(**inputs), inputs).sum().backward()
        sums.append({name: value.grad / limit for name, value in model.named_parameters()})
    close(
        gradients("classifier", tmp_path, by_batch, **settings)[0],
        plain,
        {name: sum(each[name] / n for each, n in zip(sums, rows, strict=True)) / 3 for name in plain},
    )
    close(
        gradients("classifier", tmp_path, by_row, **settings)[0],
        plain,
        {name: sum(each[name] for each in sums) / 24 for name in plain},
    )


@pytest.mark.parametrize("broken", ["value", "gradient", "infinite"])
@pytest.mark.parametrize("scheduler", [Fixed(1.0), AugmentedLagrangian(1.0, initial=1.0)], ids=["linear", "augmented"])
def test_a_cost_that_is_not_finite_is_a_violation_and_never_reaches_the_weights(tmp_path, broken, scheduler):
    def cost(outputs, inputs):
        rows = positives(outputs, inputs)
        if broken == "gradient":
            return (rows - rows).sqrt()  # 0, with an infinite slope
        hole = torch.zeros_like(rows)
        hole[0] = 1.0
        return rows + (torch.log(rows * 0.0) * 0.0 if broken == "value" else -torch.log(rows * 0.0)) * hole

    trainer = build(classifier(), tmp_path, Rows(64), max_steps=3, logging_nan_inf_filter=False)
    guard = Guard(Constraint("c", limit=0.1, cost=cost, scheduler=scheduler))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    facts = guard.decision.constraints["c"]
    if broken != "gradient":
        assert facts.invalid_rows > 0
        assert facts.cost > 0.1
    assert torch.tensor(logged(trainer, "loss")).isfinite().all()


def test_an_infinite_slope_at_the_hidden_states_of_a_layer_never_reaches_the_weights(tmp_path):
    def cost(outputs, inputs):
        rows = outputs.hidden_states[-1].mean((-1, -2))
        return (rows - rows).sqrt()  # 0, with an infinite slope

    model = language_model()
    model.config.output_hidden_states = True
    trainer = build(model, tmp_path, Sentences(64), max_steps=2)
    trainer.add_callback(
        GuardrailsCallback(trainer, Guard(Constraint("c", limit=0.1, cost=cost, scheduler=Fixed(1.0))))
    )
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model returns in a form of its own."""

    logits: torch.Tensor


NESTED = {
    "a dict": (lambda logits: {"logits": logits}, lambda scores: scores["logits"]),
    "a list of dicts": (lambda logits: [{"logits": logits}], lambda scores: scores[0]["logits"]),
    "an output": (lambda logits: SequenceClassifierOutput(logits=logits), lambda scores: scores.logits),
    "a dataclass": (Scores, lambda scores: scores.logits),
    "what topk returns": (lambda logits: logits.topk(2), lambda scores: scores.values),
}


@pytest.mark.parametrize("form", NESTED)
def test_an_infinite_slope_at_outputs_within_outputs_never_reaches_the_weights(tmp_path, form):
    wrap, unwrap = NESTED[form]

    class Nesting(Classifier):
        def forward(self, features, labels=None):
            outputs = super().forward(features, labels)
            return {"loss": outputs["loss"], "scores": wrap(outputs["logits"])}

    def cost(outputs, inputs):
        rows = unwrap(outputs["scores"])[:, 1]
        return (rows - rows).sqrt() + rows  # an infinite slope beside one that is 1

    trainer = build(Nesting(), tmp_path, Rows(64), max_steps=2)
    start = weights(trainer)
    trainer.add_callback(
        GuardrailsCallback(trainer, Guard(Constraint("c", limit=0.1, cost=cost, scheduler=Fixed(1.0))))
    )
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert not same(start, weights(trainer))


def test_a_gate_may_not_take_a_batchs_number_for_the_evidence_of_its_rows(tmp_path):
    trainer = build(classifier(), tmp_path, Rows(64), max_steps=1)
    gate = Gate(Require(ConstraintSatisfaction("number", 1.0), at_least=0.5))
    guard = Guard(
        Constraint("rows", limit=gate.between(0.1, 0.5), cost=positives),
        Constraint("number", limit=1.0, cost=lambda o, i: positives(o, i).mean()),
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    with pytest.raises(RolloutError, match=r"A gate reads 'number'.*8 rows.*Return one number per row"):
        trainer.train()


def test_a_gate_opens_a_limit_on_what_the_steps_measure(tmp_path):
    def right(outputs, inputs):
        return 1.0 - (outputs["logits"].argmax(-1) == inputs["labels"]).float()

    trainer = build(classifier(), tmp_path, Rows(256), max_steps=40, per_device_train_batch_size=32)
    gate = Gate(Require(ConstraintSatisfaction("wrong", 0.5), at_least=0.5), rungs=2)
    guard = Guard(Constraint("c", limit=gate.between(0.2, 0.6), cost=positives))
    trainer.add_callback(GuardrailsCallback(trainer, guard, columns={"wrong": right}))
    trainer.train()
    limits = logged(trainer, "guardrails/c/limit")
    assert limits[0] == 0.2
    assert limits[-1] == 0.6
    assert guard.decision.gates[gate.name].rung == 2
