"""One step of refining, without the host: detect, refine, accept. Nothing in it can stop a training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from guardrails.errors import told
from guardrails.refine.acceptance import Acceptance
from guardrails.refine.detectors import Detector, Rows, detected
from guardrails.refine.edits import edit_ratio
from guardrails.refine.refiner import Refiner
from guardrails.rollout import FloatArray

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[str]], Sequence[Sequence[Hashable]]]
Score = Callable[[Sequence[int], Sequence[str]], Sequence["float | None"]]


@dataclass(frozen=True, eq=False)
class Corrections:
    """What became of each row.

    Args:
        detected: rows that were to be refined.
        offers: what the refiner returned; None where it was not asked or had nothing to offer.
        accepted: rows whose offer is the target y⁺; those where it equals the completion among them.
        refused: why an offer was refused, empty where it was not.
        edit_ratio: ``(n_rows,)`` in [0, 1]: 0 where nothing was detected; of an accepted offer, its own; 1 where
            the refiner failed or was refused.
        seconds: wall time of ``detect``, ``refine`` and ``accept``.
    """

    detected: tuple[bool, ...]
    offers: tuple[str | None, ...]
    accepted: tuple[bool, ...]
    refused: tuple[str, ...]
    edit_ratio: FloatArray
    seconds: Mapping[str, float]

    @property
    def targets(self) -> list[str | None]:
        """y⁺ of each row, None where there is no term."""
        return [text if taken else None for text, taken in zip(self.offers, self.accepted, strict=True)]

    @property
    def failed(self) -> int:
        """Rows that were detected and got no offer."""
        return sum(found and offer is None for found, offer in zip(self.detected, self.offers, strict=True))


class Corrector:
    """Runs a refiner on what a host's policy wrote.

    Whatever detector, refiner or check raise or return is caught and counted: `detect` then finds every row,
    the refiner has nothing to offer, the check refuses. Each kind of failure is logged once as a warning,
    afterwards for debugging.

    Args:
        refiner: corrects.
        when: which rows.
        accept: which corrections count.

    Example:
        >>> from guardrails.refine import Acceptance, Always, FunctionRefiner
        >>> corrector = Corrector(FunctionRefiner(lambda prompt, text: text.strip()), Always(), Acceptance())
        >>> corrector.correct(Rows(prompts=["Hello"] * 2, completions=["Good day. ", "Hi."])).edit_ratio
        array([0.1, 0. ])
    """

    def __init__(self, refiner: Refiner, when: Detector, accept: Acceptance) -> None:
        self._refiner, self._when, self._accept = refiner, when, accept
        self._warned: set[str] = set()

    def correct(self, rows: Rows, *, encode: Encode | None = None, score: Score | None = None) -> Corrections:
        """Return what became of each row.

        Args:
            rows: of this process.
            encode: from texts to the sequences between which edits are counted, such as token ids; by default
                characters.
            score: from row numbers and refined texts to differences of task reward, refined minus as written;
                needed where ``accept.reward`` is on.
        """
        begun = time.perf_counter()
        found, failure = detected(self._when, rows)
        if failure:
            self._warn("when", f"The detector {self._when!r} {failure}; the rows concerned are refined.")
        chosen = [row for row, each in enumerate(found) if each]
        refining = time.perf_counter()
        offers: list[str | None] = [None] * len(rows)
        for row, offer in zip(chosen, self._refine(rows.take(chosen)), strict=True):
            offers[row] = offer
        accepting = time.perf_counter()
        ratios, refused = self._judge(rows, offers, encode, score)
        done = time.perf_counter()
        edits = np.array([_edited(*row) for row in zip(found, offers, refused, ratios, strict=True)], dtype=np.float64)
        return Corrections(
            detected=tuple(found),
            offers=tuple(offers),
            accepted=tuple(offer is not None and not reason for offer, reason in zip(offers, refused, strict=True)),
            refused=tuple(refused),
            edit_ratio=edits,
            seconds={"detect": refining - begun, "refine": accepting - refining, "accept": done - accepting},
        )

    def _refine(self, rows: Rows) -> list[str | None]:
        if not len(rows):
            return []
        try:
            offers = list(self._refiner.refine(rows.prompts, rows.completions))
        except Exception as error:
            self._warn("refine", f"The refiner {self._refiner!r} raised {told(error)}.")
            return [None] * len(rows)
        if len(offers) != len(rows):
            self._warn(
                "refine", f"The refiner {self._refiner!r} returned {len(offers)} texts for {len(rows)} completions."
            )
            return [None] * len(rows)
        wrong = [offer for offer in offers if not (offer is None or _is_text(offer))]
        if wrong:
            self._warn("type", f"The refiner {self._refiner!r} returned {wrong[0]!r:.60}, neither a text nor None.")
        return [offer if _is_text(offer) else None for offer in offers]

    def _judge(
        self, rows: Rows, offers: Sequence[str | None], encode: Encode | None, score: Score | None
    ) -> tuple[list[float], list[str]]:
        """Return the edit ratio of each offer, and why it is refused."""
        ratios, refused = [0.0] * len(rows), [""] * len(rows)
        offered = [row for row, offer in enumerate(offers) if offer is not None]
        if not offered:
            return ratios, refused
        texts = {row: str(offers[row]) for row in offered}
        changed = [row for row in offered if texts[row] != rows.completions[row]]
        for row, ratio in zip(changed, _ratios(rows, texts, changed, encode), strict=True):
            ratios[row] = ratio
            if 1.0 - ratio < self._accept.similarity:
                refused[row] = f"edit similarity {1.0 - ratio:.3g} is below {self._accept.similarity:g}"
        for row in self._unsound(rows, texts):
            refused[row] = refused[row] or "it is degenerate itself"
        for row in changed:
            if not refused[row] and not self._passes(rows, row, texts[row]):
                refused[row] = "the check refused it"
        left = [row for row in changed if not refused[row]]
        for row in self._worse(left, texts, score):
            refused[row] = "the task reward scores it lower"
        return ratios, refused

    def _unsound(self, rows: Rows, texts: Mapping[int, str]) -> list[int]:
        """Return the rows whose offer is degenerate; one that was cut off and left as it was still is."""
        if self._accept.sound is None:
            return []
        some, offered = rows.take(list(texts)), list(texts)
        cut = (
            None
            if some.truncated is None
            else [
                bool(cut) and texts[row] == before
                for row, cut, before in zip(offered, some.truncated, some.completions, strict=True)
            ]
        )
        refined = Rows(prompts=some.prompts, completions=list(texts.values()), truncated=cut, infos=some.infos)
        found, failure = detected(self._accept.sound, refined)
        if failure:
            self._warn(
                "sound", f"The detector {self._accept.sound!r} {failure}; the refinements concerned are refused."
            )
        return [row for row, each in zip(offered, found, strict=True) if each]

    def _passes(self, rows: Rows, row: int, refined: str) -> bool:
        check = self._accept.check
        if check is None:
            return True
        try:
            return bool(check(rows.prompts[row], rows.completions[row], refined))
        except Exception as error:
            self._warn("check", f"The check {check!r} raised {told(error)}; it refuses then.")
            return False

    def _worse(self, left: Sequence[int], texts: Mapping[int, str], score: Score | None) -> list[int]:
        """Return the rows whose offer the host's reward functions score lower; all of them where they fail."""
        if not self._accept.reward or not left:
            return []
        try:
            if score is None:
                raise TypeError("the host scores no refinements")
            gains = list(score(left, [texts[row] for row in left]))
            return [row for row, gain in zip(left, gains, strict=True) if gain is None or not gain >= 0.0]
        except Exception as error:
            self._warn("score", f"Scoring refinements failed ({told(error)}); they are refused then.")
            return list(left)

    def _warn(self, kind: str, text: str) -> None:
        logger.log(logging.DEBUG if kind in self._warned else logging.WARNING, "%s", text)
        self._warned.add(kind)


def _is_text(offer: object) -> TypeGuard[str]:
    """Return whether this is a text that can be written; JSON can hold half of a surrogate pair, tokenizers cannot."""
    if not isinstance(offer, str):
        return False
    try:
        offer.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ratios(rows: Rows, texts: Mapping[int, str], changed: Sequence[int], encode: Encode | None) -> list[float]:
    before, after = [rows.completions[row] for row in changed], [texts[row] for row in changed]
    if encode is None or not changed:
        return [edit_ratio(*pair) for pair in zip(before, after, strict=True)]
    coded = encode([*before, *after])
    return [edit_ratio(coded[i], coded[i + len(changed)]) for i in range(len(changed))]


def _edited(found: bool, offer: str | None, refused: str, ratio: float) -> float:
    if not found:
        return 0.0
    return 1.0 if offer is None or refused else ratio
