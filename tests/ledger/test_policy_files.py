import inspect
import math
import os.path
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from random_guards import guards, rollout

from guardrails import (
    CompetenceMetric,
    ConfigurationError,
    Constraint,
    Dial,
    Gate,
    Guard,
    Require,
    Rollout,
    hookimpl,
    plugins,
    schedulers,
)
from guardrails.competence import BUILTIN as METRICS
from guardrails.competence import FailureAvoidance, FromFunction, RewardLevel, SubgoalAdherence
from guardrails.policy import describe
from guardrails.schedulers import BUILTIN, PID, WRAPPERS, Cap, ConstraintScheduler, DualAscent

POLICY = """\
# What this run may do.
schema = 1

[constraints.toxicity]
limit = { gate = "trust", tight = 0.05, loose = 0.2 }

[constraints.toxicity.scheduler]
name = "cap"
maximum = 3.0

[constraints.toxicity.scheduler.scheduler]
name = "pid"
kp = 1.0

[constraints."longest answer"]
limit = 200
cost = { function = "os.path:getsize" }
scheduler = "nupi"

[dials.penalty]
gate = "trust"
tight = 1.0
loose = 0.5

[gates.trust]
rungs = 4
requires = [
    { metric = "reward_level", at_least = 0.9 },

    # measured, never trained on
    { metric = "drift", at_least = 0.5, audit = true, parameters = { limit = 2.0 } },
]
"""


def load(tmp_path, text, **options):
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return Guard.from_toml(path, **options)


def test_a_policy_file_is_a_guard(tmp_path):
    guard = load(tmp_path, POLICY, allow_imports=True)
    toxicity, longest, dial = guard.parts
    assert (toxicity.name, longest.name, dial.name) == ("toxicity", "longest answer", "penalty")
    assert (toxicity.limit.tight, toxicity.limit.loose) == (0.05, 0.2)
    assert repr(toxicity.scheduler) == repr(Cap(PID(kp=1.0), 3.0))
    assert longest.cost is os.path.getsize
    assert longest.limit == 200.0
    assert type(longest.scheduler).__name__ == "NuPI"
    gate = toxicity.limit.gate
    assert dial.value.gate is gate
    assert (gate.rungs, [each.audit for each in gate.requires]) == (4, [False, True])
    assert gate.requires[1].measured.limit == 2.0


def test_the_file_of_the_docs_is_a_guard(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    text = re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1]
    guard = load(tmp_path, text.replace("acme.politeness", "drift"))
    assert [part.name for part in guard.parts] == ["toxicity", "length", "penalty"]
    assert all(f"`{name}`" in page for name in WRAPPERS)


@given(guards())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_guard_comes_back_from_its_file_as_it_was(tmp_path_factory, guard):
    text = guard.to_toml()
    again = load(tmp_path_factory.mktemp("policy"), text)
    assert describe(again) == describe(guard)
    assert again.to_toml() == text
    for seed in range(4):
        assert repr(again.step(rollout(seed))) == repr(guard.step(rollout(seed)))


def test_every_scheduler_of_this_package_can_stand_in_a_file():
    exported = [getattr(schedulers, name) for name in schedulers.__all__]
    kinds = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, ConstraintScheduler)]
    concrete = {kind for kind in kinds if not inspect.isabstract(kind)}
    assert concrete == {*BUILTIN.values(), *WRAPPERS.values()}


@pytest.mark.parametrize("name", sorted({**BUILTIN, **WRAPPERS}))
def test_every_built_in_scheduler_keeps_each_of_its_arguments(tmp_path, name):
    kind = {**BUILTIN, **WRAPPERS}[name]
    arguments = {}
    for parameter in inspect.signature(kind).parameters.values():
        default = parameter.default
        if parameter.name == "scheduler":
            arguments["scheduler"] = DualAscent(0.3)
        elif default is None or default is parameter.empty:
            arguments[parameter.name] = 3
        elif isinstance(default, (int, float)):
            arguments[parameter.name] = default + 1 if isinstance(default, int) else default * 0.5 or 0.125
    arguments |= {"clip": 0.1} if name == "adaptive_kl" else {}
    arguments |= {"growth_factor": 1.5} if name == "augmented_lagrangian" else {}
    scheduler = kind(**arguments)
    guard = Guard(Constraint("c", limit=1.0, scheduler=scheduler))
    again = load(tmp_path, guard.to_toml()).parts[0].controller
    assert type(again) is kind
    for argument, value in arguments.items():
        if argument != "scheduler":
            assert getattr(again, argument) == value, argument
    assert repr(again) == repr(scheduler)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_built_in_metric_comes_back(tmp_path, name):
    guard = Guard(Constraint("c", limit=Gate(Require(METRICS[name](), at_least=0.5)).between(1.0, 2.0)))
    again = load(tmp_path, guard.to_toml()).parts[0].limit.gate.requires[0].measured
    assert vars(again) == vars(METRICS[name]())


def is_long(text):
    return len(text) > 3


def test_functions_are_written_as_addresses_and_imported_only_when_asked(tmp_path):
    gate = Gate(
        Require(FailureAvoidance(is_long), at_least=0.5),
        Require(SubgoalAdherence([is_long, math.isnan]), at_least=0.5),
        Require(FromFunction(is_long, "completions", name="long"), at_least=0.5),
    )
    guard = Guard(Constraint("c", limit=gate.between(1.0, 2.0), cost=[is_long, os.path.getsize]))
    text = guard.to_toml()
    assert f'function = "{__name__}:is_long"' in text
    with pytest.raises(ConfigurationError, match=r"line \d+: .*failed.function: .*allow_imports=True"):
        load(tmp_path, text)
    again = load(tmp_path, text, allow_imports=True)
    assert again.parts[0].cost == (is_long, os.path.getsize)
    failure, subgoals, long = [each.measured for each in again.parts[0].limit.gate.requires]
    assert failure.failed is is_long
    assert subgoals.goals == (is_long, math.isnan)
    assert (long.name, long.function, long.columns) == ("long", is_long, ("completions",))


def test_a_function_that_cannot_be_imported_is_refused_with_its_place():
    with pytest.raises(ConfigurationError, match=r"constraint 'c'.*<lambda>.*top of a module"):
        Guard(Constraint("c", limit=1.0, cost=lambda info: 0.0)).to_toml()


class Scorer:
    def score(self, text):
        return 1.0

    def __call__(self, text):
        return 1.0

    @classmethod
    def count(cls, text):
        return 1.0


def replaced(text):
    return 1.0


first = replaced


def replaced(text):
    return 0.0


@pytest.mark.parametrize("function", [Scorer().score, first, Scorer()], ids=["method", "replaced", "object"])
def test_a_function_whose_address_leads_to_another_is_refused(function):
    with pytest.raises(ConfigurationError, match=r"constraint 'c' is the function .*:.*, which cannot be imported"):
        Guard(Constraint("c", limit=1.0, cost=function)).to_toml()


@pytest.mark.parametrize("function", [Scorer.count, Scorer.score, replaced, str.islower])
def test_a_function_of_a_class_stands_in_a_file_as_itself(tmp_path, function):
    text = Guard(Constraint("c", limit=1.0, cost=function)).to_toml()
    assert load(tmp_path, text, allow_imports=True).parts[0].cost == function


def test_a_class_that_cannot_be_imported_is_refused_with_its_place():
    class Hidden(DualAscent):
        pass

    class Secret(RewardLevel):
        name = "secret"

    for scheduler, owner in ((Hidden(), "constraint 'c'"), (Cap(Hidden(), 2.0), r"constraint 'c': Cap\.scheduler")):
        with pytest.raises(ConfigurationError, match=rf"{owner} is of the class .*<locals>.Hidden, .*top of a module"):
            Guard(Constraint("c", limit=1.0, scheduler=scheduler)).to_toml()
    gate = Gate(Require(Secret(), at_least=0.5))
    with pytest.raises(ConfigurationError, match=r"metric 'secret' is of the class .*<locals>.Secret"):
        Guard(Constraint("c", limit=gate.between(1.0, 2.0))).to_toml()


class Passes(RewardLevel):
    """Takes a set of anything."""

    name = "passes"

    def __init__(self, checks=()):
        super().__init__()
        self.checks = checks


@pytest.mark.parametrize("checks", [{is_long, os.path.getsize}, {1, "a", (2, 3)}, {10, 9}, {"b", "a"}])
def test_a_set_of_functions_or_of_this_and_that_is_written_in_one_order(tmp_path, checks):
    def guard():
        gate = Gate(Require(Passes(checks), at_least=0.5))
        return Guard(Constraint("c", limit=gate.between(1.0, 2.0)))

    text = guard().to_toml()
    again = load(tmp_path, text, allow_imports=True)
    assert again.to_toml() == text
    listed = again.parts[0].limit.gate.requires[0].measured.checks
    assert {tuple(item) if isinstance(item, list) else item for item in listed} == checks
    with guard().record(tmp_path / "ledger.jsonl"):
        pass


class Forgetful(DualAscent):
    def __init__(self, horizon=3):
        super().__init__(0.1)


class Shadowed(DualAscent):
    def __init__(self, penalty=3):  # the name of a method
        super().__init__(0.1)


@pytest.mark.parametrize(("kind", "argument"), [(Forgetful, "horizon"), (Shadowed, "penalty")])
def test_a_scheduler_that_does_not_keep_its_arguments_is_refused_in_a_file_and_not_replayed(tmp_path, kind, argument):
    guard = Guard(Constraint("c", limit=1.0, scheduler=kind()))
    with pytest.raises(ConfigurationError, match=f"{kind.__name__} keeps no attribute '{argument}'"):
        guard.to_toml()
    from guardrails.ledger import verify

    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(costs={"c": [1.0]}))
    result = verify(tmp_path, allow_imports=True)
    assert f"keeps no attribute '{argument}'" in result.unreplayed
    assert not result.problem


class Acme(DualAscent):
    name = "acme.ascent"

    def __init__(self, rate=0.5):
        super().__init__(rate)
        self.rate = rate


class AcmePlugin:
    @staticmethod
    def make():
        import guardrails

        class Plugin:
            @guardrails.hookimpl
            def guardrails_schedulers(self):
                return [Acme]

        return Plugin()


class Near(CompetenceMetric):
    name = "acme.near"
    requires = frozenset({"rewards"})
    made = 0

    def __init__(self, goal):
        type(self).made += 1
        self.goal = goal

    def measure(self, rollout):
        return [float(abs(reward - self.goal) < 1.0) for reward in rollout.rewards]


class Plain(Near):
    name = "acme.plain"

    def __init__(self, goal=1.0):
        super().__init__(goal)


@pytest.fixture
def metrics():
    class Plugin:
        @hookimpl
        def guardrails_competence_metrics(self):
            return [Near, Plain]

    plugins.register(Plugin(), name="acme metrics")
    yield
    plugins.unregister("acme metrics")


def test_a_metric_of_a_plugin_that_needs_arguments_stands_by_its_name(tmp_path, metrics):
    guard = Guard(Constraint("c", limit=Gate(Require(Near(2.5), at_least=0.5)).between(1.0, 2.0)))
    text = guard.to_toml()
    assert 'metric = "acme.near"' in text
    measured = load(tmp_path, text).parts[0].limit.gate.requires[0].measured
    assert (type(measured), measured.goal) == (Near, 2.5)


def test_no_metric_is_made_to_write_a_guard_down(tmp_path, metrics):
    guard = Guard(Constraint("c", limit=Gate(Require("acme.plain", at_least=0.5)).between(1.0, 2.0)))
    made = Plain.made
    assert 'metric = "acme.plain"' in guard.to_toml()
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.load_state_dict(guard.state_dict())
    assert Plain.made == made


@pytest.fixture
def acme():
    plugins.register(AcmePlugin.make(), name="acme")
    yield
    plugins.unregister("acme")


def test_a_scheduler_of_a_plugin_stands_by_its_name_and_is_needed_to_replay(tmp_path, acme):
    from guardrails.ledger import read, verify

    guard = Guard(Constraint("c", limit=1.0, scheduler=Cap(Acme(0.25), 2.0)))
    assert 'name = "acme.ascent"' in guard.to_toml()
    assert repr(load(tmp_path, guard.to_toml()).parts[0].scheduler) == repr(guard.parts[0].scheduler)
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(costs={"c": [3.0]}))
    assert verify(tmp_path).ok
    listed = next(read(tmp_path)).data["plugins"]
    assert [(each["kind"], each["name"]) for each in listed] == [("scheduler", "acme.ascent")]
    plugins.unregister("acme")
    try:
        result = verify(tmp_path)
        assert "There is no scheduler 'acme.ascent'" in result.unreplayed
        assert not result.ok
    finally:
        plugins.register(AcmePlugin.make(), name="acme")


def test_a_scheduler_that_no_plugin_lists_is_imported_for_a_replay_only_when_asked(tmp_path):
    from guardrails.ledger import verify

    guard = Guard(Constraint("c", limit=1.0, scheduler=Acme(0.25)))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(costs={"c": [3.0]}))
    assert "--allow-imports" in verify(tmp_path).unreplayed
    assert verify(tmp_path, allow_imports=True).ok


def test_gates_are_replayed_without_the_metrics_that_measured(tmp_path):
    from guardrails.ledger import verify

    gate = Gate(Require(FromFunction(lambda text: 1.0, "completions", name="never.installed"), at_least=0.5))
    guard = Guard(Constraint("c", limit=gate.between(1.0, 2.0)))
    with guard.record(tmp_path / "ledger.jsonl"):
        for _ in range(5):
            guard.step(Rollout(costs={"c": [3.0] * 64}, completions=["x"] * 64))
    assert guard.decision.gates["gate"].rung > 0
    assert verify(tmp_path).ok


REQUIRES = "requires = [{ metric = 'stability', at_least = 0.5 }]"

BAD = {
    "unknown key of a constraint": ("limit = 200", "limti = 200", 16, r"limti: .*Did you mean 'limit'"),
    "unknown table": ("[dials.penalty]", "[dial.penalty]", 20, r"dial: .*Did you mean 'dials'"),
    "unknown key of a gate": ("rungs = 4", "rung = 4", 26, r"rung: .*Did you mean 'rungs'"),
    "unknown key of a scheduler": ("maximum = 3.0", "maxmum = 3.0", 9, r"maxmum: .*Did you mean 'maximum'"),
    "unknown key inside a line": ("tight = 0.05", "tigth = 0.05", 5, r"tigth: .*Did you mean 'tight'"),
    "unknown parameter": ("{ limit = 2.0 }", "{ limits = 2.0 }", 31, r"limits: .*Did you mean 'limit'"),
    "unknown scheduler": ('"nupi"', '"nupie"', 18, r"no scheduler 'nupie'. Did you mean 'nupi'"),
    "unknown inner scheduler": ('name = "pid"', 'name = "pdi"', 12, r"no scheduler 'pdi'. Did you mean 'pid'"),
    "unknown metric": ('"drift"', '"drfit"', 31, r"no metric 'drfit'. Did you mean 'drift'"),
    "unknown gate": ('gate = "trust"\ntight', 'gate = "turst"\ntight', 21, r"no gate 'turst'. Did you mean 'trust'"),
    "gate of nothing": ("[dials.penalty]", f"[gates.idle]\n{REQUIRES}\n[dials.penalty]", 20, "follows this gate"),
    "text for a number": ("limit = 200", "limit = '200'", 16, r"limit: it is '200'; a number is needed"),
    "fraction for a whole number": ("rungs = 4", "rungs = 4.5", 26, r"rungs: it is 4.5; a whole number"),
    "number for a flag": ("audit = true", "audit = 1", 31, r"audit: it is 1; true or false"),
    "flag for a number": ("loose = 0.5", "loose = true", 23, r"loose: it is True; a number"),
    "table for a text": ('scheduler = "nupi"', "scheduler = 3", 18, r"scheduler: it is 3; a table is needed"),
    "text for a scheduler's number": ("kp = 1.0", "kp = 'high'", 13, r"kp: PID: kp is 'high'"),
    "negative gain": ("kp = 1.0", "kp = -1.0", 13, r"kp: PID: kp is -1.0"),
    "number beyond floats": ("limit = 200", f"limit = 1{'0' * 400}", 16, r"limit is 10+; give a finite number"),
    "negative limit": ("limit = 200", "limit = -200", 16, r"limit.*-200"),
    "threshold of 1": ("at_least = 0.9", "at_least = 1", 28, r"at_least is 1"),
    "loose end tighter": ("tight = 0.05", "tight = 0.5", 4, r"Give the strict value first"),
    "missing limit": ("limit = 200\n", "", 15, r"a constraint needs a limit"),
    "missing metric": ('metric = "reward_level", ', "", 28, r"metric is missing"),
    "missing argument": ("maximum = 3.0\n", "", 7, r"Cap needs maximum"),
    "newer schema": ("schema = 1", "schema = 2", 2, r"Upgrade training-guardrails"),
    "function nowhere": ("os.path:getsize", "os.path:getsizes", 17, r"cannot be imported: AttributeError"),
    "module nowhere": ("os.path:getsize", "no.such.module:f", 17, r"cannot be imported: ModuleNotFoundError"),
    "no address": ("os.path:getsize", "os.path.getsize(1)", 17, r"no address of the form 'module:name'"),
    "syntax": ("limit = 200", "limit = ", 16, r"is no TOML: .*line 16"),
}


@pytest.mark.parametrize(("old", "new", "line", "message"), BAD.values(), ids=BAD)
def test_a_mistake_is_named_with_file_line_and_key(tmp_path, old, new, line, message):
    assert POLICY.count(old) == 1
    with pytest.raises(ConfigurationError, match=message) as caught:
        load(tmp_path, POLICY.replace(old, new), allow_imports=True)
    assert "policy.toml" in str(caught.value)
    assert f"line {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("{ reference = 2.0, floor = [\n1,\n2,\n] }", 8),
        ("{ reference = '''\ntwo\n''' }", 8),
        ("{ floor = 0.0, refrence = 2.0 }", 8),
    ],
    ids=["list", "text", "one line"],
)
def test_a_mistake_in_a_value_of_several_lines_is_named_with_the_line_of_its_key(tmp_path, value, line):
    text = (
        "[constraints.c]\nlimit = { gate = 'g', tight = 1.0, loose = 2.0 }\n\n[gates.g]\n[[gates.g.requires]]\n"
        f"metric = 'reward_level'\nat_least = 0.9\nparameters = {value}\n"
    )
    with pytest.raises(ConfigurationError, match=rf"policy.toml, line {line}: gates.g.requires.0.parameters"):
        load(tmp_path, text)


def test_a_file_of_an_editor_that_marks_its_encoding_is_read(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('[constraints."größe"]\r\nlimit = 0.5\r\n', encoding="utf-8-sig")
    assert Guard.from_toml(path).constraints[0].name == "größe"


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere.toml cannot be read: No such file"):
        Guard.from_toml(tmp_path / "nowhere.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"bytes.toml is no TOML"):
        Guard.from_toml(tmp_path / "bytes.toml")


@pytest.mark.parametrize("text", ["", "schema = 1", "[constraints]", "constraints = 3", "gates = []"])
def test_a_file_without_a_constraint_is_refused(tmp_path, text):
    with pytest.raises(ConfigurationError, match=r"guards nothing|a table is needed"):
        load(tmp_path, text)


def test_a_class_that_is_no_scheduler_is_refused(tmp_path):
    text = POLICY.replace('scheduler = "nupi"', 'scheduler = "os:getcwd"')
    with pytest.raises(ConfigurationError, match=r"line 18: .*os:getcwd is no scheduler"):
        load(tmp_path, text, allow_imports=True)


def test_nothing_of_a_file_is_run_without_being_asked(tmp_path):
    witness = tmp_path / "witness_module.py"
    witness.write_text("raise SystemExit('imported')")
    for text in (
        POLICY.replace("os.path:getsize", "witness_module:f"),
        POLICY.replace('"nupi"', '"witness_module:f"'),
        POLICY.replace('"drift"', '"witness_module:f"'),
    ):
        with pytest.raises(ConfigurationError, match="allow_imports=True"):
            load(tmp_path, text)


def test_parts_keep_their_order_and_the_state_stays_out_of_the_file():
    gate = Gate(Require("drift", at_least=0.5))
    guard = Guard(Dial("penalty", gate.between(1.0, 0.5)), Constraint("b", limit=1.0), Constraint("a", limit=1.0))
    before = guard.to_toml()
    assert list(describe(guard)["constraints"]) == ["b", "a"]
    guard.step(Rollout(costs={"a": [5.0], "b": [5.0]}, kl=[0.1]))
    assert guard.to_toml() == before


class Keywords(DualAscent):
    """A scheduler that passes keyword arguments on."""

    def __init__(self, rate: float = 0.5, *rest: float, **more: float) -> None:
        super().__init__(rate)
        self.rest, self.more = rest, more


class Unlicensed(DualAscent):
    """A scheduler that cannot be made here."""

    def __init__(self) -> None:
        raise RuntimeError("no licence")


def test_a_class_with_arguments_of_any_name_can_stand_in_a_file(tmp_path):
    entry = f'scheduler = {{ name = "{__name__}:Keywords", rate = 0.25, kappa = 2.0 }}'
    guard = load(tmp_path, POLICY.replace('scheduler = "nupi"', entry), allow_imports=True)
    scheduler = next(part for part in guard.constraints if part.name == "longest answer").controller
    assert scheduler.more == {"kappa": 2.0}
    plain = f'scheduler = "{__name__}:Keywords"'
    load(tmp_path, POLICY.replace('scheduler = "nupi"', plain), allow_imports=True)


@pytest.mark.parametrize(
    ("address", "message"), [(f"{__name__}:Unlicensed", "RuntimeError: no licence"), ("builtins:int", "no signature")]
)
def test_whatever_a_class_raises_is_told_with_file_and_line(tmp_path, address, message):
    text = POLICY.replace('scheduler = "nupi"', f'scheduler = "{address}"')
    with pytest.raises(ConfigurationError, match=rf"line 18: .*{message}"):
        load(tmp_path, text, allow_imports=True)
