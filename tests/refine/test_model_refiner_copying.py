"""Copy-ahead decoding writes what greedy generation writes, token for token, in fewer forward passes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from guardrails.refine.copying import copy_ahead, supports

END, VOCABULARY, LIMIT = 1, 24, 20
TOKENS = {"pad_token_id": 0, "eos_token_id": END, "bos_token_id": None, "vocab_size": VOCABULARY}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Large initial weights make a random model write varied text, with ends of its own, and no near ties.
RANDOM = {"initializer_range": 0.4}


def build(kind, **more):
    torch.manual_seed(0)
    if kind == "gpt2":  # learned absolute positions
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **TOKENS, **RANDOM, **more)
        return GPT2LMHeadModel(config).eval()
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    shape = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    return model(config(**shape, **TOKENS, **RANDOM, **more)).eval()


MODELS = {kind: build(kind) for kind in ("llama", "gpt2", "qwen3")}
MODELS["eager"] = build("llama", attn_implementation="eager")


def generated(model, prompts, limit=LIMIT):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    written = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=limit)
    rows = written[:, width:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def passes(model, call):
    counted = []
    handle = model.register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        return call(), len(counted)
    finally:
        handle.remove()


def edited(draw, tokens):
    """The text with tokens left out, replaced and put in here and there."""
    out = []
    for token in tokens:
        kind = draw.random()
        if kind > 0.1:
            out.append(draw.randrange(2, VOCABULARY) if kind < 0.2 else token)
        if kind > 0.9:
            out.append(draw.randrange(2, VOCABULARY))
    return out


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n_rows=st.integers(1, 7), lookahead=st.sampled_from([0, 1, 5, 16]))
def test_output_is_that_of_greedy_generation_whatever_the_draft(kind, seed, n_rows, lookahead):
    model, draw = MODELS[kind], random.Random(seed)
    prompts = [[draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, 12))] for _ in range(n_rows)]
    expected = generated(model, prompts)
    drafts = []
    for row in expected:
        right = [token for token in row if token != END]
        noise = [draw.randrange(VOCABULARY) for _ in range(draw.randint(0, 25))]  # an end may stand in a draft
        drafts.append(draw.choice([right, edited(draw, right), noise, [], right + right]))
    given_ = {"max_new_tokens": LIMIT, "end_ids": {END}, "lookahead": lookahead}
    assert copy_ahead(model, prompts, drafts, **given_) == expected


@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_are_only_copied_take_one_forward_pass_together(kind):
    model, prompts = MODELS[kind], [[5, 6, 7], [8, 9], [10, 11, 12, 13], [3]]
    expected = generated(model, prompts)
    drafts = [[token for token in row if token != END] for row in expected]
    out, n_passes = passes(model, lambda: copy_ahead(model, prompts, drafts, max_new_tokens=LIMIT, end_ids={END}))
    assert out == expected
    assert n_passes == 1


@pytest.mark.parametrize(
    "change",
    [lambda row: [*row[:6], 23, *row[7:]], lambda row: [*row[:6], *row[8:]], lambda row: [*row[:6], 23, 23, *row[6:]]],
    ids=["replaced", "left out", "put in"],
)
def test_an_edit_costs_a_few_passes_not_one_per_token(change):
    model = MODELS["llama"]
    prompts = next([[a, b]] for a in range(2, 24) for b in range(2, 24) if len(set(generated(model, [[a, b]])[0])) > 10)
    expected = generated(model, prompts)
    drafts = [change([token for token in row if token != END]) for row in expected]
    out, n_passes = passes(model, lambda: copy_ahead(model, prompts, drafts, max_new_tokens=LIMIT, end_ids={END}))
    assert out == expected
    assert len(expected[0]) == LIMIT
    assert n_passes <= 5


def test_several_ends_and_a_limit_of_one_token():
    model = MODELS["llama"]
    expected = generated(model, [[5, 6], [7, 8]])
    ends = {END, expected[0][2]}
    out = copy_ahead(model, [[5, 6], [7, 8]], [expected[0], []], max_new_tokens=LIMIT, end_ids=ends)
    first = next(i for i, token in enumerate(expected[0]) if token in ends)
    assert out[0] == expected[0][: first + 1]
    one = copy_ahead(model, [[5, 6], [7, 8]], [expected[0], []], max_new_tokens=1, end_ids={END})
    assert one == [row[:1] for row in expected]
    assert copy_ahead(model, [], [], max_new_tokens=1, end_ids={END}) == []


def test_no_hook_stays_on_the_model_and_no_gradient_is_recorded():
    model = MODELS["llama"]
    head = model.get_output_embeddings()
    copy_ahead(model, [[5, 6]], [[7]], max_new_tokens=3, end_ids={END})
    assert not head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_of_other_kinds_of_memory_are_not_decoded_so():
    assert all(supports(model) for model in MODELS.values())
    assert not supports(build("mistral", sliding_window=8))
    assert supports(build("mistral", sliding_window=None))


def test_the_vocabulary_is_met_in_parts_that_fit_a_budget(monkeypatch):
    from guardrails.refine import copying

    model, prompts = MODELS["llama"], [[5, 6, 7], [8, 9]]
    expected = generated(model, prompts)
    monkeypatch.setattr(copying, "_LOGITS", VOCABULARY * 3)  # three positions at a time
    sizes, head = [], model.get_output_embeddings()
    original = type(head).forward

    def forward(self, hidden):
        if self is head:
            sizes.append(hidden.shape[:-1].numel())
        return original(self, hidden)

    monkeypatch.setattr(type(head), "forward", forward)
    assert copy_ahead(model, prompts, expected, max_new_tokens=LIMIT, end_ids={END}) == expected
    assert max(sizes) <= 3
