"""Time of a transformers Trainer step, guarded over unguarded, measured alternately.

    OMP_NUM_THREADS=1 python benchmarks/overhead_trainer.py

A Llama of 10.6M parameters (6 layers of 320, 4,096 words), batches of 8 rows of 64 tokens. Variants: the trainer
alone; the same with five constraints on costs of the batch and five metrics that a gate requires; the same with one
differentiable cost, the probability mass on 50 words, whose multiplier is above 0, so that it takes its own part of the
backward pass, without a further forward pass. Each round trains every variant for some steps, in an order that
changes from round to round, so that a machine that slows down slows all; a ratio is taken within a round, of medians
over its steps.

The learning rate is 0 and every round seeds all variants alike: their work is equal but for the guard. Time is the
processor time of this single-threaded process, which other processes of the machine do not enter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from guardrails import Constraint, Gate, Guard, Require
from guardrails.competence import ConstraintSatisfaction
from guardrails.schedulers import PID, Fixed
from guardrails_transformers import GuardrailsCallback

WORDS, LENGTH, ROWS = 4096, 64, 8

TARGETS = {"unguarded": float("nan"), "5 constraints, 5 metrics": 1.01, "a differentiable cost": 1.03}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        variant: what was measured.
        milliseconds: median step, over steps and rounds.
        ratio: median over the rounds of guarded over unguarded.
        low: lower quartile of that ratio.
        high: upper quartile of it.
        target: the most that is promised, NaN for the baseline.
    """

    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    target: float


class Clock(TrainerCallback):
    """Processor time of each step, from its beginning to the next one's, its logging included."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Note when a step begins."""
        self.begun.append(time.process_time())

    def take(self) -> np.ndarray:
        """Return the durations of the steps so far, in milliseconds, and forget them."""
        durations = np.diff(self.begun) * 1e3
        self.begun = []
        return durations


def _share(first: int):
    """Return a cost of a batch: the share of words below ``first``, a row each; it has no gradient."""
    return lambda outputs, inputs: (inputs["input_ids"] < first).float().mean(-1)


def _mass(outputs, inputs):
    """Return the mean probability that the next word is one of the first 50, a row each."""
    return outputs.logits.softmax(-1)[..., :50].sum(-1).mean(-1)


def _guard(variant: str) -> Guard | None:
    if variant == "a differentiable cost":
        return Guard(Constraint("mass", limit=0.001, cost=_mass, scheduler=Fixed(0.5)))
    if variant == "5 constraints, 5 metrics":
        costs = {f"cost{i}": _share(100 * (i + 1)) for i in range(5)}
        requires = [
            Require(ConstraintSatisfaction(name, 0.5, margin=0.1 * (i + 1)), at_least=0.9)
            for i, name in enumerate(costs)
        ]
        for i, each in enumerate(requires):
            each.measured.name = f"metric{i}"
        gate = Gate(*requires)
        return Guard(
            *(
                Constraint(name, limit=gate.between(0.1, 0.2) if name == "cost0" else 0.1, cost=cost, scheduler=PID())
                for name, cost in costs.items()
            )
        )
    return None


def _trainer(variant: str, folder: str, steps: int) -> tuple[Trainer, Clock]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=6,
        num_attention_heads=5,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    words = torch.randint(0, WORDS, (512, LENGTH))
    trainer = Trainer(
        LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            learning_rate=0.0,
            max_steps=steps + 1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in words],
    )
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    guard = _guard(variant)
    if guard is not None:
        trainer.add_callback(GuardrailsCallback(trainer, guard))
    return trainer, clock


def measure(rounds: int, steps: int) -> list[Row]:
    """Return one row per variant, over ``rounds`` alternating rounds of ``steps`` after one to warm up."""
    names = list(TARGETS)
    with tempfile.TemporaryDirectory() as folder:
        variants = {name: _trainer(name, f"{folder}/{i}", steps) for i, name in enumerate(names)}
        found: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            order = [names[(turn + i) % len(names)] for i in range(len(names))]
            for name in order:
                trainer, clock = variants[name]
                torch.manual_seed(turn)
                trainer.train()
                durations = clock.take()
                if turn:
                    found[name].append(float(np.median(durations)))
    size = sum(parameter.numel() for parameter in variants["unguarded"][0].model.parameters())
    print(f"{size / 1e6:.1f}M parameters, {ROWS} rows of {LENGTH} tokens, {rounds} rounds of {steps} steps")
    rows = []
    for name in names:
        ratios = np.array(found[name]) / np.array(found["unguarded"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows.append(Row(f"Trainer, {name}", float(np.median(found[name])), middle, low, high, TARGETS[name]))
    return rows


def main(rounds: int = 20, steps: int = 8) -> list[Row]:
    """Print the table and return its rows."""
    torch.set_num_threads(1)
    rows = measure(rounds, steps)
    print(f"{'':36}{'ms/step':>9}{'ratio':>8}{'quartiles':>16}{'target':>9}")
    for row in rows:
        target = "" if np.isnan(row.target) else f"<= {row.target:.2f}"
        spread = f"{row.low:.3f} to {row.high:.3f}"
        print(f"{row.variant:36}{row.milliseconds:9.1f}{row.ratio:8.3f}{spread:>16}{target:>9}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    main(options.rounds, options.steps)
