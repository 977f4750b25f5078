"""Does the online refiner hold what a hackable reward lets go? GRPO on two tasks, against no constraint and KL.

    OMP_NUM_THREADS=1 python benchmarks/refiner.py [--jobs 2]    # runs what has no record yet: results/refiner.jsonl
    python benchmarks/refiner.py --report                        # results/refiner.md and .png from the records
    python benchmarks/refiner.py one dialogue 'refine 3' 0       # one run, its record printed and not kept
    python benchmarks/refiner.py one code 'refine 3' 2 1200      # the same with a reference taught for longer

Every arm has the same rollouts, learning rate and steps, and starts from the same reference of its task and seed.
Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.context import BaseContext
from pathlib import Path

RECORDS = Path(__file__).parent / "results" / "refiner.jsonl"


def records() -> list[dict]:
    """Return the finished runs."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def one(task: str, arm: str, seed: int, *more: int) -> None:
    """Print the record of one run, as the last line."""
    print(json.dumps(_train(task, arm, seed, *more), separators=(",", ":")))


def missing(tasks: list[str], arms: list[str], seeds: int, finished: list[dict]) -> list[tuple[str, str, int]]:
    """Return the runs that have no record yet, seed by seed."""
    done = {(record["task"], record["arm"], record["seed"]) for record in finished}
    runs = ((task, arm, seed) for seed in range(seeds) for task in tasks for arm in arms)
    return [run for run in runs if run not in done]


def run_all(tasks: list[str], arms: list[str], seeds: int, jobs: int) -> int:
    """Run what has no record yet, each run in a process of its own, and return how many failed."""
    failed = 0
    with ProcessPoolExecutor(jobs, mp_context=_processes(), max_tasks_per_child=1) as pool:
        running = {pool.submit(_train, *run): run for run in missing(tasks, arms, seeds, records())}
        for future in as_completed(running):
            try:
                record = future.result()
            except Exception as error:
                print(*running[future], "FAILED:", repr(error), flush=True)
                failed += 1
                continue
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
            print(*running[future], record["last"], f"{record['seconds']} s", flush=True)
    return failed


def _processes() -> BaseContext:
    """Return a server that forks processes which have loaded the libraries already: seconds less for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["refiner_run"])
    return context


def _train(task: str, arm: str, seed: int, *more: int) -> dict:
    from refiner_run import Setting, train

    return train(Setting(task, arm, seed, *more))


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="one TASK ARM SEED [REFERENCE_STEPS]; nothing: all that is missing")
    parser.add_argument("--tasks", nargs="+", default=["dialogue", "code"])
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        from refiner_report import report

        report(records())
        return 0
    if given.what:
        _, task, arm, *numbers = given.what
        one(task, arm, *map(int, numbers))
        return 0
    if given.arms is None:
        from refiner_run import ARMS

        given.arms = list(ARMS)
    return min(run_all(given.tasks, given.arms, given.seeds, given.jobs), 1)


if __name__ == "__main__":
    sys.exit(main())
