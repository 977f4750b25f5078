"""Every name of transformers that is not public and that this adapter relies on, and how a trainer scales its loss.

Six methods are wrapped on the trainer's instance: what computes the loss, what logs, what evaluates, what writes a
checkpoint, what reads one, and the loop that trains. All of them are checked before the first is touched.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer

from guardrails import AttachError
from guardrails_transformers.wrapping import SHARED, Wrapping, is_wrapped

LOSS = "compute_loss"
LOG = "log"
EVALUATE = "evaluate"

_PARAMETERS = {
    LOSS: ["model", "inputs", "return_outputs", "num_items_in_batch"],
    LOG: ["logs", "start_time"],
    EVALUATE: ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    **SHARED,
}
_ATTRIBUTES = ("accelerator", "callback_handler", "model_accepts_loss_kwargs", "compute_loss_func", "_get_output_dir")
_COMPLETIONS = ("GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer")
"""TRL's trainers that sample completions and score them: a cost of theirs belongs to a completion."""


class Host(Wrapping):
    """A transformers `Trainer`, seen through the names this adapter needs.

    Args:
        trainer: the trainer. Looking at it changes nothing.

    Raises:
        AttachError: if it is no trainer that computes a loss on batches, its version is not supported, or it is
            guarded already.
    """

    def __init__(self, trainer: Any) -> None:
        if not isinstance(trainer, Trainer):
            kind = trainer.__name__ if isinstance(trainer, type) else type(trainer).__name__
            raise AttachError(
                f"GuardrailsCallback(trainer, guard) guards an instance of transformers' Trainer or of a subclass, not "
                f"{kind}."
            )
        _check(trainer, type(trainer).__name__)
        super().__init__(trainer)

    def accumulation(self, num_items_in_batch: Any) -> int:
        """Return what a term of one batch's mean has to be divided by before it joins the host's loss.

        A host that has scaled its loss by the items of the whole accumulated batch divides no more; the others divide
        by the number of accumulated batches after `Trainer.compute_loss`, and the term with it.
        """
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if scaled else 1

    def backbone(self, model: nn.Module) -> nn.Module | None:
        """Return the part of a language ``model`` below its head, where that can be looked at from outside."""
        plain = self.unwrapped(model)
        sharded = str(self.trainer.accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED")
        compiled = hasattr(model, "_orig_mod") or hasattr(plain, "_orig_mod")
        head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
        below = getattr(plain, "base_model", plain)
        return None if sharded or compiled or head is None or below is plain else below

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Return the logits of ``hidden`` states as ``model`` would: in the host's mixed precision, then in single."""
        accelerator = self.trainer.accelerator
        with accelerator.autocast(), torch.enable_grad():  # who asks first may need none, and all get the same
            logits = head_logits(self.unwrapped(model), hidden)
        return logits.float() if accelerator.native_amp else logits

    def unwrapped(self, model: nn.Module) -> Any:
        """Return ``model`` without what accelerate and PEFT have wrapped it in."""
        plain = self.trainer.accelerator.unwrap_model(model)
        return plain.get_base_model() if hasattr(plain, "get_base_model") else plain


def _check(trainer: Any, name: str) -> None:
    bases = [base.__name__ for base in type(trainer).__mro__ if base.__module__.startswith("trl.")]
    foreign = next((base for base in bases if base in _COMPLETIONS), None)
    if foreign is not None:
        raise AttachError(
            f"{name} samples completions, and its costs are functions of them. Guard it with "
            "guardrails_trl.GuardrailsCallback."
        )
    if any(is_wrapped(trainer, method) for method in _PARAMETERS):
        raise AttachError(
            f"This {name} is guarded already. Call detach() on the GuardrailsCallback it has; put several constraints "
            "into one Guard."
        )
    version = f"training-guardrails does not know the Trainer of transformers {transformers.__version__}"
    cure = "Install transformers>=5,<6 or upgrade training-guardrails."
    for method, expected in _PARAMETERS.items():
        function = getattr(Trainer, method, None)
        if function is None or list(inspect.signature(function).parameters)[1:] != expected:
            raise AttachError(f"{version}: its method {method}({', '.join(expected)}) is gone or has changed. {cure}")
    missing = [attribute for attribute in _ATTRIBUTES if not hasattr(trainer, attribute)]
    if missing:
        raise AttachError(f"{version}: it has no {', '.join(missing)}. {cure}")


_RESCALED = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)
"""Settings of models whose logits are more than what their head returns."""


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits of ``hidden`` states, for a host whose fused head returns log-probabilities instead.

    Raises:
        AttachError: if the model does more to its logits than its head does.
    """
    config = model.config.get_text_config()
    rescaled = [name for name in _RESCALED if getattr(config, name, None) not in (None, 1.0)]
    if rescaled:
        raise AttachError(
            f"This host computes no logits, and {type(model).__name__} rescales them ({rescaled[0]}), so they cannot "
            "be made from its head alone. Compute the cost from outputs.log_probs or outputs.entropy."
        )
    head = model.get_output_embeddings()
    logits: Tensor = head(hidden.to(head.weight.device))
    return logits


def is_trained_on(model: nn.Module) -> bool:
    """Whether a loss of ``model`` that is computed now, while its trainer trains, is one to train on."""
    return bool(model.training and torch.is_grad_enabled())
