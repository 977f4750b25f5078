"""The example is a third party's package: built, installed into a fresh environment, used by name."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin_metric"


def call(*command, cwd=None):
    # The environment must find the package by its own site-packages, not by this process's path.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "plugin_metric"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory, source):
    """Return the interpreter of a fresh environment with the wheel installed; it borrows our dependencies."""
    root = tmp_path_factory.mktemp("fresh")
    wheels = root / "wheels"
    offline = ("--no-index", "--disable-pip-version-check", "--quiet")
    pip = (sys.executable, "-m", "pip")
    call(*pip, "wheel", *offline, "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    venv.create(root / "env", with_pip=False)
    interpreter = root / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = Path(call(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "borrowed.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    (wheel,) = wheels.glob("*.whl")
    call(*pip, "--python", interpreter, "install", *offline, wheel)
    return interpreter


def test_the_plugin_is_listed_with_distribution_and_version(python, tmp_path):
    listing = json.loads(call(python, "-m", "guardrails", "plugins", "--json", cwd=tmp_path))
    assert listing == [
        {
            "plugin": "acme",
            "distribution": "acme-guardrails",
            "version": "1.0.0",
            "kind": "metric",
            "names": ["acme.politeness"],
            "error": "",
            "disabled": False,
        }
    ]


def test_the_package_passes_its_own_tests(python, source):
    assert "10 passed" in call(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=source)


GATED = """
from guardrails import Constraint, Gate, Guard, Require, Rollout

gate = Gate(Require("acme.politeness", at_least=0.8), rungs=4)
guard = Guard(Constraint("toxicity", limit=gate.between(0.02, 0.10)))

def limit(completion):
    for _ in range(20):
        decision = guard.step(Rollout(completions=[completion] * 64, costs={"toxicity": [0.0] * 64}))
    return decision.constraints["toxicity"].limit

print(limit("Shut up, you stupid idiot."), limit("Thank you kindly."), limit("stupid fool " * 5))
"""


def test_the_metric_named_in_a_gate_moves_the_limit(python, tmp_path):
    impolite, polite, relapsed = map(float, call(python, "-c", GATED, cwd=tmp_path).split())
    assert (impolite, polite, relapsed) == (0.02, 0.10, 0.02)
