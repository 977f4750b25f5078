"""How polite a completion is, judged by its words."""

import re

import guardrails

RUDE = frozenset({"fool", "idiot", "moron", "nonsense", "rubbish", "shut", "stupid"})


class Politeness(guardrails.CompetenceMetric):
    """1 - the share of rude words among the first ten that matter: 1 = polite, 0 = ten rude words."""

    name = "acme.politeness"
    requires = frozenset({"completions"})

    def measure(self, rollout):
        return [1.0 - min(1.0, rude_words(text(completion)) / 10.0) for completion in rollout.completions]


def rude_words(text):
    return sum(word in RUDE for word in re.findall(r"[a-z]+", text.lower()))


def text(completion):
    """TRL holds a completion as a string or, in a conversation, as a list of messages."""
    if isinstance(completion, str):
        return completion
    return " ".join(message["content"] for message in completion)
