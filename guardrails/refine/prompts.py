"""What a language model is asked for when it refines: a minimal correction of one completion."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

from guardrails.errors import ConfigurationError
from guardrails.refine.refiner import Text, plain

Template: TypeAlias = "str | Callable[[Text, str], Text]"
"""A text with ``{prompt}`` and ``{completion}``, or a function of the two."""

DEFAULT_PROMPT = """\
Below are a request and an answer to it. Correct what is wrong in the answer and keep everything else word for word. \
If nothing is wrong, repeat the answer as it is. Reply with the answer alone.

Request:
{prompt}

Answer:
{completion}

Corrected answer:
"""

_FIELD = re.compile(r"\{(prompt|completion)\}")


def check_template(owner: str, template: Any) -> Template:
    """Return ``template`` if it can be filled.

    Raises:
        ConfigurationError: if it is neither a text with ``{completion}`` nor a function.
    """
    if callable(template) or (isinstance(template, str) and "{completion}" in template):
        given: Template = template
        return given
    raise ConfigurationError(
        f"{owner}: prompt is {template!r:.60}; give a text with the fields {{completion}} and, if it is to be seen, "
        "{prompt}; or a function (prompt, completion) -> text or messages."
    )


def fill(template: Template, prompt: Text, completion: str) -> Text:
    """Return what to ask for one row. Braces other than the two fields stay as they are.

    Args:
        template: see `Template`.
        prompt: as the host holds it; messages are written one below the other with their roles.
        completion: the text to correct.

    Example:
        >>> fill("{prompt} {completion} {}", "1 + 1 =", "{prompt}")
        '1 + 1 = {prompt} {}'
    """
    if callable(template):
        return template(prompt, completion)
    fields = {"prompt": transcript(prompt), "completion": completion}
    return _FIELD.sub(lambda field: fields[field[1]], template)


def transcript(prompt: Text) -> str:
    r"""Return ``prompt`` as one text; of several messages, each with its role.

    Example:
        >>> transcript([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
        'system: Be kind.\nuser: Hello'
    """
    if isinstance(prompt, str) or len(prompt) == 1:
        return plain(prompt)
    return "\n".join(f"{message.get('role', '')}: {plain([message])}" for message in prompt)


def settled(completion: str, reply: str) -> str:
    """Return a model's ``reply``, or the completion itself where they differ in surrounding white space alone."""
    return completion if reply.strip() == completion.strip() else reply
