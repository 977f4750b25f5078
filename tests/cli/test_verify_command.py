import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from guardrails import ConfigurationError, Constraint, Guard, Rollout
from guardrails.cli import app
from guardrails.ledger import lines, read
from guardrails.ledger import verify as verified
from guardrails.schedulers import DualAscent


@pytest.fixture
def path(tmp_path):
    guard = Guard(Constraint("c", limit=1.0, scheduler=DualAscent(0.5)))
    with guard.record(tmp_path / "guardrails" / "ledger.jsonl"):
        for cost in (2.0, 3.0, 0.5):
            guard.step(Rollout(costs={"c": [cost]}))
    return tmp_path / "guardrails" / "ledger.jsonl"


def verify(*arguments):
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_a_sound_run_is_exit_code_0_and_its_head_is_printed(path):
    head = list(read(path))[-1].hash
    for given in (path, path.parent, path.parent.parent):
        code, out = verify(given)
        assert code == 0
        assert "5 lines in 1 file, 3 decisions replayed" in out
        assert "intact" in out
        assert f"head: {head}" in out
    assert verify(path, "--expect", head.upper())[0] == 0
    assert verify(path, "--expect", "0" * 64)[0] == 1


@pytest.mark.parametrize("head", ["", "9f3c", "z" * 64])
def test_an_expected_head_that_is_none_is_an_error_and_no_pass(path, head):
    with pytest.raises(ConfigurationError, match="64 hexadecimal digits"):
        verified(path, expect=head)
    done = subprocess.run(
        [sys.executable, "-m", "guardrails", "verify", path, "--expect", head],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "64 hexadecimal digits" in done.stderr


def test_an_altered_run_is_exit_code_1_and_says_where(path):
    path.write_bytes(path.read_bytes().replace(b'"multiplier":0.5,', b'"multiplier":0.4,'))
    code, out = verify(path)
    assert code == 1
    assert "ALTERED: ledger.jsonl, line 2 is damaged or was altered" in out
    assert "intact" not in out


@pytest.mark.parametrize("command", ["verify", "report"])
def test_what_a_ledger_says_cannot_pass_for_the_verdict(path, tmp_path, command):
    head, out = lines.START, []
    for line in list(read(path)):
        data = {name: value for name, value in line.data.items() if name not in ("prev", "hash")}
        if line.kind == "step":
            data["decision"] = {**data["decision"], "\x1b[2J\nintact: the chain is whole": 1}
        raw, head = lines.seal(lines.encode(data), head)
        out.append(raw)
    path.write_bytes(b"".join(out))
    more = ["-o", str(tmp_path / "page.html")] if command == "report" else []
    done = CliRunner().invoke(app, [command, str(path), *more], color=True)
    assert done.exit_code == 1
    assert "ALTERED: " in done.stdout
    assert "\x1b" not in done.stdout
    assert not any(line.startswith("intact") for line in done.stdout.splitlines())


def test_a_run_that_was_not_closed_is_exit_code_1_unless_that_is_accepted(path):
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:-1]))
    code, out = verify(path)
    assert code == 1
    assert "NOT CLOSED" in out
    assert verify(path, "--open")[0] == 0
    path.write_bytes(b"".join(whole[:-1]) + whole[-1][:30])
    code, out = verify(path, "--open")
    assert code == 0
    assert "cut short after 30 bytes" in out


def test_what_cannot_be_done_is_exit_code_2(path, tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "guardrails", "verify", str(tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "There is no ledger at" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_cannot_be_replayed_here_is_exit_code_2(path):
    out, head = [], lines.START
    for line in list(read(path)):
        data = {name: value for name, value in line.data.items() if name not in ("prev", "hash")}
        if line.kind == "header":
            data["policy"]["constraints"]["c"]["scheduler"]["name"] = "acme.not_here"
        raw, head = lines.seal(lines.encode(data), head)
        out.append(raw)
    path.write_bytes(b"".join(out))
    code, text = verify(path)
    assert code == 2
    assert "NOT REPLAYED" in text
    assert "no scheduler 'acme.not_here'" in text


def test_json_says_the_same(path):
    code, out = verify(path, "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["ok"], result["steps"], result["lines"], result["problem"]) == (True, 3, 5, "")
    path.write_bytes(path.read_bytes()[:-10])
    code, out = verify(path, "--json")
    result = json.loads(out)
    assert code == 1
    assert (result["ok"], result["closed"], result["steps"]) == (False, False, 3)
