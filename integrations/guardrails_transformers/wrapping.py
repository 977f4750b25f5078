"""A trainer's instance whose methods are wrapped, and unwrapped again without a trace."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from guardrails import AttachError

SAVE = "_save_checkpoint"
RESUME = "_load_optimizer_and_scheduler"
LOOP = "_inner_training_loop"

SHARED = {
    SAVE: ["model", "trial"],
    RESUME: ["checkpoint"],
    LOOP: ["batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
}
"""Methods of transformers that are wrapped on every host, and their parameters: writing and reading checkpoints, and
the loop that trains."""

_MARK = "guarded_by"


class Wrapping:
    """A trainer, as every kind of host needs it.

    Args:
        trainer: the trainer. Looking at it changes nothing.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer: Any = trainer
        self.name = type(trainer).__name__
        self._wrappers: dict[str, tuple[Any, Any]] = {}

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process, so that local data is all there is."""
        return bool(self.trainer.accelerator.num_processes == 1)

    def gather(self, values: Tensor) -> Tensor:
        """Return the equally long ``values`` of all processes, one after the other."""
        gathered: Tensor = self.trainer.accelerator.gather(values)
        return gathered

    def checkpoint(self, trial: Any) -> Path:
        """Return the folder of the checkpoint that is written now."""
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.trainer.state.global_step}"
        return Path(os.fspath(self.trainer._get_output_dir(trial=trial))) / folder

    def times_added(self, callback: Any) -> int:
        """Return how often ``callback`` was added to the trainer."""
        return sum(present is callback for present in self.trainer.callback_handler.callbacks)

    def wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Put ``wrapper(original, *args)`` in the place of a method, on this instance alone."""
        original = getattr(self.trainer, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(wrapped, _MARK, self)
        self._wrappers[name] = wrapped, vars(self.trainer).get(name)
        setattr(self.trainer, name, wrapped)

    def unwrap(self) -> None:
        """Take all wrappers off, or none.

        Raises:
            AttachError: if somebody has wrapped a method again since.
        """
        for name, (wrapped, _) in self._wrappers.items():
            if vars(self.trainer).get(name) is not wrapped:
                raise AttachError(
                    f"{self.name}.{name} was replaced after the guard was attached, so it cannot be put back. Undo "
                    "that replacement first, then call detach()."
                )
        for name, (_, before) in self._wrappers.items():
            if before is None:
                delattr(self.trainer, name)
            else:
                setattr(self.trainer, name, before)
        self._wrappers = {}

    def forget(self, prefix: str) -> None:
        """Drop what was put into the host's logs under names that start with ``prefix``."""


def is_wrapped(trainer: Any, name: str) -> bool:
    """Whether a guard's wrapper is in the place of a trainer's method."""
    return hasattr(vars(trainer).get(name), _MARK)
