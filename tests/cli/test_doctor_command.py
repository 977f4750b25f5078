import base64
import hashlib
import json
import os
import subprocess
import sys

import pytest

from guardrails import doctor


@pytest.fixture
def run(tmp_path):
    """Run doctor in a process of its own, where only the distributions and modules in ``tmp_path`` are new."""

    def run(*arguments, before="", **variables):
        called = f"sys.argv = ['guardrails', 'doctor', *{arguments!r}]"
        code = f"import sys\n{before}\nfrom guardrails.cli import main\n{called}\nmain()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), **variables}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def findings(run, tmp_path):
    """The findings, with a torch that answers at once, so that only its own test waits for the real one."""

    def findings(**options):
        code, out, err = run("--json", **options)
        assert err == "" or options, err
        report = json.loads(out)
        assert code == (0 if report["ok"] else 1)
        return {finding["subject"]: finding for finding in report["findings"]}

    if not (tmp_path / "torch.py").exists():
        fake_torch(tmp_path)
    return findings


def fake_torch(folder, *, cuda=None, built_for="None", mps=False, names=()):
    (folder / "torch.py").write_text(
        "from types import SimpleNamespace as N\n__version__ = '9.9'\n"
        f"version = N(cuda={built_for}, hip=None)\nnames = {list(names)!r}\n"
        "cuda = N(is_available=lambda: bool(names), device_count=lambda: len(names))\n"
        "cuda.get_device_name = names.__getitem__\n"
        f"backends = N(mps=N(is_available=lambda: {mps}))\n"
    )


def distribution(folder, name, version, *, record="", entry_points=""):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(record)
    (info / "entry_points.txt").write_text(entry_points)


def test_an_environment_that_will_do_has_no_problem(findings):
    found = findings()
    assert {finding["status"] for finding in found.values()} <= {"ok", "note"}
    assert found["numpy"]["status"] == found["trl"]["status"] == found["stable-baselines3"]["status"] == "ok"
    assert found["sb3-contrib"]["status"] == "ok"
    assert "pytest" not in found


def test_a_host_of_a_version_that_is_not_supported_is_a_problem_with_its_cure(findings, tmp_path):
    distribution(tmp_path, "trl", "0.9.6")
    trl = findings()["trl"]
    assert trl["status"] == "problem"
    assert trl["text"].startswith("0.9.6, but <2,>=1.6 is supported; needed by extra trl")
    assert trl["cure"] == "pip install 'trl<2,>=1.6'"


def test_a_host_that_is_not_installed_is_a_note_with_its_extra(monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name in ("trl", "peft", "numpy"):
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {finding.subject: finding for finding in doctor.packages()}
    assert (found["trl"].status, found["trl"].cure) == ("note", "pip install 'training-guardrails[trl]'")
    assert (found["peft"].status, found["peft"].cure) == ("note", "pip install 'training-guardrails[all]'")
    assert (found["numpy"].status, found["numpy"].cure) == ("problem", "pip install 'numpy>=1.26'")


def test_guardrails_ai_beside_this_package_is_a_problem(findings, tmp_path):
    distribution(tmp_path, "guardrails-ai", "0.11.0", record="guardrails/__init__.py,sha256=x,1\n")
    clash = findings()["guardrails-ai"]
    assert clash["status"] == "problem"
    assert "installs a package 'guardrails' too" in clash["text"]
    assert "pip uninstall guardrails-ai" in clash["cure"]


def test_another_package_with_a_longer_name_is_no_clash(findings, tmp_path):
    distribution(tmp_path, "acme", "1.0", record="acme/guardrails/__init__.py,,\nguardrails_acme/__init__.py,,\n")
    assert "acme" not in findings()


def test_files_that_another_package_wrote_over_are_a_problem(tmp_path, monkeypatch):
    (tmp_path / "guardrails").mkdir()
    record = []
    for name, content in (("__init__.py", b"ours"), ("guard.py", b"ours too")):
        (tmp_path / "guardrails" / name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        record.append(f"guardrails/{name},sha256={digest},{len(content)}")
    distribution(tmp_path, "training-guardrails", "0.1.0", record="\n".join(record))
    own = next(iter(doctor.metadata.distributions(path=[str(tmp_path)])))
    monkeypatch.setattr(doctor, "_own", lambda: own)
    assert [finding.status for finding in doctor.install()] == ["ok"]
    (tmp_path / "guardrails" / "guard.py").write_bytes(b"theirs")
    (finding,) = doctor.install()
    assert finding.status == "problem"
    assert "1 of its files" in finding.text
    assert "guardrails/guard.py" in finding.text
    (tmp_path / "guardrails" / "__init__.py").unlink()
    (finding,) = doctor.install()
    assert "2 of its files" in finding.text


def test_metadata_that_cannot_be_read_is_a_note_and_of_a_package_that_is_needed_a_problem(findings, tmp_path):
    for name in ("other", "numpy"):
        distribution(tmp_path, name, "1.0")
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_bytes(f"Name: {name}\nAuthor: José\n".encode("latin-1"))
    found = findings()
    other = found[str(tmp_path / "other-1.0.dist-info")]
    assert other["status"] == "note"
    assert "cannot be read: UnicodeDecodeError" in other["text"]
    assert found["numpy"]["status"] == "problem"
    assert found["numpy"]["cure"] == "pip install --force-reinstall 'numpy>=1.26'"


def test_a_broken_plugin_is_a_problem_and_one_switched_off_a_note(findings, tmp_path):
    distribution(tmp_path, "broken-guardrails", "1.0", entry_points="[guardrails]\nbroken = broken_code\n")
    (tmp_path / "broken_code.py").write_text("print('noise')\nraise RuntimeError('out of order')\n")
    broken = findings(before="")["broken (broken-guardrails 1.0)"]
    assert broken["status"] == "problem"
    assert "RuntimeError: out of order" in broken["text"]
    assert broken["cure"].endswith("GUARDRAILS_DISABLE_PLUGINS=broken")
    off = findings(GUARDRAILS_DISABLE_PLUGINS="broken")
    assert off["broken (broken-guardrails 1.0)"]["status"] == "note"


@pytest.mark.parametrize(
    ("torch", "status", "text"),
    [
        ({"names": ["NVIDIA H200"], "built_for": "'13.0'"}, "ok", "NVIDIA H200"),
        ({"mps": True}, "ok", "Apple MPS"),
        ({"built_for": "'13.0'"}, "note", "none visible to torch"),
    ],
)
def test_what_torch_sees_is_told(findings, tmp_path, torch, status, text):
    fake_torch(tmp_path, **torch)
    gpu = findings()["GPU"]
    assert gpu["status"] == status
    assert text in gpu["text"]


def test_a_driver_with_a_torch_for_the_cpu_alone_is_noted(findings, tmp_path):
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    gpu = findings(PATH=f"{driver.parent}{os.pathsep}{os.environ['PATH']}")["GPU"]
    assert gpu["status"] == "note"
    assert "built for the CPU alone" in gpu["text"]
    assert "pytorch.org" in gpu["cure"]


def test_a_torch_that_cannot_be_imported_is_a_problem(findings, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    torch = {f["text"]: f for f in findings().values()}
    (text,) = [text for text in torch if "cannot be imported" in text]
    assert "libcudnn.so.9" in text
    assert torch[text]["status"] == "problem"


def test_a_torch_that_prints_when_it_is_imported_is_no_problem(findings, tmp_path):
    fake_torch(tmp_path, names=["NVIDIA H200"], built_for="'13.0'")
    with (tmp_path / "torch.py").open("a") as file:
        file.write("import atexit\nprint('welcome', end='')\natexit.register(print, 'bye')\n")
    assert findings()["GPU"]["text"] == "NVIDIA H200"


def test_a_torch_that_ends_the_process_is_not_said_to_be_slow(findings, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    (text,) = [finding["text"] for finding in findings().values() if "cannot be imported" in finding["text"]]
    assert text == "it cannot be imported: the process that tried ended with code -9"


def test_without_torch_none_is_imported(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *arguments, **options: pytest.fail("a process was started"))
    (finding,) = doctor.gpu()
    assert (finding.status, finding.text) == ("note", "not looked for: torch is not installed")


def test_the_real_torch_answers():
    (finding,) = doctor.gpu()
    assert finding.subject == "GPU"
    assert finding.status in ("ok", "note")


def test_an_older_python_than_supported_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.8.19")
    (finding,) = doctor.python()
    assert finding.status == "problem"
    assert finding.text == "3.8.19, but >=3.10 is needed"


def test_a_package_that_is_not_installed_cannot_be_looked_at(run):
    before = (
        "from importlib import metadata\n"
        "def distribution(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.distribution = distribution"
    )
    code, out, err = run(before=before)
    assert (code, out) == (2, "")
    assert err.startswith("guardrails: training-guardrails is imported from a folder and not installed")


def test_a_python_built_between_two_releases_is_none_too_old(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.12.4+")
    (finding,) = doctor.python()
    assert (finding.status, finding.text) == ("ok", "3.12.4+")


def test_problems_stand_out_with_their_cures(run, tmp_path):
    fake_torch(tmp_path)
    distribution(tmp_path, "trl", "0.9.6")
    code, out, _ = run()
    assert code == 1
    assert "PROBLEM  trl: 0.9.6, but <2,>=1.6 is supported; needed by extra trl\n" in out
    assert "         → pip install 'trl<2,>=1.6'\n" in out
    assert "ok       Python: " in out


def test_looking_imports_no_host(run, tmp_path):
    fake_torch(tmp_path)
    check = "import atexit; atexit.register(lambda: print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules))))"
    assert run(before=check)[1].endswith("[]\n")
