"""The safety critic by itself: what it learns, against exact solutions, and what it says."""

import math

import numpy as np
import pytest
import torch
from sb3_machine import COOL, HOT, LEVELS, N_STATES, exact_cost_to_go, wear
from torch import nn

from guardrails import ConfigurationError, StateError
from guardrails.critic import Ensemble, SafetyCritic, Transitions, critic_limit, critic_unit
from guardrails.critic.networks import EnsembleMLP

torch.set_num_threads(1)
GAMMA = 0.9


def critic(discrete=False, costs=("cost",), units=None, signs=None, **settings):
    torch.manual_seed(0)
    settings = {"members": 3, "hidden": (32,)} | settings
    return SafetyCritic(
        nn.Identity(),
        N_STATES,
        len(LEVELS) if discrete else 1,
        costs=costs,
        units=units or [1.0] * len(costs),
        signs=signs,
        discrete=discrete,
        settings=Ensemble(**settings),
    )


def batch_of(draw, odds, discrete, n=256, steps=1):
    """Transitions of the machine under a policy that draws a level by ``odds[s]``, after a random first load."""
    eye = np.eye(N_STATES, dtype=np.float32)
    first = draw.integers(N_STATES, size=n)
    levels = draw.integers(len(LEVELS), size=n)
    state, level, costs = first, levels, np.zeros(n)
    for step in range(steps):
        load = LEVELS[level]
        costs = costs + GAMMA**step * wear(np.tile(LEVELS, (N_STATES, 1)))[state, level]
        move = (1 - load)[:, None] * COOL[state] + load[:, None] * HOT[state]
        state = (draw.random(n)[:, None] > move.cumsum(axis=1)[:, :-1]).sum(axis=1)
        level = (draw.random(n)[:, None] > odds[state].cumsum(axis=1)[:, :-1]).sum(axis=1)
    as_action = (lambda index: index) if discrete else (lambda index: (2 * LEVELS[index] - 1).astype(np.float32))
    return Transitions(
        torch.from_numpy(eye[first]),
        torch.from_numpy(as_action(levels)).reshape(n, 1),
        torch.from_numpy(costs.astype(np.float32)).reshape(n, 1),
        torch.from_numpy(eye[state]),
        torch.from_numpy(as_action(level)).reshape(n, 1),
        torch.zeros(n, 1),
        GAMMA**steps,
    )


@pytest.mark.parametrize(("discrete", "steps"), [(True, 1), (False, 1), (True, 3)])
def test_the_critic_learns_the_exact_cost_to_go_of_a_policy(discrete, steps):
    draw = np.random.default_rng(0)
    odds = draw.dirichlet(np.ones(len(LEVELS)), size=N_STATES)
    exact = exact_cost_to_go(odds, np.tile(LEVELS, (N_STATES, 1)), GAMMA)
    learner = critic(discrete, units=[5.0], members=2, kappa=0.0, learning_rate=3e-3, tau=0.02)
    for step in range(2000):
        if step == 1500:  # the rest of the way without the noise of large steps
            learner.optimizer.param_groups[0]["lr"] = 3e-4
        learner.update(batch_of(draw, odds, discrete, steps=steps))
    states = torch.eye(N_STATES).repeat_interleave(len(LEVELS), dim=0)
    every = torch.arange(len(LEVELS)) if discrete else torch.from_numpy(2 * LEVELS - 1).float()
    found = learner.risk(states, every.repeat(N_STATES).reshape(-1, 1)).detach().numpy().reshape(exact.shape)
    # sampled batches leave a few per cent of noise; the values lie between 7 and 14
    np.testing.assert_allclose(found, exact, rtol=0.05)
    assert np.ptp(exact) > 4.0


def test_the_batched_ensemble_is_its_members_one_by_one():
    torch.manual_seed(0)
    net = EnsembleMLP(3, 4, 2, (8, 6))
    rows = torch.randn(5, 4)
    for member in range(3):
        hidden = rows
        for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            hidden = hidden @ weight[member] + bias[member]
            hidden = hidden.clamp(min=0) if layer < 2 else hidden
        torch.testing.assert_close(net(rows)[member], hidden)
    outputs = net(rows)
    assert not torch.allclose(outputs[0], outputs[1]), "members must start apart"


def test_an_update_is_the_documented_step_for_each_member_with_its_own_target():
    learner = critic(units=[5.0], tau=0.25)
    draw = np.random.default_rng(1)
    batch = batch_of(draw, np.full((N_STATES, len(LEVELS)), 0.2), False, n=16)
    for parameter in learner.target.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    before = [parameter.clone() for parameter in learner.network.parameters()]
    lagging = [parameter.clone() for parameter in learner.target.parameters()]
    inputs = torch.cat([batch.observations, batch.actions], dim=1)
    following = torch.cat([batch.next_observations, batch.next_actions], dim=1)
    wanted = batch.costs / 5.0 + GAMMA * learner.target.perceptrons(following)
    loss = (learner.network.perceptrons(inputs) - wanted.detach()).square().mean(dim=(1, 2)).sum()
    expected = torch.autograd.grad(loss, list(learner.network.parameters()))
    learner.update(batch)
    for was, now, gradient, old, target in zip(
        before, learner.network.parameters(), expected, lagging, learner.target.parameters(), strict=True
    ):
        moved = gradient.abs() > 1e-4  # the first step of Adam is the learning rate against the sign
        torch.testing.assert_close((now - was)[moved], -1e-3 * gradient.sign()[moved], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(target, old + 0.25 * (now - old))


@pytest.mark.parametrize(("off", "cut"), [(-50.0, 0.0), (50.0, 20.0), (0.0, None)])
def test_what_follows_a_step_is_cut_to_what_can_be(off, cut):
    learner = critic(units=[5.0])
    learner.bound([0.0], [20.0])
    learner.target.perceptrons.biases[-1].data.fill_(off + 2.0)
    batch = batch_of(np.random.default_rng(1), np.full((N_STATES, len(LEVELS)), 0.2), False, n=16)
    following = 5.0 * learner.target.perceptrons(torch.cat([batch.next_observations, batch.next_actions], dim=1))
    assert (following[0] < 0.0).all() or (following[0] > 20.0).all() or cut is None
    wanted = (batch.costs + GAMMA * (following if cut is None else torch.full_like(following, cut))) / 5.0
    own = learner.network.perceptrons(torch.cat([batch.observations, batch.actions], dim=1))
    expected = (own - wanted).square().mean().item()
    learner.update(batch)
    assert learner.take_loss() == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize("interval", [1, 2])
def test_the_level_of_the_estimates_follows_a_cost_as_slowly_as_the_target_network_does(interval):
    """One state, one action, and a cost of 2 at each step for ever, which the critic begins by not expecting."""
    gamma, tau, cost = 0.95, 0.2, 2.0
    level, constant = cost / (1.0 - gamma), interval / (tau * (1.0 - gamma))
    own = critic(units=[level], tau=tau, target_interval=interval, learning_rate=1e-2)
    own.bound([0.0], [level])  # what costs of 2 can add up to, which the estimates reach in the end alone
    state, action = torch.ones(16, N_STATES), torch.zeros(16, 1)
    steady = Transitions(state, action, torch.full((16, 1), cost), state, action, torch.zeros(16, 1), gamma)
    shares = []
    for _ in range(round(4 * constant)):
        own.update(steady)
        shares.append(own.values(state[:1], action[:1]).mean().item() / level)
    expected = 1.0 - np.exp(-np.arange(1, len(shares) + 1) / constant)
    # The first steps bring the network to the cost of one step, a share of 1 - γ; measured 0.047 and 0.034 after that.
    np.testing.assert_allclose(shares[50:], expected[50:], rtol=0.0, atol=0.06)


def test_rows_of_unknown_cost_teach_nothing():
    draw = np.random.default_rng(2)
    batch = batch_of(draw, np.full((N_STATES, len(LEVELS)), 0.2), False, n=32)
    known = Transitions(*(getattr(batch, name)[:20] for name in list(vars(batch))[:6]), batch.discounts)
    batch.costs[20:] = math.nan
    left, right = critic(), critic()
    left.update(batch)
    right.update(known)
    for mine, its in zip(left.network.parameters(), right.network.parameters(), strict=True):
        torch.testing.assert_close(mine, its)
    batch.costs[:] = math.nan
    weights = [parameter.clone() for parameter in left.network.parameters()]
    left.optimizer.state.clear()
    left.update(batch)
    assert all(torch.equal(was, now) for was, now in zip(weights, left.network.parameters(), strict=True))


def test_a_terminal_step_has_nothing_beyond_it():
    learner = critic(members=2, kappa=0.0, learning_rate=1e-2)
    ones = torch.ones(64, 1)
    rows = torch.eye(N_STATES)[:1].expand(64, -1)
    for _ in range(400):
        learner.update(Transitions(rows, 0 * ones, 3 * ones, rows, 0 * ones, ones, GAMMA))
    assert learner.risk(rows[:1], ones[:1] * 0).item() == pytest.approx(3.0, abs=0.05)  # Adam has not quite settled


def test_risk_is_mean_and_kappa_deviations_on_the_side_of_the_limit():
    learner = critic(costs=("high", "low"), units=[2.0, 5.0], signs=[1.0, -1.0], kappa=1.5, members=4)
    rows, actions = torch.eye(N_STATES), torch.zeros(N_STATES, 1)
    values = learner.values(rows, actions).detach().numpy().astype(np.float64)
    mean, spread = values.mean(axis=0), values.std(axis=0)
    expected = mean + 1.5 * spread * np.array([1.0, -1.0])
    np.testing.assert_allclose(learner.risks(rows, actions).detach().numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(learner.risk(rows, actions, "low").detach().numpy(), expected[:, 1], rtol=1e-4)
    assert spread.min() > 0.01
    with pytest.raises(ConfigurationError, match="judges high, low; none was named"):
        learner.risk(rows, actions)
    with pytest.raises(ConfigurationError, match="'heat' is none of them"):
        learner.risk(rows, actions, "heat")


def test_the_slope_of_the_risk_reaches_actions_and_no_weight():
    learner = critic()
    rows = torch.eye(N_STATES)
    actions = torch.zeros(N_STATES, 1, requires_grad=True)
    learner.risk(rows, actions).sum().backward()
    step = 1e-2
    with torch.no_grad():
        slope = (learner.risk(rows, actions + step) - learner.risk(rows, actions - step)) / (2 * step)
    torch.testing.assert_close(actions.grad[:, 0], slope, rtol=2e-2, atol=2e-3)  # single precision, piecewise linear
    assert all(parameter.grad is None for parameter in learner.network.parameters())


def test_what_an_encoder_does_otherwise_while_it_learns_is_no_part_of_any_judgement():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    learner = SafetyCritic(encoder, 3, 2, costs=["cost"], units=[1.0], discrete=True)
    observations = torch.randn(8, 3)
    for target in (False, True):
        together = learner.risks_of_all(observations, target=target)
        alone = [learner.risks_of_all(row, target=target) for row in observations.split(1)]
        torch.testing.assert_close(torch.cat(alone), together)


def test_risks_of_all_discrete_actions_are_those_of_each():
    learner = critic(discrete=True, costs=("a", "b"))
    rows = torch.eye(N_STATES)
    every = learner.risks_of_all(rows)
    assert every.shape == (N_STATES, len(LEVELS), 2)
    for index in range(len(LEVELS)):
        actions = torch.full((N_STATES, 1), index)
        torch.testing.assert_close(every[:, index], learner.risks(rows, actions))


@pytest.mark.parametrize(("horizon", "gamma"), [(1, 0.5), (7, 0.9), (1000, 0.99), (1000, 1.0), (20, 0.999999)])
def test_a_limit_per_episode_is_the_discounted_sum_of_its_even_share(horizon, gamma):
    share = 25.0 / horizon
    assert critic_limit(25.0, horizon, gamma) == pytest.approx(sum(share * gamma**k for k in range(horizon)), rel=1e-9)


def test_a_horizon_or_discount_that_means_nothing_is_refused():
    for horizon, gamma in ((0, 0.9), (2.5, 0.9), (10, 0.0), (10, 1.01)):
        with pytest.raises(ConfigurationError, match="critic_unit"):
            critic_unit(horizon, gamma)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"members": 0}, "members"),
        ({"members": 1}, "one member has no spread"),
        ({"kappa": -1.0}, "kappa"),
        ({"hidden": ()}, "hidden"),
        ({"hidden": (0,)}, "hidden"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"tau": 1.5}, "tau"),
    ],
)
def test_an_ensemble_that_cannot_be_is_refused_by_argument(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        Ensemble(**settings)


def test_a_critic_of_no_constraint_is_refused():
    with pytest.raises(ConfigurationError, match="0 costs"):
        critic(costs=())


def test_a_saved_critic_goes_on_bit_for_bit_and_a_foreign_one_is_refused_whole():
    draw, odds = np.random.default_rng(3), np.full((N_STATES, len(LEVELS)), 0.2)
    batches = [batch_of(draw, odds, False, n=32) for _ in range(4)]
    through, resumed = critic(), critic()
    for batch in batches[:2]:
        through.update(batch)
    saved = {name: tensor.clone() for name, tensor in through.tensors().items()}
    resumed.load_tensors(saved)
    for batch in batches[2:]:
        through.update(batch)
        resumed.update(batch)
    for name, tensor in through.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    other = critic(hidden=(16,))
    before = other.risk(torch.eye(3), torch.zeros(3, 1))
    with pytest.raises(StateError, match=r"saved safety critic does not fit.*perceptrons"):
        other.load_tensors(saved)
    assert torch.equal(before, other.risk(torch.eye(3), torch.zeros(3, 1)))
