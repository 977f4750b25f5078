import sys
import textwrap

import pytest

from guardrails import plugins

GOOD = """
    import guardrails

    class {cls}(guardrails.CompetenceMetric):
        name = "{name}"
        requires = frozenset({{"completions"}})
        def measure(self, rollout):
            return [float(text == "polite") for text in rollout.completions]

    @guardrails.hookimpl
    def guardrails_competence_metrics():
        return [{cls}]
"""


@pytest.fixture
def good():
    """Return the source of a sound plug-in with one metric."""
    return lambda name="acme.politeness", cls="Politeness": GOOD.format(name=name, cls=cls)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution as an installer would: a module and its metadata in a folder on the path."""
    modules = set()

    def install(distribution, source, *, version="1.0", plugin=None, entry_points=None):
        plugin = plugin or distribution.split("-")[0]
        module = f"{distribution.replace('-', '_')}_code"
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points or f"[guardrails]\n{plugin} = {module}\n")
        monkeypatch.syspath_prepend(str(folder))
        plugins.refresh()
        modules.add(module)
        return folder

    yield install
    for module in modules:
        sys.modules.pop(module, None)
    plugins.refresh()


@pytest.fixture
def failures():
    return lambda: {record.plugin: record.error for record in plugins.found() if record.error}
