"""Rollout: what happened in one step of the host, as columns with one row per trajectory.

A row is one RL episode or one language-model completion. Adapters build rollouts; metrics and
constraints read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from guardrails.errors import RolloutError

FloatArray: TypeAlias = npt.NDArray[np.float64]

_NUMERIC = ("rewards", "lengths", "edit_ratio", "kl", "entropy")


def as_column(values: Any, name: str) -> FloatArray:
    """Return ``values`` as a one-dimensional float64 array that cannot be written to; ``None`` entries become NaN.

    Raises:
        RolloutError: if the values are not one number per row.
    """
    try:
        if hasattr(values, "detach"):  # a torch tensor, on any device, in any dtype
            values = values.detach().cpu().double().numpy()
        if isinstance(values, np.ma.MaskedArray):  # what is masked was not measured
            values = np.ma.filled(values.astype(np.float64), np.nan)
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RolloutError(
            f"Column '{name}' holds values that are not numbers ({error}). Give one float per row; None means missing."
        ) from error
    if column.ndim != 1:
        raise RolloutError(
            f"Column '{name}' has shape {column.shape}; one number per row is needed, shape (n_rows,). "
            "Reduce tokens or steps to one value per trajectory first."
        )
    view: FloatArray = column.view()  # the caller's own array stays as it is
    view.flags.writeable = False
    return view


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """Columns of equal length, one row per trajectory.

    Columns of numbers cannot be written to: constraints and all metrics read the same ones.

    Args:
        rewards: ``(n_rows,)`` float64, the task reward of each trajectory.
        costs: name to ``(n_rows,)`` float64. NaN marks a cost that could not be measured; a
            constraint counts it as a violation. None in place of a column says that this step was not to
            measure it, as between two evaluations: the constraints and gates that read it stay as they are.
        lengths: ``(n_rows,)`` steps or tokens of each trajectory.
        actions: one entry per row, ``(length, action_dim)`` each.
        observations: one entry per row, ``(length, observation_dim)`` each.
        prompts: one prompt per row, as the host holds it.
        completions: one completion per row, as the host holds it.
        infos: one mapping per row, what the environment or data set says of the trajectory.
        edit_ratio: ``(n_rows,)`` share of a completion that the refiner changed, in [0, 1].
        kl: ``(n_rows,)`` divergence from the reference policy, in nats.
        entropy: ``(n_rows,)`` mean policy entropy, in nats.

    Raises:
        RolloutError: if columns differ in length or hold something other than numbers.
    """

    rewards: FloatArray | Sequence[float] | None = None
    costs: Mapping[str, FloatArray | Sequence[float] | None] = field(default_factory=dict)
    lengths: FloatArray | Sequence[float] | None = None
    actions: Sequence[Any] | None = None
    observations: Sequence[Any] | None = None
    prompts: Sequence[Any] | None = None
    completions: Sequence[Any] | None = None
    infos: Sequence[Mapping[str, Any]] | None = None
    edit_ratio: FloatArray | Sequence[float] | None = None
    kl: FloatArray | Sequence[float] | None = None
    entropy: FloatArray | Sequence[float] | None = None
    n_rows: int = field(init=False)
    unmeasured: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        for name in _NUMERIC:
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, as_column(values, name))
        if not isinstance(self.costs, Mapping):
            raise RolloutError(f"costs is {type(self.costs).__name__}; give a column for each name, as a dict.")
        object.__setattr__(self, "unmeasured", frozenset(name for name, values in self.costs.items() if values is None))
        costs = {name: as_column(() if values is None else values, name) for name, values in self.costs.items()}
        object.__setattr__(self, "costs", costs)
        n_rows, counted = 0, ""
        for name, size in self._sizes():
            if not counted:
                n_rows, counted = size, name
            elif size != n_rows:
                raise RolloutError(
                    f"Column '{name}' has {size} rows, but '{counted}' has {n_rows}. "
                    "Give every column one entry per trajectory."
                )
        object.__setattr__(self, "n_rows", n_rows)

    def _sizes(self) -> list[tuple[str, int]]:
        sizes = [(name, len(getattr(self, name))) for name in self._given()]
        return sizes + [(name, len(self.cost(name))) for name in self.costs if name not in self.unmeasured]

    def _given(self) -> list[str]:
        """Names of the columns that are present, besides costs."""
        names = [column.name for column in fields(self) if column.init and column.name != "costs"]
        return [name for name in names if getattr(self, name) is not None]

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that are present; a cost is listed under its own name and as ``costs``."""
        return frozenset({*self._given(), *self.costs, *(("costs",) if self.costs else ())})

    def cost(self, name: str) -> FloatArray:
        """Return the cost column ``name``, shape (n_rows,) float64; no rows if it is `unmeasured`.

        Raises:
            RolloutError: if there is no such column.
        """
        try:
            return self.costs[name]  # type: ignore[return-value]
        except KeyError:
            present = ", ".join(sorted(self.costs)) or "none"
            raise RolloutError(
                f"There is no cost column '{name}' in this rollout. Cost columns here: {present}. "
                f"Pass it as Rollout(costs={{'{name}': ...}})."
            ) from None
