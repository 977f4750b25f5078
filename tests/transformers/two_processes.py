"""Run by `test_transformers_distributed.py`, in one process or in two: short guarded trainings of several hosts."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from datasets import Dataset
from tiny_trainer import Rows, build, classifier, logged, positives
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, AugmentedLagrangian
from guardrails_transformers import GuardrailsCallback
from guardrails_trl import toy

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def report(prediction):
    """A metric on which processes disagree, as they do on times: the first one's is what all decide on."""
    wrong = float((prediction.predictions.argmax(-1) != prediction.label_ids).mean())
    return {"wrong": wrong + 0.1 * int(os.environ.get("RANK", "0"))}


def classify(folder, *, rows=64, accumulated=1, rare=False):
    counts = []

    def few(outputs, inputs):
        """Rows of rare positives alone; most batches, and so processes, have none."""
        chosen = (inputs["labels"] == 1) & (inputs["features"][:, 1] > 0.5)
        counts.append(int(chosen.sum()))
        return positives(outputs, inputs)[chosen]

    trainer = build(
        classifier(),
        folder,
        Rows(rows),
        eval_data=Rows(24, seed=1),
        extra={"compute_metrics": report},
        per_device_train_batch_size=8 // WORLD,
        gradient_accumulation_steps=accumulated,
        max_steps=8,
        max_grad_norm=0.5,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    guard = Guard(
        Constraint("linear", limit=0.2, cost=positives, scheduler=PID(kp=1.0)),
        Constraint("bent", limit=0.3, cost=positives, scheduler=AugmentedLagrangian(2.0, learning_rate=0.1)),
        Constraint("number", limit=0.3, cost=lambda o, i: positives(o, i).mean(), scheduler=PID(kp=1.0)),
        *([Constraint("few", limit=0.3, cost=few, scheduler=PID(kp=1.0))] if rare else []),
        Constraint("wrong", limit=0.2, cost="eval_wrong", scheduler=PID(kp=1.0)),
    )
    callback = GuardrailsCallback(trainer, guard, drives={"wrong": "args.max_grad_norm"})
    trainer.add_callback(callback)
    trainer.train()
    return seen(trainer, guard, callback, "linear") | {"counts": counts}


def talk(outputs, inputs):
    """Probability mass on filler words, a row each; the model's own head returns none, so it is asked for logits."""
    mass = outputs.logits.softmax(-1)[..., -len(toy.FILLERS) :].sum(-1)
    mask = inputs["attention_mask"]
    return (mass * mask).sum(-1) / mask.sum(-1)


def tune(model, folder):
    texts = {"text": [f"{i % 7} + 2 = {'well ' * (i % 3)}{(i % 7) + 2} <eos>" for i in range(64)]}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8 // WORLD,
            max_steps=6,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=Dataset.from_dict(texts),
    )
    trainer.remove_callback(PrinterCallback)
    guard = Guard(Constraint("talk", limit=0.02, cost=talk, scheduler=PID(kp=1.0)))
    callback = GuardrailsCallback(trainer, guard)
    trainer.add_callback(callback)
    trainer.train()
    return seen(trainer, guard, callback, "talk")


def seen(trainer, guard, callback, name):
    return {
        "costs": logged(trainer, f"guardrails/{name}/cost"),
        "multipliers": guard.multipliers,
        "state": guard.state_dict(),
        "rows": guard.decision.n_rows,
        "weights": [value.flatten().tolist() for value in trainer.model.state_dict().values()],
        "traffic": [callback.traffic.collectives, callback.traffic.bytes],
        "ledger": guard.ledger is not None,
    }


def main(model, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    found = {
        "plain": classify(folder / "plain"),
        "accumulated": classify(folder / "accumulated", accumulated=2),
        "uneven": classify(folder / "uneven", rows=21, rare=True),
        "sft": tune(model, folder / "sft"),
    }
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"rank{rank}of{WORLD}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
