"""Wrappers that any scheduler accepts: a late start, a cap, a smoothed measurement, a rate limit.

They are schedulers themselves and nest: ``Warmup(Cap(DualAscent(), 10.0), updates=20)``.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import ConstraintScheduler, check_gain, check_share, whole_number
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops
from guardrails.schedulers.rows import LARGEST


class Wrapper(ElementwiseScheduler[Any]):
    """A scheduler around another, whose state lies in the field ``inner``."""

    def __init__(self, scheduler: ConstraintScheduler[Any]) -> None:
        if not isinstance(scheduler, ConstraintScheduler):
            raise ConfigurationError(
                f"{type(self).__name__} wraps a scheduler, not {scheduler!r}; give an instance such as PID()."
            )
        self.scheduler = scheduler
        self.monotone = scheduler.monotone
        self.two_sided = scheduler.two_sided
        self.relative = scheduler.relative

    def advance_tracking(self, before: Any, after: Any, strength: Any, ops: Ops) -> Any:
        """Pass the strength that was applied on to the scheduler inside."""
        inner = ops.track(self.scheduler, before.inner, after.inner, strength)
        return after._replace(multiplier=strength, inner=inner)

    def _dump_field(self, name: str, value: Any) -> Any:
        return self.scheduler.dump(value) if name == "inner" else super()._dump_field(name, value)

    def _load_field(self, name: str, value: Any) -> Any:
        return self.scheduler.load(value) if name == "inner" else super()._load_field(name, value)


class WarmupState(NamedTuple):
    """State of `Warmup`."""

    multiplier: float
    remaining: float
    inner: Any


class Warmup(Wrapper):
    """λ = 0 while the first measurements are made, then the scheduler inside, which sees none of them.

    For hosts whose first measurements say little, and for letting a policy learn the task before it
    is bounded.

    Args:
        scheduler: what follows.
        updates: measurements it does not see, at least 1.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> from guardrails.schedulers import DualAscent
        >>> late = Warmup(DualAscent(0.1), updates=1)
        >>> state, lam = late.update(late.init(), 5.0)
        >>> lam, late.update(state, 5.0)[1]
        (0.0, 0.5)
    """

    state_type: ClassVar[type[Any]] = WarmupState

    def __init__(self, scheduler: ConstraintScheduler[Any], updates: int) -> None:
        super().__init__(scheduler)
        self.updates = whole_number("Warmup", "updates", updates)

    def init(self) -> WarmupState:
        """Return the inner start, held at 0."""
        return WarmupState(0.0, float(self.updates), self.scheduler.init())

    def advance(self, state: WarmupState, violation: Any, ops: Ops) -> WarmupState:
        """Count down, then update the scheduler inside."""
        if ops.any(state.remaining > 0.0):  # rows that are updated together also start together
            remaining = state.remaining - 1.0
            strength = ops.where(remaining > 0.0, 0.0, ops.strength(self.scheduler, state.inner))
            return WarmupState(strength, remaining, state.inner)
        inner, strength = ops.update(self.scheduler, state.inner, violation)
        return WarmupState(strength, state.remaining, inner)

    def advance_tracking(self, before: WarmupState, after: WarmupState, strength: Any, ops: Ops) -> WarmupState:
        """Pass the strength on, unless the scheduler inside has not begun."""
        if ops.any(before.remaining > 0.0):
            return after._replace(multiplier=strength)
        tracked: WarmupState = super().advance_tracking(before, after, strength, ops)
        return tracked

    def penalty(self, state: WarmupState, violation: Any) -> Any:
        """Return the loss term of the scheduler inside, or 0 v while λ is held at 0."""
        return 0.0 * violation if state.remaining > 0.0 else self.scheduler.penalty(state.inner, violation)


class CapState(NamedTuple):
    """State of `Cap`."""

    multiplier: float
    inner: Any


class Cap(Wrapper):
    """λ = min(λ of the scheduler inside, ``maximum``).

    The scheduler inside is told (`ConstraintScheduler.track`), so what it accumulates stops at the
    cap as well and λ falls as soon as the violation does.

    Args:
        scheduler: what is capped.
        maximum: λ > 0.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> from guardrails.schedulers import DualAscent
        >>> capped = Cap(DualAscent(1.0), 3.0)
        >>> state, lam = capped.update(capped.init(), 100.0)
        >>> lam, capped.update(state, -1.0)[1]
        (3.0, 2.0)
    """

    state_type: ClassVar[type[Any]] = CapState

    def __init__(self, scheduler: ConstraintScheduler[Any], maximum: float) -> None:
        super().__init__(scheduler)
        self.maximum = check_gain("Cap", "maximum", maximum, positive=True)

    def init(self) -> CapState:
        """Return the inner start, capped."""
        inner = self.scheduler.init()
        strength = min(self.scheduler.strength(inner), self.maximum)
        return CapState(strength, self.scheduler.track(inner, inner, strength))

    def advance(self, state: CapState, violation: Any, ops: Ops) -> CapState:
        """Update the scheduler inside and cap its strength."""
        inner, own = ops.update(self.scheduler, state.inner, violation)
        strength = ops.clip(own, 0.0, self.maximum)
        return CapState(strength, ops.track(self.scheduler, state.inner, inner, strength))


class SmoothState(NamedTuple):
    """State of `Smooth`: v̄, and whether it holds a measurement (0 or 1)."""

    multiplier: float
    smoothed: float
    started: float
    inner: Any


class Smooth(Wrapper):
    """v̄ ← σ v̄ + (1-σ) v, starting at the first v; the scheduler inside sees v̄.

    For hosts that measure J on few trajectories. While the limit stands still, smoothing v is
    smoothing J.

    Args:
        scheduler: what sees the smoothed violation.
        smoothing: σ in [0, 1); averages over about 1 / (1-σ) updates, and delays by as many.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> from guardrails.schedulers import DualAscent
        >>> smooth = Smooth(DualAscent(1.0), smoothing=0.5)
        >>> state, lam = smooth.update(smooth.init(), 2.0)
        >>> smooth.update(state, 0.0)[1]
        3.0
    """

    state_type: ClassVar[type[Any]] = SmoothState

    def __init__(self, scheduler: ConstraintScheduler[Any], smoothing: float = 0.9) -> None:
        super().__init__(scheduler)
        self.smoothing = check_share("Smooth", "smoothing", smoothing)

    def init(self) -> SmoothState:
        """Return the inner start, before the first measurement."""
        inner = self.scheduler.init()
        return SmoothState(self.scheduler.strength(inner), 0.0, 0.0, inner)

    def advance(self, state: SmoothState, violation: Any, ops: Ops) -> SmoothState:
        """Smooth the violation and update the scheduler inside with it."""
        previous = ops.where(state.started > 0.0, state.smoothed, violation)
        smoothed = self.smoothing * previous + (1.0 - self.smoothing) * violation
        inner, strength = ops.update(self.scheduler, state.inner, smoothed)
        return SmoothState(strength, smoothed, ops.where(state.started > 0.0, state.started, 1.0), inner)

    def penalty(self, state: SmoothState, violation: Any) -> Any:
        """Return the loss term of the scheduler inside."""
        return self.scheduler.penalty(state.inner, violation)


class RateLimitState(NamedTuple):
    """State of `RateLimit`."""

    multiplier: float
    inner: Any


class RateLimit(Wrapper):
    """λ ← clip(λ of the scheduler inside, λ₋₁ - r, λ₋₁ + r).

    The scheduler inside is told, as with `Cap`.

    Args:
        scheduler: what is limited.
        max_change: r > 0, λ per update.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> from guardrails.schedulers import CRPO
        >>> gentle = RateLimit(CRPO(), 0.5)
        >>> state, lam = gentle.update(gentle.init(), 2.0)
        >>> gentle.update(state, 2.0)[1]
        1.0
    """

    state_type: ClassVar[type[Any]] = RateLimitState

    def __init__(self, scheduler: ConstraintScheduler[Any], max_change: float) -> None:
        super().__init__(scheduler)
        self.max_change = check_gain("RateLimit", "max_change", max_change, positive=True)

    def init(self) -> RateLimitState:
        """Return the inner start."""
        inner = self.scheduler.init()
        return RateLimitState(self.scheduler.strength(inner), inner)

    def advance(self, state: RateLimitState, violation: Any, ops: Ops) -> RateLimitState:
        """Update the scheduler inside and limit the change of its strength."""
        inner, own = ops.update(self.scheduler, state.inner, violation)
        low = ops.clip(state.multiplier - self.max_change, 0.0, LARGEST)
        strength = ops.clip(own, low, state.multiplier + self.max_change)
        return RateLimitState(strength, ops.track(self.scheduler, state.inner, inner, strength))
