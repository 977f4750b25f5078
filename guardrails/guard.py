"""Guard: composes constraints, holds their only mutable state, and decides once per step."""

from __future__ import annotations

import copy
import logging
import math
import operator
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardrails import saved
from guardrails.action_set import ActionSet
from guardrails.competence import gates as gating
from guardrails.competence.between import Between
from guardrails.constraint import PENALTY, Constraint
from guardrails.controllers import Controllers
from guardrails.decision import ConstraintDecision, Decision, GateDecision, Reason, Verdict
from guardrails.errors import AttachError, ConfigurationError, RolloutError
from guardrails.evidence import CostEvidence, Evidence
from guardrails.parts import Part, sort
from guardrails.refinement import Refinement
from guardrails.rollout import FloatArray, Rollout, as_column

if TYPE_CHECKING:
    from guardrails.ledger import Ledger

logger = logging.getLogger(__name__)

_LARGEST = 1e9
"""Scaled violations are clipped here, so that a huge finite cost cannot overflow a controller."""


class Guard:
    """The limits a training run must respect.

    Args:
        *parts: the constraints, dials, action sets and at most one refinement, each with a name of its own. The
            gates that they follow come along by themselves.

    Raises:
        ConfigurationError: if there is no part, a part of an unknown kind, two of one name, or two refinements; or a
            scheduler begins with a strength that is no number ≥ 0.

    Example:
        >>> guard = Guard(Constraint("toxicity", limit=0.05))
        >>> decision = guard.step(Rollout(costs={"toxicity": [0.0, 0.2]}))
        >>> decision.constraints["toxicity"].violation
        0.05
    """

    def __init__(self, *parts: Part) -> None:
        found = sort(parts)
        self._parts, self._declared, self._dials, self._gates = parts, found.constraints, found.dials, found.gates
        self._refinement, self._action_sets = found.refinement, found.action_sets
        self._steering, self._widths = found.steering, found.widths
        self._gate_states = {name: gate.init() for name, gate in self._gates.items()}
        self._constraints = self._in_force()
        self._controllers = Controllers(self._declared.values())
        self._step = 0
        self._decision: Decision | None = None
        self._costs: dict[str, FloatArray] = {}
        self._ledger: Ledger | None = None
        self._lock = threading.RLock()  # a checkpoint may be written from a thread of its own
        self._host: str | None = None

    @classmethod
    def from_toml(cls, path: str | Path, *, allow_imports: bool = False) -> Guard:
        """Return the guard that a policy file describes; ``docs/policy.md`` shows one.

        Args:
            path: a TOML file. Metrics and schedulers stand in it by the names they are registered under.
            allow_imports: import functions and classes that the file names as ``module:name``; that runs the
                code of those modules.

        Raises:
            ConfigurationError: if it cannot be read or something in it cannot be used: an unknown key, a wrong
                type, an unknown plug-in, a value out of range. The message names file, line and key.
        """
        from guardrails.policy import toml  # above this module; loaded only where a guard is a file

        return toml.load(path, allow_imports=allow_imports)

    def to_toml(self) -> str:
        """Return a policy file of this guard: `from_toml` makes the same guard of it, without the state.

        Raises:
            ConfigurationError: if a part is a function that cannot be imported, such as a lambda, or a
                scheduler or metric that does not keep its arguments as attributes of the same names.
        """
        from guardrails.policy import toml

        return toml.dump(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: the state, but neither the ledger, which has one writer, nor the host."""
        with self._lock:
            kept = {name: value for name, value in vars(self).items() if name != "_lock"}
            controllers = copy.copy(self._controllers)
        return {**kept, "_controllers": controllers, "_ledger": None, "_host": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what `__getstate__` returned."""
        vars(self).update(state)
        self._lock = threading.RLock()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The constraints, dials, action sets and refinement as they were given, with limits that move as `Between`."""
        return self._parts

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The constraints, in the order given, each with the limit in force as a number; see `steering`."""
        return tuple(self._constraints.values())

    @property
    def action_sets(self) -> tuple[ActionSet, ...]:
        """The action sets, in the order given, which is that in which they are applied."""
        return self._action_sets

    @property
    def refinement(self) -> Refinement | None:
        """The refinement, or None."""
        return self._refinement

    @property
    def refinement_weight(self) -> float:
        """Weight α ≥ 0 of the refinement in force, also before the first step; 0 where there is none."""
        part = self._refinement
        if part is None:
            return 0.0
        if isinstance(part.weight, Constraint):
            return self.multipliers[part.weight.name]
        return part.weight.at(self._level(part.weight)) if isinstance(part.weight, Between) else part.weight

    @property
    def steering(self) -> frozenset[str]:
        """Names of what turns the refinement's weight and nothing else.

        A constraint among them is measured, updated and recorded like any other, but its multiplier is the
        weight: a host must not apply it to rewards or losses besides.
        """
        return self._steering

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier λ in force of each constraint, also before the first step."""
        penalty = self._penalty
        return {name: strength * penalty for name, strength in self._controllers.strengths.items()}

    @property
    def dials(self) -> dict[str, float]:
        """Value in force of each dial, also before the first step."""
        return {name: value.at(self._level(value)) for name, value in self._dials.items()}

    @property
    def gates(self) -> dict[str, GateDecision]:
        """Where each gate stands, and what it waits for."""
        return {name: gate.report(self._gate_states[name]) for name, gate in self._gates.items()}

    @property
    def requires(self) -> frozenset[str]:
        """Columns that the gates' metrics read, without the constraints' own costs."""
        gates = self._gates.values()
        return frozenset(column for gate in gates for each in gate.requires for column in each.measured.requires)

    def check_columns(self, provided: Iterable[str], host: str) -> None:
        """Raise unless a host that provides these columns serves every metric; adapters call it when attaching.

        Args:
            provided: names of `Rollout` columns, costs by their own names and as ``costs``.
            host: what errors call the host, such as ``"the PPO host"``.

        Raises:
            AttachError: naming the first metric and column that the host cannot serve.
        """
        gating.check_columns(self._gates.values(), provided, host)

    def _multiplier(self, name: str) -> float:
        return self._controllers.strengths[name] * self._penalty

    @property
    def _penalty(self) -> float:
        value = self._dials.get(PENALTY)
        return 1.0 if value is None else value.at(self._level(value))

    def _level(self, value: Between) -> float:
        return value.gate.level(self._gate_states[value.gate.name])

    def _in_force(self) -> dict[str, Constraint]:
        return {
            name: part.at(self._level(part.limit)) if isinstance(part.limit, Between) else part
            for name, part in self._declared.items()
        }

    @property
    def decision(self) -> Decision | None:
        """The last decision, or None before the first step."""
        return self._decision

    @property
    def host(self) -> str | None:
        """Name of the host this guard is attached to, or None."""
        return self._host

    def attach(self, host: str, *, dials: Collection[str] = (), refines: bool = False, acts: bool = False) -> None:
        """Mark the guard as belonging to ``host``; adapters call this last, once all else is checked.

        Args:
            host: what errors call the host.
            dials: the dials that the adapter turns on this host.
            refines: whether the adapter can put a refinement into this host's loss.
            acts: whether the adapter applies action sets where this host acts.

        Raises:
            AttachError: if it already belongs to a host: its state would mix two runs; or if it has a
                dial, an action set or a refinement that the host lacks the means for.
        """
        if self._action_sets and not acts:
            raise AttachError(
                f"Action set '{self._action_sets[0].name}' has nothing to apply to on {host}, which does not act in "
                "an environment. Use it with guardrails_sb3, or leave it out."
            )
        if self._refinement is not None and not refines:
            raise AttachError(
                f"Refinement '{self._refinement.name}' has nothing to correct on {host}: it writes no completions. "
                "Use it with a trainer that does, such as TRL's GRPOTrainer, or leave it out."
            )
        foreign = sorted(set(self._dials) - {PENALTY, *dials} - self._steering - self._widths)
        if foreign:
            present = ", ".join(sorted({PENALTY, *dials}))
            raise AttachError(f"Dial '{foreign[0]}' has nothing to turn on {host}. Dials here: {present}.")
        if self._host is not None:
            raise AttachError(
                f"This Guard is already attached to {self._host}. Detach it there first, or build a new Guard."
            )
        self._host = host

    def detach(self) -> None:
        """Release the guard from its host; its state stays."""
        self._host = None

    @property
    def ledger(self) -> Ledger | None:
        """The ledger that `record` opened last, or None."""
        return self._ledger

    def record(self, path: str | Path, *, seed: int | None = None, max_bytes: int = 1 << 28) -> Ledger:
        """Write every step from now on into a ledger: the evidence, the decision, and why.

        Adapters do this beside the host's output; a loop of your own calls it once, on its first process.
        ``guardrails verify`` proves the record, ``guardrails report`` shows it.

        Args:
            path: the file, such as ``"runs/x/ledger.jsonl"``. One that is there is continued.
            seed: of the run, for the header.
            max_bytes: a file that has grown so large is followed by another.

        Returns:
            The ledger, which is closed when the process ends, or by ``with`` or `Ledger.close`.

        Raises:
            ConfigurationError: if ``seed`` or ``max_bytes`` is no whole number that can be used.
            LedgerError: if the file cannot be opened, is in use by another process, or is no ledger.

        Example:
            >>> guard.record("runs/x/ledger.jsonl")  # doctest: +SKIP
        """
        from guardrails.ledger import Ledger, header  # above this module; loaded only when a run is recorded

        if seed is not None:
            seed = _whole("seed", seed, "a whole number, or None")
        if _whole("max_bytes", max_bytes, "a whole number of bytes") < 1:
            raise ConfigurationError(f"record: max_bytes is {max_bytes!r}; give at least 1.")
        with self._lock:
            previous, self._ledger = self._ledger, None
            if previous is not None:
                previous.close()
            self._ledger = Ledger(path, lambda: header.start(self, seed), max_bytes=max_bytes, lock=self._lock)
            return self._ledger

    def sanitised(self, name: str) -> FloatArray:
        """Return the costs of the last step, ``(n_rows,)``, with unmeasurable rows set to the worst value.

        Raises:
            ConfigurationError: if there is no such constraint.
            RolloutError: if there was no step yet, or none since a state was loaded.
        """
        part = self._named(name)
        if name not in self._costs:
            raise RolloutError(f"There are no costs of '{name}' yet, or none since a state was loaded: call step().")
        return part.sanitise(self._costs[name])

    def penalty(self, name: str, cost: Any) -> Any:
        """Return the term that a host with a differentiable cost adds to its loss, dimensionless.

        λ v for most schedulers; ψ(v) for the augmented Lagrangian, whose derivative is its multiplier. Of a scheduler
        that failed it is what it was before, plus v times that by which λ was raised in its stead.

        Args:
            name: the constraint.
            cost: J in the cost's own unit, as a float or as a differentiable tensor of any library.

        Raises:
            ConfigurationError: if there is no such constraint.
        """
        part = self._named(name)
        violation = part.violation(cost) / part.violation_scale
        return self._controllers.penalty(part, violation) * self._penalty

    def _named(self, name: str) -> Constraint:
        if name not in self._constraints:
            present = ", ".join(self._constraints) or "none"
            raise ConfigurationError(f"This guard has no constraint '{name}'. Constraints here: {present}.")
        return self._constraints[name]

    def step(self, rollout: Rollout) -> Decision:
        """Update the gates on ``rollout``, measure each constraint against the limit then in force, and say why.

        It is `reduce`, then `decide`; what was reduced and decided goes into the ledger, if there is one. Other threads
        may call `state_dict` meanwhile: it waits.

        Args:
            rollout: the globally reduced rows of one step of the host. With no rows nothing changes but the number
                of the step.

        Raises:
            RolloutError: if a constraint's cost column is missing, or this is no `Rollout`; nothing was updated.
        """
        if not isinstance(rollout, Rollout):
            raise RolloutError(f"Guard.step takes a Rollout(costs={{...}}), not {type(rollout).__name__}.")
        with self._lock:
            costs = {name: self._column(part, rollout) for name, part in self._declared.items()}
            evidence = self._reduce(costs, rollout)
            decision = self._settle(evidence, costs)
        _warn(decision)
        return decision

    def settle(self, evidence: Evidence) -> Decision:
        """Do what `step` does, on evidence that is there already: of a host that measures costs otherwise than by rows.

        Other threads may call `state_dict` meanwhile: it waits. `sanitised` returns the costs of the last `step`.

        Args:
            evidence: such as `reduce` returns, with costs of one's own.
        """
        with self._lock:
            decision = self._settle(evidence, self._costs)
        _warn(decision)
        return decision

    def _settle(self, evidence: Evidence, costs: dict[str, FloatArray]) -> Decision:
        """Decide and record it; who calls holds the lock."""
        decision = self.decide(evidence)
        self._costs = costs
        if self._ledger is not None:
            self._ledger.step(evidence, decision)
        return decision

    def reduce(self, rollout: Rollout) -> Evidence:
        """Return what ``rollout`` comes down to, for `decide`; nothing is updated.

        Args:
            rollout: the globally reduced rows of one step of the host.

        Raises:
            RolloutError: if a constraint's cost column is missing.
        """
        return self._reduce({name: self._column(part, rollout) for name, part in self._declared.items()}, rollout)

    def _reduce(self, columns: Mapping[str, FloatArray], rollout: Rollout) -> Evidence:
        costs = {name: part.reduce(columns[name]) for name, part in self._declared.items()}
        return Evidence(rollout.n_rows, costs, gating.reduce(self._gates, self._gate_states, rollout))

    def _column(self, part: Constraint, rollout: Rollout) -> FloatArray:
        """Return a constraint's costs; of one that steers the refinement and has no cost, the edit ratio."""
        edited = part.name in self._steering and part.cost is None and part.name not in rollout.costs
        if edited and rollout.edit_ratio is not None:
            return as_column(rollout.edit_ratio, "edit_ratio")
        return rollout.cost(part.name)

    def decide(self, evidence: Evidence) -> Decision:
        """Update gates and schedulers on ``evidence``; from the same state it gives the same decision, to the bit."""
        before = self.multipliers
        self._gate_states, gates, reasons = gating.judge(self._gates, self._gate_states, evidence.gates)
        if gates:
            self._constraints = self._in_force()
        facts = {
            name: self._decide(part, evidence.costs[name], evidence.n_rows, before[name], reasons)
            for name, part in self._constraints.items()
        }
        self._step += 1
        weights = {} if self._refinement is None else {self._refinement.name: self.refinement_weight}
        self._decision = Decision(self._step, evidence.n_rows, facts, tuple(reasons), gates, self.dials, weights)
        return self._decision

    def _decide(
        self, part: Constraint, evidence: CostEvidence, n_rows: int, before: float, reasons: list[Reason]
    ) -> ConstraintDecision:
        name, cost = part.name, part.mean(evidence, n_rows)
        if math.isnan(cost):
            found, after = "costs" if n_rows else "rows", self._multiplier(name)
            course = f"stays {after:.4g}" if after == before else f"{before:.4g} → {after:.4g} with its penalty dial"
            reasons.append(Reason(name, "empty", f"no {found} in this step, λ {course}"))
            return ConstraintDecision(name, math.nan, part.bound, math.nan, after)
        violation = part.violation(cost)
        scaled = min(max(violation / part.violation_scale, -_LARGEST), _LARGEST)
        failure = self._controllers.update(part, scaled)
        after = self._multiplier(name)
        if failure:
            reasons.append(Reason(name, "failed", failure))
        if evidence.invalid_rows:
            text = f"{evidence.invalid_rows} of {n_rows} costs were not finite and count as violations"
            reasons.append(Reason(name, "invalid", text))
        verdict: Verdict = "tightened" if after > before else "relaxed" if after < before else "held"
        relation = _relation(part, violation)
        text = f"mean cost {cost:.4g} is {relation} {part.bound:.4g}, λ {before:.4g} → {after:.4g}"
        reasons.append(Reason(name, verdict, text))
        return ConstraintDecision(name, cost, part.bound, violation, after, evidence.invalid_rows)

    def state_dict(self) -> dict[str, Any]:
        """Return all mutable state as JSON data: schema version, step, and the state of each scheduler and gate.

        A ledger is written up to here, so that it reaches as far as any checkpoint.
        """
        with self._lock:
            return self._dump()

    def _dump(self) -> dict[str, Any]:
        if self._ledger is not None:
            self._ledger.flush()
        return {
            "schema": saved.SCHEMA,
            "step": self._step,
            "constraints": {name: self._controllers.dump(part) for name, part in self._constraints.items()},
            "gates": {name: gate.dump(self._gate_states[name]) for name, gate in self._gates.items()},
        }

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Restore what `state_dict` wrote; either all of it is loaded or nothing.

        Raises:
            StateError: if the state is newer than this package, belongs to other constraints or
                schedulers or gates, or is damaged.
        """
        with self._lock:
            step, controlled = saved.parse(self._constraints, data)
            self._gate_states = gating.load(self._gates, data.get("gates", {}))
            self._step = step
            self._controllers.load(controlled)
            self._constraints = self._in_force()
            self._decision, self._costs = None, {}
            if self._ledger is not None:
                self._ledger.seam("resumed")


def _warn(decision: Decision) -> None:
    for reason in decision.reasons:
        if reason.verdict in ("failed", "frozen"):
            logger.warning("%s", reason)


def _whole(name: str, value: Any, wanted: str) -> int:
    """Return a whole number of any library as int."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ConfigurationError(f"record: {name} is {value!r}; give {wanted}.") from error


def _relation(part: Constraint, violation: float) -> str:
    if part.sense == "==":
        return "above target" if violation > 0 else "below target" if violation < 0 else "at target"
    side = "above" if part.sense == "<=" else "below"
    return f"{side} limit" if violation > 0 else "within limit"
