"""Copy-ahead decoding: greedy generation for outputs that mostly repeat a known text.

Prompt-lookup speculation (Saxena 2023; "LLMA", Yang et al. 2023) whose draft is the text to be corrected, batched:
the model reads prompt and draft in one forward pass, each row keeps the longest prefix of its draft that the model
would have written itself, takes the model's own token at the first difference, finds its place in the draft again
and goes on. What comes out is what ``model.generate(do_sample=False)`` writes where the model's own generation settings
have no penalties or forced tokens, at a forward pass per edit instead of one per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

_LONGEST_MATCH = 3
"""Tokens of context by which a row finds its place in the draft again, at most."""

_LOGITS = 1 << 24
"""Logits that are held at once, at most: the vocabulary is large, and only its largest entry is needed."""


def supports(model: Any) -> bool:
    """Whether `copy_ahead` can decode with this model: full attention over a plain cache, with explicit positions.

    Args:
        model: a causal language model of transformers, not wrapped.
    """
    config = model.config
    parameters = inspect.signature(type(model).forward).parameters
    if config.is_encoder_decoder or not {"attention_mask", "position_ids", "past_key_values"} <= parameters.keys():
        return False
    if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa") or not _head(model):
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def copy_ahead(
    model: Any,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    pad_id: int = 0,
    lookahead: int = 16,
) -> list[list[int]]:
    """Return what greedy decoding writes after each prompt, the token that ends it included.

    The output does not depend on the drafts, only the time does. In half precision, where logits tie, the order of
    summation can decide between two equal tokens, as it does between batch sizes of ``generate``.

    Args:
        model: a causal language model that `supports` approves of, in eval mode; no gradient is recorded.
        prompts: token ids of each row, at least one.
        drafts: token ids that the output of each row probably repeats; may be empty.
        max_new_tokens: where a row stops that has not ended, ≥ 1.
        end_ids: tokens that end a row.
        pad_id: any valid token id; what stands in for nothing is masked.
        lookahead: tokens of the draft that are tried per forward pass after the first at most, ≥ 0.

    Example:
        >>> copy_ahead(model, [[5, 6, 7]], [[5, 6]], max_new_tokens=8, end_ids={0})  # doctest: +SKIP
        [[5, 6, 0]]
    """
    rows = [
        _Row(index, list(prompt), list(draft))
        for index, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True))
    ]
    outputs: list[list[int]] = [[] for _ in rows]
    if not rows:
        return outputs
    device = model.get_input_embeddings().weight.device
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), _greedy(model) as greedy:
        attention = torch.zeros(len(rows), 0, dtype=torch.long)
        blocks = [(row.prompt, row.draft(max_new_tokens - 1)) for row in rows]
        side = "left"
        while rows:
            drafted = max(len(draft) for _, draft in blocks)
            written = [read + draft for read, draft in blocks]
            ids, there = _padded(written, pad_id, side)
            used = torch.tensor([[row.used] for row in rows])
            positions = (used + there.cumsum(dim=1) - 1).clamp(min=0)
            attention = torch.cat([attention, there], dim=1)
            own = greedy(ids.to(device), attention.to(device), positions.to(device), cache, drafted + 1, side)
            width, keep = ids.shape[1], []
            for i, (row, (read, draft), tokens) in enumerate(zip(rows, blocks, own, strict=True)):
                start = len(tokens) - 1 - len(draft) if side == "left" else 0
                accepted = row.take(tokens[start : start + len(draft) + 1], draft, end_ids, max_new_tokens)
                row.used += len(read) + accepted
                rejected = len(draft) - accepted
                if rejected:
                    end = attention.shape[1] - (0 if side == "left" else width - len(written[i]))
                    attention[i, end - rejected : end] = 0
                if row.ended:
                    outputs[row.index] = row.output
                else:
                    keep.append(i)
            attention = _shrink(cache, attention, keep)
            rows = [rows[i] for i in keep]
            reach = min(lookahead, round(sum(row.reach for row in rows) / max(1, len(rows))))
            blocks = [([row.output[-1]], row.draft(min(reach, max_new_tokens - len(row.output) - 1))) for row in rows]
            side = "right"
    return outputs


class _Row:
    """One row: what it has written, and its place in the draft.

    Attributes:
        used: tokens of the row that are in the cache and count.
        reach: tokens of the draft worth trying next: thrice what agreed last, and three; none after a mere guess.
        ended: whether it wrote an end, or all it may.
    """

    def __init__(self, index: int, prompt: list[int], source: list[int]) -> None:
        self.index, self.prompt, self._source = index, prompt, source
        self._ends: dict[int, list[int]] = {}
        for place, token in enumerate(source):
            self._ends.setdefault(token, []).append(place + 1)
        self._place = 0
        self.output: list[int] = []
        self.used, self.reach, self.ended = 0, 0, False

    def draft(self, n_tokens: int) -> list[int]:
        """Return what the source continues with."""
        return self._source[self._place : self._place + max(n_tokens, 0)]

    def take(self, own: Sequence[int], draft: Sequence[int], end_ids: Collection[int], limit: int) -> int:
        """Write the model's ``own`` tokens up to the first that is not drafted; return how many of the draft agreed.

        Args:
            own: after the token read last, and after each token of ``draft``, what the model writes.
            draft: what `draft` returned.
            end_ids: tokens that end the row.
            limit: tokens that it may write.
        """
        accepted = 0
        for i, token in enumerate(own):
            self.output.append(token)
            agrees = i < len(draft) and token == draft[i]
            if token in end_ids or len(self.output) >= limit:
                self.ended = True
                return accepted
            if not agrees:
                break
            accepted += 1
        self._place += accepted
        found = self._realign()
        self.reach = 3 * accepted + 3 if accepted or found else 0
        return accepted

    def _realign(self) -> bool:
        """Find the place after the token written last: the longest context that the source has too, nearest first.

        Returns:
            Whether it is more than a guess.
        """
        source, output, expected = self._source, self.output, self._place
        if expected < len(source) and output[-1] == source[expected]:
            self._place = expected + 1
            return True
        ends = self._ends.get(output[-1])
        if ends is None:
            self._place = min(expected + 1, len(source))  # what is nowhere in the source replaces a token of it
            return False
        self._place = max(ends, key=lambda end: (self._match(end), -abs(end - expected - 1)))
        return len(ends) == 1 or self._match(self._place) > 1

    def _match(self, end: int) -> int:
        """Return how many of the tokens written last stand in the source before ``end``."""
        source, output = self._source, self.output
        most = min(_LONGEST_MATCH, len(output), end)
        return next((size for size in range(1, most) if source[end - 1 - size] != output[-1 - size]), most)


def _padded(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    gaps = [width - len(row) for row in rows]
    if side == "left":
        ids = [[pad_id] * gap + list(row) for gap, row in zip(gaps, rows, strict=True)]
        there = [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    else:
        ids = [list(row) + [pad_id] * gap for gap, row in zip(gaps, rows, strict=True)]
        there = [[1] * len(row) + [0] * gap for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(there)


def _shrink(cache: DynamicCache, attention: Tensor, keep: Sequence[int]) -> Tensor:
    """Drop rows that have ended, and the cache's last tokens where no row counts them."""
    if not keep:
        return attention[:0]
    if len(keep) < len(attention):
        attention = attention[list(keep)]
        cache.batch_select_indices(torch.tensor(keep))
    counted = int(attention.any(dim=0).nonzero().max()) + 1
    if counted < attention.shape[1]:
        cache.crop(counted - attention.shape[1])
    return attention[:, :counted]


def _head(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


@contextmanager
def _greedy(model: Any) -> Iterator[Any]:
    """Yield a function that runs the model and returns its own next tokens, ``(n_rows, n_last)`` as lists.

    The logits of a few rows exist at a time: the output layer is met as the model enters it, so that autocast,
    adapters and whatever else is wrapped around the model stay in force. What models do to logits afterwards, such
    as capping them, does not change which is the largest.
    """
    head: Any = _head(model)
    found: list[Tensor] = []

    def largest(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        rows = hidden.reshape(-1, hidden.shape[-1])
        step = max(1, _LOGITS // module.weight.shape[0])
        parts = [module.forward(part).argmax(dim=-1) for part in rows.split(step)]
        found.append(torch.cat(parts).view(hidden.shape[:-1]))
        return (hidden[:1, -1:], *arguments[1:])

    keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def run(ids: Tensor, attention: Tensor, positions: Tensor, cache: Any, n_last: int, side: str) -> list[list[int]]:
        found.clear()
        last = {"logits_to_keep": n_last} if keeps and side == "left" else {}
        model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last,
        )
        tokens = found[-1]
        return (tokens[:, -n_last:] if side == "left" else tokens[:, :n_last]).tolist()

    handle = head.register_forward_pre_hook(largest)
    try:
        yield run
    finally:
        handle.remove()
