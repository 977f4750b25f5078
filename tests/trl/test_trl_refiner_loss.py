"""The refinement's term: its gradient against an independent computation, its rows, and what it leaves alone."""

import pytest
import torch
from tiny_trl import build_trainer, logged, same_weights, weights
from transformers import TrainerCallback

from guardrails import Guard, Refinement
from guardrails.refine import Acceptance, Always, FunctionRefiner, ModelRefiner
from guardrails_trl import GuardrailsCallback, toy
from guardrails_trl.refine_seams import RefineSeams

ANY = Acceptance(sound=None)
WEIGHT = 0.7


def edit(prompt, completion):
    """A correction that differs from row to row: nothing, the text itself, a shorter or a longer one, a long one."""
    words = completion.split()
    short = [words[1:4] or ["7"], ["so", *words[:2], "9"], [*words[:1], "+", "="], ["7"] * 7]
    by_row = sum(map(len, words)) + len(words) + len(prompt)
    return [completion, None, *map(" ".join, short), completion][by_row % 7]


def nothing_to_gain(completions, **kwargs):
    return [0.0] * len(completions)


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None})


def run(model, folder, *, refinement=None, rewards=nothing_to_gain, passes=None, **settings):
    """Train at a learning rate of 0; return the trainer, its gradients, and the host's own micro-batches.

    Into ``passes`` goes the number of rows of every pass of the policy with gradients.
    """
    trainer = build_trainer(
        model, folder, rewards=rewards, learning_rate=0.0, max_grad_norm=0.0, gradient_checkpointing=False, **settings
    )
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        seen.append({name: value for name, value in inputs.items() if not name.startswith("guardrails")})
        return original(model, inputs, **kwargs)

    def count(module, arguments, keywords):
        if passes is not None and torch.is_grad_enabled():
            passes.append(len(keywords["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.compute_loss = compute_loss
    gradients = Gradients()
    trainer.add_callback(gradients)
    if refinement is not None:
        trainer.add_callback(GuardrailsCallback(trainer, Guard(refinement)))
    trainer.train()
    return trainer, gradients.steps, seen


def expected_gradient(trainer, batches, divisors, refine, *, changed_only=None, copied=True):
    """∇ Σ_batch Σ_row -log π(y⁺|x) / divisor: each row alone, unpadded, in float64, on a copy of the model."""
    own = trainer.accelerator.unwrap_model(trainer.model)
    model = type(own)(own.config).double()
    model.load_state_dict(own.state_dict())
    tokenizer = trainer.processing_class
    total, terms, copies = torch.zeros((), dtype=torch.float64), 0, 0
    nlls, marks = [], []
    for batch, divisor in zip(batches, divisors, strict=True):
        for row in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            length = (batch["completion_ids"][row] != tokenizer.pad_token_id).nonzero().max() + 1
            ids = batch["completion_ids"][row][:length].tolist()
            said = tokenizer.decode(ids, skip_special_tokens=True)
            text = refine(tokenizer.decode(prompt, skip_special_tokens=True), said)
            if text is None:
                continue
            target = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(target) > trainer.max_completion_length:
                continue
            learned = torch.ones(len(target)) if changed_only is None else torch.tensor(changed_only(ids, target))
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1] / trainer.temperature
            log_probs = logits.log_softmax(dim=-1)[torch.arange(len(target)), target]
            nlls.append(-log_probs.detach() * learned)
            marks.append(learned)
            total = total - (log_probs * learned).sum() / divisor
            terms, copies = terms + 1, copies + (text == said)
    trainer.expected_loss = float(sum(nll.sum() for nll in nlls) / sum(learned.sum() for learned in marks))
    assert terms >= 3, "too few corrections to test anything"
    if changed_only is None and copied:
        assert 0 < copies < terms, "corrections of one kind only"
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(total, parameters.values()), strict=True))


def assert_close(measured, expected):
    """float32 sums over a few hundred tokens against float64: relative to the largest entry of all gradients."""
    largest = max(value.abs().max() for value in expected.values())
    assert largest > 1e-4
    for name, value in expected.items():
        assert (measured[name] - value).abs().max() < 2e-5 * largest + 1e-9, name


def n_sampled(batches):
    return sum(int(batch["completion_mask"].sum()) for batch in batches)


def divisors(loss_type, batches, accumulation, length=6):
    """What the host divides a sum over tokens by, written down from its documentation."""
    per_batch = {
        "luspo": [8.0 * accumulation] * len(batches),
        "rloo": [8.0 * accumulation] * len(batches),
        "dr_grpo": [8.0 * length * accumulation] * len(batches),
        "tokens": [n_sampled([batch]) * accumulation for batch in batches],
        "all": [float(n_sampled(batches))] * len(batches),
    }
    kind = {"grpo": "tokens", "sapo": "tokens", "bnpo": "tokens", "dapo": "all", "cispo": "all", "vespo": "all"}
    return per_batch[kind.get(loss_type, loss_type)]


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
    assert all(rows > 8 for rows in passes)
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


def test_changed_rows_are_read_before_the_others_in_passes_of_half_as_many(speaking_model, tmp_path):
    """So that their activations are gone when the host's own are made: the peak of memory is the host's."""
    passes = []
    everything = Refinement(FunctionRefiner(lambda prompt, completion: "7 so"), WEIGHT, accept=ANY)
    run(speaking_model, tmp_path, refinement=everything, passes=passes)
    assert passes[-1] == 8
    assert passes[:-1] in ([4, 4], [4, 3])  # one of them may have said just that


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
    assert_close(together[0], {name: alone[0][name] + WEIGHT * value for name, value in expected.items()})


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
