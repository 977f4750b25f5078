"""Run by `test_trl_distributed.py` under torchrun: a guarded OnlineDPO trainer."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_trl_hosts_pairs import guarded, on_fillers

from guardrails.schedulers import PID
from guardrails_trl import toy


def main(model, folder):
    torch.set_num_threads(1)
    measured, decided = [], []

    def cost(completions, answer, **columns):
        """Fillers, and the answer: OnlineDPO seeds all processes alike, so that only prompts tell them apart."""
        measured.append([fillers + right for fillers, right in zip(toy.fillers(completions), answer, strict=True)])
        return measured[-1]

    trainer, callback = guarded(
        model,
        folder,
        on_fillers(PID(), cost=cost),
        ledger=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    step = callback.guard.step
    callback.guard.step = lambda rollout: decided.append(rollout.cost("fillers").tolist()) or step(rollout)
    trainer.train()
    rank = trainer.accelerator.process_index
    found = {
        "measured": measured,
        "decided": decided,
        "state": callback.guard.state_dict(),
        "traffic": [callback.traffic.collectives, callback.traffic.bytes],
        "records": callback.guard.ledger is not None,
    }
    (Path(folder) / f"pairs{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
