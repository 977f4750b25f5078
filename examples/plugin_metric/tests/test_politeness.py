import pytest
from acme_guardrails import Politeness

from guardrails import Rollout, plugins
from guardrails.testing import MetricContract


class TestPoliteness(MetricContract):
    def metric(self):
        return Politeness()

    def rollout(self):
        return Rollout(
            completions=["Thank you kindly.", "You fool!", [{"role": "assistant", "content": "Stupid, stupid idiot."}]],
            rewards=[0.0, 1.0, 2.0],
        )


def test_each_rude_word_costs_a_tenth():
    scores = Politeness().measure(Rollout(completions=["Good morning.", "Shut up, you fool.", "idiot " * 40]))
    assert scores == pytest.approx([1.0, 0.8, 0.0])


def test_the_metric_is_found_by_name():
    assert isinstance(plugins.metric("acme.politeness"), Politeness)
