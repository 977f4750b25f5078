"""The bandit of ``benchmarks/algd_bandit.py``: what the augmentation of the Lagrangian buys a diffusion policy."""

from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
RHO, UPDATES = 50.0, 1_600


@pytest.fixture(scope="module")
def bandit():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import algd_bandit

        yield algd_bandit


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def runs(request, bandit):
    """An augmented and a plain run of one seed."""
    return [bandit.train(rho, request.param, UPDATES, UPDATES // 4) for rho in (RHO, 0.0)]


def lowest(bandit, rho, multiplier):
    """Return the radius at which the Lagrangian is lowest, on a ridge that is safe."""
    learner = bandit.Learner(rho, 0)
    learner.guard.load_state_dict(_with_multiplier(learner.guard.state_dict(), rho, multiplier))
    radii = torch.linspace(0.0, 1.0, 1_001)
    return float(radii[learner.energy(radii[:, None] * bandit.RIDGES[0]).argmin()])


def _with_multiplier(state, rho, multiplier):
    saved = state["constraints"]["cost"]
    dual = saved["state"]["inner"] if rho else saved["state"]
    dual["multiplier"] = saved["multiplier"] = saved["state"]["multiplier"] = multiplier
    return state


def test_the_plain_lagrangian_is_never_lowest_at_the_limit_and_the_augmented_one_is(bandit):
    """On a safe ridge the limit is met at a radius of 0.48, where the step is 0.06 wide."""
    edge = 0.48
    assert float(bandit.cost(edge * bandit.RIDGES[0])) == pytest.approx(bandit.LIMIT, abs=0.02)
    plain = np.array([lowest(bandit, 0.0, float(each)) for each in np.geomspace(0.3, 40.0, 60)])
    assert plain.max() > 0.8
    assert plain.min() < 0.35
    assert not np.any(np.abs(plain - edge) < 0.06), "it leaps from one side to the other"
    augmented = [lowest(bandit, RHO, each) for each in (3.0, 6.0, 9.0)]
    assert np.all(np.abs(np.array(augmented) - edge) < 0.03)


def test_augmented_actions_cover_the_safe_modes_and_avoid_the_unsafe_ones(runs, bandit):
    augmented, plain = runs
    assert min(augmented["safe ridges"]) > 0.1  # of a third at the optimum
    assert sum(augmented["safe ridges"]) > 0.8
    assert augmented["unsafe"] < 0.25
    assert augmented["unsafe"] < 0.6 * plain["unsafe"]


def test_the_plain_lagrangian_swings_between_both_sides_of_the_limit(runs, bandit):
    """Its mean cost over time may well be the limit: it is kept by no policy on the way."""
    augmented, plain = runs
    assert augmented["cost_swing"] < 0.15
    assert plain["cost_swing"] > 2.0 * augmented["cost_swing"]
    assert plain["swing"] > 1.5 * augmented["swing"]
