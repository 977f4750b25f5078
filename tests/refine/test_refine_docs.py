"""The examples in docstrings run as printed."""

import doctest
import importlib
import pkgutil

import pytest

import guardrails
import guardrails.refine
from guardrails.refine import DETECTORS, REFINERS

MODULES = [f"guardrails.refine.{module.name}" for module in pkgutil.iter_modules(guardrails.refine.__path__)]


@pytest.mark.parametrize("name", [*MODULES, "guardrails.refinement"])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = vars(guardrails) | vars(guardrails.refine) | vars(module)
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_every_refiner_and_detector_has_an_example():
    for kind in [*DETECTORS.values(), *REFINERS.values(), guardrails.Refinement, guardrails.refine.Corrector]:
        assert ">>>" in kind.__doc__, kind


def test_refiners_and_detectors_go_by_the_names_they_bear():
    assert all(kind.name == name for name, kind in [*DETECTORS.items(), *REFINERS.items()])
