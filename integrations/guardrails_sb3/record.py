"""The ledger of a guarded model: opened when ``learn`` begins, closed when it ends."""

from __future__ import annotations

from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from guardrails import Guard
from guardrails.ledger import Ledger
from guardrails_sb3 import seams


class Recorder(BaseCallback):
    """Records a guard's decisions during ``learn``, unless it records already.

    Args:
        guard: whose decisions.
        ledger: see `guardrails_sb3.wrap`.
    """

    looks = False
    """Whether it looks at steps; see `guardrails_sb3.callbacks`."""

    def __init__(self, guard: Guard, ledger: str | Path | bool) -> None:
        super().__init__()
        self._guard, self._path = guard, ledger
        self._ledger: Ledger | None = None

    def _on_training_start(self) -> None:
        if self._guard.ledger is not None and not self._guard.ledger.closed:
            return
        folder = seams.log_folder(self.model)
        if not isinstance(self._path, bool):
            self._ledger = self._guard.record(self._path, seed=self.model.seed)
        elif self._path and folder is not None:
            self._ledger = self._guard.record(Path(folder) / "guardrails" / "ledger.jsonl", seed=self.model.seed)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the ledger, if this opened one."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
