import subprocess
import sys

import pytest

from guardrails import Rollout, plugins
from guardrails.errors import PluginError

HOOK = """
    import guardrails

    @guardrails.hookimpl
    def {name}({arguments}):
        {body}
"""


def hook(body, name="guardrails_competence_metrics", arguments=""):
    return HOOK.format(name=name, body=body, arguments=arguments)


def test_an_installed_metric_is_found_by_name_and_reported_with_its_origin(install, good):
    install("acme-guardrails", good(), version="2.3")
    metric = plugins.metric("acme.politeness")
    assert list(metric.measure(Rollout(completions=["polite", "rude"]))) == [1.0, 0.0]
    assert plugins.found() == (plugins.Found("acme", "acme-guardrails", "2.3", "metric", ("acme.politeness",)),)


def test_each_lookup_returns_a_metric_of_its_own(install, good):
    install("acme-guardrails", good())
    assert plugins.metric("acme.politeness") is not plugins.metric("acme.politeness")


BROKEN = {
    "missing module": ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    "exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "panics": ("raise type('Panic', (BaseException,), {})('out of bounds')", "Panic: out of bounds"),
    "not python": ("def broken(:", "broken_guardrails_code.py:1)"),
    "looks up plug-ins": ("from guardrails import plugins; plugins.found()", "while it is being loaded"),
    "hook misspelt": (hook("return []", "guardrails_competence_metric"), "Did you mean guardrails_competence_metrics?"),
    "hook unknown": (hook("return []", "zzz"), "Hooks: guardrails_competence_metrics, guardrails_detectors"),
    "hook not marked": ("def guardrails_competence_metrics(): return []", "@guardrails.hookimpl"),
    "hook takes arguments": (hook("return []", arguments="rollout"), "hook 'guardrails_competence_metrics'"),
    "hook raises": (hook("1 / 0"), "guardrails_competence_metrics() raised ZeroDivisionError: division by zero"),
    "hook exits": (hook("raise SystemExit(3)"), "SystemExit: 3"),
    "hook returns nothing": (hook("pass"), "returned None; return a list of metrics"),
    "hook returns text": (hook("return 'acme.x'"), "returned str"),
    "lists text": (hook("return ['acme.x']"), "no subclass of CompetenceMetric"),
    "lists an abstract class": (hook("return [guardrails.CompetenceMetric]"), "write its methods measure"),
    "lists another class": (hook("return [dict]", "guardrails_schedulers"), "no subclass of ConstraintScheduler"),
    "lists a number": (hook("return [7]", "guardrails_refiners"), "list a class or a function"),
    "lists a metric as a refiner": (
        hook("return [guardrails.CompetenceMetric]", "guardrails_refiners"),
        "no subclass of Refiner",
    ),
    "lists an abstract refiner": (
        hook("from guardrails.refine import Refiner; return [Refiner]", "guardrails_refiners"),
        "write its methods refine",
    ),
    "lists an instance": (
        hook("from guardrails.refine import Empty; return [Empty()]", "guardrails_detectors"),
        "an instance of Empty; list the class itself",
    ),
    "lists what raises when it is looked at": (
        "class Lazy:\n    def __getattr__(self, name): raise ImportError(f'no torch for {name}')\n"
        "from guardrails import hookimpl\n@hookimpl\ndef guardrails_detectors(): return [Lazy()]",
        "ImportError: no torch for",
    ),
    "lists what cannot be shown": (
        hook("return [type('Dark', (), {'__repr__': lambda self: 1 / 0})()]", "guardrails_refiners"),
        "ZeroDivisionError: division by zero",
    ),
    "lists the nameless": (hook("return [len]", "guardrails_detectors"), "set a class attribute name"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_work(install, good, failures, case):
    source, error = BROKEN[case]
    install("broken-guardrails", source, version="0.1")
    install("acme-guardrails", good())
    assert plugins.metric("acme.politeness").measure(Rollout(completions=["polite"])) == [1.0]
    assert set(failures()) == {"broken"}
    assert error in failures()["broken"]
    (record,) = [record for record in plugins.found() if record.error]
    assert (record.distribution, record.version) == ("broken-guardrails", "0.1")


def test_an_import_error_names_file_and_line(install, failures):
    install("broken-guardrails", "x = 1\nraise RuntimeError('two\\nlines\\x1b[2J')\n")
    assert failures()["broken"].startswith("RuntimeError: two lines [2J (")
    assert failures()["broken"].endswith("broken_guardrails_code.py:2)")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before Python 3.11")
def test_an_error_with_a_note_is_told_by_its_message(install, failures):
    install("broken-guardrails", "e = RuntimeError('too old')\ne.add_note('See the manual.')\nraise e\n")
    assert failures()["broken"].startswith("RuntimeError: too old (")


def test_ctrl_c_while_a_plugin_is_imported_is_the_users(install):
    install("slow-guardrails", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins.found()


def test_discovery_recovers_after_ctrl_c(install, monkeypatch):
    folder = install("slow-guardrails", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins.found()
    (folder / "slow_guardrails_code.py").write_text("")
    assert "no hook" in plugins.found()[0].error


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("politeness", "'<vendor>.<name>'"),
        ("failure_avoidance", "'<vendor>.<name>'"),
        ("acme.", "'<vendor>.<name>'"),
        ("Acme.Politeness", "'<vendor>.<name>'"),
        ("acme.poli teness", "'<vendor>.<name>'"),
        ("guardrails.politeness", "vendor 'guardrails'"),
    ],
)
def test_a_name_outside_the_vendors_own_space_is_refused(install, good, failures, name, error):
    install("acme-guardrails", good(name))
    assert error in failures()["acme"]
    assert [record.names for record in plugins.found()] == [(name,)]


def test_a_plugin_cannot_take_the_place_of_a_built_in(install, good):
    before = type(plugins.metric("failure_avoidance"))
    install("acme-guardrails", good("failure_avoidance"))
    assert type(plugins.metric("failure_avoidance")) is before


def test_a_refused_object_leaves_the_rest_of_its_plugin_in_use(install, good):
    source = (
        good()
        + """
    def rude(prompt, completion):
        return completion == "rude"
    rude.name = "acme.politeness"

    @guardrails.hookimpl
    def guardrails_detectors():
        return [len, rude]
"""
    )
    install("acme-guardrails", source)
    assert plugins.detector("acme.politeness")("Hello", "rude")
    assert [(record.kind, record.names, bool(record.error)) for record in plugins.found()] == [
        ("metric", ("acme.politeness",), False),
        ("detector", ("acme.politeness",), False),
        ("detector", ("len",), True),
    ]


@pytest.mark.parametrize("order", [("acme-guardrails", "evil-guardrails"), ("evil-guardrails", "acme-guardrails")])
def test_a_name_claimed_by_two_distributions_is_served_by_neither(install, good, failures, order):
    for distribution in order:
        install(distribution, good())
    with pytest.raises(
        PluginError, match=r"acme\.politeness' is refused.*also claimed by 'evil' \(evil-guardrails 1\.0\)"
    ):
        plugins.metric("acme.politeness")
    assert "'evil' (evil-guardrails 1.0)" in failures()["acme"]
    assert "'acme' (acme-guardrails 1.0)" in failures()["evil"]


def test_a_contested_name_is_settled_by_switching_one_plugin_off(install, good, monkeypatch):
    install("acme-guardrails", good(cls="Ours"))
    install("evil-guardrails", good(cls="Theirs"))
    monkeypatch.setenv("GUARDRAILS_DISABLE_PLUGINS", "Evil_Guardrails")
    assert type(plugins.metric("acme.politeness")).__name__ == "Ours"


def test_two_objects_of_one_plugin_cannot_share_a_name(install, good, failures):
    source = good(cls="One") + good(cls="Two").replace("return [Two]", "return [One, Two]")
    install("acme-guardrails", source)
    assert "listed twice" in failures()["acme"]


@pytest.mark.parametrize("disable", ["acme", "acme-guardrails", "ACME_guardrails, other", "*"])
def test_a_plugin_switched_off_is_not_imported(install, good, monkeypatch, disable):
    install("acme-guardrails", good())
    monkeypatch.setenv("GUARDRAILS_DISABLE_PLUGINS", disable)
    with pytest.raises(PluginError, match="Switched off by GUARDRAILS_DISABLE_PLUGINS: acme"):
        plugins.metric("acme.politeness")
    assert plugins.found() == (plugins.Found("acme", "acme-guardrails", "1.0", disabled=True),)
    assert "acme_guardrails_code" not in sys.modules


def test_other_names_in_the_switch_leave_a_plugin_on(install, good, monkeypatch):
    install("acme-guardrails", good())
    monkeypatch.setenv("GUARDRAILS_DISABLE_PLUGINS", "evil, acm,")
    assert plugins.metric("acme.politeness").name == "acme.politeness"


def test_damaged_metadata_of_one_distribution_leaves_the_others_in_use(install, good, failures):
    install("torn-guardrails", "", entry_points="[guardrails]\nno equals sign here\n")
    install("acme-guardrails", good())
    assert plugins.metric("acme.politeness").name == "acme.politeness"
    (record,) = [record for record in plugins.found() if record.error]
    assert record.distribution == "torn-guardrails"
    assert "entry points cannot be read" in record.error


def test_a_distribution_without_a_name_is_reported_as_unknown(install, good):
    folder = install("acme-guardrails", good())
    (folder / "acme_guardrails-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\n")
    assert plugins.metric("acme.politeness").name == "acme.politeness"
    assert plugins.found()[0].distribution == "unknown distribution"


def test_only_the_first_copy_of_a_distribution_on_the_path_counts(install, good, tmp_path, monkeypatch):
    install("acme-guardrails", good())
    newer = tmp_path / "newer" / "acme_guardrails-2.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-guardrails\nVersion: 2.0\n")
    monkeypatch.syspath_prepend(str(newer.parent))
    plugins.refresh()
    assert plugins.found() == ()


def test_built_ins_are_looked_up_without_importing_a_plugin(install):
    install("loud-guardrails", "raise RuntimeError('imported')")
    plugins.metric("failure_avoidance")
    plugins.scheduler("pid")
    assert "loud_guardrails_code" not in sys.modules


def test_listing_a_plugin_does_not_instantiate_its_metrics(install, good):
    source = good().replace("requires =", "def __init__(self): raise RuntimeError('made')\n        requires =")
    install("acme-guardrails", source)
    assert [record.error for record in plugins.found()] == [""]
    with pytest.raises(PluginError, match=r"without arguments: RuntimeError: made. Import its class"):
        plugins.metric("acme.politeness")


def test_a_plugin_is_imported_once(install, good):
    folder = install("acme-guardrails", "import pathlib; open(pathlib.Path(__file__).parent / 'log', 'a').write('x')")
    plugins.found()
    sys.modules.pop("acme_guardrails_code")
    plugins.found()
    assert (folder / "log").read_text() == "x"
    plugins.refresh()
    plugins.found()
    assert (folder / "log").read_text() == "xx"


def test_importing_the_package_reads_no_entry_points_and_imports_no_plugin(install):
    folder = install("loud-guardrails", "raise RuntimeError('imported')")
    code = (
        "import sys; before = set(sys.modules); import guardrails, guardrails.plugins; "
        "print(sorted({'importlib.metadata', 'loud_guardrails_code'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{folder}"}
    )
    assert done.stdout.strip() == "[]"
