"""A refinement on a real TRL trainer: what is refined and accepted, what is logged, what is left as it was."""

import json
import math

import pytest
import torch
from peft import LoraConfig
from refined_gradients import expected_gradient, run
from tiny_trl import build_trainer, logged, same_weights, weights
from tokenizers import AddedToken
from transformers import TrainerCallback
from trl import GRPOTrainer

from guardrails import AttachError, Constraint, Gate, Guard, Refinement, Require
from guardrails.competence import RefinerAgreement
from guardrails.refine import (
    Acceptance,
    Always,
    Degenerate,
    Detector,
    FunctionRefiner,
    LowEntropy,
    ModelRefiner,
    Predicate,
    Refiner,
    Truncated,
)
from guardrails.report import collect
from guardrails.schedulers import DualAscent, Fixed
from guardrails_trl import GuardrailsCallback, toy

ANY = Acceptance(sound=None)
PREFIX = "guardrails/refinement/"


class Recording(Refiner):
    """Takes filler words out, and keeps what it was asked."""

    def __init__(self, correct=None):
        self.asked, self.host = [], None
        self.correct = correct or (lambda text: " ".join(w for w in text.split() if w not in toy.FILLERS) or None)

    def attach(self, host):
        self.host = host

    def detach(self):
        self.host = None

    def refine(self, prompts, completions):
        self.asked.append(list(zip(prompts, completions, strict=True)))
        return [self.correct(text) for text in completions]


class OnStepEnd(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()


def guarded(trainer, *parts, **settings):
    callback = GuardrailsCallback(trainer, Guard(*parts), **settings)
    trainer.add_callback(callback)
    return callback


def table(trainer):
    """Prompt, completion and correction of each row of the host's completions table."""
    logs = trainer._logs
    return list(zip(logs["prompt"], logs["completion"], logs["extra"]["guardrails/refined"], strict=True))


def as_control_token(trainer, word):
    """Make a word one that texts do not show though the tokenizer has no name for it, and return its id."""
    tokenizer = trainer.processing_class
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False)])
    token = tokenizer.convert_tokens_to_ids(word)
    assert token not in tokenizer.all_special_ids
    return token


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_refinement_keeps_a_policy_from_the_filler_words_that_its_reward_pays_for(repairing_model, tmp_path, kind):
    """The reference corrects, the policy learns it: end to end, against the run without."""
    last = {}
    for weight in (0.0, 3.0):
        trainer = build_trainer(
            repairing_model, tmp_path, kind=kind, beta=1e-6, max_steps=40, per_device_train_batch_size=32,
            num_generations=8, max_completion_length=toy.MAX_COMPLETION_LENGTH, rows=512,
        )  # fmt: skip
        guarded(trainer, Refinement(ModelRefiner(prompt=toy.REPAIR), weight))
        trainer.train()
        last[weight] = sum(logged(trainer, "completions/mean_length")[-10:]) / 10
    assert last[0.0] > 6.0  # words and the end: a bare answer has 2
    assert last[3.0] < 3.0


def test_log_and_table_say_what_became_of_the_rows(speaking_model, tmp_path):
    def correct(text):
        words = text.split()
        if len(words) == 1:
            return text if int(words[0]) % 2 else "so so so"  # kept, or refused by the check
        if len(words) == 2:
            return None if words[0] in toy.FILLERS else words[0]
        return "7 " * 9

    def expected(text):
        """The target and the edit ratio of a completion."""
        offer = correct(text)
        if offer in (None, "so so so") or len(offer.split()) == 9:  # nine words and an end do not fit into six tokens
            return None, 1.0
        return offer, 0.0 if offer == text else 0.5

    trainer = build_trainer(speaking_model, tmp_path, per_device_train_batch_size=32, num_generations=8)
    refuse = Acceptance(sound=None, check=lambda prompt, completion, refined: refined != "so so so")
    guarded(trainer, Refinement(Recording(correct), 0.5, accept=refuse))
    trainer.train()
    rows = table(trainer)
    targets, edits = zip(*(expected(text) for _, text, _ in rows), strict=True)
    offers = {correct(text) for _, text, _ in rows}
    assert {None, "so so so", "7 " * 9} < offers
    assert {0.0, 0.5, 1.0} == set(edits)
    assert tuple(refined for _, _, refined in rows) == targets
    shares = {
        "edit_ratio": sum(edits) / 32,
        "intervention_rate": 1.0,
        "acceptance_rate": sum(target is not None for target in targets) / 32,
        "change_rate": edits.count(0.5) / 32,
        "weight": 0.5,
    }
    assert {name: logged(trainer, PREFIX + name)[0] for name in shares} == pytest.approx(shares)
    assert logged(trainer, PREFIX + "loss")[0] > 0.0
    parts = [logged(trainer, f"{PREFIX}seconds/{part}")[0] for part in ("detect", "refine", "accept")]
    assert logged(trainer, PREFIX + "seconds") == [pytest.approx(sum(parts))]


def test_only_what_the_detector_finds_is_asked_for(speaking_model, tmp_path):
    trainer = build_trainer(speaking_model, tmp_path, per_device_train_batch_size=32, num_generations=8)
    talks = Predicate(lambda prompt, completion: any(word in toy.FILLERS for word in completion.split()))
    refiner = Recording()
    guarded(trainer, Refinement(refiner, 1.0, talks))
    trainer.train()
    found = [(prompt, text) for prompt, text, _ in table(trainer) if any(w in toy.FILLERS for w in text.split())]
    assert refiner.asked == [found]
    assert 0 < len(found) < 32
    assert logged(trainer, PREFIX + "intervention_rate") == [len(found) / 32]
    assert all(refined is None for _, text, refined in table(trainer) if not set(text.split()) & set(toy.FILLERS))


def test_detectors_are_told_of_truncation_and_entropy_where_the_host_knows(speaking_model, tmp_path):
    trainer = build_trainer(speaking_model, tmp_path, kind="rloo", max_completion_length=2)
    refiner = Recording()
    guarded(trainer, Refinement(refiner, 1.0, Truncated() & LowEntropy(1e9)))
    trainer.train()
    ids = trainer.processing_class
    assert len(refiner.asked[0]) == sum(len(text.split()) == 2 for _, text, _ in table(trainer)) > 0
    del ids
    alone = build_trainer(speaking_model, tmp_path)
    with pytest.raises(AttachError, match="reads the policy's entropy"):
        GuardrailsCallback(alone, Guard(Refinement(Recording(), 1.0, LowEntropy(0.1))))
    reused = build_trainer(speaking_model, tmp_path, num_iterations=2, max_steps=2)
    guarded(reused, Refinement(Recording(), 1.0, LowEntropy(1e9)))
    reused.train()
    assert logged(reused, PREFIX + "intervention_rate") == [1.0]  # one generation, two updates


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_of_completions_that_are_masked_as_truncated_the_entropy_is_not_known(speaking_model, tmp_path, kind):
    seen = []

    class Reading(Detector):
        requires = frozenset({"truncated", "entropy"})

        def detect(self, rows):
            seen.extend(zip(rows.truncated, rows.entropy, strict=True))
            return LowEntropy(1e9).detect(rows)

    trainer = build_trainer(
        speaking_model, tmp_path, kind=kind, num_iterations=2, mask_truncated_completions=True,
        max_completion_length=2, per_device_train_batch_size=32, num_generations=8,
    )  # fmt: skip
    guarded(trainer, Refinement(Recording(), 1.0, Reading()))
    trainer.train()
    assert {cut for cut, _ in seen} == {True, False}
    assert all(math.isnan(entropy) == cut for cut, entropy in seen)


def test_a_step_of_several_generations_logs_its_own_loss_alone(speaking_model, tmp_path):
    """Generations with and without corrections, two to a step: with, without; without, with."""
    calls = iter([True, False, False, True])

    class Sometimes(Recording):
        def refine(self, prompts, completions):
            return super().refine(prompts, completions) if next(calls) else [None] * len(completions)

    trainer, _, batches = run(
        speaking_model, tmp_path, refinement=Refinement(Sometimes(lambda text: "7 so"), 1.0, accept=ANY),
        gradient_accumulation_steps=2, steps_per_generation=1, max_steps=2,
    )  # fmt: skip
    assert len(batches) == 4
    means = []
    for batch in (batches[0], batches[3]):
        expected_gradient(trainer, [batch], [1.0], lambda prompt, completion: "7 so", copied=False)
        means.append(pytest.approx(trainer.expected_loss, rel=1e-5))  # float32 sums
    assert logged(trainer, PREFIX + "loss") == means


def test_a_correction_that_spells_out_a_special_token_is_refused(speaking_model, tmp_path):
    trainer = build_trainer(speaking_model, tmp_path)
    guarded(
        trainer,
        Refinement(FunctionRefiner(lambda prompt, text: f"7 {trainer.processing_class.eos_token} 7"), accept=ANY),
    )
    trainer.train()
    assert logged(trainer, PREFIX + "acceptance_rate") == [0.0]
    assert logged(trainer, PREFIX + "edit_ratio") == [1.0]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("correct", [lambda text: text, lambda text: "7"], ids=["unchanged", "changed"])
def test_a_row_with_a_control_token_that_its_text_does_not_show_is_refused(speaking_model, tmp_path, kind, correct):
    written = []

    def rewards(completion_ids, **columns):
        written.extend(completion_ids)
        return [0.0] * len(completion_ids)

    trainer = build_trainer(
        speaking_model, tmp_path, kind=kind, rewards=rewards, per_device_train_batch_size=32, num_generations=8
    )
    control = as_control_token(trainer, "so")
    guarded(trainer, Refinement(Recording(correct), accept=ANY))
    trainer.train()
    offers = [
        None if control in ids else correct(text) for ids, (_, text, _) in zip(written, table(trainer), strict=True)
    ]
    assert 0 < offers.count(None) < 32
    assert [refined for _, _, refined in table(trainer)] == offers
    assert logged(trainer, PREFIX + "acceptance_rate") == [1.0 - offers.count(None) / 32]


def test_a_correction_that_spells_out_a_control_token_is_refused(speaking_model, tmp_path):
    trainer = build_trainer(speaking_model, tmp_path)
    as_control_token(trainer, "well")
    guarded(trainer, Refinement(FunctionRefiner(lambda prompt, text: "7 well 7"), accept=ANY))
    trainer.train()
    assert logged(trainer, PREFIX + "acceptance_rate") == [0.0]


def test_a_refiner_that_fails_to_let_go_leaves_no_trace_on_the_trainer(speaking_model, tmp_path):
    class Clinging(Recording):
        def detach(self):
            raise RuntimeError("not yet")

    trainer = build_trainer(speaking_model, tmp_path)
    before = dict(vars(trainer))
    callback = guarded(trainer, Refinement(Clinging()))
    with pytest.raises(RuntimeError, match="not yet"):
        callback.detach()
    assert vars(trainer).keys() == before.keys()
    assert callback not in trainer.callback_handler.callbacks
    guarded(trainer, Refinement(Recording()))


class TestWeight:
    def test_a_constraint_turns_the_weight_and_leaves_advantages_alone(self, speaking_model, tmp_path):
        trainer = build_trainer(speaking_model, tmp_path, max_steps=3, learning_rate=0.0)
        held = Constraint("talk", limit=0.05, cost=toy.fillers, scheduler=DualAscent(1.0))
        callback = guarded(trainer, Refinement(Recording(), held))
        trainer.train()
        weight = logged(trainer, PREFIX + "weight")
        assert weight == logged(trainer, "guardrails/talk/multiplier")
        assert weight[-1] > weight[0] > 0.0
        assert callback.guard.refinement_weight == weight[-1]
        plain = build_trainer(speaking_model, tmp_path, max_steps=3, learning_rate=0.0)
        plain.train()
        assert list(trainer._logs["advantages"]) == list(plain._logs["advantages"])

    def test_without_a_cost_it_holds_the_edit_ratio(self, speaking_model, tmp_path):
        trainer = build_trainer(speaking_model, tmp_path, max_steps=2)
        guarded(trainer, Refinement(Recording(), Constraint("edits", limit=0.01)))
        trainer.train()
        assert logged(trainer, "guardrails/edits/cost") == pytest.approx(logged(trainer, PREFIX + "edit_ratio"))

    def test_nothing_is_refined_while_the_weight_is_0(self, speaking_model, tmp_path):
        trainer = build_trainer(speaking_model, tmp_path, max_steps=3)
        refiner = Recording()
        held = Constraint("degenerate", limit=0.9, cost=Degenerate(), scheduler=DualAscent(1.0))
        guarded(trainer, Refinement(refiner, held))
        trainer.train()
        assert refiner.asked == []
        assert logged(trainer, PREFIX + "weight") == [0.0] * 3
        assert logged(trainer, PREFIX + "edit_ratio") == []
        plain = build_trainer(speaking_model, tmp_path, max_steps=3)
        plain.train()
        assert same_weights(weights(trainer), weights(plain))

    def test_the_table_shows_no_corrections_of_earlier_rows(self, speaking_model, tmp_path):
        trainer = build_trainer(speaking_model, tmp_path, max_steps=2, eval_rows=8)
        steps = iter([1.0, 0.0, 0.0])
        cost = lambda completions, **columns: [next(steps)] * len(completions)  # noqa: E731
        held = Constraint("once", limit=0.5, cost=cost, scheduler=DualAscent(1.0))
        guarded(trainer, Refinement(FunctionRefiner(lambda prompt, text: "hello"), held, accept=ANY))
        column = []
        trainer.add_callback(OnStepEnd(lambda: column.append([refined for *_, refined in table(trainer)])))
        trainer.train()
        assert logged(trainer, PREFIX + "weight") == [1.0, 0.0]
        assert column == [["hello"] * 8, [None] * 8]

    def test_the_table_of_an_evaluation_shows_no_corrections_of_trained_rows(self, speaking_model, tmp_path):
        trainer = build_trainer(speaking_model, tmp_path, eval_rows=8)
        guarded(trainer, Refinement(FunctionRefiner(lambda prompt, text: "hello"), 1.0, accept=ANY))
        trainer.train()
        assert [refined for *_, refined in table(trainer)] == ["hello"] * 8
        trainer.evaluate()
        assert [refined for *_, refined in table(trainer)] == [None] * 8

    def test_a_gate_reads_the_edit_ratio_and_turns_the_weight(self, speaking_model, tmp_path):
        trainer = build_trainer(
            speaking_model, tmp_path, max_steps=4, per_device_train_batch_size=64, num_generations=8, learning_rate=0.0
        )
        gate = Gate(Require(RefinerAgreement(), at_least=0.3), rungs=2, confidence=0.8, dwell=1)
        callback = guarded(trainer, Refinement(Recording(lambda text: text), gate.between(2.0, 0.5)))
        assert callback.guard.refinement_weight == 2.0
        trainer.train()
        assert logged(trainer, PREFIX + "weight")[-1] < 2.0

    def test_weight_scales_the_step(self, speaking_model, tmp_path):
        """SGD from the same weights on rewards of 0: twice the weight, twice the way."""
        ways = {}
        for weight in (1.0, 2.0):
            trainer = build_trainer(
                speaking_model, tmp_path, optim="sgd", max_grad_norm=0.0, learning_rate=1e-3, weight_decay=0.0,
                rewards=lambda completions, **kwargs: [0.0] * len(completions),
            )  # fmt: skip
            before = weights(trainer)
            guarded(trainer, Refinement(Recording(), weight))
            trainer.train()
            ways[weight] = {name: value - before[name] for name, value in weights(trainer).items()}
        for name, way in ways[1.0].items():
            # differences of float32 weights near 1
            torch.testing.assert_close(ways[2.0][name], 2.0 * way, rtol=1e-2, atol=3e-7)


class TestAcceptance:
    def test_reward_scores_refinements_by_the_hosts_own_functions(self, speaking_model, tmp_path):
        scored = []

        def reward(prompts, completions, answer, log_extra, log_metric, **kwargs):
            log_extra("seen", completions)
            log_metric("rows", float(len(completions)))
            scored.append(list(zip(prompts, completions, answer, strict=True)))
            return [float(len(text.split())) for text in completions]

        trainer = build_trainer(speaking_model, tmp_path, rewards=reward, max_steps=2)
        refiner = Recording(lambda text: "7" if len(text.split()) > 1 else f"{text} so")
        guarded(trainer, Refinement(refiner, 1.0, accept=Acceptance(sound=None, reward=True)))
        trainer.train()
        for prompt, text, refined in table(trainer):
            assert refined == (f"{text} so" if len(text.split()) == 1 else None), (prompt, text)
        assert len(scored) == 4
        for asked, written, again in zip(refiner.asked, scored[::2], scored[1::2], strict=True):
            assert [row[:2] for row in written] == asked
            assert [row[0] for row in again] == [
                prompt for prompt, _ in asked
            ]  # each changed row, with its own columns
            answers = {prompt: answer for prompt, _, answer in written}
            assert all(answers[prompt] == answer for prompt, _, answer in again)
        assert list(trainer._logs["extra"]["seen"]) == [text for _, text, _ in table(trainer)]
        assert logged(trainer, "rows") == [8.0, 8.0]
        assert not trainer._pending_extra_logs

    def test_a_reward_that_fails_on_refinements_refuses_them_and_training_goes_on(self, speaking_model, tmp_path):
        def reward(completions, **kwargs):
            if "+ + +" in completions:
                raise ValueError("not a word")
            return [float(len(text)) for text in completions]

        trainer = build_trainer(speaking_model, tmp_path, rewards=reward, max_steps=2)
        refiner = Recording(lambda text: "+ + +")
        guarded(trainer, Refinement(refiner, 1.0, accept=Acceptance(sound=None, reward=True)))
        trainer.train()
        assert logged(trainer, PREFIX + "acceptance_rate") == [0.0, 0.0]
        assert logged(trainer, PREFIX + "edit_ratio") == [1.0, 1.0]

    def test_corrections_longer_than_a_completion_are_refused_not_cut(self, speaking_model, tmp_path):
        trainer = build_trainer(speaking_model, tmp_path)
        guarded(trainer, Refinement(Recording(lambda text: "so " * len(text.split()) + "7 " * 4), 1.0, accept=ANY))
        trainer.train()
        for _, text, refined in table(trainer):
            assert (refined is None) == (len(text.split()) + 4 + 1 > 6)


def test_ledger_and_report_keep_a_few_examples(speaking_model, tmp_path):
    trainer = build_trainer(speaking_model, tmp_path, max_steps=2, per_device_train_batch_size=32, num_generations=8)
    guarded(trainer, Refinement(Recording(), 1.0))
    trainer.train()
    ledger = tmp_path / "guardrails" / "ledger.jsonl"
    lines = list(map(json.loads, ledger.read_text().splitlines()))
    notes = [line["data"] for line in lines if line["kind"] == "note"]
    assert [note["step"] for note in notes] == [1, 2]
    for note in notes:
        assert (note["rows"], note["refined"]) == (32, 32)
        assert 0 < note["accepted"] <= 32
        assert len(note["examples"]) == 3
        for example in note["examples"]:
            expected = " ".join(word for word in example["before"].split() if word not in toy.FILLERS)
            assert example["after"] == expected != example["before"]
            assert example["prompt"].endswith("=")
    shown = collect(tmp_path).refinement
    assert (shown.rows, shown.refined) == (64, 64)
    assert len(shown.examples) == 6


def test_evaluation_refines_nothing(speaking_model, tmp_path):
    trainer = build_trainer(speaking_model, tmp_path, eval_rows=8, eval_strategy="steps", eval_steps=1, max_steps=2)
    refiner = Recording()
    held = Constraint("edits", limit=0.5, scheduler=Fixed(1.0))
    guarded(trainer, Refinement(refiner, held))
    trainer.train()
    assert len(refiner.asked) == 2
    assert len(logged(trainer, "eval_reward")) == 2


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_with_peft_the_policy_without_its_adapter_corrects(repairing_model, tmp_path, kind, beta):
    trainer = build_trainer(
        repairing_model, tmp_path, kind=kind, beta=beta, max_steps=3, peft=LoraConfig(r=2, target_modules="all-linear")
    )
    assert trainer.ref_model is None
    refiner = ModelRefiner(prompt=toy.REPAIR)
    callback = guarded(trainer, Refinement(refiner, 1.0))
    asked = (["3 + 4 ="] * 3, ["well 7 so", "8", "7"])
    before = refiner.refine(*asked)
    assert before[0] == "7"
    learning = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    with torch.no_grad():  # an adapter that would say something else
        for value in learning:
            trainer.model.get_parameter(value).add_(0.3)
    assert refiner.refine(*asked) == before
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == set(learning)
    assert trainer.model.training
    with torch.no_grad():
        for name, value in learning.items():
            trainer.model.get_parameter(name).copy_(value)
    trainer.train()
    assert any(not torch.equal(value, trainer.model.get_parameter(name)) for name, value in learning.items())
    assert len(logged(trainer, PREFIX + "loss")) == 3
    callback.detach()


def test_a_full_model_without_reference_is_refused_unless_a_model_is_given(repairing_model, tmp_path):
    trainer = build_trainer(repairing_model, tmp_path)
    before = set(vars(trainer))
    guard = Guard(Refinement(ModelRefiner(prompt=toy.REPAIR), 1.0))
    with pytest.raises(AttachError, match=r"holds no reference model.*beta above 0.*ModelRefiner\(model\)"):
        GuardrailsCallback(trainer, guard)
    assert set(vars(trainer)) == before
    assert guard.host is None
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(repairing_model)
    guarded(trainer, Refinement(ModelRefiner(model, prompt=toy.REPAIR), 1.0))
    trainer.train()
    assert model.training is False
    assert len(logged(trainer, PREFIX + "loss")) == 1


def test_hosts_that_cannot_be_served_are_refused_by_name(speaking_model, tmp_path):
    class Other(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    refinement = Refinement(Recording(), 1.0)
    trainer = build_trainer(speaking_model, tmp_path, cls=Other)
    with pytest.raises(AttachError, match="Other replaces _compute_loss"):
        GuardrailsCallback(trainer, Guard(refinement))
    for attribute, value, message in (
        ("tools", [len], "calls tools"),
        ("rollout_func", len, "rollout_func"),
        ("environment_factories", {None: len}, "environments"),
        ("loss_type", "new", "loss_type 'new'"),
        ("use_liger_kernel", True, "Liger loss has no log-probabilities"),
        ("max_completion_length", None, "max_completion_length is None"),
        ("processing_class", object(), "reads images"),
    ):
        trainer = build_trainer(speaking_model, tmp_path)
        setattr(trainer, attribute, value)
        with pytest.raises(AttachError, match=message):
            GuardrailsCallback(trainer, Guard(refinement))
    spread = build_trainer(speaking_model, tmp_path, beta=0.1)
    spread.is_fsdp_enabled = True
    with pytest.raises(AttachError, match="spread over the processes"):
        GuardrailsCallback(spread, Guard(Refinement(ModelRefiner(), 1.0)))


def hooks(trainer):
    modules = (*trainer.model.modules(), *trainer.ref_model.modules())
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]


def test_detach_leaves_no_trace(repairing_model, tmp_path):
    trainer = build_trainer(repairing_model, tmp_path, beta=0.05, max_steps=2)
    own = trainer.compute_loss  # a wrapper that was there before
    trainer.compute_loss = lambda *args, **kwargs: own(*args, **kwargs)
    wrapper = trainer.compute_loss
    refiner = ModelRefiner(prompt=toy.REPAIR)
    callback = guarded(trainer, Refinement(refiner, 1.0))
    trainer.train()
    callback.detach()
    assert trainer.compute_loss is wrapper
    assert "_get_per_token_logps_and_entropies" not in vars(trainer)
    assert not any(name.startswith("guardrails") for name in trainer._logs["extra"])
    with pytest.raises(AttachError, match="not attached"):
        refiner.refine(["3 + 4 ="], ["7"])
    plain = build_trainer(repairing_model, tmp_path, beta=0.05, max_steps=2)
    plain.train()
    detached = build_trainer(repairing_model, tmp_path, beta=0.05, max_steps=2)
    guarded(detached, Refinement(ModelRefiner(prompt=toy.REPAIR), 1.0)).detach()
    detached.train()
    assert same_weights(weights(plain), weights(detached))
    assert hooks(plain) == hooks(trainer)  # the host has some of its own


def test_always_is_the_default_and_all_rows_are_refined(speaking_model, tmp_path):
    trainer = build_trainer(speaking_model, tmp_path)
    refiner = Recording()
    refinement = Refinement(refiner, 1.0)
    assert isinstance(refinement.detects, Always)
    guarded(trainer, refinement)
    trainer.train()
    assert [text for _, text in refiner.asked[0]] == [text for _, text, _ in table(trainer)]


def test_training_with_a_refiner_that_fails_now_and_then_goes_on(speaking_model, tmp_path):
    calls = []

    def flaky(prompt, completion):
        calls.append(completion)
        if len(calls) <= 8:
            raise TimeoutError("no answer")
        return completion

    trainer = build_trainer(speaking_model, tmp_path, max_steps=2)
    guarded(trainer, Refinement(FunctionRefiner(flaky), 1.0, accept=ANY))
    trainer.train()
    assert logged(trainer, PREFIX + "acceptance_rate") == [0.0, 1.0]
    assert logged(trainer, PREFIX + "edit_ratio")[0] == 1.0
