import functools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails import ConfigurationError, Constraint
from guardrails.refine import (
    Acceptance,
    AllOf,
    Always,
    AnyOf,
    CostAbove,
    Degenerate,
    Detector,
    Empty,
    FunctionRefiner,
    LowEntropy,
    Not,
    Predicate,
    Repetition,
    Rows,
    Truncated,
    Unparsable,
    detected,
)
from guardrails.testing import DetectorContract

TEXTS = ["Good day.", "", "ha " * 12, "GOOD DAY.", "it is what it is", '{"a": 1}', "x = 1", "  \n"]


def rows(*texts, **columns):
    return Rows(prompts=["Hello"] * len(texts), completions=texts, **columns)


class Answers(Detector):
    """Says what it was told to say."""

    def __init__(self, *answers):
        self.answers = answers

    def detect(self, rows):
        return list(self.answers)


class Broken(Detector):
    def detect(self, rows):
        raise RuntimeError("out of order")


def contract(make, texts=TEXTS, **columns):
    """A class of tests: the suite for third parties, for one built-in detector."""

    class Suite(DetectorContract):
        def detector(self):
            return make()

        def rows(self):
            return rows(*texts, **columns)

    return Suite


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


async def asynchronous(*arguments, **kwargs):
    return [0.0]


class Asynchronous:
    async def __call__(self, **kwargs):
        return [0.0]


TestRepetition = contract(Repetition)
TestEmpty = contract(Empty)
TestDegenerate = contract(Degenerate)
TestDegenerateWithTruncation = contract(Degenerate, truncated=[True, *[False] * 7])
TestTruncated = contract(Truncated, truncated=[True, *[False] * 7])
TestLowEntropy = contract(lambda: LowEntropy(0.5), entropy=[0.1, *[2.0] * 7])
TestJson = contract(lambda: Unparsable("json"))
TestPython = contract(lambda: Unparsable("python"))
TestPredicate = contract(lambda: Predicate(lambda prompt, completion: completion.isupper()))
TestCostAbove = contract(lambda: CostAbove(length, 8.0))
TestCombined = contract(lambda: (Empty() | Repetition()) & ~Predicate(lambda prompt, completion: completion == ""))


def test_repetition_measures_the_share_of_ngrams_that_stood_before():
    text = "a b a b a b"  # four trigrams, of which aba and bab stand twice
    assert Repetition(3, 0.49).detect(rows(text)) == [True]
    assert Repetition(3, 0.5).detect(rows(text)) == [False]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The cat sat on the mat because it was tired of standing about all day long.", False),
        ("I am happy to help. " * 6, True),
        ("really " * 6, True),
        ("a" * 60, True),  # one endless word
        ("好" * 40, True),  # no spaces between words
        ("今天天气很好,我们去公园散步,然后在湖边的小店里喝茶,晚上再回家做饭吃。", False),
        ("!?!?!?!?!?!?", True),
        ("no no", False),  # too short to tell
        ("def area(width, height):\n    if width < 0:\n        return 0\n    return width * height\n", False),
        ("", False),
    ],
)
def test_repetition_tells_loops_from_prose_code_and_short_answers(text, found):
    assert Repetition().detect(rows(text)) == [found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": [1, 2.5, null, true]}', False),
        (' \n"text"\n', False),
        ('```json\n{"a": 1}\n```', False),
        ('```\n{"a": 1}\n```\n', False),
        ('~~~json\n{"a": 1}\n~~~', False),
        ("{'a': 1}", True),
        ('{"a": 1,}', True),
        ('Here it is: {"a": 1}', True),
        ("NaN", True),
        ("-Infinity", True),
        ("", True),
        ("[" * 100_000, True),
    ],
)
def test_json_is_what_the_standard_calls_so_in_one_fence_or_none(text, found):
    assert Unparsable("json").detect(rows(text)) == [found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\nprint(x)", False),
        ("```python\ndef f(a):\n    return a\n```", False),
        ("    x = 1\n    y = 2\n", False),
        ("raise SystemExit", False),  # parsed, never run
        ("def f(:", True),
        ("x = = 1", True),
        ("x = 1\0", True),
        ("return\n    x", True),
        ("(" * 5000, True),
        ("1" * 5000, True),
        ("'\\d'", False),  # a warning to its author is nothing to us
    ],
)
def test_python_is_what_the_interpreter_parses(text, found, recwarn):
    assert Unparsable("python").detect(rows(text)) == [found]
    assert not recwarn


def test_what_is_parsed_is_not_executed(tmp_path):
    target = tmp_path / "made"
    assert Unparsable("python").detect(rows(f"open({str(target)!r}, 'w')")) == [False]
    assert not target.exists()


def test_degenerate_is_repetition_or_emptiness_and_truncation_where_known():
    texts = ("ha " * 12, " ", "Good day.", "Good day.")
    assert Degenerate().detect(rows(*texts)) == [True, True, False, False]
    assert Degenerate().detect(rows(*texts, truncated=[False, False, False, True])) == [True, True, False, True]


def test_low_entropy_cannot_tell_where_the_entropy_is_unknown():
    assert LowEntropy(0.5).detect(rows("a", "b", "c", entropy=[0.4, 0.5, math.nan])) == [True, False, None]


def test_a_cost_function_sees_what_a_host_would_pass_it():
    seen = {}

    def cost(**arguments):
        seen.update(arguments)
        return np.array([1.0, np.nan])

    chat = [[{"role": "user", "content": "Hello"}]] * 2
    infos = [{"prompt": chat[0], "answer": 3}, {"prompt": chat[0], "answer": 4}]
    some = Rows(prompts=chat, completions=["a", "b"], infos=infos)
    assert CostAbove(cost, 0.5).detect(some) == [True, None]
    assert seen == {
        "prompts": chat,
        "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
        "answer": [3, 4],
    }
    assert CostAbove(lambda completions, **kwargs: [None, 0.4], 0.5).detect(rows("a", "b")) == [None, False]


def test_of_a_row_on_which_a_predicate_raises_nothing_can_be_told():
    found = Predicate(lambda prompt, completion: 1 / len(completion) > 0.5)
    assert found.detect(rows("a", "", "abc")) == [True, None, False]
    assert (~found).detect(rows("a", "", "abc")) == [False, None, True]


logic = st.sampled_from([True, False, None])


@given(st.lists(st.tuples(logic, logic), min_size=1, max_size=9))
def test_combinations_follow_three_valued_logic(pairs):
    one, other = (Answers(*column) for column in zip(*pairs, strict=True))
    some = rows(*[""] * len(pairs))
    order = {False: 0, None: 1, True: 2}
    back = {0: False, 1: None, 2: True}
    assert (one | other).detect(some) == [back[max(order[a], order[b])] for a, b in pairs]
    assert (one & other).detect(some) == [back[min(order[a], order[b])] for a, b in pairs]
    assert (~one).detect(some) == [back[2 - order[a]] for a, _ in pairs]
    assert (~(one | other)).detect(some) == (~one & ~other).detect(some)


def test_combinations_require_what_their_parts_do_and_stay_flat():
    both = Truncated() | LowEntropy() | Empty()
    assert both.requires == {"truncated", "entropy"}
    assert [type(part) for part in both.parts] == [Truncated, LowEntropy, Empty]
    assert (~Truncated()).requires == {"truncated"}
    assert repr(~(Empty() & Always()) | Truncated()) == "(~(Empty() & Always()) | Truncated())"


@pytest.mark.parametrize(
    ("detector", "failure"),
    [
        (Broken(), "raised RuntimeError: out of order"),
        (Broken() | Empty(), "raised RuntimeError: out of order"),
        (~Broken(), "raised RuntimeError: out of order"),
        (Answers(True, False), "returned 2 answers for 3 rows"),
        (Answers(False, "no", False), "returned 'no', which is neither true, false nor None"),
        (Answers(0.0, 0.0, 0.0), "returned 0.0"),
        (Truncated(), "lacks the columns ['truncated']"),
        (Answers(), "returned 0 answers"),
    ],
)
def test_a_detector_that_fails_finds_every_row(detector, failure):
    found, said = detected(detector, rows("a", "b", "c"))
    assert found == [True, True, True]
    assert failure in said


def test_what_a_detector_cannot_tell_counts_as_degenerate():
    assert detected(Answers(None, False, np.True_), rows("a", "b", "c")) == (
        [True, False, True],
        "could not tell of 1 rows",
    )


def test_the_users_interrupt_passes():
    class Interrupted(Detector):
        def detect(self, rows):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detected(Interrupted(), rows("a"))


def test_a_detector_is_a_cost_function(caplog):
    cost = Constraint("degenerate", limit=0.05, cost=Degenerate()).cost
    chat = [[{"role": "assistant", "content": "ha " * 12}], [{"role": "assistant", "content": "Good day."}]]
    assert cost(prompts=["Hello"] * 2, completions=chat, trainer_state=object(), answer=[1, 2]) == [1.0, 0.0]
    assert cost.__name__ == "degenerate"
    assert Broken()(prompts=["Hello"], completions=["a"]) == [1.0]
    assert "Broken() raised RuntimeError" in caplog.text


def test_as_a_cost_function_it_judges_what_the_policy_wrote_and_not_its_tools():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rows", "arguments": {}}}]}
    zeros = {"role": "tool", "name": "rows", "content": "0, " * 20}
    answer = {"role": "assistant", "content": '{"zeros": 20}'}
    looping = {"role": "assistant", "content": "0, " * 20}
    nothing = {"role": "assistant", "content": ""}
    chats = [
        [call, zeros, answer],
        [looping, zeros, answer],
        [call, zeros],
        [call, zeros, nothing],
        [{"content": "0, " * 20}],
    ]
    given = {"prompts": [[{"role": "user", "content": "Count."}]] * len(chats), "completions": chats}
    assert Degenerate()(**given) == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert Unparsable("json")(**given) == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert (Repetition() | Unparsable("json"))(**given) == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert Predicate(lambda prompt, text: "tool" in text or "0, " in text)(**given) == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert Unparsable("json")(prompts=["Count."] * 2, completions=['{"zeros": 20}', "none"]) == [0.0, 1.0]


def test_as_a_cost_function_it_passes_the_data_sets_columns_on():
    def wrong_by(completions, answer, **kwargs):
        return [abs(int(text) - right) for text, right in zip(completions, answer, strict=True)]

    wrong = CostAbove(wrong_by, 0.5)
    assert wrong(prompts=["1+1"] * 2, completions=["2", "3"], answer=[2, 2], log_extra=print) == [0.0, 1.0]


def test_a_detector_that_needs_more_than_texts_is_no_cost_function():
    with pytest.raises(ConfigurationError, match=r"LowEntropy\(nats=0.1\) requires \['entropy'\]"):
        LowEntropy()(prompts=["Hello"], completions=["a"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Repetition(0), "n is 0"),
        (lambda: Repetition(share=1.0), "share is 1.0"),
        (lambda: Unparsable("yaml"), "language is 'yaml'"),
        (lambda: LowEntropy(0.0), "nats is 0.0"),
        (lambda: Predicate("rude"), "Predicate"),
        (lambda: CostAbove(3.0), "CostAbove"),
        (lambda: CostAbove(length, math.nan), "threshold is nan"),
        (lambda: CostAbove(asynchronous), "CostAbove: .*asynchronous.*Give a plain function"),
        (lambda: CostAbove(functools.partial(asynchronous, weight=2.0)), "CostAbove: .*is asynchronous"),
        (lambda: CostAbove(Asynchronous()), "CostAbove: .*is asynchronous"),
        (lambda: CostAbove(lambda completions, completion_ids, **kwargs: []), "requires 'completion_ids'.*Write it as"),
        (lambda: CostAbove(lambda completions, *, log_extra, **kwargs: []), "requires 'log_extra'"),
        (lambda: CostAbove(lambda prompts, completions, /, **kwargs: []), "requires 'prompts'.*by name"),
        (lambda: CostAbove(lambda completions: []), r"takes no \*\*kwargs"),
        (lambda: Predicate(asynchronous), "Predicate: .*is asynchronous"),
        (lambda: FunctionRefiner(asynchronous), "FunctionRefiner: .*is asynchronous"),
        (lambda: Acceptance(check=asynchronous), "Acceptance: check: .*is asynchronous"),
        (lambda: AnyOf(), "combines nothing"),
        (lambda: AllOf(Empty(), len), "combines detectors, not"),
        (lambda: Not(len), "Not takes a detector"),
        (lambda: rows("a", truncated=[True, False]), "'truncated' has 2 entries for 1 completions"),
    ],
)
def test_what_cannot_be_used_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_cost_function_may_require_columns_and_take_the_hosts_own_where_there_are_some():
    def cost(prompts, completions, answer, completion_ids=None):
        return [float(right) for right in answer]

    some = rows("a", "b", infos=[{"answer": 0}, {"answer": 1}])
    assert CostAbove(cost).detect(some) == [False, True]
    assert CostAbove(functools.partial(length, weight=1.0), 1.5).detect(rows("a", "bb")) == [False, True]


def test_a_detector_combines_with_detectors_only():
    with pytest.raises(TypeError):
        Empty() | len
    with pytest.raises(TypeError):
        Empty() & len


@pytest.mark.parametrize("text", ["~" * 100 + "\n" * 1200 + "x", "```\n" + "\n" * 20000 + "x"])
def test_degenerate_text_around_a_fence_takes_no_time(text):
    begun = time.perf_counter()
    Unparsable("python").detect(rows(text))
    assert time.perf_counter() - begun < 2.0  # linear: milliseconds; quadratic: 5 s and more
