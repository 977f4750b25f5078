import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import guardrails_demo
from guardrails.cli import app

SCRIPT = Path(sys.executable).with_name("guardrails")
COMMANDS = typer.main.get_command(app).commands


def test_every_command_of_the_program_is_there():
    assert set(COMMANDS) == {"demo", "doctor", "layout", "plugins", "report", "verify", "watch"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_speaks_json_and_documents_its_exit_codes(name):
    command = COMMANDS[name]
    assert "--json" in [option for parameter in command.params for option in parameter.opts]
    done = subprocess.run(
        [SCRIPT, name, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0
    assert "Exit code" in done.stdout
    assert "--json" in done.stdout


def test_the_help_of_the_program_documents_the_exit_codes():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    text = " ".join(done.stdout.split())
    for code in ("0 all is well", "1 something checked is not", "2 the command could not be done", "130 interrupted"):
        assert code in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_from_a_script_the_program_prints(shell):
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([SCRIPT, "--show-completion", shell], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "_GUARDRAILS_COMPLETE=complete_" + shell in done.stdout


def test_bash_completes_commands_and_options():
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run([SCRIPT, "--show-completion", "bash"], capture_output=True, text=True, env=environment)
    typed = """
    COMP_WORDS=(guardrails re); COMP_CWORD=1; _guardrails_completion guardrails; echo "${COMPREPLY[@]}"
    COMP_WORDS=(guardrails report --im); COMP_CWORD=2; _guardrails_completion guardrails; echo "${COMPREPLY[@]}"
    """
    paths = {**os.environ, "PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script.stdout + typed], capture_output=True, text=True, env=paths)
    assert done.stdout.splitlines() == ["report", "--image"], done.stderr


def test_the_demo_prints_where_its_results_are_as_json(monkeypatch, tmp_path):
    def run(*, seed, quick, output):
        print("a table for people")
        return 1

    monkeypatch.setattr(guardrails_demo, "run", run)
    result = CliRunner().invoke(app, ["demo", "--json", "--output", str(tmp_path)])
    assert result.exit_code == 1
    written = json.loads(result.stdout)
    assert written["ok"] is False
    assert written["written"]["report.html"] == str(tmp_path / "report.html")
    assert "a table for people" in result.stderr
