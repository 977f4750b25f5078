"""Acceptance: which refinements become a target. One that is refused leaves its row without a term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from guardrails.errors import ConfigurationError
from guardrails.refine.degeneration import Degenerate
from guardrails.refine.detectors import Detector
from guardrails.refine.functions import check_plain
from guardrails.refine.refiner import Text
from guardrails.schedulers.base import check_number

Check = Callable[[Text, str, str], bool]


@dataclass(frozen=True)
class Acceptance:
    """What a refinement must be: similar, sound, and as good.

    Args:
        similarity: floor on 1 - edit ratio, in [0, 1]: what is rewritten is not minimally corrected.
        sound: a refinement that it finds degenerate is refused; None accepts any. It reads texts, and
            ``truncated`` of those that the refiner left as they were.
        reward: also refuse a refinement that the host's reward functions score below the completion. Off by
            default: a reward that is being gamed scores every cure lower, and would refuse it.
        check: a further condition, ``check(prompt, completion, refined)``; one that raises refuses.

    Raises:
        ConfigurationError: if a value is out of range, ``sound`` requires entropy, which a refinement lacks, or
            ``check`` is asynchronous.

    Example:
        >>> Acceptance(similarity=0.5, check=lambda prompt, completion, refined: "sorry" not in refined).similarity
        0.5
    """

    similarity: float = 0.0
    sound: Detector | None = field(default_factory=Degenerate)
    reward: bool = False
    check: Check | None = None

    def __post_init__(self) -> None:
        floor = check_number("Acceptance", "similarity", self.similarity, low=0.0, high=1.0)
        object.__setattr__(self, "similarity", floor)
        if self.sound is not None and not isinstance(self.sound, Detector):
            raise ConfigurationError(f"Acceptance: sound is {self.sound!r}; give a detector, or None.")
        if self.sound is not None and "entropy" in self.sound.requires:
            raise ConfigurationError(
                f"Acceptance: {self.sound!r} reads the policy's entropy, which a refinement has none of. "
                "Give a detector that reads texts."
            )
        if not isinstance(self.reward, bool):
            raise ConfigurationError(f"Acceptance: reward is {self.reward!r}; give True or False.")
        if self.check is not None and not callable(self.check):
            raise ConfigurationError(
                f"Acceptance: check is {self.check!r}; give a function (prompt, completion, refined) -> bool."
            )
        if self.check is not None:
            check_plain("Acceptance: check", self.check)
