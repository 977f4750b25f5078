import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import guardrails
import guardrails_demo
from guardrails.cli import app

SOUND = """
import guardrails
print("hello from the plug-in")

def detect(texts):
    return [False for _ in texts]

detect.name = "acme.gibberish"

@guardrails.hookimpl
def guardrails_detectors():
    return [detect]
"""


@pytest.fixture
def run(tmp_path):
    """Run the command in a process of its own, where only the distributions given are new."""

    def run(*arguments, before="", stdout=subprocess.PIPE, wait=True, **variables):
        code = (
            f"import sys\n{before}\nfrom guardrails.cli import main\nsys.argv = ['guardrails', *{arguments!r}]\nmain()"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*sys.path, *map(str, tmp_path.glob("*"))]),
            **variables,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run


@pytest.fixture
def install(tmp_path):
    def install(distribution, source, version="1.0"):
        module = f"{distribution.replace('-', '_')}_code"
        info = tmp_path / distribution / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (tmp_path / distribution / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[guardrails]\n{distribution.split('-')[0]} = {module}\n")

    return install


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"training-guardrails {guardrails.__version__}\n", "")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "guardrails", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage: guardrails [OPTIONS] COMMAND" in done.stdout


def test_the_installed_script_is_the_command():
    script = Path(sys.executable).with_name("guardrails")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.stdout == f"training-guardrails {guardrails.__version__}\n"


def test_plugins_are_listed_with_origin_and_status(run, install):
    install("acme-guardrails", SOUND, version="2.3")
    code, out, err = run("plugins")
    assert code == 0
    assert out.splitlines() == [
        "PLUG-IN  DISTRIBUTION         KIND      STATUS  NAMES",
        "acme     acme-guardrails 2.3  detector  ok      acme.gibberish",
    ]
    assert "hello from the plug-in" in err


def test_a_failed_plugin_is_listed_with_its_reason_and_the_exit_code_is_1(run, install):
    install("acme-guardrails", SOUND)
    install("broken-guardrails", "raise RuntimeError('out of order')", version="0.1")
    code, out, _ = run("plugins")
    assert code == 1
    lines = out.splitlines()
    assert lines[2] == "broken   broken-guardrails 0.1            failed"
    assert lines[4].startswith("Failed:")
    assert lines[5].startswith("broken (broken-guardrails 0.1): RuntimeError: out of order (")


def test_json_holds_every_field_and_nothing_a_plugin_prints(run, install):
    install("acme-guardrails", SOUND)
    install("broken-guardrails", "raise RuntimeError('out of order')", version="0.1")
    code, out, _ = run("plugins", "--json")
    sound, failed = json.loads(out)
    assert code == 1
    assert sound == {
        "plugin": "acme",
        "distribution": "acme-guardrails",
        "version": "1.0",
        "kind": "detector",
        "names": ["acme.gibberish"],
        "error": "",
        "disabled": False,
    }
    assert failed["error"].startswith("RuntimeError: out of order")
    assert (failed["plugin"], failed["kind"], failed["names"]) == ("broken", "plugin", [])


def test_a_plugin_switched_off_is_no_failure(run, install):
    install("broken-guardrails", "raise RuntimeError('out of order')")
    code, out, _ = run("plugins", GUARDRAILS_DISABLE_PLUGINS="broken")
    assert code == 0
    assert out.splitlines()[1] == "broken   broken-guardrails 1.0        off"


def test_no_plugins_is_said_in_words(run):
    assert run("plugins")[:2] == (
        0,
        "No plug-ins are installed: no distribution has entry points in the group 'guardrails'.\n",
    )
    assert run("plugins", "--json")[:2] == (0, "[]\n")


def test_listing_plugins_loads_no_torch(run, install):
    install("acme-guardrails", SOUND)
    check = "import atexit; atexit.register(lambda: print('torch' in sys.modules))"
    assert run("plugins", before=check)[1].endswith("False\n")


def test_a_reader_that_leaves_early_gets_no_traceback(run, install):
    install("acme-guardrails", SOUND.replace('print("hello from the plug-in")', ""))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        code, _, err = run("plugins", stdout=closed)
    assert code == 1
    assert err == ""


def test_ctrl_c_ends_without_a_traceback(run, install, tmp_path):
    install("slow-guardrails", "import pathlib, time; pathlib.Path('started').touch(); time.sleep(30)")
    process = run("plugins", wait=False)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_an_unknown_command_is_a_usage_error(run):
    code, _, err = run("frobnicate")
    assert code == 2
    assert "No such command 'frobnicate'" in err


def test_an_error_of_the_package_is_a_sentence_and_exit_code_2(run):
    before = (
        "import guardrails.plugins as p; from guardrails.errors import PluginError\n"
        "def found(): raise PluginError('Cause. Cure.')\n"
        "p.found = found"
    )
    assert run("plugins", before=before) == (2, "", "guardrails: Cause. Cure.\n")


@pytest.mark.parametrize("command", ["verify", "report", "watch", "layout"])
def test_an_error_is_json_too_where_json_was_asked_for(run, tmp_path, command):
    more = ["--once"] if command == "watch" else []
    code, out, _ = run(command, str(tmp_path / "nowhere"), *more, "--json")
    assert code == 2
    told = json.loads(out)
    assert told["ok"] is False
    assert told["error"].startswith("There is no ledger at")


def test_the_demo_names_what_is_missing_and_how_to_install_it(run):
    code, out, err = run("demo", before="sys.modules['mujoco'] = sys.modules['trl'] = None")
    assert code == 2
    assert out == ""
    assert "trl, mujoco" in err
    assert "pip install 'training-guardrails[demo]'" in err


def test_the_demo_gets_the_options_and_its_result_is_the_exit_code(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(guardrails_demo, "run", lambda **options: calls.append(options) or 1)
    runner = CliRunner()
    assert runner.invoke(app, ["demo", "--seed", "7", "--quick", "--output", str(tmp_path)]).exit_code == 1
    assert runner.invoke(app, ["demo"]).exit_code == 1
    assert calls == [
        {"seed": 7, "quick": True, "output": tmp_path},
        {"seed": 0, "quick": False, "output": Path("runs/demo")},
    ]


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_no_generator_takes_is_refused_before_the_demo_begins(seed):
    done = CliRunner().invoke(app, ["demo", "--seed", seed])
    assert done.exit_code == 2
    assert "Invalid value for '--seed'" in done.output


def test_a_folder_that_cannot_be_made_for_the_demo_is_a_sentence(run, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run("demo", "--output", str(tmp_path / "file"))
    assert code == 2
    assert err == f"guardrails: {tmp_path / 'file'} cannot be made: File exists. Give another --output.\n"
