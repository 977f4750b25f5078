"""What a ledger costs to write, and what it takes to verify and to draw one of a million lines, a gigabyte.

    OMP_NUM_THREADS=1 python benchmarks/ledger.py                        # about fifteen minutes
    OMP_NUM_THREADS=1 python benchmarks/ledger.py --lines 10000 --json

Writing is the difference of `Guard.step` with and without a ledger, in processor time, which other
processes of the machine do not enter. Verifying is one ``guardrails verify``, drawing one ``guardrails report``
without verification, each in a fresh process: its processor and wall time, and its peak resident memory (Linux).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from guardrails import Constraint, Gate, Guard, Require, Rollout
from guardrails.ledger import files

# VmHWM, since ru_maxrss of a child starts at what its parent had.
PEAK = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(steps, peak)
"""
VERIFY = """
import sys
from guardrails.ledger import verify
result = verify(sys.argv[1])
assert result.ok, result
steps = result.steps
"""
REPORT = """
import pathlib, sys
from guardrails.report import collect, page
view = collect(sys.argv[1], verified=False)
pathlib.Path(sys.argv[1]).with_name("report.html").write_text(page([view]), encoding="utf-8")
steps = view.steps
"""


def plain() -> Guard:
    """Return a guard of five constraints."""
    return Guard(*(Constraint(f"cost{i}", limit=0.5) for i in range(5)))


def gated() -> Guard:
    """Return a guard of five constraints whose limits follow a gate of three requirements."""
    gate = Gate(
        Require("reward_level", at_least=0.9), Require("stability", at_least=0.5), Require("drift", at_least=0.4)
    )
    return Guard(*(Constraint(f"cost{i}", limit=gate.between(0.3, 0.6)) for i in range(5)))


def rows(n_rows: int) -> Rollout:
    """Return rows that every metric above can measure."""
    draw = np.random.default_rng(0)
    costs = {f"cost{i}": draw.random(n_rows) for i in range(5)}
    return Rollout(rewards=costs["cost0"], costs=costs, kl=draw.random(n_rows))


def microseconds(make, folder: Path, rounds: int = 40, repeats: int = 200) -> dict[str, float]:
    """Return processor time per step without and with a ledger, in alternating rounds; flushes are part of it."""
    rollout = rows(256)
    bare, recorded = make(), make()
    recorded.record(folder / f"{make.__name__}.jsonl")
    times: dict[str, list[float]] = {"bare": [], "recorded": []}
    for _ in range(rounds):
        for name, guard in (("bare", bare), ("recorded", recorded)):
            begun = time.process_time()
            for _ in range(repeats):
                guard.step(rollout)
            times[name].append((time.process_time() - begun) / repeats * 1e6)
    recorded.ledger.close()
    without, with_ledger = np.array(times["bare"]), np.array(times["recorded"])
    low, middle, high = np.quantile(with_ledger - without, [0.25, 0.5, 0.75])
    return {"step": float(np.median(without)), "ledger": middle, "ledger_q1": low, "ledger_q3": high}


def write(path: Path, n_lines: int) -> None:
    """Write a ledger of so many steps of a guard with one constraint on a moving limit."""
    gate = Gate(Require("reward_level", at_least=0.9))
    guard = Guard(Constraint("cost0", limit=gate.between(0.3, 0.6)))
    draw = np.random.default_rng(0)
    rollouts = [Rollout(rewards=draw.random(16) ** 0.1, costs={"cost0": draw.random(16)}) for _ in range(64)]
    with guard.record(path):
        for index in range(n_lines):
            guard.step(rollouts[index % 64])


def measure(code: str, path: Path) -> dict[str, float]:
    """Run ``code`` on a ledger in a fresh process, and return its times in seconds and its peak memory in MiB."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code + PEAK, str(path)], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    steps, peak = map(int, done.stdout.split())
    return {
        "steps": steps,
        "wall_s": time.perf_counter() - begun,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": peak / 1024,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, dict[str, float]] = {
            "5 constraints, 256 rows": microseconds(plain, folder),
            "the same on a gate of 3 requirements": microseconds(gated, folder),
        }
        for lines in sorted({1000, arguments.lines}):
            path = folder / str(lines) / "ledger.jsonl"
            begun = time.process_time()
            write(path, lines)
            results[f"write {lines} steps"] = {
                "cpu_s": time.process_time() - begun,
                "bytes": sum(each.stat().st_size for each in files(path)),
                "files": len(files(path)),
            }
            results[f"verify {lines} steps"] = measure(VERIFY, path)
            results[f"report {lines} steps"] = measure(REPORT, path)
            results[f"report {lines} steps"]["page_bytes"] = path.with_name("report.html").stat().st_size
    where = {"python": platform.python_version(), "machine": platform.machine(), "numpy": np.__version__}
    if arguments.json:
        print(json.dumps({"where": where, **results}, indent=2))
        return
    print(f"Python {where['python']}, {where['machine']}, numpy {where['numpy']}\n")
    for title, figures in results.items():
        print(title)
        for figure, value in figures.items():
            print(f"  {figure:14} {value:14,.1f}")


if __name__ == "__main__":
    main()
