"""What a task of the refiner benchmark is: prompts, an imperfect reference, a reward with a flaw, and the truth.

The reward is what the trainer sees. The truth is what `Task.judge` says, which neither the reward, the refiner nor any
arm of the benchmark reads: it is only measured.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""One row of a data set: the prompt, and what reward and judge need to know of it."""

REFINE_PROMPT = "{prompt} {completion} corrected :"
"""How the reference is asked for a correction, in training and by the refiner."""


@dataclass(frozen=True)
class Verdict:
    """The truth about one completion.

    Args:
        well_formed: whether its form is faultless; what is not is degenerate.
        right: whether what it says is right, if its form is faultless; False otherwise.
    """

    well_formed: bool
    right: bool


class Task(ABC):
    """One task.

    Attributes:
        name: in records and tables.
        words: the vocabulary.
        temptations: words that a flaw of the reward pays for.
        columns: of a row, beside ``prompt``.
        completion_length: tokens of a completion at most, the end of sequence included.
    """

    name: str
    words: tuple[str, ...]
    temptations: tuple[str, ...]
    columns: tuple[str, ...]
    completion_length: int

    @abstractmethod
    def question(self, draw: random.Random) -> Row:
        """Return a row with its ``prompt``."""

    @abstractmethod
    def answer(self, row: Row, draw: random.Random) -> str:
        """Return what the reference is taught to answer: often wrong, now and then with a fault of form."""

    @abstractmethod
    def repair(self, row: Row, completion: str, draw: random.Random) -> str:
        """Return the minimal correction that the reference is taught.

        What is well formed stays as it is, *also where it is wrong*: the reference knows no more as a refiner than
        it knows when it answers. What is missing is filled in as `answer` would.
        """

    @abstractmethod
    def rewards(self, completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """Return the reward of each completion: what the trainer sees."""

    @abstractmethod
    def judge(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Verdict]:
        """Return the truth about each completion that ended; one that was cut is degenerate whatever it says."""

    def close(self) -> None:
        """Let go of what the task holds."""
        return

    def example(self, draw: random.Random) -> tuple[str, str]:
        """Return one prompt and output of the reference's training: as often a repair as an answer."""
        row = self.question(draw)
        answer = self.answer(row, draw)
        if draw.random() < 0.4:
            return row["prompt"], answer
        completion = answer if draw.random() < 0.3 else self.corrupt(answer, draw)
        return (
            REFINE_PROMPT.format(prompt=row["prompt"], completion=completion),
            self.repair(row, completion, draw),
        )

    def corrupt(self, completion: str, draw: random.Random) -> str:
        """Return ``completion`` with faults of every kind a policy may fall into, from one word to nothing left."""
        words, room = completion.split(), self.completion_length
        for _ in range(draw.choice((1, 1, 2, 3))):
            kind = draw.randrange(6)
            at = draw.randint(0, len(words))
            if kind == 0 and words:  # words are missing
                del words[at : at + draw.randint(1, 3)]
            elif kind == 1 and words:  # a span is said again
                span = words[at : at + draw.randint(1, 4)]
                words[at:at] = span * draw.randint(1, 3)
            elif kind == 2:  # noise
                words[at:at] = [draw.choice(self.words) for _ in range(draw.randint(1, 3))]
            elif kind == 3:  # nothing but a stretch of what pays
                words = self._spam(draw, room) if draw.random() < 0.4 else words + self._spam(draw, room)
            else:
                words[at:at] = self._spam(draw, draw.randint(1, room))
        return " ".join(words[:room])

    def _spam(self, draw: random.Random, length: int) -> list[str]:
        one = [draw.choice(self.temptations)]
        return [draw.choice(one if draw.random() < 0.5 else self.temptations) for _ in range(length)]
