"""Circuit breaker: stops asking a service that keeps failing, and tries it again with a single probe."""

from __future__ import annotations

import time
from collections.abc import Callable

from guardrails.schedulers.base import check_number, whole_number


class CircuitBreaker:
    """Closed until ``failures`` in a row, then open for ``cooldown`` seconds, then half-open for one probe.

    A probe that succeeds closes it; one that fails opens it again, for twice as long each time, up to
    ``longest``. Source: Nygard, "Release It!", 2007.

    Args:
        failures: failures in a row that open it, ≥ 1.
        cooldown: seconds that it stays open at first, > 0.
        longest: seconds that it stays open at most.
        clock: a clock in seconds that never goes back.

    Raises:
        ConfigurationError: if a value is out of range.

    Example:
        >>> breaker = CircuitBreaker(failures=2, cooldown=30.0)
        >>> breaker.failed(), breaker.failed(), breaker.state
        (None, None, 'open')
    """

    def __init__(
        self,
        failures: int = 5,
        cooldown: float = 30.0,
        *,
        longest: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures = whole_number("CircuitBreaker", "failures", failures)
        self.cooldown = check_number("CircuitBreaker", "cooldown", cooldown, low=0.0, open_low=True)
        self.longest = check_number("CircuitBreaker", "longest", longest, low=self.cooldown)
        self._clock = clock
        self._in_a_row = 0
        self._wait = self.cooldown
        self._opened: float | None = None

    @property
    def state(self) -> str:
        """``"closed"``: ask; ``"open"``: do not; ``"half-open"``: ask once, and see."""
        if self._opened is None:
            return "closed"
        return "open" if self._clock() - self._opened < self._wait else "half-open"

    def succeeded(self) -> None:
        """Note that an answer came."""
        self._in_a_row, self._wait, self._opened = 0, self.cooldown, None

    def failed(self) -> None:
        """Note that none came. While it is open, answers still on their way change nothing."""
        state = self.state
        if state == "open":
            return
        self._in_a_row += 1
        if state == "half-open":
            self._wait = min(2.0 * self._wait, self.longest)
        elif self._in_a_row < self.failures:
            return
        self._opened = self._clock()
