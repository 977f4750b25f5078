"""Refiners and detectors of third parties: found by name, used in a guard, and held to their contracts."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest

from guardrails import Guard, Refinement, plugins
from guardrails.refine import Acceptance, Always, Corrector, Detector, Refiner, Rows
from guardrails.testing import DetectorContract, RefinerContract

SOURCE = """
    import guardrails
    from guardrails.refine import Detector, Refiner

    class Closing(Refiner):
        name = "acme.closing"
        def refine(self, prompts, completions):
            return [text if text.endswith(".") else text + "." for text in completions]

    class Shouting(Detector):
        name = "acme.shouting"
        def detect(self, rows):
            return [text.isupper() for text in rows.completions]

    def shorten(prompt, completion):
        return completion[:3]
    shorten.name = "acme.shorten"

    def long(prompt, completion):
        return len(completion) > 3
    long.name = "acme.long"

    @guardrails.hookimpl
    def guardrails_refiners():
        return [Closing, shorten]

    @guardrails.hookimpl
    def guardrails_detectors():
        return [Shouting, long]
"""


@pytest.mark.parametrize(
    ("refiner", "when", "expected"),
    [
        ("acme.closing", "acme.shouting", ["GOOD DAY.", None, None]),
        ("acme.shorten", "acme.long", ["GOO", None, "Goo"]),
        ("acme.closing", Always(), ["GOOD DAY.", "Hm.", "Good."]),
    ],
)
def test_an_installed_plugin_corrects_what_an_installed_plugin_detects(install, refiner, when, expected):
    install("acme-guardrails", SOURCE, version="2.3")
    part = Guard(Refinement(refiner, when=when)).refinement
    corrector = Corrector(part.corrects, part.detects, Acceptance(sound=None))
    rows = Rows(prompts=["Hello"] * 3, completions=["GOOD DAY", "Hm.", "Good"])
    assert corrector.correct(rows).targets == expected
    assert {(record.kind, record.names) for record in plugins.found()} == {
        ("refiner", ("acme.closing", "acme.shorten")),
        ("detector", ("acme.long", "acme.shouting")),
    }


class Closing(Refiner):
    name = "acme.closing"

    def refine(self, prompts, completions):
        return [text if text.endswith(".") else text + "." for text in completions]


class Shouting(Detector):
    name = "acme.shouting"

    def detect(self, rows):
        return [text.isupper() for text in rows.completions]


class TestClosing(RefinerContract):
    def refiner(self):
        return Closing()

    def faulty(self):
        return [("Hello", "Good day"), ([{"role": "user", "content": "Hello"}], "Hm")]

    def faultless(self):
        return [("Hello", "Good day.")]


class TestShouting(DetectorContract):
    def detector(self):
        return Shouting()

    def rows(self):
        texts = ["GOOD DAY", "Good day", "", "Hm."]
        return Rows(prompts=["Hello"] * 4, completions=texts, truncated=[False] * 4, entropy=[1.0] * 4)


class TestShoutingInArrays(TestShouting):
    def rows(self):
        rows = super().rows()
        return replace(rows, truncated=np.zeros(4, dtype=bool), entropy=np.array([1.0, 0.5, math.nan, 2.0]))


def refiner_that(refine):
    return type("Broken", (Closing,), {"refine": refine})


def closed(completions):
    return Closing().refine([], completions)


def drops_a_row(self, prompts, completions):
    return closed(completions)[1:]


def rewrites_all(self, prompts, completions):
    return [text + "!" for text in completions]


def throws_away(self, prompts, completions):
    return [text if text.endswith(".") else "?" for text in completions]


def looks_around(self, prompts, completions):
    return [text + (str(i) if i else "") for i, text in enumerate(closed(completions))]


def sorts_in_place(self, prompts, completions):
    offers = closed(completions)
    completions.sort()
    return offers


def draws(self, prompts, completions):
    random.random()
    return closed(completions)


class Forgetful(Closing):
    """Cannot be used again once it was detached from a host."""

    attached = gone = False

    def attach(self, host):
        self.attached = True

    def detach(self):
        self.gone = self.attached

    def refine(self, prompts, completions):
        return [None] * len(completions) if self.gone else closed(completions)


@pytest.mark.parametrize(
    ("promise", "refiner"),
    [
        ("test_every_row_gets_a_text_or_none", refiner_that(drops_a_row)),
        ("test_what_is_faulty_is_changed_and_not_thrown_away", refiner_that(throws_away)),
        ("test_what_is_faultless_stays_as_it_is", refiner_that(rewrites_all)),
        ("test_a_row_is_refined_by_itself", refiner_that(looks_around)),
        ("test_prompts_and_completions_are_left_as_they_were", refiner_that(sorts_in_place)),
        ("test_the_programs_chance_is_not_drawn_from", refiner_that(draws)),
        ("test_it_can_be_detached_and_attached_again", Forgetful),
    ],
)
def test_the_contract_catches_a_refiner_that_breaks_its_promise(promise, refiner):
    suite = TestClosing()
    suite.refiner = refiner
    with pytest.raises(AssertionError):
        getattr(suite, promise)()


def remembers(self, rows):
    self.seen = getattr(self, "seen", 0) + 1
    return [text.isupper() ^ (self.seen > 2) for text in rows.completions]


def asks_the_neighbour(self, rows):
    return [text.isupper() or (i > 0 and rows.completions[i - 1].isupper()) for i, text in enumerate(rows.completions)]


def sorts_rows(self, rows):
    found = [text.isupper() for text in rows.completions]
    rows.completions.sort()
    return found


def reads_more(self, rows):
    return [text.isupper() and value > 0 for text, value in zip(rows.completions, rows.entropy, strict=True)]


def fails_on_nothing(self, rows):
    return [text.isupper() and len(rows.completions[0]) >= 0 for text in rows.completions] or [True]


def sleeps(self, rows):
    time.sleep(0.0005 * len(rows))
    return [text.isupper() for text in rows.completions]


def detector_that(detect):
    return type("Broken", (Shouting,), {"detect": detect})


@pytest.mark.parametrize(
    ("promise", "detector"),
    [
        ("test_it_tells_degenerate_rows_from_others", detector_that(lambda self, rows: [False] * len(rows))),
        ("test_no_rows_give_no_answers", detector_that(fails_on_nothing)),
        ("test_equal_rows_get_equal_answers", detector_that(remembers)),
        ("test_rows_that_trade_places_keep_their_answers", detector_that(asks_the_neighbour)),
        ("test_the_rows_are_left_as_they_were", detector_that(sorts_rows)),
        ("test_the_required_columns_suffice", detector_that(reads_more)),
        ("test_256_rows_are_judged_in_time", detector_that(sleeps)),
    ],
)
def test_the_contract_catches_a_detector_that_breaks_its_promise(promise, detector):
    suite = TestShouting()
    suite.detector = detector
    suite.time_limit = 0.1  # the sleeper takes 0.128 s at least
    with pytest.raises(AssertionError):
        getattr(suite, promise)()


def test_every_promise_is_seen_to_fail():
    for suite, test in (
        (RefinerContract, test_the_contract_catches_a_refiner_that_breaks_its_promise),
        (DetectorContract, test_the_contract_catches_a_detector_that_breaks_its_promise),
    ):
        (mark,) = test.pytestmark
        promises = sorted(name for name in vars(suite) if name.startswith("test_"))
        assert sorted(promise for promise, _ in mark.args[1]) == promises
