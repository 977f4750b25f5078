"""What a guard costs: every overhead figure of the README, each beside its target.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py            # all, about half an hour
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --only core

Host figures are ratios of guarded over unguarded work, measured alternately in one process (see ``overhead_trl.py``,
``overhead_sb3.py``, ``overhead_action_sets.py``, ``overhead_trainer.py``, ``overhead_refiner.py``); core figures are
times of one call. All times are processor time of this single-threaded process, which other processes of the machine
do not enter.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time

import numpy as np

from guardrails import Constraint, Guard, Rollout
from guardrails.schedulers import PID

PARTS = ("core", "sb3", "action_sets", "trl", "trainer", "refiner")
IMPORT = "import time; t = time.process_time(); import guardrails; print((time.process_time() - t) * 1e3)"


def microseconds(call, *, rounds: int = 20, repeats: int = 100) -> np.ndarray:
    """Return the time of one call in each of ``rounds`` rounds, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - start) / repeats * 1e6)
    return np.array(times[1:])


def guard_step() -> np.ndarray:
    """Time ``Guard.step`` with 5 constraints on 256 rows, the building of the `Rollout` included."""
    draw = np.random.default_rng(0)
    costs = {f"cost{i}": draw.random(256) for i in range(5)}
    guard = Guard(*(Constraint(name, limit=0.5, scheduler=PID()) for name in costs))
    return microseconds(lambda: guard.step(Rollout(rewards=costs["cost0"], costs=costs)))


def import_time(rounds: int = 10) -> np.ndarray:
    """Time ``import guardrails`` in fresh interpreters, in milliseconds."""
    runs = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True) for _ in range(rounds + 1)]
    return np.array([float(run.stdout) for run in runs[1:]])


def core() -> None:
    """Print the figures of the core."""
    print(f"{'':44}{'median':>9}{'quartiles':>18}{'target':>10}")
    for name, values, unit, target in (
        ("Guard.step, 5 constraints, 256 rows", guard_step(), "µs", 300),
        ("import guardrails, without torch", import_time(), "ms", 150),
    ):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        print(f"{name:44}{middle:6.0f} {unit}{f'{low:.0f} to {high:.0f}':>18}{f'<= {target}':>10}")


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    chosen = parser.parse_args().only
    print(f"Python {platform.python_version()}, {platform.machine()}\n")
    if "core" in chosen:
        core()
    if "sb3" in chosen:
        import overhead_sb3

        print()
        overhead_sb3.main()
    if "action_sets" in chosen:
        import overhead_action_sets

        print()
        overhead_action_sets.main()
    if "trl" in chosen:
        import overhead_trl

        print()
        overhead_trl.main()
    if "trainer" in chosen:
        import overhead_trainer

        print()
        overhead_trainer.main()
    if "refiner" in chosen:
        import overhead_refiner

        print()
        overhead_refiner.time_steps(7, 6)


if __name__ == "__main__":
    main()
