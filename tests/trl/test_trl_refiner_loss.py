"""The refinement's term: its gradient against an independent computation, its rows, and what it leaves alone."""

import pytest
from refined_gradients import (
    ANY,
    WEIGHT,
    assert_close,
    divisors,
    edit,
    expected_gradient,
    n_sampled,
    run,
)
from tiny_trl import build_trainer, logged, same_weights, weights

from guardrails import Guard, Refinement
from guardrails.refine import Acceptance, Always, FunctionRefiner, ModelRefiner
from guardrails_trl import GuardrailsCallback, toy
from guardrails_trl.refine_seams import RefineSeams


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo", "luspo", "rloo"])
def test_gradient_of_the_term_is_that_of_each_correction_alone(speaking_model, tmp_path, loss_type, accumulation):
    settings = {"kind": "rloo"} if loss_type == "rloo" else {"loss_type": loss_type}
    trainer, measured, batches = run(
        speaking_model,
        tmp_path,
        refinement=Refinement(FunctionRefiner(edit), WEIGHT, accept=ANY),
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    expected = expected_gradient(trainer, batches, divisors(loss_type, batches, accumulation), edit)
    assert_close(measured[0], {name: WEIGHT * value for name, value in expected.items()})
    # the mean of -log π per token that is learned, in float32
    assert logged(trainer, "guardrails/refinement/loss") == [pytest.approx(trainer.expected_loss, rel=1e-5)]
    # rewards of 0: the term is all of the host's loss, which is logged with few digits where it is large
    assert logged(trainer, "loss") == [pytest.approx(WEIGHT * trainer.expected_total, rel=1e-4)]


@pytest.mark.parametrize(("loss_type", "accumulation"), [("dapo", 2), ("bnpo", 1), ("rloo", 2)])
def test_rows_appended_to_the_hosts_own_pass_give_the_same_gradient(
    speaking_model, tmp_path, monkeypatch, loss_type, accumulation
):
    """As where the processes hold parts of the weights, and must run equally many passes."""
    monkeypatch.setattr(RefineSeams, "learns_apart", False)
    passes = []
    settings = {"kind": "rloo"} if loss_type == "rloo" else {"loss_type": loss_type}
    refinement = Refinement(FunctionRefiner(edit), WEIGHT, accept=ANY)
    trainer, measured, batches = run(
        speaking_model,
        tmp_path,
        refinement=refinement,
        gradient_accumulation_steps=accumulation,
        passes=passes,
        **settings,
    )
    assert len(passes) == accumulation
    assert all(rows > 8 for rows, _ in passes)
    expected = expected_gradient(trainer, batches, divisors(loss_type, batches, accumulation), edit)
    assert_close(measured[0], {name: WEIGHT * value for name, value in expected.items()})


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_corrections_stay_with_their_rows_when_a_batch_is_used_again(speaking_model, tmp_path, kind):
    trainer, measured, batches = run(
        speaking_model,
        tmp_path,
        kind=kind,
        refinement=Refinement(FunctionRefiner(edit), WEIGHT, accept=ANY),
        steps_per_generation=2,
        num_iterations=2,
        max_steps=4,
    )
    assert len(batches) == 4
    for step, batch in enumerate(batches):
        # dapo divides by the tokens of the generation batch, of which a step uses half
        divisor = 8.0 if kind == "rloo" else n_sampled(batches[:2]) / 2
        expected = expected_gradient(trainer, [batch], [divisor], edit)
        assert_close(measured[step], {name: WEIGHT * value for name, value in expected.items()})


def test_the_policy_learned_is_the_one_sampled_from_at_its_temperature(speaking_model, tmp_path):
    trainer, measured, batches = run(
        speaking_model, tmp_path, refinement=Refinement(FunctionRefiner(edit), WEIGHT, accept=ANY), temperature=1.5
    )
    expected = expected_gradient(trainer, batches, divisors("dapo", batches, 1), edit)
    assert_close(measured[0], {name: WEIGHT * value for name, value in expected.items()})


def test_an_unchanged_text_with_special_tokens_in_it_is_learned_without_them(random_model, tmp_path):
    trainer, measured, batches = run(
        random_model,
        tmp_path,
        refinement=Refinement(FunctionRefiner(lambda prompt, completion: completion), WEIGHT, accept=ANY),
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=12,
    )
    special = {trainer.processing_class.pad_token_id, trainer.processing_class.unk_token_id}
    rows = zip(batches[0]["completion_ids"].tolist(), batches[0]["completion_mask"].tolist(), strict=True)
    said = [[token for token, there in zip(*row, strict=True) if there] for row in rows]
    assert any(ids[-1] == trainer.processing_class.eos_token_id and special & set(ids[:-1]) for ids in said)
    expected = expected_gradient(
        trainer, batches, [float(n_sampled(batches))], lambda prompt, completion: completion, copied=False
    )
    assert_close(measured[0], {name: WEIGHT * value for name, value in expected.items()})


def test_only_changed_tokens_are_learned_where_that_is_asked_for(speaking_model, tmp_path):
    def changed(before, after):  # by the longest common subsequence, from Python's own library
        import difflib

        marks = [0.0] * len(after)
        for tag, _, _, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if tag in ("replace", "insert"):
                marks[start:end] = [1.0] * (end - start)
            elif tag == "delete" and start < len(after):
                marks[start] = 1.0
        return marks

    def insert(prompt, completion):  # an edit whose alignment is beyond doubt
        return " ".join(["+", *completion.split()[:3], "+"]) if len(completion.split()) % 2 else completion

    trainer, measured, batches = run(
        speaking_model,
        tmp_path,
        refinement=Refinement(FunctionRefiner(insert), WEIGHT, accept=ANY, changed_only=True),
    )
    by_own = expected_gradient(trainer, batches, divisors("dapo", batches, 1), insert, changed_only=changed)
    assert_close(measured[0], {name: WEIGHT * value for name, value in by_own.items()})


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_hosts_own_loss_is_the_same_beside_the_term(speaking_model, tmp_path, kind, beta):
    settings = {"rewards": toy.reward, "kind": kind, "beta": beta}
    _, alone, _ = run(speaking_model, tmp_path, **settings)
    refinement = Refinement(FunctionRefiner(edit), WEIGHT, accept=ANY)
    trainer, together, batches = run(speaking_model, tmp_path, refinement=refinement, **settings)
    expected = expected_gradient(trainer, batches, divisors("rloo" if kind == "rloo" else "dapo", batches, 1), edit)
    assert_close(together[0], {name: alone[0][name].cpu() + WEIGHT * value for name, value in expected.items()})


def test_tokens_of_truncated_completions_count_though_the_host_masks_them(speaking_model, tmp_path):
    """Else the term would be divided by the few tokens that are left, and grow as the policy degenerates."""
    trainer, measured, batches = run(
        speaking_model,
        tmp_path,
        refinement=Refinement(FunctionRefiner(edit), WEIGHT, accept=ANY),
        mask_truncated_completions=True,
        max_completion_length=3,
    )
    pad = trainer.processing_class.pad_token_id
    lengths = [int((row != pad).nonzero().max()) + 1 for row in batches[0]["completion_ids"]]
    assert int(batches[0]["completion_mask"].sum()) < sum(lengths)
    expected = expected_gradient(trainer, batches, [float(sum(lengths))], edit)
    assert_close(measured[0], {name: WEIGHT * value for name, value in expected.items()})


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("of", ["weight 0", "nothing offered", "nothing found", "refused", "raises"])
def test_without_a_term_training_is_the_unguarded_one_bit_for_bit(speaking_model, tmp_path, kind, of):
    def fails(prompt, completion):
        raise RuntimeError("no server")

    refuse = Acceptance(check=lambda prompt, completion, refined: False)
    refinement = {
        "weight 0": Refinement(FunctionRefiner(edit), 0.0),
        "nothing offered": Refinement(FunctionRefiner(lambda prompt, completion: None), 3.0),
        "nothing found": Refinement(FunctionRefiner(edit), 3.0, when=~Always()),
        "refused": Refinement(FunctionRefiner(lambda prompt, text: text + " 7"), 3.0, accept=refuse),
        "raises": Refinement(FunctionRefiner(fails), 3.0),
    }[of]
    settings = {"kind": kind, "max_steps": 3, "gradient_accumulation_steps": 2}
    plain = build_trainer(speaking_model, tmp_path, **settings)
    plain.train()
    guarded = build_trainer(speaking_model, tmp_path, **settings)
    guarded.add_callback(GuardrailsCallback(guarded, Guard(refinement)))
    guarded.train()
    assert same_weights(weights(plain), weights(guarded))


def test_a_model_refiner_at_weight_0_changes_nothing_either(repairing_model, tmp_path):
    plain = build_trainer(repairing_model, tmp_path, beta=0.05, max_steps=3)
    plain.train()
    guarded = build_trainer(repairing_model, tmp_path, beta=0.05, max_steps=3)
    guarded.add_callback(GuardrailsCallback(guarded, Guard(Refinement(ModelRefiner(prompt=toy.REPAIR), 0.0))))
    guarded.train()
    assert same_weights(weights(plain), weights(guarded))
