"""Guards, and what happens to them, drawn at random."""

import numpy as np
from hypothesis import strategies as st

from guardrails import Constraint, Dial, Gate, Guard, Refinement, Require, Rollout
from guardrails.competence import (
    ActionVariance,
    ConstraintSatisfaction,
    Drift,
    FailureAvoidance,
    RewardLevel,
    Stability,
)
from guardrails.refine import (
    Acceptance,
    Always,
    Degenerate,
    Empty,
    EndpointRefiner,
    LowEntropy,
    Repetition,
    Truncated,
)
from guardrails.schedulers import (
    CRPO,
    PID,
    AdamAscent,
    AdaptiveKL,
    Anneal,
    AugmentedLagrangian,
    Cap,
    DualAscent,
    Fixed,
    LogDual,
    Margin,
    NuPI,
    RateLimit,
    Smooth,
    Warmup,
)

gains = st.floats(1e-6, 50.0)
shares = st.floats(0.0, 0.99)
counts = st.integers(1, 6)

plain = st.one_of(
    st.builds(Fixed, gains),
    st.builds(Anneal, gains, gains, updates=counts, shape=st.sampled_from(["linear", "cosine"])),
    st.builds(AugmentedLagrangian, gains, learning_rate=st.none() | gains, growth_factor=st.floats(1.0, 2.0)),
    st.builds(DualAscent, gains, initial=gains),
    st.builds(AdamAscent, gains, initial=gains, mean_smoothing=shares, epsilon=gains),
    st.builds(LogDual, gains, initial=st.floats(0.5, 2.0), minimum=st.floats(1e-3, 0.5)),
    st.builds(PID, gains, gains, gains, smoothing_p=shares, smoothing_d=shares, delay=counts, integral_max=gains),
    st.builds(CRPO, shares, weight=gains),
    st.builds(NuPI, gains, gains, nu=shares, initial=gains),
    st.builds(AdaptiveKL, batch_size=st.floats(1.0, 100.0), horizon=st.floats(1e3, 1e5)),
)
schedulers = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds(Cap, inner, gains),
        st.builds(RateLimit, inner, gains),
        st.builds(Smooth, inner, shares),
        st.builds(Warmup, inner, counts),
        st.builds(Margin, inner),
    ),
    max_leaves=3,
)

metrics = [
    st.builds(RewardLevel, st.floats(0.5, 2.0), floor=st.floats(-1.0, 0.0)),
    st.builds(Stability, st.floats(0.5, 2.0)),
    st.builds(ConstraintSatisfaction, st.sampled_from(["a", "b"]), gains, margin=gains),
    st.builds(Drift, gains),
    st.builds(FailureAvoidance) | st.builds(FailureAvoidance, cost=st.just("a"), level=gains),
    st.builds(ActionVariance, st.floats(-2.0, -1.0), st.floats(1.0, 2.0)),
]
thresholds = st.floats(0.05, 0.95)


@st.composite
def gates(draw, name):
    chosen = draw(st.lists(st.sampled_from(range(len(metrics))), min_size=1, max_size=3, unique=True))
    audits = [False, *draw(st.lists(st.booleans(), min_size=len(chosen) - 1, max_size=len(chosen) - 1))]
    requires = [
        Require(draw(metrics[index]), at_least=draw(thresholds), audit=audit)
        for index, audit in zip(chosen, audits, strict=True)
    ]
    return Gate(
        *requires,
        confidence=draw(st.floats(0.5, 0.99)),
        rungs=draw(counts),
        dwell=draw(st.integers(0, 64)),
        interval=draw(counts),
        fall=draw(st.sampled_from(["one", "half", "floor"])),
        run_length=draw(st.floats(2.0, 1e4)),
        window=draw(st.integers(1, 64)),
        budget_seconds=draw(st.none() | st.just(60.0)),
        name=name,
    )


@st.composite
def guards(draw, names=("a", "b", "läuft nicht")):
    """Draw a guard of one to three constraints, on fixed or moving limits, and perhaps a dial."""
    pool = [draw(gates("gate")), draw(gates("an other"))]
    parts = []
    for name in names[: draw(st.integers(1, len(names)))]:
        limit = draw(st.floats(0.1, 10.0))
        if draw(st.booleans()):
            limit = draw(st.sampled_from(pool)).between(
                limit, 2.0 * limit, scale=draw(st.sampled_from(["linear", "geometric"]))
            )
        sense = "<=" if not isinstance(limit, float) else draw(st.sampled_from(["<=", ">="]))
        scale = draw(st.none() | gains)
        cost = draw(st.none() | st.sampled_from(["key", "a:b", 'qu"ote\n']))
        parts.append(Constraint(name, limit=limit, scheduler=draw(schedulers), sense=sense, scale=scale, cost=cost))
    if draw(st.booleans()):
        parts.insert(0, Dial("penalty", draw(st.sampled_from(pool)).between(1.0, 0.25)))
    if draw(st.booleans()):
        weight = draw(
            gains
            | st.builds(lambda gate: gate.between(2.0, 0.5), st.sampled_from(pool))
            | st.builds(lambda scheduler: Constraint("edits", limit=0.1, scheduler=scheduler), schedulers)
        )
        when = draw(st.sampled_from([Always(), Empty() | Repetition(2), ~(Truncated() & LowEntropy())]))
        accept = Acceptance(similarity=draw(shares), sound=draw(st.sampled_from([None, Degenerate(2)])))
        refiner = EndpointRefiner("http://localhost:1/v1", "m", budget=draw(gains))
        parts.insert(0, Refinement(refiner, weight, when, accept=accept, name=draw(st.sampled_from(["cure", "üb er"]))))
    return Guard(*parts)


def rollout(seed, names=("a", "b", "läuft nicht")):
    """Return rows that are mostly good, sometimes bad, rarely broken, sometimes none at all."""
    draw = np.random.default_rng(seed)
    n_rows = int(draw.choice([0, 1, 7, 32], p=[0.05, 0.1, 0.25, 0.6]))
    good = draw.random() < 0.8
    costs = {name: draw.gamma(1.0 if good else 5.0, size=n_rows) for name in names}
    for column in costs.values():
        column[draw.random(n_rows) < 0.02] = draw.choice([np.nan, np.inf, -np.inf, 1.7e308])
    columns = {
        "rewards": draw.normal(1.0 if good else 0.0, 0.3, n_rows),
        "kl": draw.random(n_rows),
        "infos": [{"failure": bool(draw.random() < (0.01 if good else 0.5))} for _ in range(n_rows)],
        "edit_ratio": np.where(draw.random(n_rows) < 0.02, np.nan, draw.random(n_rows) * (0.2 if good else 1.0)),
        "actions": [draw.normal(0.0, 0.3, (4, 2)) for _ in range(n_rows)],
    }
    if draw.random() < 0.05:
        del columns["kl"]  # a metric that reads it fails
    return Rollout(costs=costs, **columns)
