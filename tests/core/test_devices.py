"""Apple's MPS has no float64: a tensor becomes one only once it is on the CPU. Read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def made_elsewhere(source):
    """Return the calls that make a float64 tensor of one, or on a device, that may not be the CPU."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        named = any(ast.unparse(value) == "torch.float64" for value in values)
        placed = any(keyword.arg == "device" for keyword in call.keywords)
        converts = call.func.attr == "double" or (named and call.func.attr in ("to", "type"))
        left = ast.unparse(call.func.value).endswith(".cpu()")
        if (converts and not left) or (named and placed):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x.double().cpu()", True),
        ("x.to(torch.float64)", True),
        ("torch.zeros(3, dtype=torch.float64, device=x.device)", True),
        ("x.cpu().double()", False),
        ("torch.tensor([1.0], dtype=torch.float64)", False),
    ],
)
def test_the_rule_itself(source, found):
    assert bool(made_elsewhere(source)) == found


def test_no_float64_is_made_before_a_tensor_has_left_its_device():
    paths = [path for folder in ("guardrails", "integrations") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    found = {str(path.relative_to(ROOT)): made_elsewhere(path.read_text()) for path in paths}
    assert {path: calls for path, calls in found.items() if calls} == {}
