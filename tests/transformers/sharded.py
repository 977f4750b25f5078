"""Run by `test_transformers_distributed.py` in one process, or in two that hold half of the weights each (FSDP)."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tiny_trainer import Sentences, build, first_words, language_model, logged

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, AugmentedLagrangian
from guardrails_transformers import GuardrailsCallback

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def shard_on_cpus():
    """Let accelerate shard over CPUs: that the processes have no GPUs is all that keeps it from it."""
    begin = PartialState.__init__

    def begun(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = begun


def train(folder, *, guarded=True, resume=None):
    sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    trainer = build(
        language_model(),
        folder,
        Sentences(64),
        max_steps=6,
        per_device_train_batch_size=8 // WORLD,
        gradient_accumulation_steps=2,
        save_strategy="steps" if guarded else "no",
        save_steps=3,
        **(sharding if WORLD > 1 else {}),
    )
    guard = Guard(
        Constraint("linear", limit=0.05, cost=first_words, scheduler=PID(kp=2.0)),
        Constraint("bent", limit=0.05, cost=first_words, scheduler=AugmentedLagrangian(2.0, learning_rate=0.1)),
    )
    if guarded:
        trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train(resume_from_checkpoint=resume)
    return {
        "kind": str(trainer.accelerator.distributed_type).rpartition(".")[2],
        "losses": logged(trainer, "loss"),
        "costs": logged(trainer, "guardrails/linear/cost"),
        "state": guard.state_dict(),
    }


def main(folder):
    torch.set_num_threads(1)
    shard_on_cpus()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {"plain": train(folder / "plain", guarded=False), "whole": train(folder / "whole")}
    found["resumed"] = train(folder / "whole", resume=str(folder / "whole" / "checkpoint-3"))
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"sharded{rank}of{WORLD}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
