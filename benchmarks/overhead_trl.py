"""Time of a TRL GRPO step, guarded over unguarded, measured alternately.

    OMP_NUM_THREADS=1 python benchmarks/overhead_trl.py

Two Llamas, 2 layers of 64 and 4 layers of 256, since what a guard adds does not grow with the model; 16 prompts with 8
completions of up to 12 tokens; two constraints with cheap costs, their multipliers above 0, so that the whole path is
taken. Each round trains both variants for ten steps and takes their median, in an order that changes from round to
round, so that a machine that slows down slows both; a ratio is taken within a round.

The learning rate is 0 and every round seeds both variants alike: with the same weights they sample the same
completions, so their work is equal. Time is the processor time of this single-threaded process, which other
processes of the machine do not enter.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from guardrails import Constraint, Guard
from guardrails.schedulers import Fixed
from guardrails_trl import GuardrailsCallback, toy

STEPS = 10
TARGET = 1.01

_NAMES = ("unguarded", "guarded")


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


def _talk(completions, **kwargs):
    return [float(text.count("so")) for text in completions]


def _length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def _trainer(model: str, folder: str, *, guarded: bool) -> tuple[GRPOTrainer, Clock]:
    args = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=toy.MAX_COMPLETION_LENGTH,
        learning_rate=0.0,
        max_steps=STEPS + 1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(model, toy.reward, args=args, train_dataset=toy.dataset(1024))
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    if guarded:
        guard = Guard(
            Constraint("talk", limit=0.5, cost=_talk, scheduler=Fixed(0.5)),
            Constraint("length", limit=10.0, cost=_length, scheduler=Fixed(0.5)),
        )
        trainer.add_callback(GuardrailsCallback(trainer, guard))
    return trainer, clock


def measure(rounds: int, *, layers: int, width: int) -> list[Row]:
    """Return one row per variant, over ``rounds`` alternating rounds after one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        model = toy.build(f"{folder}/model", steps=0, layers=layers, width=width)
        variants = {name: _trainer(model, f"{folder}/{name}", guarded=name == "guarded") for name in _NAMES}
        steps: dict[str, list[float]] = {name: [] for name in _NAMES}
        for turn in range(rounds + 1):
            for name in _NAMES[:: 1 if turn % 2 else -1]:
                trainer, clock = variants[name]
                torch.manual_seed(turn)
                trainer.train()
                if turn:
                    steps[name].append(float(np.median(clock.take())))
                clock.take()
    rows = []
    for name in _NAMES:
        ratios = np.array(steps[name]) / np.array(steps["unguarded"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        target = TARGET if name == "guarded" else float("nan")
        rows.append(
            Row(f"TRL GRPO {layers} × {width} {name}", float(np.median(steps[name])), middle, low, high, target)
        )
    return rows


def main(rounds: int = 30) -> list[Row]:
    """Print the table and return its rows."""
    torch.set_num_threads(1)
    rows = measure(rounds, layers=2, width=64) + measure(rounds // 3, layers=4, width=256)
    print(f"{'':32}{'ms/step':>9}{'ratio':>8}{'quartiles':>16}{'target':>9}")
    for row in rows:
        target = "" if np.isnan(row.target) else f"<= {row.target:.2f}"
        spread = f"{row.low:.3f} to {row.high:.3f}"
        print(f"{row.variant:32}{row.milliseconds:9.1f}{row.ratio:8.3f}{spread:>16}{target:>9}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    main(parser.parse_args().rounds)
