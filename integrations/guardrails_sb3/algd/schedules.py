"""The two diffusions of ALGD: how much noise there is at each step, and how one reverse step takes some away.

Latents x have no bounds; the action is tanh(x). Steps are numbered t = K-1, ..., 0 in the order they are taken.
Source: "Augmented-Lagrangian-guided diffusion" (arXiv 2602.02924) and its public code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from guardrails import ConfigurationError
from guardrails.schedulers.base import check_number, whole_number


class Schedule(ABC):
    """A diffusion of K steps.

    Attributes:
        heads: outputs of the network that a reverse step takes, each as wide as the action.
    """

    heads: ClassVar[int]

    @property
    @abstractmethod
    def steps(self) -> int:
        """K, the number of steps."""

    @property
    @abstractmethod
    def start(self) -> float:
        """Standard deviation of the latents that the first step is given."""

    @property
    @abstractmethod
    def spreads(self) -> tuple[float, ...]:
        """σ_t for t = 0, ..., K-1: how far about an action the score target at step t looks."""

    @abstractmethod
    def reverse_step(
        self, latents: torch.Tensor, outputs: torch.Tensor, t: int, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x_{t-1}, ``(n_rows, n_actions)``.

        Args:
            latents: x_t, ``(n_rows, n_actions)``.
            outputs: of the network at (s, tanh(x_t), t), ``(n_rows, heads, n_actions)``; the score φ comes first.
            t: the step, in 0, ..., K-1.
            noise: ε, standard normal, like ``latents``; None takes the mean.
        """


@dataclass(frozen=True)
class VESchedule(Schedule):
    """Variance-exploding diffusion: x_{t-1} = x_t + Δσ²_t φ + √Δσ²_t ε, with Δσ²_t = σ_t² - σ_{t-1}² and σ_{-1} = 0.

    The last step, t = 0, adds no noise.

    Args:
        sigmas: σ_0 < ... < σ_{K-1}, all above 0.

    Raises:
        ConfigurationError: if they do not increase.
    """

    sigmas: tuple[float, ...]
    heads: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", _numbers("VESchedule", "sigmas", self.sigmas))
        if self.sigmas[0] <= 0.0 or any(a >= b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ConfigurationError(f"VESchedule: sigmas are {self.sigmas}; give numbers above 0 that increase.")

    @property
    def steps(self) -> int:
        """K, the number of steps."""
        return len(self.sigmas)

    @property
    def start(self) -> float:
        """σ_{K-1}."""
        return self.sigmas[-1]

    @property
    def spreads(self) -> tuple[float, ...]:
        """The σ_t themselves."""
        return self.sigmas

    def increment(self, t: int) -> float:
        """Return Δσ²_t."""
        return self.sigmas[t] ** 2 - (self.sigmas[t - 1] ** 2 if t else 0.0)

    def reverse_step(
        self, latents: torch.Tensor, outputs: torch.Tensor, t: int, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x_{t-1}, see `Schedule.reverse_step`."""
        increment = self.increment(t)
        mean = torch.add(latents, outputs[:, 0], alpha=increment)
        return mean if noise is None or t == 0 else torch.add(mean, noise, alpha=math.sqrt(increment))


@dataclass(frozen=True)
class DDPMSchedule(Schedule):
    """Denoising diffusion (Ho et al. 2020) whose posterior mean is shifted along the score.

    With α_t = 1 - β_t, ᾱ_t = Π_{i ≤ t} α_i and ᾱ_{-1} = 1, and the network's noise ε̂:
    x̂_0 = (x_t - √(1-ᾱ_t) ε̂) / √ᾱ_t,
    x_{t-1} = [√ᾱ_{t-1} β_t x̂_0 + √α_t (1-ᾱ_{t-1}) x_t] / (1-ᾱ_t) + g φ/‖φ‖ + √(β_t (1-ᾱ_{t-1}) / (1-ᾱ_t)) ε.
    The last step, t = 0, adds no noise.

    Args:
        betas: β_0, ..., β_{K-1}, each in (0, 1).
        guidance: g ≥ 0, length of the shift in latent space.

    Raises:
        ConfigurationError: if an argument is out of range.
    """

    betas: tuple[float, ...]
    guidance: float = 0.05
    heads: ClassVar[int] = 2
    _kept: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _numbers("DDPMSchedule", "betas", self.betas))
        if not all(0.0 < beta < 1.0 for beta in self.betas):
            raise ConfigurationError(f"DDPMSchedule: betas are {self.betas}; give numbers between 0 and 1.")
        check_number("DDPMSchedule", "guidance", self.guidance, low=0.0, high=1e3)
        kept = [1.0]
        for beta in self.betas:
            kept.append(kept[-1] * (1.0 - beta))
        object.__setattr__(self, "_kept", tuple(kept[1:]))

    @property
    def steps(self) -> int:
        """K, the number of steps."""
        return len(self.betas)

    @property
    def start(self) -> float:
        """1: a diffusion that keeps the variance starts from a standard normal."""
        return 1.0

    @property
    def spreads(self) -> tuple[float, ...]:
        """√(1-ᾱ_t)."""
        return tuple(math.sqrt(1.0 - self.kept(t)) for t in range(self.steps))

    def kept(self, t: int) -> float:
        """Return ᾱ_t, and 1 for t = -1."""
        return self._kept[t] if t >= 0 else 1.0

    def reverse_step(
        self, latents: torch.Tensor, outputs: torch.Tensor, t: int, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x_{t-1}, see `Schedule.reverse_step`; ``outputs`` are φ and ε̂."""
        beta, kept, before = self.betas[t], self.kept(t), self.kept(t - 1)
        of_start = math.sqrt(before) * beta / (1.0 - kept)
        of_latents = of_start / math.sqrt(kept) + math.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - kept)
        of_noise = -of_start * math.sqrt(1.0 - kept) / math.sqrt(kept)
        scores = outputs[:, 0]
        mean = torch.add(latents * of_latents, outputs[:, 1], alpha=of_noise)
        if self.guidance:
            lengths = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
            mean = torch.add(mean, scores / (lengths + 1e-8), alpha=self.guidance)
        if noise is None or t == 0:
            return mean
        return torch.add(mean, noise, alpha=math.sqrt(beta * (1.0 - before) / (1.0 - kept)))


def ve_schedule(steps: int = 5, *, sigma_min: float = 0.01, sigma_max: float = 1.0) -> VESchedule:
    """Return σ_t = σ_min (σ_max / σ_min)^{t / (K-1)}, a geometric sequence.

    Args:
        steps: K ≥ 1; a single step takes σ_max.
        sigma_min: σ_0 > 0, in latent space.
        sigma_max: σ_{K-1} > σ_min.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> [round(sigma, 4) for sigma in ve_schedule(3).sigmas]
        [0.01, 0.1, 1.0]
    """
    count = whole_number("ve_schedule", "steps", steps)
    low = check_number("ve_schedule", "sigma_min", sigma_min, low=0.0, open_low=True)
    high = check_number("ve_schedule", "sigma_max", sigma_max, low=low, open_low=True)
    if count == 1:
        return VESchedule((high,))
    return VESchedule(tuple(low * (high / low) ** (t / (count - 1)) for t in range(count)))


def ddpm_schedule(
    steps: int = 5, *, beta_min: float = 1e-4, beta_max: float = 0.02, guidance: float = 0.05
) -> DDPMSchedule:
    """Return β_t evenly spaced from β_min to β_max.

    Args:
        steps: K ≥ 1; a single step takes β_max.
        beta_min: β_0 in (0, 1).
        beta_max: β_{K-1} in [β_min, 1).
        guidance: see `DDPMSchedule`.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> [round(beta, 5) for beta in ddpm_schedule(3).betas]
        [0.0001, 0.01005, 0.02]
    """
    count = whole_number("ddpm_schedule", "steps", steps)
    high = check_number("ddpm_schedule", "beta_max", beta_max, low=0.0, open_low=True)
    low = check_number("ddpm_schedule", "beta_min", beta_min, low=0.0, high=high, open_low=True)
    if count == 1:
        return DDPMSchedule((high,), guidance)
    return DDPMSchedule(tuple(low + (high - low) * t / (count - 1) for t in range(count)), guidance)


def named_schedule(sde: str | Schedule, steps: int) -> Schedule:
    """Return the schedule of a name, ``"ve"`` or ``"ddpm"``, with its defaults; one that is given as it is.

    Raises:
        ConfigurationError: if there is none of that name.
    """
    if isinstance(sde, Schedule):
        return sde
    if sde == "ve":
        return ve_schedule(steps)
    if sde == "ddpm":
        return ddpm_schedule(steps)
    raise ConfigurationError(
        f"DiffusionPolicy: sde is {sde!r}; give 've', 'ddpm', or a schedule such as ve_schedule(5)."
    )


def _numbers(owner: str, name: str, values: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or not len(values):
        raise ConfigurationError(f"{owner}: {name} is {values!r}; give a number for each step, at least one.")
    return tuple(check_number(owner, name, value) for value in values)
