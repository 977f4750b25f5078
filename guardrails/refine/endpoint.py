"""EndpointRefiner: a model behind an OpenAI-compatible server, such as vLLM or ``transformers serve``.

Whatever the server does, a call ends within its budget, and rows without a usable answer get None.
"""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from guardrails.errors import ConfigurationError
from guardrails.refine.asking import Call, Tally
from guardrails.refine.breaker import CircuitBreaker
from guardrails.refine.prompts import PROMPT, Template, check_template, fill
from guardrails.refine.refiner import RefineHost, Refiner, Text
from guardrails.schedulers.base import check_number, whole_number

logger = logging.getLogger(__name__)


class EndpointRefiner(Refiner):
    """y⁺ = what the model behind ``url`` answers when asked to correct y minimally.

    Rows are asked concurrently. An attempt that fails, takes longer than ``timeout`` or answers nothing
    readable is repeated after a wait that doubles; after ``failures`` rows in a row without an answer no more
    are asked for ``cooldown`` seconds, then one, to see whether the server is back. The key, where the server
    wants one, is read from the environment at each call and kept nowhere.

    Args:
        url: base address, such as ``"http://localhost:8000/v1"``.
        model: the name under which the server knows its model.
        prompt: what is asked; a text with ``{prompt}`` and ``{completion}``, or a function of the two that
            returns a text or messages.
        max_concurrency: requests at a time.
        timeout: seconds for one attempt, from connecting to the last byte.
        budget: seconds for one call of `refine`, all rows, retries and waits together.
        retries: further attempts per row.
        backoff: seconds before the first of them, with up to half as much again at random.
        failures: rows in a row without an answer that stop the asking.
        cooldown: seconds until it is tried again; doubled each time that fails, up to 600 or itself if
            that is more.
        max_tokens: longest answer, in the server's tokens; what is cut there counts as no answer. Default: twice
            what the host lets a completion have.
        temperature: of the server's sampling; 0 is greedy.
        api_key_env: environment variable that holds the key.
        extra: further fields of each request, such as ``{"chat_template_kwargs": {...}}``.

    Raises:
        ConfigurationError: if a value cannot be used, or the package ``openai`` is not installed.

    Example:
        >>> refiner = EndpointRefiner("http://localhost:8000/v1", "Qwen/Qwen3-8B")
        >>> refiner.budget
        60.0
    """

    name = "endpoint"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        prompt: Template = PROMPT,
        max_concurrency: int = 16,
        timeout: float = 20.0,
        budget: float = 60.0,
        retries: int = 2,
        backoff: float = 0.5,
        failures: int = 5,
        cooldown: float = 30.0,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        api_key_env: str = "OPENAI_API_KEY",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        owner = "EndpointRefiner"
        self.url, self.model = _address(owner, url), model
        if not isinstance(model, str) or not model:
            raise ConfigurationError(f"{owner}: model is {model!r}; give the name that the server knows it by.")
        self.prompt = check_template(owner, prompt)
        self.max_concurrency = whole_number(owner, "max_concurrency", max_concurrency)
        self.timeout = check_number(owner, "timeout", timeout, low=0.0, open_low=True)
        self.budget = check_number(owner, "budget", budget, low=0.0, open_low=True)
        self.retries = whole_number(owner, "retries", retries, low=0)
        self.backoff = check_number(owner, "backoff", backoff, low=0.0)
        self.breaker = CircuitBreaker(failures, cooldown, longest=max(600.0, cooldown))
        self.failures, self.cooldown = self.breaker.failures, self.breaker.cooldown
        self.max_tokens = None if max_tokens is None else whole_number(owner, "max_tokens", max_tokens)
        self.temperature = check_number(owner, "temperature", temperature, low=0.0)
        self.api_key_env = api_key_env
        self.extra = None if extra is None else dict(extra)
        self._host: RefineHost | None = None
        self._complained = False
        self.jitter = random.Random()  # the program's own stream of chance is not drawn from
        self.tally = Tally()
        """What became of the rows of the last call."""
        try:
            importlib.import_module("openai")  # here, so that the first call does not spend its budget on it
        except ImportError as error:
            raise ConfigurationError(
                "EndpointRefiner speaks to the server through the package openai, which is not installed. "
                "Run: pip install 'training-guardrails[refine]'."
            ) from error

    def attach(self, host: RefineHost) -> None:
        """Take the longest completion from ``host``, whatever it is when a request is made."""
        self._host = host

    def detach(self) -> None:
        """Let go of the host."""
        self._host = None

    def refine(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[str | None]:
        """Return the server's correction of each row, None where none came within the budget."""
        if not completions:
            return []
        offers, self.tally = Call(self, prompts, completions).run()
        if self.tally.error:
            level = logging.DEBUG if self._complained else logging.WARNING
            logger.log(
                level, "%s: %d of %d rows got no refinement, %d of them were not asked for. %s",
                self.url, len(offers) - self.tally.answered, len(offers), self.tally.unasked, self.tally.error,
            )  # fmt: skip
        self._complained = bool(self.tally.error)
        return offers

    def request(self, prompt: Text, completion: str) -> dict[str, Any]:
        """Return the fields of one request."""
        asked = fill(self.prompt, prompt, completion)
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": asked}] if isinstance(asked, str) else asked,
            "temperature": self.temperature,
        }
        limit = self.max_tokens or (2 * self._host.max_completion_length if self._host else None)
        return (
            fields
            | ({} if limit is None else {"max_tokens": limit})
            | ({"extra_body": self.extra} if self.extra else {})
        )


def _address(owner: str, url: Any) -> str:
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"{owner}: url is {url!r}; give the server's base address, such as 'http://localhost:8000/v1'."
        )
    if parts.password or parts.username:
        raise ConfigurationError(
            f"{owner}: the url carries a user or password, which logs and ledgers would show. Give the key in the "
            "environment variable that api_key_env names."
        )
    if parts.query:
        raise ConfigurationError(
            f"{owner}: the url carries a query, behind which no path of a request can stand, and which logs and "
            "ledgers would show. Give the base address alone."
        )
    return str(url)
