"""Tables and curves of `benchmarks/algd.py`, from its records."""

from __future__ import annotations

import numpy as np
from algd import ARMS, EPISODES, GAMMA, LIMITS, POINTS, RESULTS, SEEDS, SLOW, TAU, lagging, wanted

LAST = POINTS // 5
"""Points that stand for the end of a run: those of its last fifth."""


def write(records, steps):
    """Write results/algd.md and, for each environment, results/algd_<environment>.png."""
    every = [run for run in records.values() if run["steps"] == steps]
    runs = [run for run in every if run["tau"] != SLOW]
    total = len(wanted(steps)) - len(lagging(steps))
    lines = [
        "# ALGD and SAC under a limit on discounted speed",
        "",
        f"`python benchmarks/algd.py run`, then `report`: {steps:,} steps, one gradient step each after the warm-up, "
        f"γ = {GAMMA}; {len(runs)} of {total} runs are in. Mean ± standard deviation (divisor n - 1) over seeds.",
        "",
        f"Return, discounted cost and cost are of episodes without noise, {EPISODES} at each of the last {LAST} of "
        f"{POINTS} evaluations. *Over* is the share of training episodes, of the second half, whose discounted cost "
        "exceeds the limit. *Swing* is the standard deviation of λ over the last half of the run, and in brackets that "
        "about its straight line: a λ that climbs steadily has a large one and a small one. λ weighs a unit of cost "
        "against a unit of reward in all arms; ALGD's begins at ln 2, the others' at 0. *Expected* is what the critics "
        "expect of the replayed actions, on which λ moves, at the same evaluations.",
        "",
        f"The targets of the cost critics follow by {TAU} at every second gradient step, see `benchmarks/algd.py`; the "
        f"last section has runs with the published {SLOW}.",
        "",
    ]
    for name in SEEDS:
        if not any(run["env"] == name for run in runs):
            continue
        _picture([run for run in runs if run["env"] == name], name)
        for budget, limit in LIMITS[name].items():
            here = [run for run in runs if run["env"] == name and run["budget"] in (budget, "none")]
            lines += [f"## {name}, {budget} limit {limit:g}", "", *_table(here, limit), ""]
        lines += [f"![{name}](algd_{name.lower()}.png)", ""]
    lines += [
        f"## Critics that lag: targets that follow by {SLOW}",
        "",
        "At one gradient step per step the estimates then have a time constant of 40,000 steps. On HalfCheetah they "
        "stay below a limit that has long been passed, and no multiplier moves up.",
        "",
    ]
    for name, budget in (("Hopper", "tight"), ("HalfCheetah", "published")):
        limit = LIMITS[name][budget]
        here = [run for run in every if run["tau"] == SLOW and (run["env"], run["budget"]) == (name, budget)]
        lines += [f"{name}, {budget} limit {limit:g}:", "", *_table(here, limit), ""]
    (RESULTS / "algd.md").write_text("\n".join(lines), encoding="utf-8")


def _table(runs, limit):
    rows = [
        "| arm | seeds | return | discounted cost | cost | over | expected | λ at the end | swing of λ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, words in ARMS.items():
        found = [run for run in runs if run["arm"] == arm]
        if not found:
            continue
        ends = np.array([np.mean(run["played"][-LAST:], axis=0) for run in found])
        over = [_over(run, limit) for run in found]
        swings = ["", "", ""]
        if arm != "unguarded":
            last = [run["duals"][-1][1] for run in found]
            swing, about = np.mean([swing_of(run) for run in found], axis=0)
            known = [np.mean([each[1] for each in run["estimates"][-LAST:]]) for run in found if "estimates" in run]
            swings = [_spread(known, 1) if known else "", _spread(last, 2), f"{swing:.3f} ({about:.3f})"]
        cells = [_spread(ends[:, 1], 0), _spread(ends[:, 3], 1), _spread(ends[:, 2], 0), f"{np.mean(over):.0%}"]
        rows.append(f"| {words} | {len(found)} | {' | '.join(cells + swings)} |")
    return rows


def _over(run, limit):
    episodes = np.array(run["episodes"])
    late = episodes[episodes[:, 0] > run["steps"] / 2]
    return (late[:, 3] > limit).mean()


def swing_of(run):
    """Return the standard deviation of λ over the last half of a run, and that about its straight line."""
    duals = np.array(run["duals"])
    late = duals[duals[:, 0] > run["steps"] / 2]
    line = np.polyval(np.polyfit(late[:, 0], late[:, 1], 1), late[:, 0])
    return late[:, 1].std(), (late[:, 1] - line).std()


def _spread(values, digits):
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def _picture(runs, name):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, len(LIMITS[name]), figsize=(11, 11), sharex=True, squeeze=False)
    for column, (budget, limit) in enumerate(LIMITS[name].items()):
        for index, (arm, words) in enumerate(ARMS.items()):
            found = [run for run in runs if run["arm"] == arm and run["budget"] in (budget, "none")]
            if not found:
                continue
            colour = "0.6" if arm == "unguarded" else f"C{index - 1}"
            played = np.array([run["played"] for run in found])
            for row, of in enumerate((1, 3, 2)):
                _course(axes[row, column], played[0, :, 0], played[:, :, of], colour, words)
            if arm != "unguarded":
                duals = np.array([run["duals"] for run in found])
                _course(axes[3, column], duals[0, :, 0], duals[:, :, 1], colour, words)
        axes[0, column].set_title(f"{name}, {budget} limit {limit:g}")
        axes[1, column].axhline(limit, color="black", linestyle="--", linewidth=1)
        axes[3, column].set(xlabel="environment steps")
        axes[3, column].set_yscale("symlog", linthresh=0.1)
    for row, label in enumerate(("return", "discounted cost", "cost", "λ")):
        axes[row, 0].set_ylabel(label)
    axes[0, 0].legend(*_labels(axes), fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"algd_{name.lower()}.png", dpi=90)
    plt.close(figure)


def _labels(axes):
    """Return the handles and labels of all panels, each label once."""
    found = {}
    for axis in axes.flat:
        found |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    return list(found.values()), list(found)


def _course(axis, steps, values, colour, label):
    axis.plot(steps, values.mean(axis=0), color=colour, label=label, linewidth=1.2)
    if len(values) > 1:
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
