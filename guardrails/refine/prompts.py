"""What a language model is asked for when it refines, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from guardrails.errors import ConfigurationError, told
from guardrails.refine.refiner import Text, plain

Template: TypeAlias = "str | Callable[[Text, str], Text]"
"""A text with ``{prompt}`` and ``{completion}``, or a function of the two."""

PROMPT = """Below are a prompt and a response to it. Correct the response with as few changes as possible: keep \
everything that is right word for word, and fix what is wrong, repeated, missing or cut off. If nothing is wrong, \
repeat the response unchanged. Write the corrected response only.

Prompt:
{prompt}

Response:
{completion}

Corrected response:
"""
"""What a model is asked by default."""

_THOUGHT, _THOUGHT_OVER = "<think>", "</think>"
"""What a reasoning model thinks stands between these, where nothing before has taken it out."""


def check_template(owner: str, template: Any) -> Template:
    """Return ``template`` if it can be filled.

    Args:
        owner: what errors call the refiner.
        template: a text for `str.format`, or a function.

    Raises:
        ConfigurationError: if it is neither a text that shows ``{completion}`` nor a function.
    """
    if callable(template):
        given: Template = template
        return given
    if not isinstance(template, str):
        raise ConfigurationError(f"{owner}: prompt is {template!r}; give a text or a function.")
    marks = ("<prompt>", "<completion>")
    try:
        filled = template.format(prompt=marks[0], completion=marks[1])
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigurationError(
            f"{owner}: the prompt is no template of {{prompt}} and {{completion}} ({told(error)}). "
            "Write braces that are meant as such twice: {{ }}."
        ) from error
    if marks[1] not in filled:
        raise ConfigurationError(f"{owner}: the prompt does not show the response. Put {{completion}} into it.")
    return template


def fill(template: Template, prompt: Text, completion: str) -> Text:
    """Return what to ask for one row; the texts that are filled in are not searched for fields.

    Args:
        template: see `Template`.
        prompt: as the host holds it.
        completion: the text to correct.

    Example:
        >>> fill("{prompt} {completion} {{}}", "1 + 1 =", "{prompt}")
        '1 + 1 = {prompt} {}'
    """
    if callable(template):
        return template(prompt, completion)
    return template.format(prompt=readable(prompt), completion=completion)


def readable(prompt: Text) -> str:
    r"""Return a prompt as one text: the content of a single message, of several with their roles.

    Example:
        >>> readable([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
        'system: Be kind.\nuser: Hello'
    """
    if isinstance(prompt, str) or len(prompt) == 1:
        return plain(prompt)
    return "\n".join(f"{message.get('role')}: {plain([message])}" for message in prompt)


def spaced_like(completion: str, refined: str) -> str:
    r"""Return ``refined`` with the white space around it that ``completion`` has.

    Models put white space around an answer where it suits their format; it is no correction.

    Example:
        >>> spaced_like(" Good day\n", "Good day.")
        ' Good day.\n'
    """
    core, before = refined.strip(), completion.strip()
    if not core or not before:
        return core
    start = completion.index(before)
    return completion[:start] + core + completion[start + len(before) :]


def without_thoughts(completion: str, answer: str) -> str | None:
    """Return a model's answer without what it thought before, None if that is all; as it is if the completion thinks.

    Where the chat template has opened the thought, the answer has the end of it alone.

    Example:
        >>> without_thoughts("Godd day.", "<think>A letter is wrong.</think> Good day.")
        'Good day.'
    """
    if _THOUGHT in completion or _THOUGHT_OVER in completion:
        return answer
    thought, over, said = answer.partition(_THOUGHT_OVER)
    opened = answer.lstrip().startswith(_THOUGHT)
    if not opened and (not over or _THOUGHT in thought):
        return answer
    return said.lstrip() or None
