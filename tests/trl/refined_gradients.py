"""Gradients of a refined trainer, step by step, and an independent computation of what they should be."""

import torch
from devices import ON_CPU
from tiny_trl import build_trainer
from transformers import TrainerCallback

from guardrails import Guard
from guardrails.refine import Acceptance
from guardrails_trl import GuardrailsCallback

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


def run(model, folder, *, refinement=None, rewards=nothing_to_gain, passes=None, prepare=None, **settings):
    """Train at a learning rate of 0; return the trainer, its gradients, and the host's own micro-batches.

    Into ``passes`` goes of every pass of the policy with gradients how many rows it has, and whether a backward was
    before it.
    """
    still = {"learning_rate": 0.0, "max_grad_norm": 0.0, "gradient_checkpointing": False}
    trainer = build_trainer(model, folder, rewards=rewards, **still | settings)
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        seen.append({name: value for name, value in inputs.items() if not name.startswith("guardrails")})
        return original(model, inputs, **kwargs)

    def count(module, arguments, keywords):
        if passes is not None and torch.is_grad_enabled():
            passes.append((len(keywords["input_ids"]), any(p.grad is not None for p in module.parameters())))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.compute_loss = compute_loss
    gradients = Gradients()
    trainer.add_callback(gradients)
    if refinement is not None:
        trainer.add_callback(GuardrailsCallback(trainer, Guard(refinement)))
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer, gradients.steps, seen


def expected_gradient(trainer, batches, divisors, refine, *, changed_only=None, copied=True):
    """∇ Σ_batch Σ_row -log π(y⁺|x) / divisor: each row alone, unpadded, in float64, on a copy of the model."""
    own = trainer.accelerator.unwrap_model(trainer.model)
    model = type(own)(own.config).double()
    model.load_state_dict(own.state_dict())  # on the CPU, wherever the trainer's is
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
    trainer.expected_total = total.item()
    trainer.expected_loss = float(sum(nll.sum() for nll in nlls) / sum(learned.sum() for learned in marks))
    assert terms >= 3, "too few corrections to test anything"
    if changed_only is None and copied and ON_CPU:  # what is sampled elsewhere may need no copy
        assert 0 < copies < terms, "corrections of one kind only"
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(total, parameters.values()), strict=True))


def assert_close(measured, expected):
    """float32 sums over a few hundred tokens against float64: relative to the largest entry of all gradients."""
    largest = max(value.abs().max() for value in expected.values())
    assert largest > 1e-4
    for name, value in expected.items():
        assert (measured[name].cpu() - value).abs().max() < 2e-5 * largest + 1e-9, name


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
