"""Convex programs whose primal and dual solutions are known, with the primal solved exactly for any multiplier."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, linprog, minimize


@dataclass(frozen=True)
class QuadraticProgram:
    """min ½ xᵀQx + qᵀx subject to Ax ≤ b, built around its own solution (x*, λ*)."""

    Q: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray
    primal: np.ndarray
    dual: np.ndarray

    @classmethod
    def around(cls, Q, A, primal, dual, slack):
        """Choose q and b such that the Karush-Kuhn-Tucker conditions hold at (primal, dual)."""
        Q, A, primal, dual, slack = (np.asarray(each, float) for each in (Q, A, primal, dual, slack))
        assert (dual * slack == 0).all(), "complementary slackness"
        return cls(Q, -Q @ primal - A.T @ dual, A, A @ primal + slack, primal, dual)

    def minimiser(self, multipliers):
        """argmin of the Lagrangian."""
        return -np.linalg.solve(self.Q, self.q + self.A.T @ multipliers)

    def violations(self, x):
        return self.A @ x - self.b

    @property
    def curvature(self):
        """-∇² of the dual function: A Q⁻¹ Aᵀ."""
        return self.A @ np.linalg.solve(self.Q, self.A.T)

    def augmented_minimiser(self, duals, rho):
        """argmin of the augmented Lagrangian, by Newton's method on its piecewise linear gradient."""
        x = self.minimiser(duals)
        for _ in range(50):
            shifted = duals + rho * self.violations(x)
            active = shifted > 0
            gradient = self.Q @ x + self.q + self.A.T @ np.where(active, shifted, 0.0)
            step = np.linalg.solve(self.Q + (self.A.T * (rho * active)) @ self.A, gradient)
            x = x - step
            if np.abs(step).max() < 1e-15:
                break
        return x


# one active constraint, so that rates are one number: m = A Q⁻¹ Aᵀ = 1.25
SINGLE = QuadraticProgram.around([[2.0, 0.0], [0.0, 1.0]], [[1.0, -0.866025403784438596]], [0.5, -1.0], [1.7], [0.0])
# active, inactive, active
MIXED = QuadraticProgram.around(
    np.diag([1.0, 2.0, 4.0]),
    [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, -1.0]],
    [0.3, -0.7, 0.2],
    [0.9, 0.0, 2.1],
    [0.0, 0.4, 0.0],
)
INACTIVE = QuadraticProgram.around([[1.0]], [[1.0]], [0.2], [0.0], [0.5])
# the unconstrained minimum lies on the boundary: active, yet λ* = 0
DEGENERATE = QuadraticProgram.around([[1.0]], [[1.0]], [0.2], [0.0], [0.0])


@dataclass(frozen=True)
class LinearProgram:
    """min cᵀx subject to Ax ≤ b, 0 ≤ x ≤ 1; both solutions from HiGHS."""

    c: np.ndarray
    A: np.ndarray
    b: np.ndarray

    def solution(self):
        result = linprog(self.c, A_ub=self.A, b_ub=self.b, bounds=(0.0, 1.0), method="highs")
        assert result.success
        return result.x, -result.ineqlin.marginals, result.fun

    def dual_value(self, multipliers):
        """min over the box of the Lagrangian: a lower bound of the optimum, tight at a dual solution."""
        return np.minimum(self.c + self.A.T @ multipliers, 0.0).sum() - multipliers @ self.b

    def minimiser(self, multipliers):
        return (self.c + self.A.T @ multipliers < 0.0).astype(float)

    def augmented_minimiser(self, duals, rho, start):
        def value(x):
            hinge = np.maximum(duals + rho * (self.A @ x - self.b), 0.0)
            return self.c @ x + (hinge @ hinge - duals @ duals) / (2 * rho), self.c + self.A.T @ hinge

        options = {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 500}
        bounds = [(0.0, 1.0)] * self.c.size
        return minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


KNAPSACK = LinearProgram(
    np.array([-3.0, -2.0, -3.5]), np.array([[1.0, 1.0, 2.0], [2.0, 0.5, 1.0]]), np.array([2.0, 1.8])
)
# three constraints meet at the optimal corner of a plane, one of them twice: the dual solution is not unique
DEGENERATE_LP = LinearProgram(
    np.array([-1.0, -1.0]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 2.0]]), np.array([0.5, 0.5, 1.0, 2.0])
)


@dataclass(frozen=True)
class Bandit:
    """max ⟨r, π⟩ + τ H(π) subject to ⟨c, π⟩ ≤ d; given λ, π = softmax((r - λc) / τ)."""

    rewards: np.ndarray
    costs: np.ndarray
    temperature: float
    limit: float

    def policy(self, multiplier):
        logits = (self.rewards - multiplier * self.costs) / self.temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def cost(self, multiplier):
        return float(self.policy(multiplier) @ self.costs)

    def dual(self):
        if self.cost(0.0) <= self.limit:
            return 0.0
        return brentq(lambda lam: self.cost(lam) - self.limit, 0.0, 1e3, xtol=1e-15, rtol=1e-15)


ARMS = dict(rewards=np.array([1.0, 0.6, 0.3, 0.0]), costs=np.array([1.0, 0.5, 0.4, 0.0]), temperature=0.3)
BANDIT = Bandit(**ARMS, limit=0.3)
INACTIVE_BANDIT = Bandit(**ARMS, limit=0.9)
DEGENERATE_BANDIT = Bandit(**ARMS, limit=Bandit(**ARMS, limit=1.0).cost(0.0))


@dataclass(frozen=True)
class TrustRegion:
    """max ⟨r, π⟩ subject to KL(π ‖ π₀) ≤ δ; given β, π ∝ π₀ exp(r / β)."""

    rewards: np.ndarray
    prior: np.ndarray
    target: float

    def policy(self, beta):
        logits = np.log(self.prior) + self.rewards / beta
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def kl(self, beta):
        policy = self.policy(beta)
        return float(policy @ np.log(policy / self.prior))

    def dual(self):
        return brentq(lambda beta: self.kl(beta) - self.target, 1e-2, 1e3, xtol=1e-15, rtol=1e-15)


TRUST_REGION = TrustRegion(np.array([1.0, 0.4, 0.0]), np.array([0.2, 0.3, 0.5]), 0.1)
