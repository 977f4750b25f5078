import inspect
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import guardrails
from guardrails import CompetenceMetric, Constraint, plugins
from guardrails.errors import PluginError
from guardrails.plugins import hookspecs
from guardrails.schedulers import PID, DualAscent


class Politeness(CompetenceMetric):
    name = "acme.politeness"
    requires = frozenset({"completions"})

    def measure(self, rollout):
        return [1.0] * rollout.n_rows


class Patient(DualAscent):
    name = "acme.patient"


def proofread(text):
    return text


proofread.name = "acme.proofread"


class Everything:
    @guardrails.hookimpl
    def guardrails_competence_metrics(self):
        return [Politeness]

    @guardrails.hookimpl
    def guardrails_schedulers(self):
        return (Patient,)

    @guardrails.hookimpl
    def guardrails_refiners(self):
        return [proofread]

    @guardrails.hookimpl
    def guardrails_detectors(self):
        return [proofread]


class Rival:
    @guardrails.hookimpl
    def guardrails_competence_metrics(self):
        return [type("Rude", (Politeness,), {})]


@pytest.fixture
def everything():
    yield plugins.register(Everything())
    plugins.unregister("Everything")


def test_a_plugin_registered_by_code_is_looked_up_by_kind(everything):
    assert isinstance(plugins.metric("acme.politeness"), Politeness)
    assert plugins.scheduler("acme.patient") is Patient
    assert plugins.refiner("acme.proofread") is proofread
    assert plugins.detector("acme.proofread") is proofread
    assert plugins.Found("Everything", kind="metric", names=("acme.politeness",)) in plugins.found()


def test_a_constraint_takes_a_scheduler_of_a_plugin_by_name(everything):
    assert isinstance(Constraint("cost", limit=1.0, scheduler="acme.patient").scheduler, Patient)


def test_a_name_is_known_only_for_its_own_kind(everything):
    with pytest.raises(PluginError, match=r"no scheduler 'acme\.politeness'"):
        plugins.scheduler("acme.politeness")


def test_built_ins_go_by_names_without_a_vendor():
    assert plugins.scheduler("pid") is PID
    assert plugins.metric("failure_avoidance").name == "failure_avoidance"


def test_an_unknown_name_is_answered_with_what_is_known_and_what_is_close(everything):
    with pytest.raises(PluginError) as caught:
        plugins.metric("acme.politness")
    assert "There is no metric 'acme.politness'. Did you mean 'acme.politeness'?" in str(caught.value)
    assert "failure_avoidance" in str(caught.value)
    assert "`guardrails plugins`" in str(caught.value)


def test_an_unknown_name_is_answered_with_the_plugins_that_failed(install):
    install("broken-guardrails", "import no_such_module_anywhere", version="0.1")
    with pytest.raises(PluginError, match=r"failed: broken \(broken-guardrails 0\.1\): ModuleNotFoundError"):
        plugins.metric("broken.metric")


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(PluginError, match="must be a string"):
        plugins.metric(Politeness)


def test_registering_a_name_that_is_taken_changes_nothing(everything):
    before = plugins.found()
    with pytest.raises(
        PluginError, match=r"'rival' was not registered: acme\.politeness it is also claimed by 'Everything'"
    ):
        plugins.register(Rival(), name="rival")
    assert plugins.found() == before
    assert type(plugins.metric("acme.politeness")) is Politeness


def test_code_cannot_take_the_name_of_an_installed_metric(install, good):
    install("acme-guardrails", good())
    with pytest.raises(PluginError, match=r"also claimed by 'acme' \(acme-guardrails 1\.0\)"):
        plugins.register(Rival())
    assert type(plugins.metric("acme.politeness")).__module__ == "acme_guardrails_code"


def test_a_plugin_name_is_registered_once(everything):
    with pytest.raises(PluginError, match="'Everything' is already here"):
        plugins.register(Everything())


@pytest.mark.parametrize("plugin", [None, SimpleNamespace(), SimpleNamespace(guardrails_detectors=list)])
def test_an_object_without_hooks_is_not_a_plugin(plugin):
    with pytest.raises(PluginError, match="hookimpl"):
        plugins.register(plugin)
    assert not [record for record in plugins.found() if not record.distribution]


def test_an_unregistered_plugin_is_gone():
    plugins.register(Everything(), name="mine")
    plugins.unregister("mine")
    with pytest.raises(PluginError, match="There is no metric"):
        plugins.metric("acme.politeness")
    with pytest.raises(PluginError, match="registered: none"):
        plugins.unregister("mine")


def test_a_plugin_registered_by_code_outlives_a_refresh(everything):
    plugins.refresh()
    assert plugins.scheduler("acme.patient") is Patient


def test_a_wrapper_of_one_plugin_does_not_reach_the_hooks_of_another(everything):
    class Wrapper:
        @guardrails.hookimpl(wrapper=True)
        def guardrails_schedulers(self):
            yield
            return []

    with pytest.raises(PluginError, match="was not registered"):
        plugins.register(Wrapper())
    assert plugins.scheduler("acme.patient") is Patient


def test_threads_that_ask_at_once_get_the_same_answer(install):
    source = "import time, pathlib; time.sleep(0.2); open(pathlib.Path(__file__).parent / 'log', 'a').write('x')"
    folder = install("slow-guardrails", source)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(plugins.found())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (folder / "log").read_text() == "x"
    assert len(answers) == 4
    assert len(set(answers)) == 1


@pytest.mark.parametrize("hook", hookspecs.HOOKS.values(), ids=str)
def test_every_hook_is_documented(hook):
    documentation = inspect.getdoc(getattr(hookspecs, hook))
    assert "Returns:" in documentation
    assert "@guardrails.hookimpl" in documentation
    assert f"def {hook}()" in documentation


def test_every_hook_specification_has_a_kind_and_a_page():
    specifications = {name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")}
    assert specifications == set(hookspecs.HOOKS.values())
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    assert {hook for hook in specifications if hook not in page} == set()
