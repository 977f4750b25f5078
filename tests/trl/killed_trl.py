"""Run by `test_trl_resume_killed.py`: a guarded training in a process of its own, to be killed and resumed."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_trl import build_trainer
from transformers import TrainerCallback

from guardrails import Constraint, Dial, Gate, Guard, Require
from guardrails.schedulers import PID, AdaptiveKL, AugmentedLagrangian
from guardrails_trl import GuardrailsCallback, toy

STEPS = 14


class Saying(TrainerCallback):
    """Says which step has ended, so that a kill can fall anywhere."""

    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)


def words(completions, **columns):
    return [float(len(text.split())) for text in completions]


def trainer_and_guard(model, folder, *, kind="grpo", **settings):
    """Every part whose state a resume could lose: three schedulers, a gate that climbs, and a dial that it turns."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, "beta": 0.1} | settings
    trainer = build_trainer(
        model, folder, kind=kind, gradient_accumulation_steps=2, num_generations=8, learning_rate=3e-3, **settings
    )
    gate = Gate(Require("reward_level", at_least=0.05), dwell=0, rungs=4, confidence=0.5)
    guard = Guard(
        Constraint("fillers", limit=gate.between(0.2, 0.4), cost=toy.fillers, scheduler=PID()),
        Constraint("words", limit=2.0, cost=words, scheduler=AugmentedLagrangian(1.0, learning_rate=0.1)),
        Constraint("kl", limit=0.01, sense="==", cost="kl", scheduler=AdaptiveKL(0.1, batch_size=16, horizon=64)),
        Dial("temperature", gate.between(0.8, 1.0)),
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    return trainer, guard


def main(model, folder, kind, resume):
    torch.set_num_threads(1)
    trainer, guard = trainer_and_guard(model, folder, kind=kind)
    trainer.add_callback(Saying())
    trainer.train(resume_from_checkpoint=resume or None)
    torch.save(trainer.model.state_dict(), Path(folder) / "weights.pt")
    (Path(folder) / "state.json").write_text(json.dumps(guard.state_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
