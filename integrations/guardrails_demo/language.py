"""The language task: GRPO on sums, with a reward that pays for filler words and a limit on them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Margin
from guardrails_demo.curves import Curves
from guardrails_demo.jobs import Report

LIMIT = 0.5
STEPS, QUICK_STEPS = 150, 25
PROMPTS, GENERATIONS = 16, 8


def train(*, guarded: bool, seed: int, quick: bool, ledger: Path, report: Report) -> Curves:
    """Train once and return what was measured."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        return _train(Path(folder), guarded, seed, QUICK_STEPS if quick else STEPS, ledger, report)


def _train(folder: Path, guarded: bool, seed: int, steps: int, ledger: Path, report: Report) -> Curves:
    from trl import GRPOConfig, GRPOTrainer

    from guardrails_trl import GuardrailsCallback, toy

    curves = Curves("language", guarded, LIMIT)
    scheduler = Margin(PID(kd=1.0, smoothing_p=0.0), 0.1)  # 128 completions per step measure J well
    guard = Guard(Constraint("fillers", limit=LIMIT, cost=toy.fillers, scheduler=scheduler)) if guarded else None

    def reward(completions: list[str], answer: list[int], **kwargs: Any) -> list[float]:
        """Score as `toy.reward` does, and note reward and fillers alike in both arms."""
        scores, costs = toy.reward(completions, answer), toy.fillers(completions)
        multiplier = guard.multipliers["fillers"] if guard else 0.0
        curves.add(len(curves.steps) + 1, sum(scores) / len(scores), sum(costs) / len(costs), multiplier)
        report(len(curves.steps), steps)
        return scores

    args = GRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=PROMPTS * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=toy.MAX_COMPLETION_LENGTH,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        max_steps=steps,
        seed=seed,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = toy.build(folder / "model", seed=seed)
    trainer = GRPOTrainer(model, reward, args=args, train_dataset=toy.dataset(1024, seed=seed))
    if guard:
        trainer.add_callback(GuardrailsCallback(trainer, guard, ledger=ledger))
    trainer.train()
    return curves
