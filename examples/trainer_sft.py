"""Supervised fine-tuning on texts that talk too much, with a limit on the probability of filler words.

    python examples/trainer_sft.py
    python examples/trainer_sft.py --unguarded

Needs `pip install training-guardrails[trl]`. Runs on a CPU in seconds, without any download: model, tokenizer and texts
are made on the spot. Most words of the texts are fillers; the guard keeps the model's probability of the next word
being one below 0.1, and lets it learn the rest.
"""

import argparse
import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Fixed, Margin
from guardrails_transformers import GuardrailsCallback
from guardrails_trl import toy

LIMIT = 0.1


def mass_on(tokens):
    """Return the cost: the mean probability that the next token is one of ``tokens``, a row each."""

    def cost(outputs, inputs):
        mass = outputs.logits.softmax(-1)[..., tokens].sum(-1)
        return (mass * inputs["attention_mask"]).sum(-1) / inputs["attention_mask"].sum(-1)

    return cost


def talkative(n_rows):
    """Answers to sums with filler words around them."""
    rows = toy.dataset(n_rows)
    texts = [f" well so {answer} really basically <eos>" for answer in rows["answer"]]
    return Dataset.from_dict({"prompt": rows["prompt"], "completion": texts})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unguarded", action="store_true")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = toy.build(f"{folder}/model", seed=options.seed)
        args = SFTConfig(
            output_dir=f"{folder}/run",
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            max_steps=options.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
            bf16=False,
            use_cpu=True,
        )
        trainer = SFTTrainer(model, args=args, train_dataset=talkative(1024))
        fillers = trainer.processing_class.convert_tokens_to_ids(list(toy.FILLERS))
        # An unguarded run is measured by a guard with a multiplier of 0, which changes nothing.
        scheduler = Fixed(0.0) if options.unguarded else Margin(PID(kp=1.0, ki=0.1, kd=0.0), 0.1)
        guard = Guard(Constraint("fillers", limit=LIMIT, cost=mass_on(fillers), scheduler=scheduler))
        trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train()

    mass = [entry["guardrails/fillers/cost"] for entry in trainer.state.log_history if "loss" in entry]
    last = max(1, len(mass) // 4)
    print(guard.decision.explain())
    print(f"Last quarter: probability of filler words {sum(mass[-last:]) / last:.3f}, limit {LIMIT}")


if __name__ == "__main__":
    main()
