"""The further names of TRL, not all public, that a refinement relies on; those of every guard are in `seams`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trl
from accelerate.utils import gather, gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import use_adapter

from guardrails import AttachError
from guardrails_transformers.dials import steps_in_backward
from guardrails_trl.seams import SCORE, SUPPORTED, Host

STEP = "training_step"
LOSS = "compute_loss"
LOG_PROBS = "_get_per_token_logps_and_entropies"

_PARAMETERS = ["model", "input_ids", "attention_mask", "logits_to_keep"]
_ATTRIBUTES = ("max_completion_length", "chat_template_kwargs", "_tokenizer", "_pending_extra_logs", "_pending_metrics")
_LOSS_TYPES = ("grpo", "sapo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo", "luspo")


class RefineSeams:
    """A GRPO or RLOO trainer as a refinement needs it; the `guardrails.refine.RefineHost` of its refiner.

    Args:
        host: the trainer. Looking at it changes nothing.

    Raises:
        AttachError: if this trainer or version of TRL cannot be refined, with the reason.
    """

    def __init__(self, host: Host) -> None:
        self._host, self._trainer, self.host_name = host, host.trainer, host.name
        _check(host.trainer, host.name)
        if not self.learns_apart and getattr(host.trainer, "aux_loss_enabled", False):
            raise AttachError(
                f"A Refinement cannot be learned on this {host.name}: with FSDP, DeepSpeed, ddp_static_graph or an "
                "optimizer that steps within the backward, corrections are read in the host's own pass, whose "
                "load-balancing loss of experts would count them too. Set router_aux_loss_coef=0, or do without those."
            )

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self._trainer._tokenizer

    @property
    def special_tokens(self) -> tuple[set[int], set[int]]:
        """Return the tokens that no text shows: those the tokenizer has names for, and further ones, of structure."""
        tokenizer = self.tokenizer
        named = set(tokenizer.all_special_ids)
        try:
            added = tokenizer.added_tokens_decoder
        except NotImplementedError:  # a tokenizer of mistral-common has names for all
            added = {}
        return named, {token for token, how in added.items() if how.special} - named

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]:
        """What the host gives the chat template of its prompts besides the messages."""
        return dict(self._trainer.chat_template_kwargs)

    @property
    def max_completion_length(self) -> int:
        """Tokens of a completion at most, its end included."""
        return int(self._trainer.max_completion_length)

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """Let the reference model be used: the host's own, or the policy without its adapter.

        Raises:
            AttachError: if the host holds none, or holds it in pieces.
        """
        trainer = self._trainer
        if self._sharded:
            raise AttachError(
                f"The reference model of this {self.host_name} is spread over the processes (FSDP or DeepSpeed "
                "ZeRO-3), so it cannot write corrections. Use DDP or ZeRO up to stage 2, an EndpointRefiner, or give "
                "each process a model of its own: ModelRefiner(model)."
            )
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.ref_model is not None:
            yield trainer.accelerator.unwrap_model(trainer.ref_model)
        elif hasattr(policy, "peft_config"):
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                yield policy
        else:
            raise AttachError(
                f"This {self.host_name} holds no reference model that could correct its policy: it was built with "
                "beta=0 and without PEFT. Build it with a beta above 0 or a peft_config, or give a model: "
                "ModelRefiner(model)."
            )

    @property
    def learns_apart(self) -> bool:
        """Whether this process may run passes that the others do not run, each with a backward of its own."""
        args = self._trainer.args
        fused = bool(steps_in_backward(self._trainer))  # each backward would be a step of its own
        counted = bool(args.ddp_static_graph) and not self._host.is_alone  # by DDP: each backward's gradients
        return not (self._sharded or self._trainer.is_deepspeed_enabled or fused or counted)

    @property
    def learns_after(self) -> bool:
        """Whether such passes may follow the host's backward: only where that does not sum gradients over processes."""
        return self.learns_apart and self._host.is_alone

    @property
    def _sharded(self) -> bool:
        """Whether the processes hold parts of the weights."""
        plugin = getattr(self._trainer.args, "deepspeed_plugin", None)
        return bool(self._trainer.is_fsdp_enabled or getattr(plugin, "zero_stage", 0) == 3)

    def log_probs(self, model: Any, ids: Tensor, mask: Tensor, n_last: int) -> Tensor:
        """Return the log-probabilities of the last tokens, from a pass of this process alone."""
        trainer = self._trainer
        original = getattr(type(trainer), LOG_PROBS).__get__(trainer)
        with trainer.compute_loss_context_manager():
            values: Tensor = original(trainer.accelerator.unwrap_model(model), ids, mask, n_last)[0]
        return values

    def backward(self, term: Tensor) -> None:
        """Add the gradient of a part of what `compute_loss` returns, scaled as transformers scales the rest."""
        self._trainer.accelerator.backward(self.scaled(term))

    def scaled(self, term: Tensor) -> Tensor:
        """Return a part of what `compute_loss` returns as a part of what `training_step` does."""
        trainer = self._trainer
        return term / trainer.current_gradient_accumulation_steps if isinstance(trainer, RLOOTrainer) else term

    @contextmanager
    def after_backward(self, then: Callable[[], None]) -> Iterator[None]:
        """Call ``then`` once the host has called the next backward, within the time that it counts as the step's."""
        accelerator = self._trainer.accelerator
        original, own = accelerator.backward, vars(accelerator).get("backward")

        def put_back() -> None:
            if own is None:
                vars(accelerator).pop("backward", None)
            else:
                accelerator.backward = own

        def backward(*args: Any, **kwargs: Any) -> None:
            put_back()
            original(*args, **kwargs)
            then()

        accelerator.backward = backward
        try:
            yield
        finally:
            put_back()

    @property
    def _ends(self) -> list[int]:
        """The tokens that end a completion; TRL before 1.15 knows the tokenizer's alone."""
        return getattr(self._trainer, "eos_token_ids", None) or [self.tokenizer.eos_token_id]

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether a completion came to an end of its own."""
        return bool(ids) and ids[-1] in self._ends

    def truncated(self, ids: Sequence[int]) -> bool:
        """Whether the host counts a completion as cut off."""
        return not ids or ids[-1] not in (*self._ends, self.tokenizer.pad_token_id)

    def end_token(self, ids: Sequence[int]) -> int:
        """Return the token that ends a correction of this completion: its own where it has one."""
        if self.ended(ids):
            return ids[-1]
        end = self.tokenizer.eos_token_id
        return int(self._ends[0] if end is None else end)

    def texts(self, completions: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[str]:
        """Return completions as the policy wrote them; of parsed messages the text before parsing."""
        if all(isinstance(completion, str) for completion in completions):
            return list(completions)
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    @staticmethod
    def prompt_ids(output: Mapping[str, Any], rows: Sequence[int]) -> list[list[int]]:
        """Return the tokens of the prompts of some rows of the host's batch, without padding."""
        ids, mask = output["prompt_ids"].cpu(), output["prompt_mask"].cpu().bool()
        return [ids[row][mask[row]].tolist() for row in rows]

    def _message(self, text: str, ids: list[int], prompt_ids: list[int]) -> dict[str, Any]:
        """Return a completion of a conversation as this host makes a message of it: parsed, or its text."""
        base = GRPOTrainer if isinstance(self._trainer, GRPOTrainer) else RLOOTrainer
        parse = getattr(inspect.getmodule(base), "parse_response", None)  # RLOO parses nothing
        prefix = {"prefix": prompt_ids} if parse and "prefix" in inspect.signature(parse).parameters else {}
        templates = ("response_schema", "response_template") if prefix else ("response_schema",)  # TRL before 1.8
        if parse is None or all(getattr(self.tokenizer, name, None) is None for name in templates):
            return {"role": "assistant", "content": text}
        message: dict[str, Any] = parse(self.tokenizer, ids, **prefix)
        return message

    def score(
        self,
        inputs: Sequence[dict[str, Any]],
        prompts: Sequence[Any],
        texts: Sequence[str],
        ids: Sequence[list[int]],
        prompt_ids: Sequence[list[int]],
    ) -> list[float]:
        """Return the host's task reward of other completions of its prompts, NaN where nothing scores them.

        Every process calls it with equally many rows, as the host gathers the scores. What reward functions
        log on the side is dropped: these texts are not the policy's. Where they fail, the scores are NaN.
        """
        trainer = self._trainer
        original = getattr(type(trainer), SCORE).__get__(trainer)
        try:
            shaped = [
                text if isinstance(prompt, str) else [self._message(text, *tokens)]
                for prompt, text, *tokens in zip(prompts, texts, ids, prompt_ids, strict=True)
            ]
            columns = original(list(inputs), list(prompts), shaped, list(ids))
        except Exception:
            width, device = len(trainer.reward_funcs), trainer.accelerator.device
            gather(torch.full((len(prompts), width), float("nan"), device=device))  # the other processes wait for it
            raise
        finally:
            trainer._pending_extra_logs.clear()
            trainer._pending_metrics.clear()
        return [float(value) for value in self._host.local(self._host.total_rewards(columns), len(prompts))]

    @property
    def shows_completions(self) -> bool:
        """Whether the host keeps a table of completions that somebody will see."""
        return bool(self._trainer.log_completions)

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in their order."""
        moved: Tensor = self._trainer.accelerator.gather(rows.to(self._trainer.accelerator.device))
        return moved.cpu()

    def gathered_objects(self, values: list[Any]) -> list[Any]:
        """Return the lists of all processes as one."""
        return list(gather_object(values))

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        total: Tensor = self._trainer.accelerator.reduce(values.to(self._trainer.accelerator.device), reduction="sum")
        return total

    def divisor(self, n_rows: int, n_tokens: float, n_all_tokens: float) -> float:
        """Return by what the host's loss divides a micro-batch's sum over tokens, accumulation included.

        Every divisor is one number for all rows. Where the host averages within each row first (``grpo``,
        ``sapo``), that would weigh a token by the length of its row, and -log π(y) of faultless rows would no longer
        have a gradient of mean zero: it would shorten them. Those are divided by the tokens of the micro-batch. Tokens
        count whether or not ``mask_truncated_completions`` hides them from the host's own loss: as a policy degenerates
        few are left, and the term would outgrow any weight.

        Args:
            n_rows: completions of the micro-batch.
            n_tokens: their sampled tokens.
            n_all_tokens: sampled tokens of the generation batch, over all processes.
        """
        trainer = self._trainer
        if isinstance(self._trainer, RLOOTrainer):
            return n_rows  # of log-probabilities summed per row; transformers divides by the accumulation steps
        steps = float(trainer.current_gradient_accumulation_steps)
        if trainer.loss_type == "luspo":
            return n_rows * steps
        if trainer.loss_type == "dr_grpo":
            return n_rows * self.max_completion_length * steps
        if trainer.loss_type in ("grpo", "sapo", "bnpo"):
            return max(n_tokens, 1.0) * steps
        generations = float(trainer.args.steps_per_generation * trainer.accelerator.num_processes)
        return max(n_all_tokens, 1.0) * steps / generations


def _check(trainer: Any, name: str) -> None:
    base = GRPOTrainer if isinstance(trainer, GRPOTrainer) else RLOOTrainer
    for attribute, what in (
        ("tools", "it calls tools, so a completion is more than one text of the policy's"),
        ("environment_factories", "its environments write parts of a completion"),
        ("rollout_func", "its rollout_func may write parts of a completion"),
        ("use_liger_kernel", "its Liger loss has no log-probabilities of the completions (use_liger_kernel)"),
    ):
        if getattr(trainer, attribute, None):
            raise AttachError(f"A Refinement cannot correct what this {name} generates: {what}. Leave it out here.")
    if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        raise AttachError(
            f"A Refinement cannot correct what this {name} generates: it reads images, which a refiner does not see. "
            "Leave it out here."
        )
    if trainer.max_completion_length is None:
        raise AttachError(
            f"A Refinement cannot correct what this {name} generates: max_completion_length is None, so nothing bounds "
            "the length of a correction. Give the trainer one."
        )
    version = f"training-guardrails cannot put a Refinement into the {base.__name__} of TRL {trl.__version__}"
    cure = f"Install {SUPPORTED}, upgrade training-guardrails, or leave the Refinement out."
    function = getattr(base, LOG_PROBS, None)
    if function is None or list(inspect.signature(function).parameters)[1:5] != _PARAMETERS:
        raise AttachError(
            f"{version}: its method {LOG_PROBS}({', '.join(_PARAMETERS)}, ...) is gone or changed. {cure}"
        )
    missing = [attribute for attribute in _ATTRIBUTES if not hasattr(trainer, attribute)]
    if missing:
        raise AttachError(f"{version}: it has no {', '.join(missing)}. {cure}")
    for method in (LOSS, "_compute_loss", LOG_PROBS):
        if getattr(type(trainer), method, None) is not getattr(base, method, None):
            raise AttachError(
                f"{name} replaces {method} of {base.__name__}, so a Refinement's term might be added to something else "
                f"than a loss on log-probabilities. Use {base.__name__} itself, or leave the Refinement out."
            )
    if base is GRPOTrainer and trainer.loss_type not in _LOSS_TYPES:
        raise AttachError(
            f"A Refinement does not know how the loss_type '{trainer.loss_type}' of this {name} is scaled. Known: "
            f"{', '.join(_LOSS_TYPES)}."
        )
