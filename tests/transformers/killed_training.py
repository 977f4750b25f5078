"""Run by `test_transformers_resume.py`: a guarded training in a process of its own, to be killed and resumed."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_trainer import Rows, build, classifier, positives
from transformers import TrainerCallback

from guardrails import Constraint, Dial, Gate, Guard, Require
from guardrails.competence import ConstraintSatisfaction
from guardrails.schedulers import PID, AugmentedLagrangian
from guardrails_transformers import GuardrailsCallback


class Slow(TrainerCallback):
    """Says which step has ended, so that a kill can fall anywhere."""

    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)


def trainer_and_guard(folder, **settings):
    def wrong(outputs, inputs):
        return (outputs["logits"].argmax(-1) != inputs["labels"]).float()

    settings = {"max_steps": 40, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 3} | settings
    trainer = build(
        classifier(dropout=0.3),
        folder,
        Rows(96),
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        **{name: value for name, value in settings.items() if name != "lr_scheduler_type"},
    )
    gate = Gate(Require(ConstraintSatisfaction("wrong", 0.5), at_least=0.4), dwell=0, rungs=4)
    guard = Guard(
        Constraint("c", limit=gate.between(0.2, 0.4), cost=positives, scheduler=PID()),
        Constraint("d", limit=0.3, cost=positives, scheduler=AugmentedLagrangian(2.0, learning_rate=0.1)),
        Dial("learning_rate", gate.between(0.5, 1.0)),
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard, columns={"wrong": wrong}))
    return trainer, guard


def main(folder, resume):
    torch.set_num_threads(1)
    trainer, guard = trainer_and_guard(folder)
    trainer.add_callback(Slow())
    trainer.train(resume_from_checkpoint=resume or None)
    torch.save(trainer.model.state_dict(), Path(folder) / "weights.pt")
    (Path(folder) / "state.json").write_text(json.dumps(guard.state_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
