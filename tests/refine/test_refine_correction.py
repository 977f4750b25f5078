import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails import ConfigurationError
from guardrails.refine import (
    Acceptance,
    Always,
    Corrector,
    CostAbove,
    Empty,
    FunctionRefiner,
    LowEntropy,
    Predicate,
    Refiner,
    Rows,
    Truncated,
    edit_ratio,
    plain,
)

ANY = Acceptance(sound=None)
LONG = Predicate(lambda prompt, completion: len(completion) > 3)


class Offers(Refiner):
    """Offers what it was told to, and remembers what it was asked."""

    def __init__(self, offers):
        self.offers = offers
        self.asked = []

    def refine(self, prompts, completions):
        self.asked.append((list(prompts), list(completions)))
        if isinstance(self.offers, Exception):
            raise self.offers
        return self.offers


def correct(offers, completions, *, when=None, accept=ANY, truncated=None, **arguments):
    rows = Rows(prompts=[f"p{i}" for i in range(len(completions))], completions=completions, truncated=truncated)
    refiner = offers if isinstance(offers, Refiner) else Offers(offers)
    return Corrector(refiner, when or Always(), accept).correct(rows, **arguments)


def test_only_what_is_detected_is_refined_and_every_answer_finds_its_row():
    refiner = Offers(["two!", "four!"])
    result = correct(refiner, ["one", "two.", "six", "four."], when=LONG)
    assert refiner.asked == [(["p1", "p3"], ["two.", "four."])]
    assert result.detected == (False, True, False, True)
    assert result.targets == [None, "two!", None, "four!"]
    assert result.edit_ratio.tolist() == [0.0, 0.25, 0.0, 0.2]
    assert result.failed == 0


def test_where_nothing_is_detected_the_refiner_is_not_asked():
    refiner = Offers([])
    result = correct(refiner, ["one", "two"], when=LONG)
    assert refiner.asked == []
    assert result.targets == [None, None]


def test_what_needs_no_change_is_a_target_of_edit_ratio_zero():
    result = correct(["one", "2wo"], ["one", "two"])
    assert result.targets == ["one", "2wo"]
    assert result.accepted == (True, True)
    assert result.edit_ratio.tolist() == [0.0, pytest.approx(1 / 3)]


@pytest.mark.parametrize(
    ("offers", "said"),
    [
        (RuntimeError("out of order"), "raised RuntimeError: out of order"),
        (["one"], "returned 1 texts for 3 completions"),
        ([], "returned 0 texts"),
        (None, "raised TypeError"),
        ([b"one", 2, {"content": "three"}], "returned b'one', neither a text nor None"),
    ],
)
def test_a_refiner_that_fails_costs_its_rows_the_term_and_nothing_else(offers, said, caplog):
    result = correct(offers, ["one", "two", "three"])
    assert result.targets == [None] * 3
    assert result.failed == 3
    assert result.edit_ratio.tolist() == [1.0] * 3
    assert said in caplog.text


def test_a_failure_is_a_warning_once(caplog):
    corrector = Corrector(Offers(RuntimeError("out of order")), Always(), ANY)
    with caplog.at_level(logging.DEBUG, logger="guardrails"):
        for _ in range(3):
            corrector.correct(Rows(prompts=["p"], completions=["one"]))
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]


def test_a_refiner_that_answers_wrongly_on_one_row_keeps_the_others():
    result = correct(["one!", 2, None], ["one", "two", "three"])
    assert result.targets == ["one!", None, None]
    assert result.failed == 2


def test_the_users_interrupt_passes():
    class Interrupted(Refiner):
        def refine(self, prompts, completions):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        correct(Interrupted(), ["one"])


def test_a_detector_that_fails_has_every_row_refined(caplog):
    result = correct(["one!", "two!"], ["one", "two"], when=Truncated())
    assert result.targets == ["one!", "two!"]
    assert "lacks the columns ['truncated']; the rows concerned are refined" in caplog.text


def test_an_edit_below_the_similarity_floor_is_refused():
    result = correct(["abcX", "abXX"], ["abcd", "abcd"], accept=Acceptance(similarity=0.75, sound=None))
    assert result.targets == ["abcX", None]
    assert result.refused == ("", "edit similarity 0.5 is below 0.75")
    assert result.edit_ratio.tolist() == [0.25, 1.0]
    assert result.failed == 0


def test_edits_are_counted_in_the_units_of_the_host():
    def words(texts):
        return [text.split() for text in texts]

    result = correct(["good bye"], ["good day"], encode=words)
    assert result.edit_ratio.tolist() == [0.5]


def test_a_refinement_that_is_degenerate_itself_is_refused():
    result = correct(["ha " * 12, "", "Hi."], ["ha ha", "well", "Hm."], accept=Acceptance())
    assert result.targets == [None, None, "Hi."]
    assert result.refused == ("it is degenerate itself", "it is degenerate itself", "")


def test_a_completion_that_was_cut_off_and_left_as_it_was_is_no_target():
    result = correct(["Good d", "Good day."], ["Good d", "Good d"], accept=Acceptance(), truncated=[True, True])
    assert result.targets == [None, "Good day."]


def test_a_check_refuses_and_so_does_one_that_raises(caplog):
    def check(prompt, completion, refined):
        return {"one!": True, "two!": False}[refined]

    result = correct(["one!", "two!", "six!"], ["one", "two", "six"], accept=Acceptance(sound=None, check=check))
    assert result.targets == ["one!", None, None]
    assert "raised KeyError: 'six!'; it refuses then" in caplog.text


def test_a_check_is_not_asked_of_what_was_not_changed():
    assert correct(["one"], ["one"], accept=Acceptance(sound=None, check=lambda *row: False)).targets == ["one"]


def test_what_the_task_reward_scores_lower_is_refused_where_that_is_asked_for():
    asked = []

    def score(rows, texts):
        asked.append((list(rows), list(texts)))
        return [0.5, -0.5, 0.0, float("nan"), None]

    offers = [None, "1!", "2!", "3!", "4!", "5!", "6"]
    completions = ["0", "1", "2", "3", "4", "5", "6"]
    strict = Acceptance(sound=None, reward=True)
    result = correct(offers, completions, accept=strict, score=score)
    assert asked == [([1, 2, 3, 4, 5], ["1!", "2!", "3!", "4!", "5!"])]
    assert result.targets == [None, "1!", None, "3!", None, None, "6"]
    assert correct(offers, completions, score=score).targets == offers
    assert len(asked) == 1


@pytest.mark.parametrize("score", [None, lambda rows, texts: 1 / 0, lambda rows, texts: [1.0]])
def test_where_the_reward_cannot_be_told_every_change_is_refused(score, caplog):
    result = correct(["1!", "2!", "3"], ["1", "2", "3"], accept=Acceptance(sound=None, reward=True), score=score)
    assert result.targets == [None, None, "3"]
    assert "Scoring refinements failed" in caplog.text


def test_seconds_are_given_by_component():
    assert set(correct(["one"], ["one"]).seconds) == {"detect", "refine", "accept"}


def test_no_rows_are_no_corrections():
    result = correct([], [])
    assert result.targets == []
    assert result.edit_ratio.shape == (0,)


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no words for it")


def raising(error):
    def function(*arguments, **kwargs):
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UnspeakableError(), "UnspeakableError: its message cannot be shown"),
        (ValueError("x" * 9999), f"ValueError: {'x' * 500}…"),
    ],
    ids=["unspeakable", "long"],
)
def test_an_error_that_cannot_be_told_or_never_ends_stops_nothing(caplog, error, told):
    accept = Acceptance(sound=None, check=raising(error))
    assert not correct(["two"], ["one"], accept=accept).accepted[0]
    assert not correct(["two"], ["one"], accept=Acceptance(sound=None, reward=True), score=raising(error)).accepted[0]
    assert correct(FunctionRefiner(raising(error)), ["one"]).failed == 1
    assert correct(["two"], ["one"], when=CostAbove(raising(error))).accepted[0]
    with caplog.at_level(logging.DEBUG):
        assert Predicate(raising(error)).detect(Rows(prompts=["a"], completions=["b"])) == [None]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 5
    assert all(told in message and len(message) < 700 for message in messages)


def test_a_function_that_raises_on_one_row_refines_the_others():
    refiner = FunctionRefiner(lambda prompt, completion: str(1 / len(completion)))
    assert refiner.refine(["p"] * 3, ["a", "", "bb"]) == ["1.0", None, "0.5"]
    with pytest.raises(ZeroDivisionError):
        refiner.refine(["p"] * 2, ["", ""])
    with pytest.raises(ConfigurationError, match="FunctionRefiner"):
        FunctionRefiner("strip")


def test_messages_are_read_as_text():
    parts = [{"type": "text", "text": "Good "}, {"type": "image"}, {"type": "text", "text": "day."}]
    assert plain([{"role": "assistant", "content": parts}, {"role": "assistant", "content": None}]) == "Good day.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": 1.5}, "similarity is 1.5"),
        ({"sound": len}, "sound is"),
        ({"sound": Empty() | LowEntropy()}, "reads the policy's entropy"),
        ({"reward": 1}, "reward is 1"),
        ({"check": "ok"}, "check is 'ok'"),
    ],
)
def test_conditions_that_cannot_be_used_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Acceptance(**arguments)


def slow_distance(before, after):
    """Levenshtein's distance by the book."""
    table = np.zeros((len(before) + 1, len(after) + 1))
    table[:, 0], table[0] = np.arange(len(before) + 1), np.arange(len(after) + 1)
    for i, one in enumerate(before):
        for j, other in enumerate(after):
            table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (one != other))
    return table[-1, -1]


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_the_edit_ratio_is_the_distance_over_the_longer_length(before, after):
    expected = slow_distance(before, after) / max(len(before), len(after), 1)
    assert edit_ratio(before, after) == pytest.approx(expected, abs=1e-12)  # one division of small whole numbers
    letters = "".join("abcd"[i] for i in before), "".join("abcd"[i] for i in after)
    assert edit_ratio(*letters) == edit_ratio(before, after)


def test_an_offer_that_no_tokenizer_can_read_is_none():
    """JSON may hold half of a surrogate pair, which is a text of Python's but no Unicode."""
    result = correct(["good\ud800", "fine"], ["god", "fin"], encode=lambda texts: [text.encode() for text in texts])
    assert result.targets == [None, "fine"]
    assert result.failed == 1
