"""Refiner: what turns a completion into its minimally corrected version, and what a host offers it.

Source: "Enhancing RL fine-tuning with an online refiner" (arXiv 2603.18088).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, runtime_checkable

from guardrails.errors import ConfigurationError
from guardrails.refine.functions import check_plain

Text: TypeAlias = "str | list[dict[str, Any]]"
"""A prompt or completion as a host hands it over: plain, or a list of messages with ``role`` and ``content``."""


@runtime_checkable
class RefineHost(Protocol):
    """What an adapter offers a refiner while it is attached.

    One that gives its chat template more than the messages has these settings as the mapping ``chat_template_kwargs``.
    """

    @property
    def tokenizer(self) -> Any:
        """Of the policy."""

    @property
    def max_completion_length(self) -> int:
        """Tokens that a completion, and so its correction, may have, its end included."""

    @property
    def host_name(self) -> str:
        """What errors call the host."""

    def reference(self) -> AbstractContextManager[Any]:
        """Return a context in which the reference model can be used; it is the value of the ``with``.

        Raises:
            AttachError: if this host holds no reference model.
        """
        ...


class Refiner(ABC):
    """y⁺ = refine(x, y): keeps what is right verbatim and corrects what is not.

    A subclass sets `name` and writes `refine`. What it cannot correct it answers with None; a refiner that
    raises has offered nothing, and the host trains on.

    Attributes:
        name: under which a plug-in lists it, ``"<vendor>.<name>"``.

    Example:
        >>> class Closing(Refiner):
        ...     name = "acme.closing"
        ...
        ...     def refine(self, prompts, completions):
        ...         return [text if text.endswith(".") else text + "." for text in completions]
        >>> Closing().refine(["Hello"], ["Good day"])
        ['Good day.']
    """

    name: str = ""

    def attach(self, host: RefineHost) -> None:
        """Take from ``host`` what is needed; called once before the first `refine`.

        Raises:
            AttachError: if the host lacks something; nothing is trained then.
        """
        del host

    def detach(self) -> None:
        """Let go of what `attach` took; the host is gone afterwards. May be called without an `attach` before."""
        return

    @abstractmethod
    def refine(self, prompts: Sequence[Text], completions: Sequence[str]) -> Sequence[str | None]:
        """Return one corrected text per row, or None where there is none to offer.

        Args:
            prompts: the prompt of each row.
            completions: what the policy answered, as text.
        """

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class FunctionRefiner(Refiner):
    """y⁺ = function(x, y), row by row: formatters, repairers, rules.

    A row on which the function raises has nothing to offer; the other rows are refined.

    Args:
        function: takes a prompt and the text of its completion and returns the corrected text, or None.

    Raises:
        ConfigurationError: if it is no function, or asynchronous.

    Example:
        >>> FunctionRefiner(lambda prompt, completion: completion.strip()).refine(["Hello"], [" Good day. "])
        ['Good day.']
    """

    name = "function"

    def __init__(self, function: Callable[[Text, str], str | None]) -> None:
        if not callable(function):
            raise ConfigurationError(
                f"FunctionRefiner({function!r}): give a function (prompt, completion) -> text or None."
            )
        check_plain("FunctionRefiner", function)
        self.function = function

    def refine(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[str | None]:
        """Return the function's answer for each row.

        Raises:
            Exception: what the function raised, if it did so on every row.
        """
        offers: list[str | None] = []
        failures: list[Exception] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                offers.append(self.function(prompt, completion))
            except Exception as error:
                failures.append(error)
                offers.append(None)
        if failures and len(failures) == len(offers):
            raise failures[0]
        return offers


def plain(text: Text) -> str:
    """Return ``text`` as a string: of messages, their contents, one below the other.

    Example:
        >>> plain([{"role": "assistant", "content": "Good day."}])
        'Good day.'
    """
    if isinstance(text, str):
        return text
    return "\n".join(_content(message.get("content")) for message in text)


def _content(content: Any) -> str:
    """Return the text of a message; of a list of parts, that of the parts that are text."""
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
