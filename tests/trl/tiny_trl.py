"""Small real TRL trainers for the tests."""

import torch
from devices import ON_CPU
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from guardrails_trl import toy


def build_trainer(
    model, folder, *, kind="grpo", rewards=toy.reward, seed=0, rows=64, eval_rows=0, cls=None, peft=None, **settings
):
    """A GRPO or RLOO trainer of two groups of four short completions per step."""
    config, default = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": ON_CPU,
        "disable_tqdm": True,
        "seed": seed,
    } | settings
    trainer = (cls or default)(
        model,
        rewards,
        args=config(**arguments),
        train_dataset=toy.dataset(rows, seed=seed),
        eval_dataset=toy.dataset(eval_rows, seed=seed + 1) if eval_rows else None,
        peft_config=peft,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def record_loss_inputs(trainer):
    """Record the advantages the loss is computed from, by completion, through the public override point."""
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        for ids, advantage in zip(inputs["completion_ids"].tolist(), inputs["advantages"].tolist(), strict=True):
            seen.append((tuple(ids), advantage))
        return original(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    return seen


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(trainer, key):
    """All values the host logged under ``key``."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class StepCounter(TrainerCallback):
    """A user's callback of their own."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
