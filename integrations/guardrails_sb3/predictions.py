"""How well a safety critic foresaw each episode: what it predicted on the way against the costs that then came."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]

_PER_EPISODE = 64
"""Predictions of an episode of full length: enough for a mean, and a fraction of the cost of one at every step."""

_UNFORESEEN = 1e9
"""What was missed of an episode too short to judge, in violation scales: the unmeasured is not taken for right."""


class Predictions:
    """Predicted cost-to-go along the running episodes, and the errors of those that have ended.

    What was missed of an episode is the mean over its predictions of |Q̄_c(s_t, a_t) - Σ_k γᵏ c_{t+k}|, in violation
    scales, with the sign of the mean difference; coverage is the share of predictions whose risk Q̄_c + κ σ was not
    exceeded. Where a time limit cut the episode, the costs that would have followed are taken to be the last
    prediction. Of an episode that outlives its horizon, the last T to 2 T steps are judged.

    Args:
        n_envs: environments of the host.
        units: for each constraint, the cost-to-go of one violation scale.
        signs: for each, 1 for an upper limit and -1 for a lower one.
        horizon: steps of an episode.
        gamma: discount.
    """

    def __init__(self, n_envs: int, units: FloatArray, signs: list[float], horizon: int, gamma: float) -> None:
        self._units, self._signs, self._gamma = units, np.asarray(signs), gamma
        self._stride, self._horizon = max(1, horizon // _PER_EPISODE), horizon
        self._ticks = 0
        self._costs: list[list[FloatArray]] = [[] for _ in range(n_envs)]
        self._made: list[list[tuple[int, FloatArray, FloatArray]]] = [[] for _ in range(n_envs)]
        self._missed: list[FloatArray] = []
        self._judged: list[tuple[FloatArray, FloatArray]] = []

    @property
    def due(self) -> bool:
        """Whether a prediction is wanted at the step that is next: every so often, and as an episode begins."""
        return self._ticks % self._stride == 0 or not all(self._costs)

    def predict(self, means: FloatArray, risks: FloatArray) -> None:
        """Keep what is predicted for the next step of every environment, ``(n_envs, n_constraints)`` each."""
        for env, made in enumerate(self._made):
            made.append((len(self._costs[env]), means[env], risks[env]))

    def begin(self, starts: npt.NDArray[np.bool_]) -> None:
        """Forget the environments in ``starts``: they begin an episode."""
        for env in map(int, np.flatnonzero(starts)):
            self._costs[env], self._made[env] = [], []

    def step(self, costs: FloatArray, dones: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_]) -> None:
        """Add a step of every environment and judge the episodes that it ended.

        Args:
            costs: ``(n_envs, n_constraints)``, finite.
            dones: ``(n_envs,)``, whether it ended its episode.
            truncated: ``(n_envs,)``, whether by a time limit.
        """
        self._ticks += 1
        for env, kept in enumerate(self._costs):
            kept.append(costs[env].copy())
            if len(kept) > 2 * self._horizon:
                self._forget(env)
            if dones[env]:
                self._judge(np.stack(kept), self._made[env], bool(truncated[env]))
        if dones.any():
            self.begin(dones)

    def _forget(self, env: int) -> None:
        """Drop the oldest T steps of an environment, and what was predicted at them."""
        del self._costs[env][: self._horizon]
        self._made[env] = [
            (place - self._horizon, mean, risk) for place, mean, risk in self._made[env] if place >= self._horizon
        ]

    def _judge(self, costs: FloatArray, made: list[tuple[int, FloatArray, FloatArray]], truncated: bool) -> None:
        places = np.array([place for place, _, _ in made], dtype=np.int64)
        means, risks = (np.array([entry[part] for entry in made]).reshape(-1, len(self._units)) for part in (1, 2))
        if truncated and len(made):
            costs = costs[: places[-1]]
            following = means[-1]
            places, means, risks = places[:-1], means[:-1], risks[:-1]
        else:
            following = np.zeros(len(self._units))
        if not len(places):
            self._missed.append(np.full(len(self._units), _UNFORESEEN))
            return
        togo = np.empty_like(costs)
        for step in reversed(range(len(costs))):
            togo[step] = following = costs[step] + self._gamma * following
        realised = togo[places]
        errors = np.abs(means - realised).mean(axis=0) / self._units
        over = (means - realised).mean(axis=0) >= 0.0
        self._missed.append(np.minimum(np.where(over, errors, -errors), _UNFORESEEN))
        self._judged.append((errors, (self._signs * realised <= self._signs * risks).mean(axis=0)))

    def take(self) -> tuple[list[FloatArray], FloatArray | None, FloatArray | None]:
        """Return what was judged of the episodes that ended since the last call.

        Returns:
            What was missed of each, ``(n_constraints,)``; and the mean error and coverage of each constraint over
            those that were long enough to judge, None without any.
        """
        missed, judged = self._missed, self._judged
        self._missed, self._judged = [], []
        if not judged:
            return missed, None, None
        return missed, np.mean([errors for errors, _ in judged], axis=0), np.mean([each for _, each in judged], axis=0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what the running episodes hold, and what was judged since the last `take`."""
        named = {"ticks": torch.tensor(self._ticks)}
        if self._missed:
            named["ended.missed"] = torch.from_numpy(np.stack(self._missed))
        if self._judged:
            named["ended.judged"] = torch.from_numpy(np.array(self._judged))
        for env, (costs, made) in enumerate(zip(self._costs, self._made, strict=True)):
            if costs:
                named[f"costs.{env}"] = torch.from_numpy(np.stack(costs))
            if made:
                named[f"places.{env}"] = torch.tensor([place for place, _, _ in made])
                named[f"made.{env}"] = torch.from_numpy(np.array([[mean, risk] for _, mean, risk in made]))
        return named

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], *, running: bool = True) -> None:
        """Restore what `tensors` returned.

        Args:
            tensors: what `tensors` returned.
            running: whether the episodes that ran then go on.
        """
        missed, judged = tensors.get("ended.missed"), tensors.get("ended.judged")
        self._missed = [] if missed is None else list(missed.numpy())
        self._judged = [] if judged is None else [(errors, covered) for errors, covered in judged.numpy()]
        if not running:
            return
        self._ticks = int(tensors.get("ticks", torch.tensor(0)))
        for env in range(len(self._costs)):
            costs, places, made = (tensors.get(f"{name}.{env}") for name in ("costs", "places", "made"))
            self._costs[env] = [] if costs is None else list(costs.numpy())
            self._made[env] = []
            if places is not None and made is not None:
                pairs = zip(places.tolist(), made.numpy(), strict=True)
                self._made[env] = [(place, mean, risk) for place, (mean, risk) in pairs]
