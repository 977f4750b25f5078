"""The guard's file in a checkpoint folder: whole or absent, and refused when it cannot be trusted."""

import json
import os

import pytest

from guardrails import Constraint, Guard, Rollout, StateError
from guardrails_transformers import load_guard, save_guard


def moved_guard():
    guard = Guard(Constraint("a", limit=0.1), Constraint("b", limit=25.0))
    for cost in (0.3, 0.1 + 0.2, 1 / 3):
        guard.step(Rollout(costs={"a": [cost], "b": [100 * cost]}))
    return guard


def fresh_guard():
    return Guard(Constraint("a", limit=0.1), Constraint("b", limit=25.0))


def test_state_survives_the_file_bit_for_bit(tmp_path):
    guard, other = moved_guard(), fresh_guard()
    path = save_guard(guard, tmp_path)
    assert path == tmp_path / "guardrails.json"
    assert load_guard(other, tmp_path)
    assert other.state_dict() == guard.state_dict() != fresh_guard().state_dict()


def test_a_write_that_fails_leaves_the_former_file_and_no_other(tmp_path, monkeypatch):
    save_guard(moved_guard(), tmp_path)
    before = (tmp_path / "guardrails.json").read_bytes()

    def no_space(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_guard(fresh_guard(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["guardrails.json"]
    assert (tmp_path / "guardrails.json").read_bytes() == before


def test_a_missing_file_is_an_error_unless_allowed(tmp_path, caplog):
    guard = moved_guard()
    before = guard.state_dict()
    with pytest.raises(StateError, match=r"has no guardrails\.json.*missing_ok=True"):
        load_guard(guard, tmp_path)
    assert not load_guard(guard, tmp_path, missing_ok=True)
    assert "has no guardrails.json" in caplog.text
    assert guard.state_dict() == before


@pytest.mark.parametrize("content", [b"", b'{"schema": 1', b"\xff\xfe", b"[]", b'{"schema": 99}', b'{"weights": 1}'])
@pytest.mark.parametrize("missing_ok", [False, True])
def test_a_damaged_or_foreign_file_is_refused_and_nothing_loaded(tmp_path, content, missing_ok):
    guard = moved_guard()
    before = guard.state_dict()
    (tmp_path / "guardrails.json").write_bytes(content)
    with pytest.raises(StateError, match=r"guardrails\.json"):
        load_guard(guard, tmp_path, missing_ok=missing_ok)
    assert guard.state_dict() == before


def test_a_half_broken_state_is_not_half_loaded(tmp_path):
    state = moved_guard().state_dict()
    state["constraints"]["b"]["state"] = {}
    (tmp_path / "guardrails.json").write_text(json.dumps(state))
    guard = fresh_guard()
    with pytest.raises(StateError, match="cannot be loaded"):
        load_guard(guard, tmp_path)
    assert guard.state_dict() == fresh_guard().state_dict()


def test_whoever_may_read_the_folder_may_read_the_state(tmp_path):
    tmp_path.chmod(0o755)
    path = save_guard(Guard(Constraint("cost", limit=1.0)), tmp_path)
    assert path.stat().st_mode & 0o777 == 0o644
