"""Does the gate keep its promises: false climbs, samples to climb, delay and false alarms of falls, memory, speed.

    OMP_NUM_THREADS=1 python benchmarks/competence.py run       # about an hour on one core; resumes
    python benchmarks/competence.py report                      # benchmarks/results/competence.md and .png

Every record carries its seed and is one line of benchmarks/results/competence.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from competence_streams import BATCH, POLICIES, RULES, UPDATES, play
from scipy.stats import beta

from guardrails import Gate, Require
from guardrails.competence import Betting, Break, EmpiricalBernstein, FromFunction
from guardrails.competence.confidence import spending

RESULTS = Path(__file__).parent / "results"
CONFIDENCE = 0.95
STREAMS = {"gate": 1_200, "moving average": 500, "peeking interval": 500}
CHUNK = 50
RUN_LENGTH = 10_000
FIRST_ERROR = float(spending(1.0 - CONFIDENCE, 1))
CLIMBS = [(0.9, 0.93), (0.9, 0.95), (0.9, 0.99), (0.95, 0.97), (0.95, 0.99), (0.95, 1.0), (0.98, 0.995), (0.7, 0.8)]
BREAKS = [0.0, 0.5, 0.7, 0.8, 0.9, 0.93]


def false_climbs(rule: str, policy: str, chunk: int) -> dict:
    runs = [play(rule, policy, seed, confidence=CONFIDENCE) for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    firsts = [run.first_climb_rows for run in runs if not math.isnan(run.first_climb_rows)]
    return {
        "streams": CHUNK,
        "false": sum(run.false_climb for run in runs),
        "climbs": sum(run.climbs for run in runs),
        "falls": sum(run.falls for run in runs),
        "firsts": firsts,
    }


def samples_to_climb(threshold: float, mean: float, seed: int, *, batch: int = 16, limit: int = 20_000) -> dict:
    rng = np.random.default_rng([seed, round(1000 * threshold), round(1000 * mean)])
    gate = Gate(Require(FromFunction(float, "rewards", name="m"), at_least=threshold), confidence=CONFIDENCE, dwell=0)
    bernstein, betting = EmpiricalBernstein(threshold), Betting(200)
    state, bounds, capital = gate.init(), bernstein.init(), betting.init()
    found: dict[str, float] = {}
    for rows in range(batch, limit + 1, batch):
        scores = (rng.random((1, batch)) < mean).astype(float)
        if "gate" not in found:
            state, decision = gate.decide(state, scores)
            if decision.rung:
                found["gate"] = rows
        if "bernstein" not in found:
            bounds = bernstein.update(bounds, scores[0])
            if bernstein.lower(bounds, FIRST_ERROR) >= threshold:
                found["bernstein"] = rows
        if "betting" not in found:
            capital = betting.update(capital, scores[0])
            if betting.lower(capital, FIRST_ERROR) >= threshold - 1e-9:
                found["betting"] = rows
        if len(found) == 3:
            break
    return {name: found.get(name, float("inf")) for name in ("gate", "bernstein", "betting")}


def detection_delay(mean: float, seed: int, *, threshold: float = 0.95, batch: int = 16, good: int = 20_000) -> dict:
    rng = np.random.default_rng([seed, round(1000 * mean), 7])
    detector = Break([threshold], run_length=RUN_LENGTH)
    state, early = detector.init(), 0
    for _ in range(good // batch):
        state, alarm = detector.update(state, np.sort((rng.random((1, batch)) < 0.98).astype(float)))
        if alarm[0]:
            state, early = detector.init(), early + 1
    rows = 0
    while rows < 20_000:
        rows += batch
        state, alarm = detector.update(state, np.sort((rng.random((1, batch)) < mean).astype(float)))
        if alarm[0]:
            break
    return {"rows": rows, "early": early}


def false_alarms(mean: float, seed: int, *, threshold: float = 0.95, batch: int = 16, updates: int = 2_000) -> dict:
    rng = np.random.default_rng([seed, round(1000 * mean), 8])
    detector = Break([threshold], run_length=RUN_LENGTH)
    state = detector.init()
    for update in range(1, updates + 1):
        state, alarm = detector.update(state, np.sort((rng.random((1, batch)) < mean).astype(float)))
        if alarm[0]:
            return {"alarm": update}
    return {"alarm": None}


def five_requirements() -> Gate:
    metrics = (FromFunction(float, "rewards", name=f"m{index}") for index in range(5))
    return Gate(*(Require(metric, at_least=0.9) for metric in metrics))


def memory(rows_in_all: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    gate, batch = five_requirements(), 256
    state = gate.init()
    for update in range(rows_in_all // batch):
        mean = 0.97 if (update // 400) % 3 else 0.6
        state, _ = gate.decide(state, (rng.random((5, batch)) < mean).astype(float))
    return {"bytes": len(json.dumps(gate.dump(state))), "attempts": float(state.attempts.max())}


def speed(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    gate = five_requirements()
    state, scores = gate.init(), rng.random((5, 256)) ** 0.02
    seconds = []
    for _ in range(3_000):
        begun = time.perf_counter()
        state, _ = gate.decide(state, scores)
        seconds.append(time.perf_counter() - begun)
    low, median, high = np.quantile(seconds, [0.05, 0.5, 0.95]) * 1e6
    return {"p5_us": low, "median_us": median, "p95_us": high}


def jobs() -> Iterator[tuple[list, Callable[[], dict]]]:
    yield ["speed", 0], lambda: speed(0)
    for rows in (10**5, 10**6, 10**7):
        yield ["memory", rows], lambda rows=rows: memory(rows, 0)
    for seed in range(200):
        for threshold, mean in CLIMBS:
            key = ["climb", threshold, mean, seed]
            yield key, lambda key=key: samples_to_climb(key[1], key[2], key[3])
        for mean in BREAKS:
            yield ["delay", mean, seed], lambda mean=mean, seed=seed: detection_delay(mean, seed)
        for mean in (0.95, 0.97):
            yield ["alarm", mean, seed], lambda mean=mean, seed=seed: false_alarms(mean, seed)
    for chunk in range(max(STREAMS.values()) // CHUNK):
        for rule, streams in STREAMS.items():
            for policy in POLICIES:
                if chunk < streams // CHUNK:
                    key = ["false", rule, policy, chunk]
                    yield key, lambda key=key: false_climbs(*key[1:])


def run(part: int, parts: int) -> None:
    """Do every job that has no record yet; of ``parts`` processes that share the file, the one numbered ``part``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "competence.jsonl"
    done = {json.dumps(json.loads(line)["key"]) for line in path.read_text().splitlines()} if path.exists() else set()
    with path.open("a") as file:
        for number, (key, job) in enumerate(jobs()):
            if number % parts == part and json.dumps(key) not in done:
                file.write(json.dumps({"key": key, **job()}) + "\n")
                file.flush()


def interval(count: int, total: int) -> tuple[float, float]:
    """Return the exact 95% binomial interval of Clopper and Pearson."""
    low = beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


def information_bound(threshold: float, mean: float) -> float:
    """Return log(1 / error) / KL(mean ‖ threshold): no valid rule needs fewer samples on average."""
    miss = (1 - mean) * math.log((1 - mean) / (1 - threshold)) if mean < 1 else 0.0
    return -math.log(FIRST_ERROR) / (mean * math.log(mean / threshold) + miss)


def report() -> None:
    """Write the table and the picture."""
    records = [json.loads(line) for line in (RESULTS / "competence.jsonl").read_text().splitlines()]
    by: dict[str, list[dict]] = {}
    for record in records:
        by.setdefault(json.dumps(record["key"][:-1] if len(record["key"]) > 1 else record["key"]), []).append(record)
    lines = ["# The gate's promises, measured", "", "`python benchmarks/competence.py run`, then `report`.", ""]
    lines += false_table(by) + climb_table(by) + break_table(by)
    lines += ["## Size and speed", ""]
    for record in by['["memory"]']:
        lines.append(f"- state after {record['key'][1]:.0e} rows: {record['bytes']} bytes of JSON")
    for record in by['["speed"]']:
        text = f"median {record['median_us']:.0f} µs (5 % {record['p5_us']:.0f}, 95 % {record['p95_us']:.0f})"
        lines.append(f"- gate update, 5 requirements, 256 rows: {text}; target 500 µs")
    (RESULTS / "competence.md").write_text("\n".join(lines) + "\n")
    picture(by)


def false_table(by: dict) -> list[str]:
    lines = [
        "## Runs with a false climb",
        "",
        f"A run is {UPDATES} batches of {BATCH} rows, two requirements at 0.9, confidence {CONFIDENCE}; it counts if "
        "ever a climb came while a running average of the true conditional means, since that evidence began, was below "
        f"0.9. Promised for the gate: at most {1 - CONFIDENCE:.0%} of runs.",
        "",
        "| scenario | rule | runs | false | share, 95 % interval | climbs per run | falls per run "
        "| median rows to the first climb, in how many runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        for rule in RULES:
            rows = by.get(json.dumps(["false", rule, policy]), [])
            if not rows:
                continue
            total, count = sum(row["streams"] for row in rows), sum(row["false"] for row in rows)
            low, high = interval(count, total)
            firsts = [first for row in rows for first in row["firsts"]]
            median = f"{np.median(firsts):.0f} in {len(firsts) / total:.0%}" if firsts else "never"
            lines.append(
                f"| {policy} | {rule} | {total} | {count} | {count / total:.2%} ({low:.2%} to {high:.2%}) "
                f"| {sum(row['climbs'] for row in rows) / total:.1f} | {sum(row['falls'] for row in rows) / total:.1f} "
                f"| {median} |"
            )
    return [*lines, ""]


def climb_table(by: dict) -> list[str]:
    lines = [
        "## Rows to the first climb",
        "",
        f"One requirement, scores of 0 and 1, batches of 16, mean over the seeds; error of the first evidence "
        f"{FIRST_ERROR:.4f}. The bound is log(1/error) / KL(mean ‖ threshold).",
        "",
        "| threshold | true mean | seeds | bound | gate | gate / bound | betting | betting / bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for threshold, mean in CLIMBS:
        rows = by.get(json.dumps(["climb", threshold, mean]), [])
        bound = information_bound(threshold, mean)
        gate, betting = (np.mean([row[name] for row in rows]) for name in ("gate", "betting"))
        lines.append(
            f"| {threshold:g} | {mean:g} | {len(rows)} | {bound:.0f} | {gate:.0f} | {gate / bound:.2f} "
            f"| {betting:.0f} | {betting / bound:.2f} |"
        )
    return [*lines, ""]


def break_table(by: dict) -> list[str]:
    detector = Break([0.95], run_length=RUN_LENGTH)
    lines = [
        "## Rows from a break to the fall",
        "",
        f"Threshold 0.95, 20,000 rows at 0.98 and then a lower mean, batches of 16, run_length {RUN_LENGTH}. Stated is "
        "`Break.rows_to_alarm`, an upper bound on the mean delay.",
        "",
        "| mean after the break | seeds | mean delay | 95 % quantile | stated |",
        "|---|---|---|---|---|",
    ]
    for mean in BREAKS:
        rows = [row["rows"] for row in by.get(json.dumps(["delay", mean]), [])]
        stated = detector.rows_to_alarm(mean, batch=16)
        lines.append(f"| {mean:g} | {len(rows)} | {np.mean(rows):.0f} | {np.quantile(rows, 0.95):.0f} | {stated:.0f} |")
    early = sum(row["early"] for mean in BREAKS for row in by.get(json.dumps(["delay", mean]), []))
    updates = sum(len(by.get(json.dumps(["delay", mean]), [])) for mean in BREAKS) * 20_000 // 16
    lines += ["", f"Before the break, at 0.98: {early} false alarms in {updates:,} updates.", ""]
    for mean in (0.95, 0.97):
        rows = by.get(json.dumps(["alarm", mean]), [])
        count = sum(row["alarm"] is not None for row in rows)
        low, high = interval(count, len(rows))
        lines.append(
            f"- mean {mean:g}, threshold 0.95: {count} of {len(rows)} runs of 2,000 updates had a false alarm, "
            f"{low:.1%} to {high:.1%}; promised at most {2_000 / RUN_LENGTH:.0%}"
        )
    return [*lines, ""]


def picture(by: dict) -> None:
    """Draw false climbs, rows to climb and delay to fall, each beside what is promised or possible."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for offset, (rule, marker) in enumerate(zip(RULES, "osx", strict=True)):
        for place, policy in enumerate(POLICIES):
            rows = by.get(json.dumps(["false", rule, policy]), [])
            total, count = sum(row["streams"] for row in rows), sum(row["false"] for row in rows)
            low, high = interval(count, total)
            share = count / total
            left.errorbar(
                share, place + 0.2 * offset, xerr=[[share - low], [high - share]], fmt=marker, color=f"C{offset}",
                label=rule if place == 0 else None,
            )  # fmt: skip
    left.axvline(1 - CONFIDENCE, color="k", linestyle="--", label="promised")
    left.set_yticks(range(len(POLICIES)), POLICIES)
    left.set(xlabel="share of runs with a false climb", xscale="symlog", xlim=(-0.002, 1.1), title="False climbs")
    left.set_xscale("symlog", linthresh=0.01)
    left.legend(fontsize=8)
    bounds = np.array([information_bound(*case) for case in CLIMBS])
    for name, marker in (("gate", "o"), ("betting", "x")):
        means = [np.mean([row[name] for row in by[json.dumps(["climb", *case])]]) for case in CLIMBS]
        middle.loglog(bounds, means, marker, label=name)
    middle.loglog(np.sort(bounds), np.sort(bounds), "k--", label="information bound")
    middle.set(xlabel="bound, rows", ylabel="mean rows to the first climb", title="Rows to climb")
    middle.legend()
    detector = Break([0.95], run_length=RUN_LENGTH)
    delays = [np.mean([row["rows"] for row in by[json.dumps(["delay", mean])]]) for mean in BREAKS]
    right.semilogy(BREAKS, delays, "o", label="measured mean")
    right.semilogy(BREAKS, [detector.rows_to_alarm(mean, batch=16) for mean in BREAKS], "k--", label="stated bound")
    right.set(xlabel="mean after the break (threshold 0.95)", ylabel="rows until the fall", title="Delay of a fall")
    right.legend()
    figure.savefig(RESULTS / "competence.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="run every N-th job from I"
    )
    options = parser.parse_args()
    if options.what == "run":
        run(*options.part)
    else:
        report()
