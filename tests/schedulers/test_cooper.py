"""Step-by-step agreement with Cooper where its semantics are right, and the difference where they are not."""

import cooper
import numpy as np
import pytest
import torch
from cooper.constraints import ConstraintState
from cooper.multipliers import DenseMultiplier
from cooper.optim import nuPI, nuPIInitType
from cooper.penalty_coefficients import (
    AdditivePenaltyCoefficientUpdater,
    DensePenaltyCoefficient,
    MultiplicativePenaltyCoefficientUpdater,
)

from guardrails.schedulers import AdamAscent, AugmentedLagrangian, DualAscent, NuPI

# Both sides are float64 and do the same few operations in another order; 200 steps of a contraction
# accumulate a few ulp. Cooper keeps the gains of nuPI in float32: those used here are exact in it.
ROUNDING = 1e-12
PRIMAL_RATE, STEPS = 0.05, 200
TARGET, NORMAL, BOUND = np.array([1.0, 2.0]), np.array([1.0, 0.5]), 0.4


class Projection(cooper.ConstrainedMinimizationProblem):
    """min ½‖x - target‖² subject to ⟨normal, x⟩ ≤ bound: violated until step 20 or so, then settling."""

    def __init__(self, formulation, penalty_coefficient=None):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.constraint = cooper.Constraint(
            constraint_type=cooper.ConstraintType.INEQUALITY,
            formulation_type=formulation,
            multiplier=DenseMultiplier(init=torch.zeros(1), dtype=torch.float64),
            penalty_coefficient=penalty_coefficient,
        )

    def compute_cmp_state(self):
        loss = 0.5 * ((self.x - torch.tensor(TARGET)) ** 2).sum()
        violation = (torch.tensor(NORMAL) * self.x).sum() - BOUND
        return cooper.CMPState(loss=loss, observed_constraints={self.constraint: ConstraintState(violation=violation)})


def cooper_path(problem, dual_optimizer, updater=None):
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem,
        primal_optimizers=torch.optim.SGD([problem.x], lr=PRIMAL_RATE),
        dual_optimizers=dual_optimizer(list(problem.dual_parameters())),
    )
    path = []
    for _ in range(STEPS):
        roll = optimizer.roll()
        if updater is not None:
            updater.step(roll.cmp_state.observed_constraints)
        path.append((*problem.x.detach().tolist(), problem.constraint.multiplier.weight.item()))
    return np.array(path)


def own_path(scheduler, dual="multiplier", primal="before"):
    """Gradient steps with the multiplier before the update, or with the one the update returns."""
    state, x, path = scheduler.init(), np.zeros(2), []
    for _ in range(STEPS):
        before, (state, after) = state, scheduler.update(state, float(NORMAL @ x) - BOUND)
        strength = scheduler.strength(before) if primal == "before" else after
        x = x - PRIMAL_RATE * (x - TARGET + strength * NORMAL)
        path.append((*x, getattr(state, dual)))
    return np.array(path)


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, maximize=True)


def test_dual_ascent_agrees():
    theirs = cooper_path(Projection(cooper.formulations.Lagrangian), sgd(0.3))
    assert own_path(DualAscent(0.3)) == pytest.approx(theirs, abs=ROUNDING)
    assert theirs[:, 2].max() > 0.5


def test_adam_ascent_agrees():
    theirs = cooper_path(
        Projection(cooper.formulations.Lagrangian), lambda p: torch.optim.Adam(p, lr=0.035, maximize=True)
    )
    assert own_path(AdamAscent(0.035)) == pytest.approx(theirs, abs=ROUNDING)


@pytest.mark.parametrize("nu", [0.0, 0.8])
def test_nupi_without_a_proportional_term_agrees(nu):
    theirs = cooper_path(
        Projection(cooper.formulations.Lagrangian),
        lambda p: nuPI(p, lr=1.0, Kp=0.0, Ki=0.25, ema_nu=nu, maximize=True),
    )
    assert own_path(NuPI(0.0, 0.25, nu=nu)) == pytest.approx(theirs, abs=ROUNDING)


def nupi_on(errors, *, sparse, kp, ki, nu=0.0):
    """What Cooper's optimizer does to one non-negative multiplier that is fed these errors."""
    weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = nuPI([weight], lr=1.0, Kp=kp, Ki=ki, ema_nu=nu, init_type=nuPIInitType.SGD, maximize=True)
    path = []
    for error in errors:
        gradient = torch.tensor([[error]], dtype=torch.float64)
        weight.grad = gradient.to_sparse(1) if sparse else gradient
        optimizer.step()
        with torch.no_grad():
            weight.clamp_(min=0.0)
        path.append(weight.item())
    return path


def own_on(errors, scheduler):
    state, path = scheduler.init(), []
    for error in errors:
        state, lam = scheduler.update(state, float(error))
        path.append(lam)
    return path


def test_nupi_with_a_proportional_term_agrees_with_the_sparse_one():
    """Cooper's sparse step starts ξ at the first error when ν = 0, as its documentation says."""
    errors = np.random.default_rng(0).normal(0.3, 1.0, 100)
    theirs = nupi_on(errors, sparse=True, kp=0.75, ki=0.25)
    assert own_on(errors, NuPI(0.75, 0.25, nu=0.0)) == pytest.approx(theirs, abs=ROUNDING)
    assert max(theirs) > 1.0


def test_nupi_differs_from_the_dense_one_which_starts_at_zero():
    """Documented: the error before the first is the first. Cooper's dense code: it is 0, a jump of K_P later."""
    assert nupi_on([1.0] * 3, sparse=False, kp=1.0, ki=0.1) == pytest.approx([0.1, 1.2, 1.3])
    assert own_on([1.0] * 3, NuPI(1.0, 0.1, nu=0.0)) == pytest.approx([0.1, 0.2, 0.3])


def test_nupi_differs_from_the_sparse_one_when_smoothed():
    """With ν > 0 Cooper's sparse code sets ξ₀ = (1 - ν) e₀ in place of e₀: a constant error then moves P."""
    assert nupi_on([1.0] * 3, sparse=True, kp=1.0, ki=0.1, nu=0.5) == pytest.approx([0.1, 0.45, 0.675])
    assert own_on([1.0] * 3, NuPI(1.0, 0.1, nu=0.5)) == pytest.approx([0.1, 0.2, 0.3])


def penalty(rho):
    return DensePenaltyCoefficient(torch.tensor(rho, dtype=torch.float64))


@pytest.mark.parametrize(("rho", "rate"), [(0.5, 0.5), (2.0, 0.1)])
def test_augmented_lagrangian_agrees(rho, rate):
    theirs = cooper_path(Projection(cooper.formulations.AugmentedLagrangian, penalty(rho)), sgd(rate))
    own = own_path(AugmentedLagrangian(rho, learning_rate=rate), dual="dual", primal="after")
    assert own == pytest.approx(theirs, abs=ROUNDING)


@pytest.mark.parametrize(
    ("updater", "growth"),
    [
        (MultiplicativePenaltyCoefficientUpdater(growth_factor=1.01), {"growth_factor": 1.01}),
        (AdditivePenaltyCoefficientUpdater(increment=0.1), {"growth_increment": 0.1}),
    ],
    ids=["multiplicative", "additive"],
)
def test_growing_penalty_coefficient_agrees_and_is_reset_when_feasible(updater, growth):
    problem = Projection(cooper.formulations.AugmentedLagrangian, penalty(0.5))
    theirs = cooper_path(problem, sgd(0.2), updater)
    scheduler = AugmentedLagrangian(0.5, learning_rate=0.2, **growth)
    assert own_path(scheduler, dual="dual", primal="after") == pytest.approx(theirs, abs=ROUNDING)
    coefficients = own_path(scheduler, dual="penalty_coefficient", primal="after")[:, 2]
    assert coefficients.max() > 0.5
    assert coefficients[int(coefficients.argmax()) :].min() == 0.5


def test_augmented_lagrangian_scales_the_dual_step_by_the_penalty_and_cooper_does_not():
    """Cooper's documentation gives λ ← [λ + ρ g]₊; its code steps by the dual optimizer's rate alone."""
    problem = Projection(cooper.formulations.AugmentedLagrangian, penalty(0.5))
    with torch.no_grad():
        problem.x.copy_(torch.tensor([2.4, 0.0]))  # g = 2
    violation = 2.0
    optimizer = cooper.optim.SimultaneousOptimizer(
        problem, torch.optim.SGD([problem.x], lr=0.0), sgd(1.0)(list(problem.dual_parameters()))
    )
    optimizer.roll()
    own = AugmentedLagrangian(0.5)
    assert problem.constraint.multiplier.weight.item() == pytest.approx(violation)
    assert own.update(own.init(), violation)[1] == pytest.approx(0.5 * violation)
