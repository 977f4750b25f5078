"""The suite that a refiner must pass; authors subclass it in their own tests."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from guardrails.errors import AttachError
from guardrails.refine.edits import edit_ratio
from guardrails.refine.refiner import Refiner, Text


class Host:
    """A host with nothing but its limits: no tokenizer and no reference model.

    Args:
        max_completion_length: in tokens.
    """

    host_name = "the contract"
    tokenizer: Any = None

    def __init__(self, max_completion_length: int = 64) -> None:
        self.max_completion_length = max_completion_length

    def reference(self) -> AbstractContextManager[Any]:
        """Refuse.

        Raises:
            AttachError: always.
        """
        raise AttachError("The contract's host has no reference model. Let host(self) return one that has.")


class RefinerContract:
    """Pytest suite for a `Refiner`: what a refinement relies on.

    Subclass it under a name that pytest collects, and write `refiner`, `faulty` and `faultless`; also `host`
    if the refiner takes something from it.

    Example:
        >>> class TestClosing(RefinerContract):
        ...     def refiner(self):
        ...         return Closing()
        ...
        ...     def faulty(self):
        ...         return [("Hello", "Good day")]
        ...
        ...     def faultless(self):
        ...         return [("Hello", "Good day.")]
    """

    def refiner(self) -> Refiner:
        """Return a new refiner."""
        raise NotImplementedError(f"{type(self).__name__} must write refiner(self), returning a new refiner.")

    def faulty(self) -> Sequence[tuple[Text, str]]:
        """Return prompts, each with a completion that the refiner corrects."""
        raise NotImplementedError(f"{type(self).__name__} must write faulty(self), returning (prompt, completion)s.")

    def faultless(self) -> Sequence[tuple[Text, str]]:
        """Return prompts, each with a completion in which nothing is wrong."""
        raise NotImplementedError(f"{type(self).__name__} must write faultless(self), returning (prompt, completion)s.")

    def host(self) -> Any:
        """Return what the refiner is attached to; by default a host without tokenizer and reference model."""
        return Host()

    def test_every_row_gets_a_text_or_none(self) -> None:
        """One answer per row, and of none nothing."""
        rows = [*self.faulty(), *self.faultless()]
        _require(len(rows) >= 2, "faulty() and faultless() must return at least one row each.")
        offers = self._refine(rows)
        _require(len(offers) == len(rows), f"{len(offers)} answers for {len(rows)} rows.")
        wrong = [offer for offer in offers if not (offer is None or isinstance(offer, str))]
        _require(not wrong, f"it answered {wrong[:1]}; a text or None is needed.")
        _require(self._refine([]) == [], "it answered although there were no rows.")

    def test_what_is_faulty_is_changed_and_not_thrown_away(self) -> None:
        """A correction is another text, and keeps something of the completion."""
        for (_, completion), offer in zip(self.faulty(), self._refine(self.faulty()), strict=True):
            _require(offer is not None and offer != completion, f"{completion!r:.60} was answered with {offer!r:.60}.")
            _require(edit_ratio(completion, offer or "") < 1.0, f"nothing of {completion!r:.60} was kept.")

    def test_what_is_faultless_stays_as_it_is(self) -> None:
        """Otherwise the term would pull on a policy that does everything right."""
        for (_, completion), offer in zip(self.faultless(), self._refine(self.faultless()), strict=True):
            _require(offer == completion, f"{completion!r:.60} became {offer!r:.60}.")

    def test_a_row_is_refined_by_itself(self) -> None:
        """Wherever and among whichever others it stands."""
        rows = [*self.faulty(), *self.faultless()]
        backwards = self._refine(rows[::-1])[::-1]
        _require(backwards == self._refine(rows), "answers changed when rows traded places.")
        alone = [self._refine([row])[0] for row in rows]
        _require(alone == self._refine(rows), "answers changed when a row stood alone.")

    def test_prompts_and_completions_are_left_as_they_were(self) -> None:
        """The host goes on working with them."""
        rows = [*self.faulty(), *self.faultless()]
        prompts, completions = [prompt for prompt, _ in rows], [completion for _, completion in rows]
        before = copy.deepcopy((prompts, completions))
        self._ask(prompts, completions)
        _require((prompts, completions) == before, "refine() changed what it was given; copy what you alter.")

    def test_the_programs_chance_is_not_drawn_from(self) -> None:
        """A training with the refiner must not differ by its mere presence."""
        before = _chance()
        self._refine([*self.faulty(), *self.faultless()])
        _require(_chance() == before, "it drew from a global random generator; make one of its own.")

    def test_it_can_be_detached_and_attached_again(self) -> None:
        """Also before it was ever attached."""
        refiner, rows = self.refiner(), list(self.faulty())
        refiner.detach()
        answers = []
        for _ in range(2):
            refiner.attach(self.host())
            answers.append(list(refiner.refine([prompt for prompt, _ in rows], [text for _, text in rows])))
            refiner.detach()
        _require(answers[0] == answers[1], "it answered otherwise when attached for the second time.")

    def _refine(self, rows: Sequence[tuple[Text, str]]) -> list[str | None]:
        return self._ask([prompt for prompt, _ in rows], [completion for _, completion in rows])

    def _ask(self, prompts: list[Text], completions: list[str]) -> list[str | None]:
        refiner = self.refiner()
        refiner.attach(self.host())
        try:
            return list(refiner.refine(prompts, completions))
        finally:
            refiner.detach()


def _chance() -> tuple[object, ...]:
    """Return the state of every global random generator in use."""
    _, words, place, *_ = np.random.get_state()
    torch = sys.modules.get("torch")
    drawn = None if torch is None else torch.get_rng_state().tolist()
    return random.getstate(), bytes(words), place, drawn  # type: ignore[arg-type]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
