import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_brings_the_parts_of_the_page(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    parts = {path.name for path in (ROOT / "guardrails" / "report" / "page").iterdir()}
    assert parts == {"template.html", "style.css", "script.js"}
    assert {f"guardrails/report/page/{name}" for name in parts} <= set(zipfile.ZipFile(wheel).namelist())
