"""What the callbacks of all transformers-based hosts share: begin and end, ledger, checkpoints, detaching."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guardrails import AttachError, Guard
from guardrails.ledger import Ledger
from guardrails_transformers.checkpoint import load_guard, save_guard
from guardrails_transformers.wrapping import LOOP, RESUME, SAVE, Wrapping

logger = logging.getLogger(__name__)

PREFIX = "guardrails/"
"""Start of every metric and table column that an adapter adds to the host's."""


class AttachedCallback(TrainerCallback):
    """A guard attached to a trainer, whatever it does there.

    Args:
        host: the trainer, checked; its methods that train, and that write and read checkpoints, are wrapped.
        guard: attached to the host already.
        missing_ok: resume also from a checkpoint without a guard's state, with the guard as it is.
        ledger: where the main process records every decision while it trains; True is
            ``<output_dir>/guardrails/ledger.jsonl``, False is nowhere. A guard that records already goes on as it is.
    """

    def __init__(self, host: Wrapping, guard: Guard, *, missing_ok: bool, ledger: str | Path | bool) -> None:
        self._wrapping: Wrapping | None = host
        self._guard = guard
        self._missing_ok = missing_ok
        self._record_at = ledger
        self._ledger: Ledger | None = None
        self._training = False
        self._begun: dict[str, Any] | None = None
        self._failed_with: int | None = None
        host.wrap(SAVE, self._save)
        host.wrap(RESUME, self._resume)
        host.wrap(LOOP, self._train)

    @property
    def guard(self) -> Guard:
        """The guard; its ``decision`` says what was decided last, and why."""
        return self._guard

    def detach(self) -> None:
        """Leave the trainer as it was before, and release the guard. Does nothing when already detached.

        Raises:
            AttachError: if something else has wrapped the trainer since; it stays guarded then.
        """
        host = self._wrapping
        if host is None:
            return
        host.unwrap()
        try:
            self._let_go()
        finally:
            host.forget(PREFIX)
            while host.times_added(self):
                host.trainer.remove_callback(self)
            self._wrapping = None
            self._close_ledger()
            self._guard.detach()

    def _let_go(self) -> None:
        """Restore what else was changed, once the methods are unwrapped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the ledger; refuse to run as the callback of another trainer than the one it was built for.

        A host that begins anew with smaller batches begins with the guard that it began with.
        """
        if self._wrapping is None or state is not self._wrapping.trainer.state:
            raise AttachError(
                "This GuardrailsCallback was built for another trainer or was detached. Build one for this trainer: "
                "GuardrailsCallback(trainer, guard)."
            )
        if state.is_hyper_param_search:
            raise AttachError(
                "hyperparameter_search trains several models, and a guard belongs to one: its multipliers would pass "
                "from trial to trial. Search without the guard."
            )
        recording = self._guard.ledger is not None and not self._guard.ledger.closed
        if state.is_world_process_zero and self._record_at is not False and not recording:
            beside = Path(str(args.output_dir)) / "guardrails" / "ledger.jsonl"
            path = beside if self._record_at is True else Path(self._record_at)
            self._ledger = self._guard.record(path, seed=args.seed)
        if self._begun is None:
            self._begun = self._guard.state_dict()
        else:
            self._guard.load_state_dict(self._begun)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the ledger that was opened when the training began."""
        self._close_ledger()

    def _close_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _check_added(self, host: Wrapping) -> None:
        """Raise unless this callback hears of the training it acts in, and once of each thing."""
        added = host.times_added(self)
        if added > 1:
            raise AttachError(
                f"This GuardrailsCallback was added to the trainer {added} times, so it would decide as often in each "
                "step. Call trainer.add_callback(callback) once; constructing it does not add it."
            )
        if not added:
            raise AttachError(
                "A guard is attached to this trainer, but its callback was not added. Call "
                "trainer.add_callback(callback) before trainer.train(), or callback.detach()."
            )

    def _train(self, original: Callable[..., Any], batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the host's loop, and know when it has ended, by an error or an interruption too: the host does not.

        With ``auto_find_batch_size`` the host runs it again after an error, with smaller batches.
        """
        again = self._failed_with is not None and batch_size is not None and batch_size < self._failed_with
        self._failed_with = None
        if not again:
            self._begun = None
            self._look_over()
        self._training = True
        finds = self._wrapping is not None and self._wrapping.trainer.args.auto_find_batch_size
        try:
            return original(batch_size, *args, **kwargs)
        except Exception:
            self._failed_with = batch_size if finds else None
            raise
        finally:
            self._training = False
            if self._ledger is not None:
                self._ledger.flush()
            self._put_back()

    def _look_over(self) -> None:
        """Take up what the host has made anew for a training, before it begins."""

    def _put_back(self) -> None:
        """Give back what a step has borrowed of the host, which an error may have left with it."""

    def _save(self, original: Callable[..., Any], model: Any, trial: Any) -> Any:
        """Write the guard's state into the checkpoint first, so that no checkpoint is ever whole without it."""
        host = self._wrapping
        if host is not None and host.trainer.args.should_save:
            folder = host.checkpoint(trial)
            folder.mkdir(parents=True, exist_ok=True)
            save_guard(self._guard, folder)
        return original(model, trial)

    def _resume(self, original: Callable[..., Any], checkpoint: str | None) -> Any:
        result = original(checkpoint)
        if checkpoint is not None and load_guard(self._guard, os.fspath(checkpoint), missing_ok=self._missing_ok):
            logger.info("Restored the guard's multipliers from %s: %s", checkpoint, self._guard.multipliers)
        return result
