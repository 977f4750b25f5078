"""ModelRefiner: what it asks, how it decodes, and that it leaves the model as it was."""

from contextlib import contextmanager

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedTokenizerFast

from guardrails import AttachError, ConfigurationError
from guardrails.refine import ModelRefiner

WORDS = ("<pad>", "<eos>", "<unk>", "user", "assistant", ":", "/", *"abcdefghij", *map(str, range(10)))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} / {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_tokenizer(*, chat=False, words=WORDS):
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    made.chat_template = TEMPLATE if chat else None
    return made


def shape(**more):
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    } | more


@pytest.fixture(scope="module")
def repairing():
    """A model that has learned to answer ``a b 5 c /`` with its letters: digits are the fault."""
    import random

    torch.manual_seed(0)
    draw, words = random.Random(0), build_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**shape(hidden_size=64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=300)
    for _ in range(300):
        letters = [draw.sample("abcdefghij", draw.randint(1, 5)) for _ in range(64)]
        texts = []
        for right in letters:
            text = list(right)
            for _ in range(draw.randint(0, 3)):
                text.insert(draw.randint(0, len(text)), str(draw.randint(0, 9)))
            texts.append(" ".join([*text, "/", *right, "<eos>"]))
        batch = words(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, text in enumerate(texts):
            labels[row, : text.split().index("/") + 1] = -100
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Host:
    host_name, max_completion_length = "TestHost", 8

    def __init__(self, model=None, tokenizer=None):
        self.model, self.tokenizer, self.uses = model, tokenizer or build_tokenizer(), 0

    @contextmanager
    def reference(self):
        if self.model is None:
            raise AttachError("TestHost holds no reference model.")
        self.uses += 1
        yield self.model


def attached(refiner, *arguments, **settings):
    refiner.attach(Host(*arguments, **settings))
    return refiner


COMPLETIONS = ["a b c", "a 5 b", "1 2 c 3", "j", "d e f g 0 h"]
CORRECTED = ["a b c", "a b", "c", "j", "d e f g h"]
ASK = "{completion} /"


def test_reference_corrects_in_one_batch_or_many_alike(repairing):
    for size in (64, 2, 1):
        refiner = attached(ModelRefiner(prompt=ASK, batch_size=size), repairing)
        assert refiner.refine(["x"] * 5, COMPLETIONS) == CORRECTED
    assert attached(ModelRefiner(prompt=ASK, generation={}), repairing).refine(["x"] * 5, COMPLETIONS) == CORRECTED


def test_a_copy_takes_one_forward_pass_and_generation_one_per_token(repairing):
    counted = []
    handle = repairing.register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        attached(ModelRefiner(prompt=ASK), repairing).refine(["x"] * 2, ["a b c", "d e f g h"])
        assert len(counted) == 1
        attached(ModelRefiner(prompt=ASK, generation={}), repairing).refine(["x"] * 2, ["a b c", "d e f g h"])
        assert len(counted) == 1 + 6
    finally:
        handle.remove()


@pytest.mark.parametrize("window", [None, 64])
def test_a_model_with_a_sliding_window_is_decoded_by_generate_with_the_same_result(window):
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(**shape(num_key_value_heads=2, initializer_range=0.4, sliding_window=window))
    model, completions = MistralForCausalLM(config).eval(), ["a b 1", "c", "d e f g"]
    out = attached(ModelRefiner(prompt=ASK, max_new_tokens=40), model).refine(["x"] * 3, completions)
    same = attached(ModelRefiner(prompt=ASK, max_new_tokens=40, generation={"do_sample": False}), model)
    assert out == same.refine(["x"] * 3, completions)


def test_what_has_not_come_to_an_end_is_not_offered(repairing):
    refiner = attached(ModelRefiner(prompt=ASK, max_new_tokens=3), repairing)
    assert refiner.refine(["x"] * 2, ["a b", "a b c d e"]) == ["a b", None]
    host_limit = attached(ModelRefiner(prompt=ASK), repairing)
    host_limit._host.max_completion_length = 3
    assert host_limit.refine(["x"] * 2, ["a b", "a b c d e"]) == ["a b", None]


def test_sampling_settings_are_those_of_generate(repairing):
    hot = {"do_sample": True, "temperature": 50.0}
    torch.manual_seed(0)
    texts = attached(ModelRefiner(prompt=ASK, generation=hot), repairing).refine(["x"] * 20, ["a b c"] * 20)
    assert len(set(texts)) > 2
    config = GenerationConfig(do_sample=True, temperature=50.0)
    torch.manual_seed(0)
    assert attached(ModelRefiner(prompt=ASK, generation=config), repairing).refine(["x"] * 20, ["a b c"] * 20) == texts


def test_the_models_own_sampling_defaults_do_not_reach_the_greedy_fallback(repairing, monkeypatch):
    from guardrails.refine import model as module

    monkeypatch.setattr(module, "supports", lambda model: False)
    monkeypatch.setattr(repairing, "generation_config", GenerationConfig(do_sample=True, temperature=50.0))
    assert attached(ModelRefiner(prompt=ASK), repairing).refine(["x"] * 5, COMPLETIONS) == CORRECTED


@pytest.mark.parametrize("copying", [True, False])
def test_the_models_own_penalty_on_repetition_forbids_no_copying(repairing, monkeypatch, copying):
    from guardrails.refine import model as module

    monkeypatch.setattr(module, "supports", lambda model: copying)
    penalty = GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1)
    monkeypatch.setattr(repairing, "generation_config", penalty)
    assert attached(ModelRefiner(prompt=ASK), repairing).refine(["x"] * 5, COMPLETIONS) == CORRECTED


def test_every_module_keeps_its_mode_also_when_decoding_fails(repairing):
    repairing.train()
    repairing.model.layers[0].eval()
    modes = [module.training for module in repairing.modules()]
    seen = []
    handle = repairing.register_forward_pre_hook(lambda module, arguments: seen.append(module.training))
    refiner = attached(ModelRefiner(prompt=ASK), repairing)
    try:
        refiner.refine(["x"], ["a 5 b"])
        assert not any(seen)
        assert [module.training for module in repairing.modules()] == modes
        refiner.prompt = lambda prompt, completion: [{"content": 1}]
        with pytest.raises(Exception):  # noqa: B017 - whatever the tokenizer makes of it
            refiner.refine(["x"], ["a 5 b"])
        repairing.register_forward_pre_hook(lambda *_: 1 / 0)
        refiner.prompt = ASK
        with pytest.raises(ZeroDivisionError):
            refiner.refine(["x"], ["a 5 b"])
        assert [module.training for module in repairing.modules()] == modes
        assert not repairing.get_output_embeddings()._forward_pre_hooks
    finally:
        handle.remove()
        repairing._forward_pre_hooks.clear()
        repairing.eval()


def test_greedy_decoding_leaves_the_random_state_alone(repairing):
    before = torch.get_rng_state()
    attached(ModelRefiner(prompt=ASK), repairing).refine(["x"] * 5, COMPLETIONS)
    assert torch.equal(torch.get_rng_state(), before)


def asked(refiner, tokenizer, prompt, completion="b", **host):
    """What the model is given to read."""
    model = LlamaForCausalLM(LlamaConfig(**shape())).eval()
    seen = []
    model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["input_ids"][0]), with_kwargs=True
    )
    offering = Host(model, tokenizer)
    vars(offering).update(host)
    refiner.attach(offering)
    refiner.refine([prompt], [completion])
    text = tokenizer.decode(seen[0])
    return text.removesuffix(completion).strip()  # the draft is read with it


CONVERSATION = [{"role": "user", "content": "a"}]
LONGER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]


def test_plain_prompts_become_text_and_conversations_become_messages():
    plain, chat = build_tokenizer(), build_tokenizer(chat=True)
    template = "{prompt} / {completion} /"
    assert asked(ModelRefiner(prompt=template), plain, "a") == "a / b /"
    assert asked(ModelRefiner(prompt=template), chat, "a") == "user : a / b / / assistant :"
    assert asked(ModelRefiner(prompt=template), chat, CONVERSATION) == "user : a / b / / assistant :"
    long = asked(ModelRefiner(prompt=template), chat, LONGER)
    assert long == "user : user : a assistant : c user : d / b / / assistant :"


def test_a_function_decides_between_text_and_messages_itself():
    chat = build_tokenizer(chat=True)
    assert asked(ModelRefiner(prompt=lambda prompt, completion: f"c {completion} :"), chat, "a") == "c b :"
    messages = ModelRefiner(prompt=lambda prompt, completion: [{"role": "user", "content": f"e {completion}"}])
    assert asked(messages, chat, "a") == "user : e b / assistant :"


THINKING = TEMPLATE + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}j j {% endif %}"
)


def test_the_chat_template_is_given_what_the_host_gives_it_or_what_is_said():
    words, own = build_tokenizer(chat=True), build_tokenizer(chat=True)
    words.chat_template = own.chat_template = THINKING
    off, thinking, quiet = {"enable_thinking": False}, "user : b / assistant :", "user : b / assistant : j j"
    plain = ModelRefiner(prompt="{completion}")
    assert asked(plain, words, "a") == thinking
    assert asked(plain, words, "a", chat_template_kwargs=off) == quiet
    assert asked(ModelRefiner(prompt="{completion}", chat_template_kwargs=off), words, "a") == quiet
    loud = ModelRefiner(prompt="{completion}", chat_template_kwargs={})
    assert asked(loud, words, "a", chat_template_kwargs=off) == thinking
    other = ModelRefiner(prompt="{completion}", tokenizer=own)  # whose template is none of the host's
    assert asked(other, words, "a", chat_template_kwargs=off) == thinking


@pytest.mark.parametrize(
    ("written", "completion", "offer"),
    [
        ("<think> a b </think> c", "5 c", "c"),
        ("a b </think> c", "5 c", "c"),  # the chat template has opened the thought
        ("<think> a b </think>", "5 c", None),
        ("<think> a b", "5 c", None),
        ("<think> a </think> c", "<think> 5 </think> c", "<think> a </think> c"),
        ("<think> a </think> c", "5 </think> c", "<think> a </think> c"),
        ("c <think> a </think>", "5 c", "c <think> a </think>"),
        ("c", "5 c", "c"),
    ],
)
def test_thoughts_are_no_part_of_a_correction_unless_the_completion_has_some(
    repairing, monkeypatch, written, completion, offer
):
    words = build_tokenizer()
    words.add_tokens(["<think>", "</think>"])
    refiner = ModelRefiner(LlamaForCausalLM(LlamaConfig(**shape(vocab_size=len(words)))), prompt=ASK)
    refiner.attach(Host(None, words))
    monkeypatch.setattr(refiner, "_decode", lambda *arguments: [[*words(written)["input_ids"], words.eos_token_id]])
    assert refiner.refine(["x"], [completion]) == [offer]


def test_the_default_prompt_shows_both_and_asks_for_few_changes():
    from guardrails.refine.model import PROMPT

    filled = PROMPT.format(prompt="WHAT IS IT?", completion="IT IS {THIS}.")
    assert filled.index("WHAT IS IT?") < filled.index("IT IS {THIS}.")
    assert "as few changes as possible" in filled


@pytest.mark.parametrize(
    ("completion", "refined"), [(" a 5 b\n", " a b\n"), ("a 5 b", "a b"), ("\n a", "\n a"), ("5", ""), ("  ", "")]
)
def test_white_space_around_is_that_of_the_completion(repairing, completion, refined):
    refiner = attached(ModelRefiner(prompt="{completion} /"), repairing)
    assert refiner.refine(["x"], [completion])[0] in (refined, refined.strip() or refined)
    if refined.strip():
        assert refiner.refine(["x"], [completion]) == [refined]


def test_a_given_model_is_used_instead_of_the_hosts(repairing):
    host = Host(None, build_tokenizer())
    refiner = ModelRefiner(repairing, prompt=ASK)
    refiner.attach(host)
    assert refiner.refine(["x"] * 5, COMPLETIONS) == CORRECTED
    refiner.detach()
    with pytest.raises(AttachError, match="not attached"):
        refiner.refine(["x"], ["a"])


def test_attaching_refuses_a_host_without_reference_and_a_vocabulary_of_another_model(repairing):
    with pytest.raises(AttachError, match="no reference"):
        ModelRefiner().attach(Host(None))
    larger = build_tokenizer(words=[*WORDS, "more"])
    with pytest.raises(AttachError, match="tokens up to 27, the model reads 27"):
        ModelRefiner().attach(Host(repairing, larger))
    ModelRefiner(tokenizer=build_tokenizer()).attach(Host(repairing, larger))


@pytest.mark.parametrize("generation", [None, {"do_sample": False}], ids=["copying", "generating"])
def test_an_added_token_that_the_model_does_not_read_costs_its_row_alone(repairing, generation):
    """As the image token of Gemma 3's text models, or padding that was added."""
    words = build_tokenizer()
    words.add_special_tokens({"pad_token": "<image>"})
    assert words.pad_token_id == len(WORDS)
    refiner = attached(ModelRefiner(prompt=ASK, generation=generation), repairing, words)
    assert refiner.refine(["x"] * 3, ["a b c", "a <image> b", "d e f g 0 h"]) == ["a b c", None, "d e f g h"]
    shown = attached(ModelRefiner(prompt="{prompt} " + ASK, generation=generation), repairing, words)
    assert shown.refine(["<image>"], ["a b c"]) == [None]


def test_a_vocabulary_of_another_model_is_refused_also_where_all_its_tokens_are_listed_as_added(repairing):
    larger = build_tokenizer(words=[*WORDS, "more"])
    larger.add_tokens(list(larger.get_vocab()))
    assert set(larger.added_tokens_decoder) == set(range(len(WORDS) + 1))
    with pytest.raises(AttachError, match="tokens up to 27, the model reads 27"):
        ModelRefiner().attach(Host(repairing, larger))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "{prompt} only"}, "does not show the response"),
        ({"prompt": "{completion} {question}"}, "KeyError"),
        ({"prompt": '{"json": {completion}}'}, "twice"),
        ({"prompt": "{completion} {" + "x" * 9999 + "}"}, r"KeyError: 'x{499}…\)"),
        ({"prompt": 3}, "a text or a function"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"generation": 5}, "generation is 5"),
        ({"chat_template_kwargs": True}, "chat_template_kwargs is True"),
        ({"model": "meta-llama/x"}, "a causal language model"),
        ({"model": nn.Linear(2, 2)}, "a causal language model"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        ModelRefiner(**arguments)
