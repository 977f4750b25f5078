from guardrails import CompetenceMetric, Constraint, Gate, Guard, Require, Rollout
from guardrails.ledger import read, verify

SCHEDULER = """
    from typing import NamedTuple

    import guardrails
    from guardrails.schedulers import ConstraintScheduler

    class On(NamedTuple):
        multiplier: float

    class Switch(ConstraintScheduler[On]):
        name = "acme.switch"
        state_type = On

        def __init__(self, gain=1.0):
            self.gain = gain

        def init(self):
            return On(0.0)

        def update(self, state, violation):
            return On(self.gain * (violation > 0.0)), self.gain * (violation > 0.0)

    @guardrails.hookimpl
    def guardrails_schedulers():
        return [Switch]
"""


def test_the_header_names_the_distribution_and_version_of_each_third_party_part(install, good, tmp_path):
    install("acme-metrics", good(), version="2.3")
    install("acme-idle", good("idle.metric", "Idle"))
    install("acme-schedulers", SCHEDULER, version="0.7")
    gate = Gate(Require("acme.politeness", at_least=0.5), Require("reward_level", at_least=0.5))
    guard = Guard(Constraint("c", limit=gate.between(1.0, 2.0), scheduler="acme.switch"))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(costs={"c": [3.0]}, rewards=[1.0], completions=["polite"]))
    listed = next(read(tmp_path)).data["plugins"]
    assert listed == [
        {"kind": "scheduler", "name": "acme.switch", "distribution": "acme-schedulers", "version": "0.7"},
        {"kind": "metric", "name": "acme.politeness", "distribution": "acme-metrics", "version": "2.3"},
    ]
    assert verify(tmp_path).ok


def listed(folder, metric, scheduler="pid"):
    """Return what the header says of the plug-ins of a guard with this metric."""
    guard = Guard(Constraint("c", limit=Gate(Require(metric, at_least=0.5)).between(1.0, 2.0), scheduler=scheduler))
    with guard.record(folder / "ledger.jsonl"):
        return next(read(folder)).data["plugins"]


def test_a_class_of_ones_own_that_bears_a_plugins_name_is_not_the_plugins(install, good, tmp_path):
    install("acme-metrics", good(), version="2.3")

    class Own(CompetenceMetric):
        name = "acme.politeness"

        def measure(self, rollout):
            return [1.0] * rollout.n_rows

    Own.__module__ = "__main__"
    assert listed(tmp_path, Own()) == [
        {"kind": "metric", "name": "acme.politeness", "distribution": "", "version": ""},
    ]
    Own.__module__ = "pytest.own"
    (credited,) = listed(tmp_path / "second", Own())
    assert credited["distribution"] == "pytest"


def test_a_name_that_two_plugins_use_for_two_kinds_is_credited_by_kind(install, good, tmp_path):
    install("acme-a", SCHEDULER.replace("acme.switch", "acme.politeness"), plugin="first", version="0.7")
    install("acme-metrics", good(), plugin="second", version="2.3")
    assert listed(tmp_path, "acme.politeness", "acme.politeness") == [
        {"kind": "scheduler", "name": "acme.politeness", "distribution": "acme-a", "version": "0.7"},
        {"kind": "metric", "name": "acme.politeness", "distribution": "acme-metrics", "version": "2.3"},
    ]
