"""One training of the refiner benchmark: an arm, on a task, from a seed, measured at every step."""

from __future__ import annotations

import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import torch
from datasets import Dataset
from refiner_tasks import TASKS, Task
from refiner_tasks.language import STEPS as REFERENCE_STEPS
from refiner_tasks.language import reference
from refiner_tasks.task import REFINE_PROMPT
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from guardrails import Constraint, Guard, Refinement
from guardrails.refine import Acceptance, Always, Degenerate, Detector, ModelRefiner
from guardrails_trl import GuardrailsCallback

STEPS, LAST = 150, 20
PROMPTS, GENERATIONS, LEARNING_RATE = 16, 8, 1e-3
KL_EVERY = 5
_PACKAGES = ("training-guardrails", "torch", "transformers", "trl")
REFERENCES = Path(__file__).parents[1] / "runs" / "refiner"
"""Where references are kept: one per task and seed, for all arms alike."""


@dataclass(frozen=True)
class Arm:
    """What is done against the reward being hacked.

    Args:
        beta: KL coefficient of the host.
        refinement: from a reference model to the refinement, None for an arm without one.
    """

    beta: float = 0.0
    refinement: Callable[[ModelRefiner], Refinement] | None = None


def _refine(weight, when: Detector | None = None, **settings) -> Arm:
    return Arm(refinement=lambda refiner: Refinement(refiner, weight, when or Always(), **settings))


ARMS = {
    "none": Arm(),
    **{f"KL {beta:g}": Arm(beta=beta) for beta in (0.3, 0.7, 1.0, 1.5, 3.0)},
    **{f"refine {weight:g}": _refine(weight) for weight in (1.0, 2.0, 3.0, 5.0, 10.0)},
    **{f"refine detected {weight:g}": _refine(weight, Degenerate()) for weight in (3.0, 10.0)},
    "refine, edits held at 0.005": _refine(Constraint("edits", limit=0.005)),
    "refine 3, similar by 0.5": _refine(3.0, accept=Acceptance(similarity=0.5)),
    "refine 3, reward no worse": _refine(3.0, accept=Acceptance(reward=True)),
}


@dataclass(frozen=True)
class Setting:
    """A run: a task, an arm, a seed; and for how many steps the reference was taught."""

    task: str
    arm: str
    seed: int
    reference_steps: int = REFERENCE_STEPS


class _Clock(TrainerCallback):
    """Processor time of each step, without the benchmark's own measurements."""

    def __init__(self, observer: Observer) -> None:
        self.seconds: list[float] = []
        self._observer, self._begun = observer, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Note when a step begins."""
        self._begun, self._observer.seconds = time.process_time(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Note how long it took."""
        self.seconds.append(time.process_time() - self._begun - self._observer.seconds)


class Observer:
    """The reward function, which also measures what the trainer is not told.

    Attributes:
        curves: what was measured: one value per step, of ``kl`` one per `KL_EVERY` steps.
        seconds: processor time spent on measurements since it was last set.
    """

    __name__ = "reward"

    def __init__(self, task: Task, words, original) -> None:
        self._task, self._words, self._original = task, words, original
        self.policy = None
        self.seconds = 0.0
        names = ("reward", "true", "degenerate", "detected", "length", "kl")
        self.curves: dict[str, list[float]] = {name: [] for name in names}
        self.sample: list[str] = []

    def __call__(self, prompts, completions, completion_ids, **columns):
        rows = [
            {"prompt": prompt, **{name: columns[name][i] for name in columns if name in self._task.columns}}
            for i, prompt in enumerate(prompts)
        ]
        rewards = self._task.rewards(completions, rows)
        begun = time.process_time()
        self._measure(prompts, completions, completion_ids, rows, rewards)
        self.seconds += time.process_time() - begun
        return rewards

    def _measure(self, prompts, completions, completion_ids, rows, rewards) -> None:
        ended = [bool(ids) and ids[-1] == self._words.eos_token_id for ids in completion_ids]
        verdicts = [
            (verdict.well_formed and end, verdict.right and end)
            for verdict, end in zip(self._task.judge(completions, rows), ended, strict=True)
        ]
        found = Degenerate()(prompts=prompts, completions=completions)
        curves, step = self.curves, len(self.curves["reward"])
        curves["reward"].append(float(np.mean(rewards)))
        curves["true"].append(float(np.mean([right for _, right in verdicts])))
        curves["degenerate"].append(1.0 - float(np.mean([form for form, _ in verdicts])))
        curves["detected"].append(float(np.mean([hit or not end for hit, end in zip(found, ended, strict=True)])))
        curves["length"].append(float(np.mean([len(ids) for ids in completion_ids])))
        if step % KL_EVERY == KL_EVERY - 1:
            curves["kl"].append(self._kl(prompts, completion_ids))
        self.sample = [
            f"{prompt} | {text}"
            for prompt, text in zip(prompts[::GENERATIONS], completions[::GENERATIONS], strict=True)
        ]

    @torch.no_grad()
    def _kl(self, prompts, completion_ids) -> float:
        """Return the mean over completions of Σₜ KL(π(·|x, y₍<t₎) ‖ π_ref), in nats, exact at each token."""
        prompt_ids = [self._words(prompt)["input_ids"] for prompt in prompts]
        rows = [p + list(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        width = max(map(len, rows))
        ids, mask, inside = (torch.full((len(rows), width), fill) for fill in (self._words.pad_token_id, 0, 0))
        for row, (p, whole) in enumerate(zip(prompt_ids, rows, strict=True)):
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
            inside[row, len(p) - 1 : len(whole) - 1] = 1
        p, q = (
            model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1) for model in (self.policy, self._original)
        )
        return float((((p.exp() * (p - q)).sum(-1)) * inside).sum() / len(rows))


def train(setting: Setting, *, steps: int = STEPS) -> dict:
    """Return the record of one run."""
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    begun = time.perf_counter()
    task = TASKS[setting.task]()
    folder = reference(task, REFERENCES, seed=setting.seed, steps=setting.reference_steps)
    arm = ARMS[setting.arm]
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    observer = Observer(task, AutoTokenizer.from_pretrained(folder), original)
    draw = random.Random(1000 + setting.seed)
    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            folder,
            observer,
            args=GRPOConfig(
                output_dir=output,
                per_device_train_batch_size=PROMPTS * GENERATIONS,
                num_generations=GENERATIONS,
                max_completion_length=task.completion_length,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                beta=arm.beta,
                max_steps=steps,
                seed=setting.seed,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([task.question(draw) for _ in range(steps * PROMPTS)]),
        )
        trainer.remove_callback(PrinterCallback)
        observer.policy = trainer.model
        if arm.refinement is not None:
            guard = Guard(
                arm.refinement(ModelRefiner(original, prompt=REFINE_PROMPT, batch_size=PROMPTS * GENERATIONS))
            )
            trainer.add_callback(GuardrailsCallback(trainer, guard, ledger=False))
        clock = _Clock(observer)
        trainer.add_callback(clock)
        trainer.train()
    task.close()
    return {
        "task": setting.task,
        "arm": setting.arm,
        "seed": setting.seed,
        "steps": steps,
        "command": f"python benchmarks/refiner.py one '{setting.task}' '{setting.arm}' {setting.seed}",
        "versions": versions(),
        "seconds": round(time.perf_counter() - begun, 1),
        "step_ms": round(1e3 * float(np.median(clock.seconds)), 1),
        "last": {name: round(float(np.mean(values[-_last(name) :])), 4) for name, values in observer.curves.items()},
        "curves": {name: [round(value, 3) for value in values] for name, values in observer.curves.items()},
        "refinement": _refinement(trainer.state.log_history),
        "sample": observer.sample[:4],
    }


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _last(name: str) -> int:
    return LAST // KL_EVERY if name == "kl" else LAST


def _refinement(history: list[dict]) -> dict[str, list[float]]:
    """Return what the adapter logged about the refinement, step by step; nothing in the other arms."""
    prefix, found = "guardrails/refinement/", {}
    for name in ("weight", "edit_ratio", "intervention_rate", "change_rate", "acceptance_rate", "loss", "seconds"):
        values = [entry[prefix + name] for entry in history if prefix + name in entry]
        if values:
            found[name] = [value if value is None else round(value, 4) for value in values]
    return found
