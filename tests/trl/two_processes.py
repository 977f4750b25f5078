"""Run by `test_trl_distributed.py` under torchrun: one step each of a reward, a cost, and a guarded trainer."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_trl import build_trainer, record_loss_inputs

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Fixed
from guardrails_trl import GuardrailsCallback, toy


def main(model, folder):
    torch.set_num_threads(1)
    seen = {}
    guard = Guard(
        Constraint("fillers", limit=0.1, cost=toy.fillers, scheduler=Fixed(0.5)),
        Constraint("same", limit=0.1, cost=toy.fillers, scheduler=PID()),
    )
    for name in ("reward", "cost", "guarded"):
        trainer = build_trainer(
            model,
            folder,
            rewards=toy.fillers if name == "cost" else toy.reward,
            per_device_train_batch_size=4,
            num_generations=8,  # one group, half of it in each process
            save_strategy="steps" if name == "guarded" else "no",
            save_steps=1,
        )
        recorded = record_loss_inputs(trainer)
        if name == "guarded":
            trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train()
        seen[name] = recorded
    rank = trainer.accelerator.process_index
    seen |= {"multipliers": guard.multipliers, "costs": [guard.sanitised(name).tolist() for name in guard.multipliers]}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
