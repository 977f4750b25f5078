"""Asking a server for many rows at once, with retries, a circuit breaker and a deadline that holds."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from guardrails.errors import told
from guardrails.refine.prompts import spaced_like, without_thoughts
from guardrails.refine.refiner import Text

if TYPE_CHECKING:
    from guardrails.refine.endpoint import EndpointRefiner

_GRACE = 1.0
"""Seconds beyond the budget after which the thread that asks is left to itself."""

_LONGEST_WAIT = 8.0
"""Seconds between two attempts at most, unless the server asks for more."""

_CUT_OFF = ("length", "content_filter", "tool_calls", "function_call", "repetition")
"""Reasons to finish that leave half an answer, and would again."""

_BROKEN_OFF = ("abort", "error")
"""Reasons to finish that leave half an answer because of the server, as when vLLM is paused or shut down."""


class _UnusableError(Exception):
    """An answer came, but no correction can be read from it."""


class _RefusedError(Exception):
    """The server works, but will not or cannot answer this row."""


class Tally(NamedTuple):
    """What became of the rows of one call.

    Args:
        answered: with a correction.
        failed: asked in vain.
        unasked: not asked, because the server had failed too often or the budget was spent.
        error: the last failure, empty if there was none.
    """

    answered: int = 0
    failed: int = 0
    unasked: int = 0
    error: str = ""


class Call:
    """One call of `EndpointRefiner.refine`: an event loop of its own, in its own thread, with its own deadline.

    The thread is the caller's protection: an event loop that is already running, or a look-up of a host name
    that hangs, does not hold it.

    Args:
        refiner: whose settings count; its circuit breaker is kept informed.
        prompts: of the rows.
        completions: of the rows.
    """

    def __init__(self, refiner: EndpointRefiner, prompts: Sequence[Text], completions: Sequence[str]) -> None:
        self._refiner, self._breaker = refiner, refiner.breaker
        self._rows = list(zip(prompts, completions, strict=True))
        self._deadline = time.monotonic() + refiner.budget
        self._lock = threading.Lock()
        self._closed = False
        self._offers: list[str | None] = [None] * len(self._rows)
        self._asked = 0
        self._error = ""

    def run(self) -> tuple[list[str | None], Tally]:
        """Return the answers that came before the deadline, and what became of the rows."""
        if self._breaker.state == "open":
            self._error = "The server has failed too often and is left alone for a while."
        else:
            thread = threading.Thread(target=self._loop, name="guardrails-endpoint", daemon=True)
            thread.start()
            thread.join(min(self._refiner.budget + _GRACE, threading.TIMEOUT_MAX))
        with self._lock:
            self._closed = True  # what comes later is dropped
            offers, asked = list(self._offers), self._asked
        answered = sum(offer is not None for offer in offers)
        error = self._error or f"The budget of {self._refiner.budget:g} s was spent."
        if answered == len(offers):  # a further attempt has made good for what failed
            error = ""
        return offers, Tally(answered, asked - answered, len(offers) - asked, error)

    def _loop(self) -> None:
        try:
            asyncio.run(self._all())
        except Exception as error:
            self._error = told(error)

    async def _all(self) -> None:
        openai = importlib.import_module("openai")
        # The client's own retries draw their jitter from the program's stream of chance; ours do not.
        async with openai.AsyncOpenAI(
            base_url=self._refiner.url, api_key=self._key or "none", max_retries=0, timeout=self._refiner.timeout
        ) as client:
            waiting = list(range(len(self._rows)))[::-1]
            if self._breaker.state == "half-open":
                await self._in_time([self._row(client, waiting.pop())])
            workers = min(self._refiner.max_concurrency, len(waiting))
            await self._in_time([self._worker(client, waiting) for _ in range(workers)])

    async def _in_time(self, work: Sequence[Coroutine[Any, Any, None]]) -> None:
        """Run ``work`` until the deadline; where nothing was answered by then, the server counts as failing."""
        tasks = [asyncio.create_task(each) for each in work]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=max(0.0, self._deadline - time.monotonic()))
        for task in late:
            task.cancel()
            if not any(offer is not None for offer in self._offers):
                self._note(self._breaker.failed)
        if late:
            await asyncio.wait(late, timeout=_GRACE / 2)

    async def _worker(self, client: Any, waiting: list[int]) -> None:
        while waiting and self._breaker.state == "closed":
            await self._row(client, waiting.pop())

    async def _row(self, client: Any, row: int) -> None:
        """Ask for a row until there is an answer, no attempt is left, or the server is given up."""
        self._asked += 1
        prompt, completion = self._rows[row]
        wait = self._refiner.backoff
        for left in range(self._refiner.retries, -1, -1):
            try:
                reply = await asyncio.wait_for(self._ask(client, prompt, completion), self._refiner.timeout)
            except _RefusedError as error:
                self._error = f"The last refusal: {error}"
                self._note(self._breaker.succeeded)
                return
            except Exception as error:
                self._error = f"The last failure: {self._described(error)}"
                if not left or _hopeless(error) or self._breaker.state != "closed":
                    break
                jittered = min(wait, _LONGEST_WAIT) * (1.0 + 0.5 * self._refiner.jitter.random())
                pause = max(jittered, _asked_for(error))
                if pause >= self._deadline - time.monotonic():  # no attempt would come after it
                    break
                await asyncio.sleep(pause)
                wait *= 2.0
            else:
                text = spaced_like(completion, reply)
                with self._lock:
                    if not self._closed:
                        self._offers[row] = text
                self._note(self._breaker.succeeded)
                return
        self._note(self._breaker.failed)

    def _note(self, event: Callable[[], None]) -> None:
        """Tell the circuit breaker, unless the call is over: a thread that comes late must not move a later one's."""
        with self._lock:
            if not self._closed:
                event()

    async def _ask(self, client: Any, prompt: Text, completion: str) -> str:
        try:
            fields = self._refiner.request(prompt, completion)
        except Exception as error:
            raise _RefusedError(f"the prompt function raised {told(error)}") from error
        try:
            answer = await client.chat.completions.create(**fields)
        except Exception as error:
            if getattr(error, "status_code", None) in (400, 413, 422):
                raise _RefusedError(self._described(error)) from error
            raise
        choices = getattr(answer, "choices", None)  # the client passes on whatever it was sent
        choice = choices[0] if isinstance(choices, list) and choices else None
        text = getattr(getattr(choice, "message", None), "content", None)
        ended = getattr(choice, "finish_reason", None)
        if ended in _CUT_OFF:
            raise _RefusedError(f"an answer was ended by '{ended}'")
        if ended in _BROKEN_OFF:
            raise _UnusableError(f"an answer was ended by '{ended}'")
        if not isinstance(text, str):
            raise _UnusableError("an answer held no text")
        said = without_thoughts(completion, text)  # where the server has no parser for them
        if said is None:
            raise _RefusedError("an answer held thoughts alone")
        return said

    def _described(self, error: Exception) -> str:
        if isinstance(error, asyncio.TimeoutError):
            return f"no answer within {self._refiner.timeout:g} s"
        key = self._key  # a server may repeat it
        return told(error).replace(key, "…") if key else told(error)

    @property
    def _key(self) -> str:
        """The key, empty where there is none; without the newline that a file of secrets ends with."""
        return os.environ.get(self._refiner.api_key_env, "").strip()


def _hopeless(error: Exception) -> bool:
    """Return whether asking again cannot help: no right to ask, or nobody of that name."""
    return getattr(error, "status_code", None) in (401, 403, 404)


def _asked_for(error: Exception) -> float:
    """Return the seconds that the server asks to be left alone, 0 if it does not."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return max(0.0, float(headers.get("retry-after", 0.0)))
    except ValueError:  # a date
        return 0.0
