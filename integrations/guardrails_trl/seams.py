"""Every name of TRL and transformers that is not public and that this adapter relies on.

TRL offers no hook between scoring and the loss, so three methods are wrapped on the trainer's instance, and a
few of its attributes are read. All of them are checked before the first is touched.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import trl
from packaging.version import Version
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from guardrails import AttachError
from guardrails_transformers.wrapping import SHARED, Wrapping, is_wrapped
from guardrails_trl import advantages

SUPPORTED = "trl>=1.6,<2"
"""Versions whose names are known here; errors ask for them, and the extra ``trl`` does."""

Mode: TypeAlias = Literal["train", "eval"]

SCORE = "_calculate_rewards"
GENERATE_AND_SCORE = "_generate_and_score_completions"
LOG_PROBS = "_get_per_token_logps_and_entropies"

_PARAMETERS = {
    SCORE: ["inputs", "prompts", "completions", "completion_ids_list"],
    GENERATE_AND_SCORE: ["inputs"],
    **SHARED,
}
_LISTS = ("reward_funcs", "reward_processing_classes", "reward_func_names")
_ATTRIBUTES = (*_LISTS, "reward_weights", "num_generations", "accelerator", "callback_handler", "_metrics", "_logs")
_OF_CLASS = {
    GRPOTrainer: ("scale_rewards", "multi_objective_aggregation"),
    RLOOTrainer: ("normalize_advantages",),
}


class Host(Wrapping):
    """A GRPO or RLOO trainer, seen through the names this adapter needs.

    Args:
        trainer: the trainer. Looking at it changes nothing.

    Raises:
        AttachError: if its class or its version of TRL is not supported, or it is guarded already.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        _check(trainer, next(base for base in _OF_CLASS if isinstance(trainer, base)), self.name)
        self._loop: _Loop | None = None

    @property
    def mode(self) -> Mode:
        """The key under which the host logs what it does now."""
        return "train" if self.trainer.model.training else "eval"

    @property
    def data_columns(self) -> set[str] | None:
        """Columns a cost function receives, or None where rollouts may add others while training."""
        dynamic = any(getattr(self.trainer, name, None) for name in ("rollout_func", "environment_factories"))
        columns = getattr(self.trainer.train_dataset, "column_names", None)
        return None if dynamic or not isinstance(columns, list) else set(columns)

    @property
    def rollout_columns(self) -> set[str]:
        """Columns of the rollouts a guard sees here: with several processes only what the host gathers anyway."""
        columns = {"rewards", "costs", "lengths"}
        if self.is_alone:
            columns |= {"prompts", "completions", "infos"}
            columns |= {"entropy"} if self._has_old_log_probs else set()
            columns |= {"kl"} if self._has_old_log_probs and self._is_grpo and self.trainer.beta != 0.0 else set()
        return columns

    @property
    def _is_grpo(self) -> bool:
        return isinstance(self.trainer, GRPOTrainer)

    @property
    def _has_old_log_probs(self) -> bool:
        """Whether the host computes the log-probabilities of what it has just sampled: RLOO does, GRPO where it must.

        That is where a batch is used for several updates, or where vLLM sampled it.
        """
        trainer = self.trainer
        if not self._is_grpo:
            return True
        steps = trainer.args.steps_per_generation * trainer.num_iterations
        corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        return bool(trainer.args.gradient_accumulation_steps % steps != 0 or corrects)

    def divergences(self, output: dict[str, Any]) -> dict[str, list[float]]:
        """Return ``entropy`` and ``kl`` per completion, in nats per token, from what the host computed for a batch.

        Entropy is estimated by -log π of the sampled tokens; the divergence by exp(r) - r - 1 with
        r = log π_ref - log π, as the host's own ``kl`` is. Both are at the temperature of sampling, and means over the
        tokens that the policy sampled: what a tool, environment or ``rollout_func`` wrote is left out. They are NaN
        for completions without any, and for those that ``mask_truncated_completions`` hides.
        """
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        n_tokens = mask.sum(dim=1).float()
        n_tokens[n_tokens == 0] = float("nan")  # of what is masked as truncated the host computes nothing
        if not self._is_grpo:
            return {"entropy": (-output["old_logps"] / n_tokens).tolist()}
        policy = output["old_per_token_logps"]
        columns = {"entropy": (-(policy * mask).sum(dim=1) / n_tokens).tolist()}
        if "ref_per_token_logps" in output:
            ratio = output["ref_per_token_logps"] - policy
            columns["kl"] = (((ratio.exp() - ratio - 1.0) * mask).sum(dim=1) / n_tokens).tolist()
        return columns

    def unwrap(self) -> None:
        """Take all wrappers off, or none, and end what was started for them.

        Raises:
            AttachError: if somebody has wrapped a method again since.
        """
        super().unwrap()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    @contextmanager
    def scoring_with(self, functions: dict[str, Callable[..., Any]], *, has_async: bool) -> Iterator[None]:
        """Let the host score ``functions`` beside its rewards, in its own columns' order, while in this context."""
        trainer = self.trainer
        before = {name: getattr(trainer, name) for name in _LISTS}
        needs_loop = has_async and not hasattr(trainer, "async_loop")
        if needs_loop:
            self._loop = self._loop or _Loop()
            trainer.async_loop = self._loop.loop
        try:
            trainer.reward_funcs = [*before["reward_funcs"], *functions.values()]
            trainer.reward_processing_classes = [*before["reward_processing_classes"], *(None for _ in functions)]
            trainer.reward_func_names = [*before["reward_func_names"], *functions]
            yield
        finally:
            for name, value in before.items():
                setattr(trainer, name, value)
            if needs_loop:
                del trainer.async_loop

    def total_rewards(self, columns: Tensor) -> Tensor:
        """Return the host's weighted sum of reward columns, ``(n_rows,)``; NaN where none gave a value."""
        total: Tensor = (columns * self.trainer.reward_weights.to(columns.device)).nansum(dim=1)
        total[columns.isnan().all(dim=1)] = float("nan")
        return total

    def advantages(self, values: Tensor) -> Tensor:
        """Return the training advantages the host would compute if ``values`` were its only reward."""
        trainer: Any = self.trainer
        size = trainer.num_generations
        if isinstance(trainer, RLOOTrainer):
            return advantages.rloo(values, size, normalize=trainer.normalize_advantages)
        return advantages.grpo(
            values, size, scale_rewards=trainer.scale_rewards, aggregation=trainer.multi_objective_aggregation
        )

    def local(self, rows: Tensor, n_local: int) -> Tensor:
        """Return this process's slice of globally gathered rows."""
        start = self.trainer.accelerator.process_index * n_local
        return rows[start : start + n_local]

    def log(self, mode: Mode, metrics: dict[str, float]) -> None:
        """Add scalars to those the host averages and sends to its loggers at its next `log`."""
        for name, value in metrics.items():
            self.trainer._metrics[mode][name].append(value)

    def logged_advantages(self, n_rows: int) -> list[float]:
        """Return the last ``n_rows`` advantages of the host's completions table."""
        return list(self.trainer._logs["advantages"])[-n_rows:]

    def replace_logged_advantages(self, values: Sequence[float]) -> None:
        """Overwrite the last rows of the advantages in the host's completions table."""
        column = self.trainer._logs["advantages"]
        for _ in range(min(len(values), len(column))):
            column.pop()
        column.extend(values)

    def log_column(self, name: str, values: Sequence[Any]) -> None:
        """Append ``values`` to a column of the host's completions table, padding the rows it was not there for."""
        column, n_rows = self.trainer._logs["extra"][name], len(self.trainer._logs["prompt"])
        rows = [*column, *values][-n_rows:]
        column.clear()
        column.extend([None] * (n_rows - len(rows)) + rows)

    def forget(self, prefix: str) -> None:
        """Drop every metric and table column whose name starts with ``prefix``."""
        for store in (*self.trainer._metrics.values(), self.trainer._logs["extra"]):
            for name in [name for name in store if name.startswith(prefix)]:
                del store[name]


def check_free(trainer: Any, name: str, methods: Iterable[str], own: Iterable[str]) -> None:
    """Raise unless nothing of a guard's is in the place of ``methods``, and nothing of anybody's in that of ``own``.

    Raises:
        AttachError: otherwise.
    """
    if any(method in vars(trainer) for method in own) or any(is_wrapped(trainer, method) for method in methods):
        raise AttachError(
            f"This {name} is guarded already, or something else has wrapped its scoring. Call detach() on the "
            "GuardrailsCallback it has; put several constraints into one Guard."
        )


def _check(trainer: Any, base: type, name: str) -> None:
    check_free(trainer, name, _PARAMETERS, (SCORE, GENERATE_AND_SCORE))
    version = f"training-guardrails does not know the {base.__name__} of TRL {trl.__version__}"
    cure = f"Install {SUPPORTED} or upgrade training-guardrails."
    if Version(trl.__version__) < Version("1.6"):
        raise AttachError(
            f"{version}: it computes the spread of rewards by other operations, and gives a completion that no reward "
            f"function scored an advantage of its own. {cure}"
        )
    for method, expected in _PARAMETERS.items():
        if _parameters(base, method) != expected:
            raise AttachError(f"{version}: its method {method}({', '.join(expected)}) is gone or has changed. {cure}")
    missing = [attribute for attribute in (*_ATTRIBUTES, *_OF_CLASS[base]) if not hasattr(trainer, attribute)]
    missing += [
        f"_logs['{key}']" for key in ("prompt", "advantages", "extra") if key not in getattr(trainer, "_logs", ())
    ]
    if missing:
        raise AttachError(f"{version}: it has no {', '.join(missing)}. {cure}")
    for method in (SCORE, GENERATE_AND_SCORE):
        if getattr(type(trainer), method) is not getattr(base, method):
            raise AttachError(
                f"{name} replaces {method} of {base.__name__}, so its advantages may mean something else and a guard "
                f"could not keep its promise. Use {base.__name__} itself, or a subclass that leaves this method alone."
            )


def _parameters(base: type, method: str) -> list[str] | None:
    function = getattr(base, method, None)
    return None if function is None else list(inspect.signature(function).parameters)[1:]


def check_log_probs(base: type, host: str) -> None:
    """Raise unless the host computes log-probabilities with the arguments that this adapter knows.

    Raises:
        AttachError: naming the version.
    """
    expected = ["model", "input_ids", "attention_mask", "logits_to_keep"]
    if (_parameters(base, LOG_PROBS) or [])[:4] != expected:
        raise AttachError(
            f"training-guardrails cannot measure the divergence of the {host} of TRL {trl.__version__}: its method "
            f"{LOG_PROBS}({', '.join(expected)}, ...) is gone or has changed. Install {SUPPORTED} or upgrade "
            "training-guardrails."
        )


def temperature_cells(trainer: Any, host: str) -> list[Any]:
    """Return the closure cells with the temperature at which the host's fused heads score tokens.

    TRL from 1.15 on hands it to the model's forward once, at construction; before, it reads its own attribute every
    time and there are no cells. Sampling at another temperature than that of the log-probabilities would be
    off-policy without a sign of it.
    """
    read = inspect.unwrap(getattr(type(trainer), LOG_PROBS, lambda: None)).__code__.co_names
    if "temperature" in read:
        return []
    cells = []
    for model in (trainer.model, trainer.ref_model):
        if model is None:
            continue
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        function = base.forward
        while function is not None:
            function = getattr(function, "__func__", function)
            free = function.__code__.co_freevars if hasattr(function, "__code__") else ()
            if "temperature" in free:
                cells.append(function.__closure__[free.index("temperature")])
                break
            function = getattr(function, "__wrapped__", None)
        else:
            raise AttachError(
                f"training-guardrails cannot turn the temperature of the {host} of TRL {trl.__version__}: that of its "
                f"log-probabilities has moved. Install {SUPPORTED}, or leave out the dial."
            )
    return cells


class _Loop:
    """An event loop on a daemon thread, for asynchronous costs on a host that has none of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="guardrails-costs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
