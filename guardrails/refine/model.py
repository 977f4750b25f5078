"""ModelRefiner: a language model, by default the host's own reference, corrects what the policy wrote.

Source: "Enhancing RL fine-tuning with an online refiner" (arXiv 2603.18088).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from guardrails.errors import AttachError, ConfigurationError
from guardrails.refine.copying import copy_ahead, supports
from guardrails.refine.prompts import PROMPT, Template, check_template, fill, spaced_like, without_thoughts
from guardrails.refine.refiner import RefineHost, Refiner, Text

logger = logging.getLogger(__name__)

_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Without the penalties that a model's own settings may have: what is right is to be repeated word for word."""


class ModelRefiner(Refiner):
    """A language model asked for a minimal correction, greedily decoded by copying ahead.

    Rows are padded on the left and refined in batches, without gradients and in eval mode; the mode of every
    module is put back afterwards. As a correction mostly repeats the response, the response is the draft of its own
    correction: a row that is left unchanged costs one forward pass, see `guardrails.refine.copying`. A model whose
    attention slides or whose state is not a plain cache is decoded by ``generate``, with the same result.

    A row that has not ended within ``max_new_tokens``, or holds thoughts alone, has nothing to offer; nor has one with
    tokens that the model does not read. What a reasoning model thinks before its answer is no part of the correction,
    unless the response itself has thoughts. White space around a correction is that of the response, as it depends on
    where in a text it stands, not on what is right.

    Args:
        model: a causal language model of transformers; None is the host's reference model, or with PEFT the
            policy without its adapter, so that there is no second copy in memory.
        tokenizer: of ``model``; None is the host's.
        prompt: what the model is asked. A text with ``{prompt}`` and ``{completion}`` in it, which becomes a user's
            message where the tokenizer has a chat template or the prompt is a conversation; or a function from
            prompt and response to a text, which is taken as it is, or to messages.
        generation: settings for ``model.generate``, which then decodes, such as ``{"do_sample": True}``; None is
            greedy decoding without penalties on repetition. Sampling draws from torch's global random state.
        max_new_tokens: tokens of a correction at most, its end included, ≥ 1; None is as many as a completion may
            have.
        batch_size: rows per forward pass, ≥ 1.
        chat_template_kwargs: what the chat template is given besides the messages, such as
            ``{"enable_thinking": False}``; None is what the host gives it where the tokenizer is the host's, else
            nothing.

    Raises:
        ConfigurationError: if an argument cannot be used.

    Example:
        >>> ModelRefiner(prompt="Prompt: {prompt} Draft: {completion} Final:", max_new_tokens=64).batch_size
        64
    """

    name = "model"

    def __init__(
        self,
        model: Any = None,
        *,
        tokenizer: Any = None,
        prompt: Template = PROMPT,
        generation: Mapping[str, Any] | GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if model is not None and not (isinstance(model, nn.Module) and hasattr(model, "generate")):
            raise ConfigurationError(
                f"ModelRefiner: model is {model!r:.80}; give a causal language model of transformers, or None for the "
                "host's reference model."
            )
        for argument, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigurationError(f"ModelRefiner: {argument} is {value!r}; give a whole number, at least 1.")
        if not (chat_template_kwargs is None or isinstance(chat_template_kwargs, Mapping)):
            raise ConfigurationError(
                f"ModelRefiner: chat_template_kwargs is {chat_template_kwargs!r}; give a mapping, such as "
                "{'enable_thinking': False}, or None."
            )
        self.chat_template_kwargs = None if chat_template_kwargs is None else dict(chat_template_kwargs)
        self.model, self.tokenizer, self.prompt = model, tokenizer, check_template("ModelRefiner", prompt)
        self.generation, self.max_new_tokens, self.batch_size = _settings(generation), max_new_tokens, batch_size
        self._host: RefineHost | None = None

    def attach(self, host: RefineHost) -> None:
        """Check that there is a model, and that it can read what the tokenizer writes.

        Tokens that were added to a tokenizer may lie beyond what its own model reads, such as that of images beside a
        model of text; rows that hold one have nothing to offer.

        Raises:
            AttachError: if the host has no reference model and none was given, or the vocabularies differ.
        """
        tokenizer = self.tokenizer or host.tokenizer
        with self._reference(host) as model:
            config = getattr(model, "config", None)
            if getattr(config, "is_encoder_decoder", False):
                raise AttachError("ModelRefiner: an encoder-decoder cannot be asked in this way. Give a causal model.")
            n_known = _n_known(model)
        highest = _highest(tokenizer)
        if n_known <= highest:
            raise AttachError(
                f"ModelRefiner: the tokenizer has tokens up to {highest}, the model reads {n_known}. Give the model's "
                "own: ModelRefiner(model, tokenizer=...)."
            )
        self._host = host

    def detach(self) -> None:
        """Forget the host."""
        self._host = None

    def refine(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[str | None]:
        """Return the model's correction of each completion; None where it did not come to an end or cannot read it.

        Raises:
            AttachError: if the refiner is not attached to a host.
        """
        host = self._host
        if host is None:
            raise AttachError(
                "This ModelRefiner is not attached to a host. Put it into a Guard: Guard(Refinement(...))."
            )
        tokenizer = self.tokenizer or host.tokenizer
        asked = [self._ask(host, tokenizer, *row) for row in zip(prompts, completions, strict=True)]
        drafts = [_words(tokenizer, completion.strip()) for completion in completions]
        offers: list[str | None] = [None] * len(asked)
        with self._reference(host) as model, torch.no_grad(), evaluating(model):
            ends, n_known = end_tokens(model, tokenizer), _n_known(model)
            known = [row for row in range(len(asked)) if max(asked[row] + drafts[row], default=0) < n_known]
            order = sorted(known, key=lambda row: len(asked[row]) + len(drafts[row]))
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                written = self._decode(
                    model, tokenizer, [asked[row] for row in rows], [drafts[row] for row in rows], ends
                )
                for row, ids in zip(rows, written, strict=True):
                    if ids and ids[-1] in ends:
                        text = tokenizer.decode(ids[:-1], skip_special_tokens=True)
                        said = without_thoughts(completions[row], text)
                        offers[row] = None if said is None else spaced_like(completions[row], said)
        return offers

    def _reference(self, host: RefineHost) -> AbstractContextManager[Any]:
        return host.reference() if self.model is None else nullcontext(self.model)

    def _ask(self, host: RefineHost, tokenizer: Any, prompt: Text, completion: str) -> list[int]:
        text = fill(self.prompt, prompt, completion)
        if isinstance(self.prompt, str) and (not isinstance(prompt, str) or getattr(tokenizer, "chat_template", None)):
            text = [{"role": "user", "content": text}]
        if isinstance(text, str):
            return list(tokenizer(text)["input_ids"])
        given = self.chat_template_kwargs
        if given is None:
            given = getattr(host, "chat_template_kwargs", {}) if self.tokenizer is None else {}
        settings = {**given, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
        ids = tokenizer.apply_chat_template(text, **settings)
        return list(ids["input_ids"])

    def _decode(
        self, model: Any, tokenizer: Any, asked: list[list[int]], drafts: list[list[int]], ends: frozenset[int]
    ) -> list[list[int]]:
        """Return what the model writes after each prompt, the end included where it came to one."""
        limit = self.max_new_tokens or (self._host.max_completion_length if self._host else 1)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
        pad = pad if pad < _n_known(model) else 0  # what is masked needs a token that the model reads
        causal = _causal(model)
        if self.generation is None and causal is not None and supports(causal):
            return copy_ahead(causal, asked, drafts, max_new_tokens=limit, end_ids=ends, pad_id=pad)
        width, device = max(map(len, asked)), model.get_input_embeddings().weight.device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in asked], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked], device=device)
        settings = {"max_new_tokens": limit, "eos_token_id": sorted(ends), "pad_token_id": pad}
        settings |= _GREEDY if self.generation is None else self.generation
        config = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return [_until(row, ends) for row in written[:, width:].tolist()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module of ``model`` to eval mode, and back to its own afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a text: of the model's generation settings and of the tokenizer.

    Raises:
        ConfigurationError: if there is none.
    """
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = declared if isinstance(declared, (list, tuple)) else [declared]
    ends = {int(end) for end in (*listed, tokenizer.eos_token_id) if end is not None}
    if not ends:
        raise ConfigurationError("ModelRefiner: neither model nor tokenizer has an end-of-sequence token. Set one.")
    return frozenset(ends)


def _n_known(model: Any) -> float:
    """Return how many tokens a model reads; infinity where its weights lie elsewhere."""
    return int(model.get_input_embeddings().weight.shape[0]) or math.inf


def _highest(tokenizer: Any) -> int:
    """Return the highest token of a tokenizer's own vocabulary, of which those added to it are no part."""
    tokens = list(tokenizer.get_vocab().values())
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:  # a tokenizer of mistral-common has none
        added = {}
    return int(max([token for token in tokens if token not in added] or tokens))


def _causal(model: Any) -> Any:
    """Return the model below PEFT, or None where an adapter acts outside of its layers."""
    if not hasattr(model, "get_base_model"):
        return model
    virtual = any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values())
    return None if virtual else model.get_base_model()


def _settings(generation: Mapping[str, Any] | GenerationConfig | None) -> dict[str, Any] | None:
    if generation is None:
        return None
    if isinstance(generation, GenerationConfig):
        return dict(generation.to_diff_dict())
    if isinstance(generation, Mapping):
        return dict(generation)
    raise ConfigurationError(
        f"ModelRefiner: generation is {generation!r}; give settings of model.generate as a mapping or a "
        "GenerationConfig, or None for greedy decoding."
    )


def _words(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: end + 1]
