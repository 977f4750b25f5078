"""The examples in the docstrings and on the documentation page run as printed."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import guardrails.competence

MODULES = [f"guardrails.competence.{module.name}" for module in pkgutil.iter_modules(guardrails.competence.__path__)]
PAGE = Path(__file__).parents[2] / "docs" / "competence.md"


@pytest.mark.parametrize("name", [*MODULES, "guardrails.constraint", "guardrails.guard"])
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    names = vars(importlib.import_module("guardrails")) | {"np": importlib.import_module("numpy")} | vars(module)
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_the_page_runs():
    ran = doctest.testfile(str(PAGE), module_relative=False)
    assert ran.attempted > 5
    assert ran.failed == 0
