"""A guard decides when episodes end; where none does, this says so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

PATIENCE = 10_000
"""Steps in one episode of every environment after which it is worth a word."""


class Endless:
    """Says once that no episode ends and the constraints therefore stand still.

    Args:
        names: the constraints that are decided on episodes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._told = names, False

    def look(self, lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Look at how long the running episodes are.

        Args:
            lengths: ``(n_envs,)``, steps so far.
        """
        if self._told or not self._names or lengths.min() < PATIENCE:
            return
        self._told = True
        logger.warning(
            "No environment has ended an episode in its last %d steps. A limit is per episode and decided on when one "
            "ends, so λ of %s stands still. Give the environments a time limit (gymnasium.wrappers.TimeLimit), or an "
            "off-policy algorithm wrap(..., dual_interval=n).",
            PATIENCE,
            ", ".join(self._names),
        )
