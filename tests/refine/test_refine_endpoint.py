"""EndpointRefiner against a real server process that is slow, fails, answers nonsense or hangs."""

import asyncio
import logging
import random
import socket
import threading
import time

import numpy as np
import openai
import pytest
import torch
from refine_server import running

from guardrails import ConfigurationError, Refinement
from guardrails.refine import Acceptance, Always, Corrector, EndpointRefiner, Rows
from guardrails.refine.asking import Call
from guardrails.refine.breaker import CircuitBreaker
from guardrails.testing import RefinerContract
from guardrails.testing.refiners import Host

FAILING = [
    "hang", "drip", "close", "500", "503", "garbage", "torn", "list", "nothing", "null", "number", "abort",
    "401", "404",
]  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def refiner(server, **settings):
    quick = {"timeout": 1.0, "budget": 10.0, "retries": 0, "backoff": 0.01, "failures": 1000}
    return EndpointRefiner(server.url, "m", **({"prompt": "{completion}"} | quick | settings))


def ask(refiner, *completions):
    return refiner.refine(["Hello"] * len(completions), list(completions))


def test_rows_get_the_servers_answers_in_their_order(server):
    asked = [f"MODE:{'slow' if i % 3 == 0 else 'answer'} ANSWER:text {i}" for i in range(20)]
    assert ask(refiner(server, timeout=5.0), *asked) == [f"text {i}" for i in range(20)]


@pytest.mark.parametrize("mode", FAILING)
def test_a_row_that_fails_gets_none_and_the_others_their_answers(server, mode):
    own = refiner(server, max_concurrency=1)
    begun = time.perf_counter()
    assert ask(own, "ANSWER:one", f"MODE:{mode} ANSWER:two", "ANSWER:three") == ["one", None, "three"]
    assert time.perf_counter() - begun < 5.0  # one attempt of 1 s, with room for a busy machine
    assert (own.tally.answered, own.tally.failed, own.tally.unasked) == (2, 1, 0)


@pytest.mark.parametrize("mode", ["length", "repetition", "400", "413", "422"])
def test_a_row_that_the_server_will_not_answer_gets_none_and_is_not_held_against_it(server, mode):
    own = refiner(server, failures=1, retries=3)
    before = server.stats()["counts"]["requests"]
    assert ask(own, f"MODE:{mode} ANSWER:two") == [None]
    assert server.stats()["counts"]["requests"] == before + 1
    assert own.breaker.state == "closed"


def test_a_refusal_shows_that_the_server_is_there(server):
    own = refiner(server, failures=3, max_concurrency=1)
    ask(own, *(f"MODE:{mode}" for mode in ("500", "500", "400", "500", "500")))
    assert own.breaker.state == "closed"
    ask(own, "MODE:500")
    assert own.breaker.state == "open"


@pytest.mark.parametrize("mode", ["hang", "drip", "slow"])
def test_a_call_ends_within_its_budget_whatever_the_server_does(server, mode):
    own = refiner(server, timeout=60.0, budget=1.5, max_concurrency=2)
    begun = time.perf_counter()
    offers = ask(own, *(f"MODE:{mode} ANSWER:{i}" for i in range(40)))
    seconds = time.perf_counter() - begun
    assert seconds < 1.5 + 1.0 + 0.5  # budget, grace, and a thread to be scheduled
    answered = [offer for offer in offers if offer is not None]
    assert answered == [str(i) for i in range(len(answered))]
    assert (len(answered) > 0) is (mode == "slow")
    assert own.tally.unasked > 20


def test_a_budget_may_be_longer_than_any_clock_waits(server):
    assert ask(refiner(server, budget=1e12, timeout=1e12), "ANSWER:one") == ["one"]


def test_a_call_ends_even_where_the_program_itself_hangs(server):
    own = EndpointRefiner(server.url, "m", prompt=lambda prompt, completion: time.sleep(4.0), budget=0.2)
    begun = time.perf_counter()
    assert ask(own, "one") == [None]
    assert time.perf_counter() - begun < 0.2 + 1.0 + 0.5
    assert "budget" in own.tally.error


def test_a_server_that_is_slow_but_answers_is_not_given_up(server):
    own = refiner(server, timeout=60.0, budget=1.5, max_concurrency=2, failures=2)
    ask(own, *(f"MODE:slow ANSWER:{i}" for i in range(40)))
    assert own.breaker.state == "closed"
    ask(own, *(f"MODE:hang ANSWER:{i}" for i in range(40)))
    assert own.breaker.state == "open"


def test_what_fails_once_is_asked_again(server):
    own = refiner(server, retries=1)
    assert ask(own, f"MODE:once {random.random()} ANSWER:yes") == ["yes"]
    assert own.tally.error == ""
    assert ask(refiner(server, retries=0), f"MODE:once {random.random()} ANSWER:yes") == [None]


def test_a_server_that_asks_for_time_gets_it(server):
    begun = time.perf_counter()
    assert ask(refiner(server, retries=1), f"MODE:later {random.random()} ANSWER:yes") == ["yes"]
    assert time.perf_counter() - begun >= 0.7


def test_waits_between_attempts_double(server):
    own = refiner(server, retries=3, backoff=0.1)
    begun = time.perf_counter()
    ask(own, "MODE:500")
    assert 0.7 <= time.perf_counter() - begun < 3.0  # 0.1 + 0.2 + 0.4, half as much again at most, and four requests


def test_what_cannot_get_better_is_not_asked_again(server):
    before = server.stats()["counts"]["requests"]
    ask(refiner(server, retries=3), "MODE:401")
    assert server.stats()["counts"]["requests"] == before + 1


def test_no_more_rows_are_asked_at_once_than_allowed():
    with running() as server:
        ask(refiner(server, max_concurrency=3, timeout=10.0), *(f"MODE:slow ANSWER:{i}" for i in range(12)))
        assert server.stats()["counts"]["most"] == 3


def test_a_failing_server_is_left_alone_and_tried_again_with_one_row():
    with running() as server:
        server.force("500")
        own, now = refiner(server, max_concurrency=1), [0.0]
        own.breaker = CircuitBreaker(3, 30.0, clock=lambda: now[0])

        def requests(*completions):
            before = server.stats()["counts"]["requests"]
            return ask(own, *completions), server.stats()["counts"]["requests"] - before

        many = [f"ANSWER:{i}" for i in range(10)]
        assert requests(*many) == ([None] * 10, 3)
        assert own.tally == (0, 3, 7, own.tally.error)
        assert requests(*many) == ([None] * 10, 0)
        assert "left alone" in own.tally.error
        now[0] += 30.0
        assert requests(*many) == ([None] * 10, 1)
        server.force()
        assert requests(*many) == ([None] * 10, 0)
        now[0] += 60.0  # twice the cooldown, since the probe failed
        assert requests(*many) == ([str(i) for i in range(10)], 10)


def test_a_server_that_dies_and_comes_back_is_found_again():
    with running() as server:
        own = refiner(server, failures=1, cooldown=0.2)
        assert ask(own, "ANSWER:one") == ["one"]
        server.stop()
        assert ask(own, "ANSWER:two") == [None]
        with running(server.port):
            time.sleep(0.3)
            assert ask(own, "ANSWER:three") == ["three"]


def test_nobody_listening_is_no_more_than_none():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        own = EndpointRefiner(url, "m", retries=0, timeout=0.5)
        assert ask(own, "one", "two") == [None, None]
        assert "APIConnectionError" in own.tally.error


def test_the_streams_of_chance_are_not_drawn_from(server):
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    ask(refiner(server, retries=3), "ANSWER:one", "MODE:500", "MODE:garbage")
    after = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_it_works_inside_a_running_event_loop(server):
    async def inside():
        return ask(refiner(server), "ANSWER:one")

    assert asyncio.run(inside()) == ["one"]


def test_a_prompt_function_that_raises_costs_its_row_alone(server):
    def prompt(prompt, completion):
        return [{"role": "user", "content": {"bad": 1 / 0}["bad"] if completion == "two" else f"ANSWER:{completion}!"}]

    own = EndpointRefiner(server.url, "m", prompt=prompt)
    assert ask(own, "one", "two") == ["one!", None]
    assert "ZeroDivisionError" in own.tally.error


def test_white_space_around_an_answer_is_that_of_the_completion(server):
    own = EndpointRefiner(server.url, "m", prompt="ANSWER: {completion}\n")
    assert ask(own, "one\n", "two") == ["one\n", "two"]


class OwnError(Exception):
    """Has the message it is given; one of None is no text, and raises where it is read."""

    def __init__(self, message):
        self.message = message

    def __str__(self):
        return self.message


TOLD = [(None, "OwnError: its message cannot be shown"), ("x" * 9999, f"OwnError: {'x' * 500}…")]


@pytest.mark.parametrize(("message", "told"), TOLD, ids=["none", "long"])
def test_an_error_is_told_whatever_its_message_is(server, monkeypatch, message, told):
    def prompt(prompt, completion):
        raise OwnError(message)

    async def fails(*arguments, **fields):
        raise OwnError(message)

    own = refiner(server, prompt=prompt)
    assert ask(own, "one") == [None]
    assert own.tally.error == f"The last refusal: the prompt function raised {told}"
    own = refiner(server)
    monkeypatch.setattr(openai.resources.chat.completions.AsyncCompletions, "create", fails)
    assert ask(own, "one") == [None]
    assert own.tally.error == f"The last failure: {told}"
    monkeypatch.setattr(Call, "_all", fails)
    assert ask(own, "one") == [None]
    assert own.tally.error == told


def test_what_a_reasoning_model_thinks_is_no_part_of_its_answer(server):
    own = refiner(server, prompt=lambda prompt, completion: prompt, failures=1)
    thoughts = ["ANSWER:<think>hm, 7</think>\n\n7", "ANSWER:<think>hm", "ANSWER:seven <think>"]
    assert own.refine(thoughts, ["8", "8", "8"]) == ["7", None, "seven <think>"]
    assert (own.tally.answered, own.tally.failed) == (2, 1)
    assert "thoughts alone" in own.tally.error
    kept = "ANSWER:<think>a</think>7"
    assert own.refine([kept], ["<think>b</think>8"]) == ["<think>a</think>7"]


def test_what_is_filled_in_is_not_searched_for_fields(server):
    own = EndpointRefiner(server.url, "m", prompt="ANSWER:{completion} {prompt} {{}}")
    assert own.refine(["{completion}"], ["{prompt}"]) == ["{prompt} {completion} {}"]


def test_the_request_says_what_was_set(server, monkeypatch):
    monkeypatch.setenv("ACME_KEY", "secret")
    own = refiner(server, temperature=0.3, api_key_env="ACME_KEY", extra={"min_p": 0.1})
    own.attach(Host(max_completion_length=20))
    ask(own, "ANSWER:one")
    last = server.stats()["last"]
    assert last["key"] == "Bearer secret"
    assert last["path"] == "/v1/chat/completions"
    assert last["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "ANSWER:one"}],
        "temperature": 0.3,
        "max_tokens": 40,
        "min_p": 0.1,
    }
    assert "secret" not in repr(vars(own))
    own.detach()
    ask(own, "ANSWER:one")
    assert "max_tokens" not in server.stats()["last"]["body"]


def test_white_space_around_a_key_is_none_of_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    assert ask(refiner(server), "ANSWER:one") == ["one"]
    assert server.stats()["last"]["key"] == "Bearer secret"


def test_a_key_that_the_server_repeats_is_not_written(server, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    own = refiner(server)
    assert ask(own, "MODE:echo") == [None]
    assert "Bearer … is not known" in own.tally.error
    assert "secret" not in own.tally.error + caplog.text


def test_the_longest_answer_follows_the_hosts_longest_completion(server):
    own, host = refiner(server), Host(max_completion_length=20)
    own.attach(host)
    host.max_completion_length = 30  # as a dial turns it
    ask(own, "ANSWER:one")
    assert server.stats()["last"]["body"]["max_tokens"] == 60


def test_what_comes_late_is_not_held_for_or_against_the_server(server):
    def late(prompt, completion):
        time.sleep(2.0)
        return completion

    own = EndpointRefiner(server.url, "m", prompt=late, budget=0.2, failures=1, retries=0)
    for text, state in (("MODE:500", "closed"), ("ANSWER:one", "open")):
        if state == "open":
            own.breaker.failed()
            own.breaker._opened -= 31.0  # half-open: a row is asked
        assert ask(own, text) == [None]
        before = own.breaker.state
        for thread in threading.enumerate():
            if thread.name == "guardrails-endpoint":
                thread.join()
        assert own.breaker.state == before


def test_a_failure_is_logged_once_until_all_is_well_again(server, caplog):
    own = refiner(server)
    with caplog.at_level(logging.WARNING, logger="guardrails"):
        for text in ("MODE:500", "MODE:500", "ANSWER:one", "MODE:500"):
            ask(own, text)
    assert [record.message.split(". ")[0] for record in caplog.records] == [
        f"{server.url}: 1 of 1 rows got no refinement, 0 of them were not asked for"
    ] * 2
    assert "InternalServerError" in caplog.text


def test_no_thread_is_left_behind(server):
    for thread in threading.enumerate():  # of the test in which the program hangs
        if thread.name == "guardrails-endpoint":
            thread.join()
    ask(refiner(server), "ANSWER:one", "MODE:hang")
    assert not [thread for thread in threading.enumerate() if thread.name == "guardrails-endpoint"]


def test_rows_without_an_answer_have_no_target(server):
    corrector = Corrector(refiner(server), Always(), Acceptance())
    rows = Rows(prompts=["Hello"] * 3, completions=["ANSWER:fine", "MODE:hang", "MODE:garbage"])
    result = corrector.correct(rows)
    assert result.targets == ["fine", None, None]
    assert result.failed == 2
    assert result.edit_ratio.tolist()[1:] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "base address"),
        ({"url": "http://me:secret@host/v1"}, "carries a user or password"),
        ({"url": "http://host/v1?key=secret"}, "carries a query"),
        ({"model": ""}, "model is ''"),
        ({"prompt": "Correct this."}, "does not show the response"),
        ({"prompt": "{completion} {more}"}, "KeyError: 'more'"),
        ({"prompt": "{completion} {"}, "Write braces"),
        ({"prompt": 3}, "give a text or a function"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"budget": float("inf")}, "budget is inf"),
        ({"retries": -1}, "retries is -1"),
        ({"max_concurrency": 0}, "max_concurrency is 0"),
        ({"cooldown": -1.0}, "cooldown is -1.0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        EndpointRefiner(**({"url": "http://localhost/v1", "model": "m"} | arguments))


def test_it_goes_by_name_where_no_argument_is_needed():
    with pytest.raises(ConfigurationError, match="refiner 'endpoint' cannot be made without arguments"):
        Refinement("endpoint")


class TestContract(RefinerContract):
    """The suite for third parties holds for it too; the fault is a word in capitals, which the server mends."""

    @pytest.fixture(autouse=True)
    def own_server(self, server):
        self.server = server

    def refiner(self):
        def prompt(prompt, completion):
            return f"ANSWER:{completion.capitalize()}"

        return EndpointRefiner(self.server.url, "m", prompt=prompt)

    def faulty(self):
        return [("Hello", "GOOD DAY"), ([{"role": "user", "content": "Hello"}], "Well WELL")]

    def faultless(self):
        return [("Hello", "Good day")]


def test_a_wait_beyond_the_budget_is_not_waited(server):
    own = refiner(server, retries=2, budget=5.0, backoff=60.0)
    begun = time.perf_counter()
    assert ask(own, "MODE:500 ANSWER:one", "ANSWER:two") == [None, "two"]
    assert time.perf_counter() - begun < 4.0  # nothing is left to do long before the budget is spent
    assert (own.tally.answered, own.tally.failed) == (1, 1)
