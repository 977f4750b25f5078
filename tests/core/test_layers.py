"""The import rules of the house, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = {"trl", "transformers", "stable_baselines3", "sb3_contrib", "gymnasium", "accelerate", "peft", "datasets"}
ADAPTERS = {"guardrails_trl", "guardrails_transformers", "guardrails_sb3"}
PROGRAMS = {"guardrails_demo"}  # use the adapters as a user would; only the command line starts them
MODELS = {  # of transformers they use what runs a model, as a refiner's model is one; nothing that trains
    "refine/model.py": {"transformers.GenerationConfig"},
    "refine/copying.py": {"transformers.DynamicCache"},
}
LAYERS = [
    {"errors"},
    {"rollout", "decision", "evidence"},
    {"schedulers", "competence", "refine", "critic"},
    {"constraint", "action_set", "refinement", "parts", "saved", "controllers", "guard"},
    {"plugins", "policy", "ledger", "report", "watch", "doctor", "testing"},
    {"cli", "__main__"},
]


def imported(path, *, at_import_time_only=False):
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if not at_import_time_only else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("guardrails"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_no_host_and_no_adapter(path):
    allowed = MODELS.get(path.relative_to(ROOT / "guardrails").as_posix(), set())
    tops = {name.split(".")[0] for name in imported(path) if name != "transformers" or not allowed}
    assert not tops & (HOSTS | ADAPTERS | PROGRAMS)
    names = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "transformers"
        for alias in node.names
    }
    assert names <= allowed


def layer(module):
    return next((level for level, names in enumerate(LAYERS) if module in names), None)


@pytest.mark.parametrize("path", sources("guardrails"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_downwards_only(path):
    own = layer(path.relative_to(ROOT / "guardrails").parts[0].removesuffix(".py"))
    if own is None:  # the package's own __init__ gathers all public names
        assert path == ROOT / "guardrails" / "__init__.py"
        return
    for name in imported(path, at_import_time_only=True):
        if name.startswith("guardrails."):
            other = layer(name.split(".")[1])
            assert other is not None, f"{name} has no place in LAYERS"
            assert other <= own, f"{path.name} imports {name}, which lies above it"


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_an_adapter_imports_no_other_adapter_except_trl_transformers(adapter):
    allowed = {adapter} | ({"guardrails_transformers"} if adapter == "guardrails_trl" else set())
    for path in sources(f"integrations/{adapter}"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert tops & ADAPTERS <= allowed, path


def test_importing_the_package_loads_neither_torch_nor_a_host():
    heavy = HOSTS | ADAPTERS | PROGRAMS | {"torch", "typer", "rich"}
    code = f"import sys, guardrails; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
