"""Fine-tuning a language model while its divergence from where it started is held at a target.

    python examples/trainer_kl.py
    python examples/trainer_kl.py --unguarded

Needs `pip install training-guardrails[trl]`, for the toy task alone: the trainer is transformers' own. Runs on a CPU
in seconds, without any download. `AdaptiveKL` holds KL(model || start) at 0.05 nats per token from both sides: the
weight of the divergence grows while it is above the target and shrinks while it is below.
"""

import argparse
import copy
import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from guardrails import Constraint, Guard
from guardrails.schedulers import AdaptiveKL, Fixed
from guardrails_transformers import GuardrailsCallback
from guardrails_trl import toy

TARGET = 0.05


def divergence_from(start):
    """Return the cost: KL(model || start) in nats per token, a row each. It takes a forward pass of ``start``."""

    def cost(outputs, inputs):
        with torch.no_grad():
            before = start(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
        now = outputs.logits.log_softmax(-1)
        per_token = (now.exp() * (now - before)).sum(-1)
        return (per_token * inputs["attention_mask"]).sum(-1) / inputs["attention_mask"].sum(-1)

    return cost


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unguarded", action="store_true")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = toy.build(f"{folder}/model", seed=options.seed)
        model, words = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        rows = toy.dataset(1024, seed=options.seed)
        texts = [f"{sum_} well {answer} <eos>" for sum_, answer in zip(rows["prompt"], rows["answer"], strict=True)]
        trainer = Trainer(
            model,
            args=TrainingArguments(
                output_dir=f"{folder}/run",
                per_device_train_batch_size=32,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                max_steps=options.steps,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=options.seed,
                use_cpu=True,
            ),
            train_dataset=[words(text) for text in texts],
            data_collator=DataCollatorForLanguageModeling(words, mlm=False),
        )
        start = copy.deepcopy(model).requires_grad_(False).eval()
        # An unguarded run is measured by a guard with a multiplier of 0, which changes nothing.
        held = AdaptiveKL(0.01, batch_size=32, horizon=320, clip=1.0)
        kl = Constraint("kl", limit=TARGET, cost=divergence_from(start), sense="==", scheduler=held)
        if options.unguarded:
            kl = Constraint("kl", limit=TARGET, cost=divergence_from(start), scheduler=Fixed(0.0))
        guard = Guard(kl)
        trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train()

    found = [entry["guardrails/kl/cost"] for entry in trainer.state.log_history if "loss" in entry]
    last = max(1, len(found) // 4)
    print(guard.decision.explain())
    print(f"Last quarter: divergence {sum(found[-last:]) / last:.3f} nats per token, target {TARGET}")


if __name__ == "__main__":
    main()
