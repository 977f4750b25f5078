"""The examples in docstrings and on the page about schedulers run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import guardrails.schedulers

PAGE = (Path(__file__).parents[2] / "docs" / "schedulers.md").read_text()
MODULES = ["guardrails.testing.schedulers"] + [
    f"guardrails.schedulers.{each.name}" for each in pkgutil.iter_modules(guardrails.schedulers.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_scheduler_has_an_example():
    for kind in [*guardrails.schedulers.BUILTIN.values(), *guardrails.schedulers.wrappers.Wrapper.__subclasses__()]:
        assert ">>>" in kind.__doc__, kind


def test_examples_on_the_page_run():
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, namespace)
    contract, scheduler = namespace["TestSwitch"](), namespace["Switch"]()
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(contract, name)(scheduler)


def test_the_page_names_every_scheduler():
    for kind in [*guardrails.schedulers.BUILTIN.values(), *guardrails.schedulers.wrappers.Wrapper.__subclasses__()]:
        assert f"`{kind.__name__}" in PAGE, kind
