"""A refinement in a policy file, and back."""

import re
from pathlib import Path

import pytest

from guardrails import ConfigurationError, Constraint, Gate, Guard, Refinement, Require, hookimpl, plugins
from guardrails.competence import RewardLevel
from guardrails.policy import describe, foreign_parts
from guardrails.refine import (
    Acceptance,
    CostAbove,
    Degenerate,
    Empty,
    EndpointRefiner,
    FunctionRefiner,
    ModelRefiner,
    Predicate,
    Refiner,
    Repetition,
    Truncated,
    Unparsable,
)
from guardrails.schedulers import NuPI

PAGE = Path(__file__).parents[2] / "docs"

POLICY = """\
[refinement]
weight = 0.5
changed_only = true

[refinement.refiner]
name = "endpoint"
url = "http://localhost:8000/v1"
model = "m"
retries = 1

[refinement.when]
any = ["empty", { name = "repetition", n = 2, share = 0.25 }, { not = { all = ["truncated", "always"] } }]

[refinement.accept]
similarity = 0.25
sound = { name = "unparsable", language = "json" }
reward = true
"""


def strip(prompt, completion):
    return completion.strip()


def cost(completions, **kwargs):
    return [0.0 for _ in completions]


def allowed(prompt, completion, refined):
    return True


def load(tmp_path, text, **options):
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return Guard.from_toml(path, **options)


def test_a_file_describes_a_refinement(tmp_path):
    part = load(tmp_path, POLICY).refinement
    assert (part.name, part.weight, part.changed_only) == ("refinement", 0.5, True)
    assert type(part.refiner) is EndpointRefiner
    assert (part.refiner.url, part.refiner.model, part.refiner.retries) == ("http://localhost:8000/v1", "m", 1)
    assert repr(part.when) == "(Empty() | Repetition(n=2, share=0.25) | ~(Truncated() & Always()))"
    assert (
        repr(part.accept) == "Acceptance(similarity=0.25, sound=Unparsable(language='json'), reward=True, check=None)"
    )


def gate():
    return Gate(Require(RewardLevel(), at_least=0.5), name="trust")


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [Refinement(EndpointRefiner("http://localhost/v1", "m"), accept=Acceptance(sound=None), name="cure")],
        lambda: [Refinement(FunctionRefiner(strip), 0.5, (Empty() | Repetition(2)) & ~Truncated())],
        lambda: [Refinement(FunctionRefiner(strip), gate().between(2.0, 1.0), Predicate(strip), changed_only=True)],
        lambda: [
            Constraint("toxicity", limit=1.0, cost=Degenerate(n=2)),
            Refinement(
                FunctionRefiner(strip),
                Constraint("degenerate", limit=gate().between(0.1, 0.2), cost=CostAbove(cost, 0.25), scheduler=NuPI()),
                accept=Acceptance(similarity=0.5, sound=Unparsable("python"), reward=True, check=allowed),
            ),
        ],
        lambda: [Refinement(FunctionRefiner(strip), Constraint("edits", limit=0.2))],
        lambda: [Refinement(ModelRefiner(chat_template_kwargs={"enable_thinking": False}))],
        lambda: [
            Refinement(ModelRefiner(generation={"temperature": 0.5, "stop_strings": ["a"]}, chat_template_kwargs={}))
        ],
        lambda: [
            Refinement(EndpointRefiner("http://localhost/v1", "m", extra={"chat_template_kwargs": {"name": "a"}}))
        ],
    ],
)
def test_any_refinement_comes_back_from_its_file_as_it_was(tmp_path, parts):
    guard = Guard(*parts())
    text = guard.to_toml()
    again = load(tmp_path, text, allow_imports=True)
    assert describe(again) == describe(guard)
    assert again.to_toml() == text
    assert repr(again.refinement.refiner) == repr(guard.refinement.refiner)
    assert repr(again.refinement.when) == repr(guard.refinement.when)
    assert repr(again.refinement.accept) == repr(guard.refinement.accept)
    assert [part.name for part in again.constraints] == [part.name for part in guard.constraints]
    assert again.steering == guard.steering
    for name in ("name", "changed_only"):
        assert getattr(again.refinement, name) == getattr(guard.refinement, name)
    assert again.refinement_weight == guard.refinement_weight
    assert [repr(part) for part in again.constraints] == [repr(part) for part in guard.constraints]


def test_the_page_on_policies_shows_one(tmp_path):
    text = re.findall(r"```toml\n(.*?)```", (PAGE / "policy.md").read_text(), re.DOTALL)[1]
    guard = load(tmp_path, text)
    assert guard.refinement.weight.name == "degenerate"
    assert guard.steering == {"degenerate"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "weight = 0.5",
            "wight = 0.5",
            r"line 2: refinement.wight: there is no key 'wight' here. Did you mean 'weight'",
        ),
        ("weight = 0.5", "weight = -1", r"line 2: refinement.weight: .*weight is -1"),
        ("weight = 0.5", 'weight = { constraint = "x" }', r"line 2: refinement.weight.constraint: .*Define \[constr"),
        (
            "weight = 0.5",
            'weight = { gate = "x", tight = 1, loose = 2 }',
            r"line 2: refinement.weight.gate: there is no",
        ),
        ("retries = 1", "retries = -1", r"line 9: refinement.refiner.retries: .*retries is -1"),
        ("retries = 1", "retires = 1", r"line 9: refinement.refiner.retires: .*Did you mean 'retries'"),
        ('model = "m"', "", r"line 5: refinement.refiner: EndpointRefiner needs model"),
        ('name = "endpoint"', 'name = "endpiont"', r"line 6: .*no refiner 'endpiont'. Did you mean 'endpoint'"),
        ('"empty"', '"emtpy"', r"line 12: .*no detector 'emtpy'. Did you mean 'empty'"),
        ("n = 2", "n = 0", r"line 12: refinement.when.any.1.n: Repetition: n is 0"),
        ("any = [", "anny = [", r"line 1[12]: refinement.when.*a detector needs a name"),
        ('"json"', '"yaml"', r"line 16: refinement.accept.sound.language: .*'yaml'"),
        ("similarity = 0.25", "similarity = 2", r"line 15: refinement.accept.similarity: .*similarity is 2"),
        ("reward = true", "reward = 1", r"line 17: refinement.accept.reward: it is 1; true or false is needed"),
    ],
)
def test_a_mistake_is_named_with_line_and_key(tmp_path, old, new, message):
    assert old in POLICY
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, POLICY.replace(old, new))


def test_functions_are_imported_only_with_leave(tmp_path):
    text = Guard(Refinement(FunctionRefiner(strip))).to_toml()
    with pytest.raises(ConfigurationError, match="Pass allow_imports=True"):
        load(tmp_path, text)
    assert load(tmp_path, text, allow_imports=True).refinement.refiner.function is strip


@pytest.mark.parametrize("value", [None, strip, float("nan"), {1: "a"}], ids=["none", "function", "nan", "keys"])
def test_a_mapping_of_more_than_plain_values_cannot_be_written(value):
    guard = Guard(Refinement(ModelRefiner(chat_template_kwargs={"style": value})))
    with pytest.raises(ConfigurationError, match=r"chat_template_kwargs.style is .*neither a number nor a text"):
        guard.to_toml()


def test_a_function_without_a_name_cannot_be_written():
    guard = Guard(Refinement(FunctionRefiner(lambda prompt, completion: completion), when=Predicate(strip)))
    with pytest.raises(ConfigurationError, match=r"refinement 'refinement': FunctionRefiner.function is the function"):
        guard.to_toml()


class Closing(Refiner):
    name = "acme.closing"

    def __init__(self, sign="."):
        self.sign = sign

    def refine(self, prompts, completions):
        return [text + self.sign for text in completions]


def shouting(prompt, completion):
    return completion.isupper()


shouting.name = "acme.shouting"


class Acme:
    @hookimpl
    def guardrails_refiners(self):
        return [Closing]

    @hookimpl
    def guardrails_detectors(self):
        return [shouting]


@pytest.fixture
def acme():
    yield plugins.register(Acme(), name="acme")
    plugins.unregister("acme")


def test_what_a_plug_in_brings_stands_by_its_name_and_is_told_of(tmp_path, acme):
    guard = Guard(Refinement(Closing("!"), when=~Predicate(shouting) | Empty()))
    data = describe(guard)["refinement"]
    assert data["refiner"] == {"name": "acme.closing", "sign": "!"}
    assert data["when"] == {"any": [{"not": "acme.shouting"}, "empty"]}
    again = load(tmp_path, guard.to_toml()).refinement
    assert again.refiner.sign == "!"
    assert again.when.parts[0].part.function is shouting
    assert [(part["kind"], part["name"]) for part in foreign_parts(guard)] == [
        ("refiner", "acme.closing"),
        ("detector", "acme.shouting"),
    ]
