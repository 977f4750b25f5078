"""Costs of environment steps: reading them from ``info`` and summing them over episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from guardrails import Constraint, Rollout, RolloutError
from guardrails_sb3 import plain

Info = Mapping[str, Any]
Reader = Callable[[Info], float]

PREDICTED = "predicted_cost"
"""Key of an episode's info with what a critic predicted of its cost."""

_SUMS = ("costs", "returns", "lengths")


def cost_reader(constraint: Constraint) -> Reader:
    """Return the function that reads one step's cost of ``constraint`` from ``info``.

    The constraint's ``cost`` is a key of ``info``, a function ``info -> float``, several such functions,
    whose values are summed, or None for the key that bears the constraint's name. A key must be in every
    ``info``: its absence is an error, never a cost of zero. None as a value means that the step could not
    be measured and reads as NaN, which counts as a violation.
    """
    source = constraint.cost
    if source is None or isinstance(source, str):
        return _key_reader(constraint.name, constraint.name if source is None else source)
    functions = (source,) if callable(source) else tuple(source)
    if len(functions) == 1:
        return _function_reader(constraint.name, functions[0])
    readers = [_function_reader(constraint.name, function) for function in functions]
    return lambda info: sum(reader(info) for reader in readers)


def terminated(info: Info) -> float:
    """Return the cost of ending an episode: 1 for its last step, unless a time limit cut it off there; 0 otherwise.

    ``Constraint("falls", limit=0.2, cost=terminated)`` allows one episode in five to end in a terminal state. It
    belongs beside a limit on an episode's cost where failing ends the episode, for an early end keeps that limit too.
    It reads what the vectorised environments of Stable-Baselines3 add to ``info``.

    Raises:
        RolloutError: if they do not say whether a time limit cut the episode off.
    """
    if "TimeLimit.truncated" not in info:
        raise RolloutError(
            "no info['TimeLimit.truncated'], so nothing tells a failure from a time limit. DummyVecEnv and "
            "SubprocVecEnv give it at every step; let yours give it too, or give Constraint(cost=...) a function of "
            "your own."
        )
    return float("terminal_observation" in info and not info["TimeLimit.truncated"])


def _key_reader(name: str, key: str) -> Reader:
    def read(info: Info) -> float:
        try:
            value = info[key]
        except KeyError:
            present = ", ".join(sorted(map(str, info))) or "none"
            raise RolloutError(
                f"Constraint '{name}' reads info['{key}'], which this step's info does not carry. Keys here: "
                f"{present}. Let the environment give it at every step (an absent cost is not taken for zero), or "
                "give Constraint(cost=...) the right key or a function of info."
            ) from None
        return _number(name, f"info['{key}']", value)

    return read


def _function_reader(name: str, function: Callable[..., Any]) -> Reader:
    label = getattr(function, "__name__", repr(function))

    def read(info: Info) -> float:
        try:
            value = function(info)
        except Exception as error:
            present = ", ".join(sorted(map(str, info))) or "none"
            raise RolloutError(
                f"Constraint '{name}': its cost function {label} raised {type(error).__name__}: {error}. It is called "
                f"with the info of every step; keys here: {present}. Return NaN for a step that cannot be measured."
            ) from error
        return _number(name, f"{label}(info)", value)

    return read


def _number(name: str, source: str, value: Any) -> float:
    if value is None:
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RolloutError(
            f"Constraint '{name}': {source} is {value!r}; one number per step is needed, or None for a step that could "
            "not be measured."
        ) from None


class _Ended(NamedTuple):
    """An episode that has ended.

    Args:
        costs: ``(n_constraints,)``, undiscounted sums.
        reward: undiscounted sum.
        length: steps.
        info: of its last step.
        whole: whether it was seen from its first step on.
    """

    costs: npt.NDArray[np.float64]
    reward: float
    length: float
    info: Info
    whole: bool


class Episodes:
    """Undiscounted sums of the episodes that run in each environment, and the ones that have ended.

    An episode that was under way when the first of its steps was seen here is no episode to judge: it is left out.

    Args:
        n_envs: environments of the host.
        names: names of the constraints.
        underway: ``(n_envs,)``, environments that are in the midst of an episode; None if there are none.
    """

    def __init__(self, n_envs: int, names: Sequence[str], underway: npt.NDArray[np.bool_] | None = None) -> None:
        self._names = tuple(names)
        self._partial = np.zeros(n_envs, dtype=bool) if underway is None else underway.copy()
        self.costs = np.zeros((n_envs, len(self._names)))
        self.returns = np.zeros(n_envs)
        self.lengths = np.zeros(n_envs)
        self._ended: list[_Ended] = []

    def begin(self, starts: npt.NDArray[np.bool_]) -> None:
        """Forget what the environments in ``starts`` had summed: they begin an episode."""
        self.costs[starts] = 0.0
        self.returns[starts] = 0.0
        self.lengths[starts] = 0.0
        self._partial[starts] = False

    def add(
        self,
        costs: npt.NDArray[np.float64],
        rewards: npt.NDArray[np.float64],
        dones: npt.NDArray[np.bool_],
        final_infos: Mapping[tuple[int, int], Info],
    ) -> None:
        """Add consecutive steps of every environment, and file the episodes that they ended.

        Args:
            costs: ``(n_steps, n_envs, n_constraints)``.
            rewards: ``(n_steps, n_envs)``.
            dones: ``(n_steps, n_envs)``, whether a step ended its episode.
            final_infos: ``info`` of each step that ended an episode, by step and environment.
        """
        begin = 0
        for last in map(int, np.flatnonzero(dones.any(axis=1))):
            self._sum(costs[begin : last + 1], rewards[begin : last + 1])
            begin = last + 1
            for env in map(int, np.flatnonzero(dones[last])):
                self.end(env, final_infos[last, env])
            self.begin(dones[last])
        self._sum(costs[begin:], rewards[begin:])

    def end(self, env: int, info: Info) -> None:
        """File the episode that has ended in an environment, with its last ``info``."""
        sums = (self.costs[env].copy(), float(self.returns[env]), float(self.lengths[env]))
        self._ended.append(_Ended(*sums, info, not self._partial[env]))

    def _sum(self, costs: npt.NDArray[np.float64], rewards: npt.NDArray[np.float64]) -> None:
        with np.errstate(invalid="ignore"):  # costs of inf and -inf in one episode make NaN, which is a violation
            self.costs += costs.sum(axis=0)
        self.returns += rewards.sum(axis=0)
        self.lengths += len(costs)

    @property
    def ended(self) -> int:
        """How many episodes, seen from their first step on, have ended since the last `take`."""
        return sum(each.whole for each in self._ended)

    def take(self, missed: Sequence[npt.NDArray[np.float64]] | None = None, **columns: Sequence[Any]) -> Rollout:
        """Return the episodes that ended since the last call, one row each but for those that had begun unseen.

        Args:
            missed: for each that ended, by how much a critic's predictions of its costs were too high,
                ``(n_constraints,)`` in the costs' units. Its info then says under ``predicted_cost/<name>``, and for
                the first constraint under ``predicted_cost``, the cost plus that, as `CriticCalibration` reads it.
            **columns: further columns of `Rollout`, an entry for each that ended.
        """
        every, self._ended = self._ended, []

        def whole(values: Sequence[Any]) -> list[Any]:
            return [value for value, each in zip(values, every, strict=True) if each.whole]

        ended = whole(every)
        sums = np.array([each.costs for each in ended]).reshape(len(ended), len(self._names))
        infos = [each.info for each in ended]
        if missed is not None:
            infos = [self._foreseen(*each) for each in zip(infos, sums, whole(missed), strict=True)]
        return Rollout(
            rewards=[each.reward for each in ended],
            costs={name: sums[:, index] for index, name in enumerate(self._names)},
            lengths=[each.length for each in ended],
            infos=infos,
            **{name: whole(values) for name, values in columns.items()},
        )

    def _foreseen(self, info: Info, costs: npt.NDArray[np.float64], missed: npt.NDArray[np.float64]) -> dict[str, Any]:
        predicted = (costs + missed).tolist()
        named = {f"{PREDICTED}/{name}": value for name, value in zip(self._names, predicted, strict=True)}
        return {**info, PREDICTED: predicted[0], **named}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums of the running episodes."""
        sums = {name: torch.from_numpy(getattr(self, name).copy()) for name in _SUMS}
        return sums | {"partial": torch.from_numpy(self._partial.copy())}

    def pending(self, *, infos: bool) -> dict[str, torch.Tensor]:
        """Return the episodes that have ended since the last `take`; nothing where none has.

        Args:
            infos: whether what their last ``info`` says is wanted; see `guardrails_sb3.plain` for what of it is kept.
        """
        if not self._ended:
            return {}
        costs, returns, lengths, said, whole = zip(*self._ended, strict=True)
        return {
            "ended.costs": torch.from_numpy(np.stack(costs)),
            "ended.returns": torch.tensor(returns, dtype=torch.float64),
            "ended.lengths": torch.tensor(lengths, dtype=torch.float64),
            "ended.infos": plain.pack(said if infos else [{} for _ in said]),
            "ended.whole": torch.tensor(whole),
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Restore what `tensors` and `pending` returned; whether it is of as many environments as there are here.

        With another number of them the host begins every episode anew, and so do the sums.
        """
        self._ended = []
        if "ended.costs" in tensors:
            columns = [tensors[f"ended.{name}"].tolist() for name in ("returns", "lengths")]
            infos = plain.unpack(tensors["ended.infos"])
            whole = tensors["ended.whole"].tolist() if "ended.whole" in tensors else [True] * len(infos)
            rows = zip(tensors["ended.costs"].numpy(), *columns, infos, whole, strict=True)
            self._ended = [_Ended(*row) for row in rows]
        lengths = tensors.get("lengths")
        if lengths is None or tuple(lengths.shape) != self.lengths.shape:
            return False
        for name in _SUMS:
            getattr(self, name)[:] = tensors[name].numpy()
        self._partial[:] = tensors["partial"].numpy() if "partial" in tensors else False
        return True
