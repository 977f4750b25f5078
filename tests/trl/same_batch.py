"""Run by `test_trl_distributed_batch.py` on one or two processes: the same completions, scored, guarded and trained on.

A `rollout_func` makes the completions from prompt, step and place in the batch, so that they do not depend on how
many processes share them.
"""

import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_trl import logged
from trl import GRPOConfig, GRPOTrainer

from guardrails import CompetenceMetric, Constraint, Gate, Guard, Require
from guardrails.schedulers import PID, AdaptiveKL
from guardrails_trl import GuardrailsCallback, toy

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "scatter",
)
STEPS = 3


class Short(CompetenceMetric):
    """Competent where a completion is short; on several processes too, as lengths travel with the rewards."""

    name = "test.short"
    requires = frozenset({"lengths"})

    def measure(self, rollout):
        return [1.0 - length / 8 for length in rollout.lengths]


def rollout(prompts, trainer):
    words = toy.tokenizer()
    first = trainer.accelerator.process_index * len(prompts)
    ids = []
    for i, prompt in enumerate(prompts):
        draw = random.Random(f"{prompt} {first + i} {trainer.state.global_step}")
        text = [draw.choice(("7", "9", *toy.FILLERS)) for _ in range(draw.randint(1, 5))]
        ids.append(words(" ".join(text))["input_ids"] + [words.eos_token_id])
    asked = [words(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": asked, "completion_ids": ids, "logprobs": None}


class Counting:
    """Counts what this process sends to the others while in this context."""

    def __enter__(self):
        self.calls, self.bytes = 0, 0
        self._before = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
        for name, function in self._before.items():
            setattr(torch.distributed, name, self._counted(function))
        return self

    def __exit__(self, *error):
        for name, function in self._before.items():
            setattr(torch.distributed, name, function)

    def _counted(self, function):
        def counted(*args, **kwargs):
            self.calls += 1
            self.bytes += sum(value.nbytes for value in args if isinstance(value, torch.Tensor))
            return function(*args, **kwargs)

        return counted


def build(model, folder, n_processes, *, shared=True, **settings):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16 // n_processes,
        "per_device_eval_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    } | settings
    return GRPOTrainer(
        model,
        toy.reward,
        args=GRPOConfig(**arguments),
        train_dataset=toy.dataset(32),
        eval_dataset=toy.dataset(3, seed=1),  # 24 completions: one process has 8 of them twice, or the other none
        rollout_func=rollout if shared else None,
    )


def guarded(trainer, *more):
    gate = Gate(Require(Short(), at_least=0.3), dwell=0, confidence=0.5, rungs=8)
    guard = Guard(
        Constraint("fillers", limit=gate.between(0.2, 0.6), cost=toy.fillers, scheduler=PID()),
        Constraint("right", limit=0.5, cost=toy.correct, scheduler=PID(), sense=">="),
        *more,
    )
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    return guard


def main(model, folder, n_processes):
    torch.set_num_threads(1)
    folder, n_processes = Path(folder), int(n_processes)
    seen = {}
    plain = build(model, folder / "plain", n_processes)
    with Counting() as counted:
        plain.train()
    seen["plain"] = [counted.calls, counted.bytes]
    trainer = build(model, folder / "guarded", n_processes)
    guard = guarded(trainer)
    with Counting() as counted:
        trainer.train()
    seen["guarded"] = [counted.calls, counted.bytes]
    seen["state"] = guard.state_dict()
    seen["costs"] = {name: guard.sanitised(name).tolist() for name in guard.multipliers}
    seen["multipliers"] = logged(trainer, "guardrails/fillers/multiplier")
    seen["weights"] = [weight.sum().item() for weight in trainer.model.state_dict().values()]
    seen["records"] = guard.ledger is not None
    metrics = trainer.evaluate()
    seen["evaluation"] = {name: value for name, value in metrics.items() if "guardrails" in name}

    sampled = build(model, folder / "sampled", n_processes, shared=False, beta=0.1)
    divergence = Constraint(
        "kl", limit=0.01, cost="kl", sense="==", scheduler=AdaptiveKL(0.1, batch_size=16, horizon=64)
    )
    guard = guarded(sampled, divergence)
    sampled.train()
    seen["sampled"] = guard.state_dict()
    seen["beta"] = sampled.beta
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
