"""The demo over several seeds: reward and cost of the last quarter, and whether the limit was held.

    python benchmarks/demo.py

Finished seeds are kept in ``runs/demo-seed-<n>`` and skipped next time; the table goes to ``results/demo.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import guardrails_demo
from guardrails_demo.curves import Curves

ROOT = Path(__file__).parents[1]
HEADER = "| seed | task | guard | reward | cost | limit | λ | limit is |\n|---|---|---|---|---|---|---|---|"


def rows(seed: int) -> list[str]:
    """Run the demo with ``seed`` unless it was run before, and return its lines of the table."""
    folder = ROOT / "runs" / f"demo-seed-{seed}"
    if not (folder / "demo.json").exists():
        guardrails_demo.run(seed=seed, quick=False, output=folder)
    lines = []
    for data in json.loads((folder / "demo.json").read_text()):
        curve = Curves(**data)
        reward, cost, multiplier = (curve.last_quarter(v) for v in (curve.reward, curve.cost, curve.multiplier))
        guard = f"yes | {reward:.2f} | {cost:.2f} | {curve.limit:g} | {multiplier:.2f}"
        if not curve.guarded:
            guard = f"no | {reward:.2f} | {cost:.2f} | {curve.limit:g} |"
        lines.append(f"| {seed} | {curve.task} | {guard} | {'held' if curve.held else 'broken'} |")
    return lines


def main() -> None:
    """Write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    lines = [line for seed in parser.parse_args().seeds for line in rows(seed)]
    text = "\n".join(
        ["`python benchmarks/demo.py`: means over the last quarter of each training.\n", HEADER, *lines, ""]
    )
    (ROOT / "benchmarks" / "results" / "demo.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
