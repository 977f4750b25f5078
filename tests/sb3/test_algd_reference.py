"""ALGD part by part against `algd_reference`, which is numpy, float64 and derived by hand."""

import copy
import math
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from algd_reference import (
    DDPM,
    MLP,
    cost_targets,
    energy,
    evaluate,
    multipliers,
    penalty,
    relu,
    reward_targets,
    risk,
    score_target,
    silu,
    ve_sigmas,
    ve_step,
)
from devices import DEVICE
from sb3_envs import callback_of
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from guardrails import Constraint, Guard
from guardrails.critic import Ensemble, critic_unit
from guardrails.schedulers import AdamLogDual, Augmented
from guardrails_sb3 import algd, safety_critic, wrap
from guardrails_sb3.algd import DiffusionPolicy

LIMIT, MULTIPLIER, RHO = 0.3, 0.7, 2.5


def perceptrons(draw, number, sizes, activation):
    def layers():
        return [
            (draw.normal(size=(n_in, n_out)) / math.sqrt(n_in), 0.3 * draw.normal(size=n_out))
            for n_in, n_out in pairwise(sizes)
        ]

    return [MLP(layers(), activation) for _ in range(number)]


def landscape(draw):
    """Two reward critics and four cost critics of observation (3) and action (2), as the paper has them, smaller."""
    return perceptrons(draw, 2, [5, 16, 16, 1], relu), perceptrons(draw, 4, [5, 16, 16, 16, 1], silu)


def reference_energy(critics, cost_critics, observations, actions, **settings):
    settings = {"limit": LIMIT, "multiplier": MULTIPLIER, "rho": RHO} | settings
    return energy(*evaluate(critics, observations, actions), *evaluate(cost_critics, observations, actions), **settings)


# The reference itself: derivatives against differences, and what is known in closed form.


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_the_references_derivative_by_the_actions_is_that_of_its_energy(rho):
    draw = np.random.default_rng(0)
    critics, cost_critics = landscape(draw)
    observations, actions = draw.normal(size=(64, 3)), draw.uniform(-1.0, 1.0, size=(64, 2))
    _, slopes = reference_energy(critics, cost_critics, observations, actions, rho=rho)
    for column in range(2):
        step = np.zeros(2)
        step[column] = 1e-6
        above = reference_energy(critics, cost_critics, observations, actions + step, rho=rho)[0]
        below = reference_energy(critics, cost_critics, observations, actions - step, rho=rho)[0]
        # central differences of a function of order 1: rounding 1e-16 / 1e-6, curvature 1e-12; a kink is not met
        np.testing.assert_allclose(slopes[:, column], (above - below) / 2e-6, atol=1e-8)


def test_the_augmented_penalty_is_the_plain_one_for_a_vanishing_rho():
    violations = np.linspace(-0.5, 0.5, 11)
    value, slope = penalty(violations, MULTIPLIER, 1e-9)
    plain, plain_slope = penalty(violations, MULTIPLIER, 0.0)
    np.testing.assert_allclose(value, plain, atol=1e-6)  # ρ/2 · g², and cancellation in λ² of 1e-16 / 1e-9
    np.testing.assert_allclose(slope, plain_slope, atol=1e-8)


def test_the_score_target_is_the_score_of_the_smoothed_boltzmann_distribution():
    """∇ log E exp(-L(a + σε)/β); for L = k a²/2 that is the Gaussian of variance β/k + σ²."""
    draw = np.random.default_rng(0)
    stiffness, beta, sigma = 2.0, 0.5, 0.4
    places = np.linspace(-1.0, 1.0, 5)[:, None]
    near = places + sigma * draw.normal(size=(200_000, 5, 1))
    found = score_target(0.5 * stiffness * near[..., 0] ** 2, stiffness * near, beta)
    exact = -places / (beta / stiffness + sigma**2)
    # 200,000 weighted samples whose deviation is about 2: four standard errors
    np.testing.assert_allclose(found, exact, atol=4 * 2 / math.sqrt(200_000))


def test_the_reverse_steps_of_the_reference_draw_from_the_distribution_whose_score_they_follow():
    """With the exact score of N(0, s²) smoothed by σ_t, many small VE steps leave the variance s²."""
    draw = np.random.default_rng(0)
    sigmas, own = ve_sigmas(400), 0.5
    latents = math.hypot(own, sigmas[-1]) * draw.normal(size=20_000)
    for t in range(399, -1, -1):
        latents = ve_step(latents, -latents / (own**2 + sigmas[t] ** 2), sigmas, t, draw.normal(size=20_000))
    # four standard errors of a variance, √(2/n), and a step bias of the order Δσ²
    assert latents.var() == pytest.approx(own**2, rel=4 * math.sqrt(2 / 20_000) + 0.02)


# The package against the reference: what stands alone, in float64.


def of_tensor(value):
    return value.detach().cpu().double().numpy()


def test_the_score_target_is_the_references():
    draw = np.random.default_rng(1)
    energies, gradients = 3.0 * draw.normal(size=(4, 32)), draw.normal(size=(4, 32, 3))
    found = algd.score_target(torch.from_numpy(energies), torch.from_numpy(gradients), 0.7)
    np.testing.assert_allclose(found.cpu().numpy(), score_target(energies, gradients, 0.7), rtol=1e-12)


def test_a_reverse_step_of_the_variance_exploding_diffusion_is_the_references():
    draw = np.random.default_rng(2)
    latents, scores, noise = draw.normal(size=(3, 32, 2))
    schedule = algd.ve_schedule(5)
    for t in range(5):
        found = schedule.reverse_step(*map(torch.from_numpy, (latents, scores[:, None])), t, torch.from_numpy(noise))
        np.testing.assert_allclose(found.cpu().numpy(), ve_step(latents, scores, ve_sigmas(5), t, noise), rtol=1e-12)
        mean = schedule.reverse_step(*map(torch.from_numpy, (latents, scores[:, None])), t, None)
        np.testing.assert_allclose(mean.cpu().numpy(), ve_step(latents, scores, ve_sigmas(5), t, 0.0), rtol=1e-12)
    assert schedule.start == ve_sigmas(5)[-1]
    np.testing.assert_allclose(schedule.spreads, ve_sigmas(5), rtol=1e-12)


def test_a_reverse_step_of_the_denoising_diffusion_is_the_references():
    draw = np.random.default_rng(3)
    latents, scores, expected, noise = draw.normal(size=(4, 32, 2))
    schedule, process = algd.ddpm_schedule(5), DDPM(5)
    outputs = torch.from_numpy(np.stack([scores, expected], axis=1))
    for t in range(5):
        found = schedule.reverse_step(torch.from_numpy(latents), outputs, t, torch.from_numpy(noise))
        # the length of φ is kept from 0 by 1e-8, a shift of 0.05 · 1e-8 / ‖φ‖
        np.testing.assert_allclose(found.cpu().numpy(), process.step(latents, scores, expected, t, noise), atol=1e-7)
    np.testing.assert_allclose(schedule.spreads, np.sqrt(1.0 - process.bars), rtol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sde", ["ve", "ddpm"])
def test_an_action_is_the_end_of_the_references_path(sde, deterministic):
    policy = diffused(RHO, sde).policy.double()
    actor, network = policy.actor, policy.actor.network
    actor.extract_features = lambda observations, extractor: observations  # preprocessing ends in float32
    with torch.no_grad():
        network.head.weight.mul_(5.0)
    observations = torch.randn(16, 3, dtype=torch.float64, device=DEVICE)
    torch.manual_seed(1)
    found = of_tensor(actor(observations, deterministic))
    torch.manual_seed(1)
    noises = torch.randn(5, 16, 2, dtype=torch.float64, device=DEVICE).cpu().numpy() * (not deterministic)

    layers = [(of_tensor(each.weight).T, of_tensor(each.bias)) for each in [*network.layers, network.head]]
    embedded, process, sigmas = of_tensor(network.embedding.weight), DDPM(5), ve_sigmas(5)
    latents = noises[0] * (sigmas[-1] if sde == "ve" else 1.0)
    for t in range(4, -1, -1):
        hidden = np.concatenate([observations.cpu().numpy(), np.tanh(latents), np.tile(embedded[t], (16, 1))], axis=1)
        for index, (weight, bias) in enumerate(layers):
            hidden = hidden @ weight + bias
            hidden = relu(hidden)[0] if index < len(layers) - 1 else hidden
        noise = noises[5 - t] if t else 0.0
        if sde == "ve":
            latents = ve_step(latents, hidden, sigmas, t, noise)
        else:
            latents = process.step(latents, hidden[:, :2], hidden[:, 2:], t, noise)
    # the length of φ is kept from 0 by 1e-8
    np.testing.assert_allclose(found, np.tanh(latents), atol=1e-6)
    assert np.ptp(found) > 0.2


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_the_multiplier_moves_as_adam_on_its_logarithm_does(rho):
    violations = 20.0 * np.random.default_rng(4).normal(size=200) + 5.0
    scheduler = AdamLogDual(3e-2, initial=math.log(2.0))
    scheduler = Augmented(scheduler, rho) if rho else scheduler
    state, found, effective = scheduler.init(), [], []
    for violation in violations:
        before = state.inner.multiplier if rho else 0.0
        state, strength = scheduler.update(state, float(violation))
        found.append(state.inner.multiplier if rho else strength)
        effective.append((strength, penalty(np.array(violation), before, rho)[1]))
    np.testing.assert_allclose(found, multipliers(violations, initial=math.log(2.0), rate=3e-2), rtol=1e-9)
    if rho:
        np.testing.assert_allclose(*zip(*effective, strict=True), rtol=1e-9)


# The package inside a SAC that trains. Rewards, costs and ends are functions of the step, so they can be told anew.


class Plain(gym.Env):
    """A point that actions push about; falling off the edge ends an episode, and 25 steps truncate it."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (3,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
    START = 9.0

    @staticmethod
    def reward(observations, actions):
        return observations[..., 0] - np.square(actions).sum(axis=-1)

    @staticmethod
    def cost(observations, actions):
        return np.abs(observations[..., 1]) + np.abs(actions[..., 0])

    @staticmethod
    def fallen(observations):
        return observations[..., 0] > 1.2

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._steps = np.zeros(2), 0
        return np.array([0.0, 0.0, self.START], np.float32), {}

    def step(self, action):
        before = np.array([*self._place, self.START if self._steps == 0 else 0.0], np.float32)
        scaled = np.asarray(action, np.float32) / 2.0
        self._place = 0.9 * self._place + 0.5 * scaled + 0.05 * self.np_random.normal(size=2)
        self._steps += 1
        after = np.array([*self._place, 0.0], np.float32)
        info = {"cost": float(self.cost(before, scaled))}
        return after, float(self.reward(before, scaled)), bool(self.fallen(after)), self._steps == 25, info


STEPS, DUAL = 120, 8
HORIZON, GAMMA = 25, 0.97


def diffused(rho, sde="ve", **settings):
    """Return a small guarded SAC whose constraint counts in the unit of the critic, as the paper's does."""
    unit = critic_unit(HORIZON, GAMMA)
    dual = AdamLogDual(3e-2, initial=MULTIPLIER)
    constraint = Constraint(
        "cost",
        limit=LIMIT / unit,
        scheduler=Augmented(dual, rho) if rho else dual,
        scale=settings.pop("scale", 1.0) / unit,
    )
    policy = {"sde": sde, "net_arch": {"pi": [32, 32], "qf": [24, 24]}}
    sac = {"learning_starts": 100, "batch_size": 64, "gamma": GAMMA, "seed": 0, "device": DEVICE, "ent_coef": 0.0}
    model = SAC(DiffusionPolicy, Plain(), policy_kwargs=policy, **sac | settings)
    critics = Ensemble(hidden=(24, 24), activation="silu", learning_rate=1e-3)
    return wrap(model, Guard(constraint), cost_critic=critics, horizon=HORIZON, dual_interval=DUAL)


def networks(ensemble, activation, unit=1.0):
    """Return the members of a batched ensemble as perceptrons of the reference."""
    weights, biases = ([of_tensor(each) for each in kind] for kind in (ensemble.weights, ensemble.biases))
    scale = [1.0] * (len(weights) - 1) + [unit]
    return [
        MLP([(w[m] * s, b[m, 0] * s) for w, b, s in zip(weights, biases, scale, strict=True)], activation)
        for m in range(ensemble.members)
    ]


def judges(model):
    """Return the critics of rewards and of costs as they are now."""
    critic = safety_critic(model).critic
    unit = float(safety_critic(model).units[0])
    return networks(model.critic.q_networks, relu), networks(critic.network.perceptrons, silu, unit)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("rho", [0.0, RHO])
def test_energies_and_their_slopes_are_those_of_the_models_critics(rho, scale):
    """ρ counts per violation scale, so in the critic's unit it is ρ / scale."""
    model = diffused(rho, scale=scale)
    seams, critic = callback_of(model).critic._seams, safety_critic(model).critic
    model.policy.double()
    critic.network.double()
    # preprocessing ends in float32, and there is nothing to preprocess
    model.critic.extract_features = lambda observations, extractor: observations
    critic.network.encoder = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.critic.parameters(), *critic.network.parameters()]:
            parameter.mul_(2.0)  # at their first weights they are nearly flat
    observations = torch.randn(48, 3, generator=generator, dtype=torch.float64).to(DEVICE)
    samples = torch.randn(4, 48, 2, generator=generator, dtype=torch.float64).to(DEVICE)
    energies, gradients = seams._slopes(observations, samples)
    rewarded, costly = judges(model)
    exact = [
        reference_energy(rewarded, costly, observations.cpu().numpy(), actions.cpu().numpy(), rho=rho / scale)
        for actions in samples
    ]
    violated = risk(*evaluate(costly, observations.cpu().numpy(), samples[0].cpu().numpy()), 1.0)[0] > LIMIT
    assert 0.05 < violated.mean() < 0.95, "both sides of the limit are to be seen"
    exact_energies, exact_gradients = map(np.stack, zip(*exact, strict=True))
    # the critic's unit is a float32
    np.testing.assert_allclose(energies.cpu().numpy(), exact_energies, rtol=1e-6, atol=1e-7)
    target = algd.score_target(energies, gradients).cpu().numpy()
    # a slope whose weight is below 1e-9 is left out
    np.testing.assert_allclose(target, score_target(exact_energies, exact_gradients, 1.0), rtol=1e-6, atol=1e-6)


class Watched:
    """Notes what the critics of a guarded model are told in a gradient step, and what they are before it."""

    def __init__(self, model):
        self.model, self.noted = model, {}
        self._update = safety_critic(model).critic.update
        safety_critic(model).critic.update = self._noting
        model.critic_target.register_forward_hook(self._asked)

    def _noting(self, batch):
        host = safety_critic(self.model)
        costly = judges(self.model)[1]
        values = evaluate(costly, of_tensor(batch.observations), of_tensor(batch.actions))
        self.noted |= {
            "batch": batch,
            "costly": costly,
            "cost_targets": networks(host.critic.target.perceptrons, silu, float(host.units[0])),
            "risk": float(risk(*values, host.critic.settings.kappa)[0].mean()),
        }
        self._update(batch)

    def _asked(self, module, args, output):
        self.noted |= {"rewarded": judges(self.model)[0], "targets": networks(module.q_networks, relu)}

    def step(self):
        """Train once and return what was noted."""
        self.model.train(gradient_steps=1, batch_size=64)
        return self.noted


def trained(**settings):
    model = diffused(RHO, **settings)
    model.learn(STEPS)
    return model


def test_critics_learn_from_the_references_targets_and_a_time_limit_ends_nothing():
    model = trained()
    watched = Watched(model)
    safety_critic(model).critic.take_loss()
    buffer = model.replay_buffer
    stored = slice(0, buffer.pos)
    dearest = Plain.cost(buffer.observations[stored], buffer.actions[stored]).max()
    for _ in range(5):
        noted = watched.step()
        batch, targets = noted["batch"], noted["targets"]
        here, there = of_tensor(batch.observations), of_tensor(batch.next_observations)
        actions, following = of_tensor(batch.actions), of_tensor(batch.next_actions)
        assert np.all(there[:, 2] != Plain.START), "what follows a last step is not the next episode's first"
        ended = Plain.fallen(there)
        wanted = reward_targets(Plain.reward(here, actions), ended, GAMMA, evaluate(targets, there, following)[0])
        errors = evaluate(noted["rewarded"], here, actions)[0] - wanted
        logged = model.logger.name_to_value["train/critic_loss"]
        # float32 against float64
        assert logged == pytest.approx(0.5 * np.square(errors).mean(axis=1).sum(), rel=1e-4)
        following_costs = evaluate(noted["cost_targets"], there, following)[0]
        wanted = cost_targets(Plain.cost(here, actions), ended, GAMMA, following_costs, dearest)
        errors = (evaluate(noted["costly"], here, actions)[0] - wanted) / float(safety_critic(model).units[0])
        assert safety_critic(model).critic.take_loss() == pytest.approx(np.square(errors).mean(), rel=1e-4)
    assert buffer.timeouts[stored].any(), "no episode was truncated"
    assert Plain.fallen(buffer.next_observations[stored]).any(), "and none ended"
    alive = evaluate(targets, there, following)[0].min(axis=0)
    assert np.abs(alive[~ended]).max() > 0.1, "what follows is worth nothing yet"
    assert following_costs.min() < 0.0 < following_costs.max(), "an expectation below 0 is to be seen"


@pytest.mark.parametrize("sde", ["ve", "ddpm"])
def test_the_actor_descends_the_mean_energy_and_the_weighted_score_loss(sde):
    model = diffused(RHO, sde)
    noted = {}
    # This hook was registered after the guard's, and the gradient SAC left is noted before it.
    seams = callback_of(model).critic._seams
    slopes = seams._slopes

    def noting(observations, samples):
        noted["samples"], noted["sac"] = samples, [p.grad.clone() for p in model.actor.parameters()]
        return slopes(observations, samples)

    def stepping(optimizer, args, kwargs):
        noted["all"] = [p.grad.clone() for p in model.actor.parameters()]
        noted["judges"] = judges(model)
        noted["actor"] = copy.deepcopy(model.actor.state_dict())

    seams._slopes = noting
    model.learn(STEPS)
    model.actor.optimizer.register_step_pre_hook(stepping)
    generator = torch.Generator(DEVICE)
    generator.set_state(seams._generator.get_state())
    acted = []
    model.critic.register_forward_hook(lambda module, args, output: acted.append(args))
    multiplier = callback_of(model).guard.state_dict()["constraints"]["cost"]["state"]["inner"]["multiplier"]
    model.train(gradient_steps=1, batch_size=64)
    observations, actions = map(of_tensor, acted[-1])
    settings = {"multiplier": multiplier, "kappa": 1.0}
    mean = reference_energy(*noted["judges"], observations, actions, **settings)[0].mean()
    # float32 against float64
    assert model.logger.name_to_value["train/actor_loss"] == pytest.approx(mean, rel=1e-4)

    path, weight = model.actor.path, model.policy.score_matching.weight
    steps = torch.randint(5, (64,), generator=generator, device=DEVICE)
    noise = torch.randn(4, 64, 2, generator=generator, device=DEVICE)
    visited = path.actions[steps, torch.arange(64, device=DEVICE)]
    spreads = torch.tensor(
        ve_sigmas(5) if sde == "ve" else np.sqrt(1.0 - DDPM(5).bars), dtype=torch.float32, device=DEVICE
    )
    samples = visited + spreads[steps, None] * noise
    torch.testing.assert_close(noted["samples"], samples)
    energies, gradients = zip(
        *(reference_energy(*noted["judges"], observations, of_tensor(each), **settings) for each in samples),
        strict=True,
    )
    target = torch.from_numpy(score_target(np.stack(energies), np.stack(gradients), 1.0)).float().to(DEVICE)
    model.actor.load_state_dict(noted["actor"])  # as it was when the loss was taken
    scores = model.actor.scores(path.observations, visited, steps)
    loss = weight * (scores - target).square().mean()
    expected = torch.autograd.grad(loss, list(model.actor.parameters()))
    for before, after, gradient in zip(noted["sac"], noted["all"], expected, strict=True):
        # float32; gradients of the mean energy are of order 1
        torch.testing.assert_close(after - before, gradient, rtol=1e-3, atol=1e-5)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3


def test_the_multiplier_moves_on_the_mean_risk_of_replayed_actions():
    model = diffused(RHO)
    guard, watched, risks, decisions = callback_of(model).guard, Watched(model), [], []
    update = safety_critic(model).critic.update

    def noting(batch):
        update(batch)
        risks.append(watched.noted["risk"])

    safety_critic(model).critic.update = noting

    class Decisions(BaseCallback):
        def _on_step(self):
            if guard.decision is not None and (not decisions or decisions[-1] is not guard.decision):
                decisions.append(guard.decision)
            return True

    model.learn(100 + 5 * DUAL, callback=Decisions())
    assert len(decisions) == 4  # the fifth comes when the next rollout ends
    means = np.array(risks)[: 4 * DUAL].reshape(4, DUAL).mean(axis=1)
    found = [decision.constraints["cost"] for decision in decisions]
    unit = critic_unit(HORIZON, GAMMA)
    np.testing.assert_allclose([each.cost * unit for each in found], means, rtol=1e-4)  # float32 against float64
    exact = multipliers(means - LIMIT, initial=MULTIPLIER, rate=3e-2)
    for index, each in enumerate(found):
        before = exact[index - 1] if index else MULTIPLIER
        assert each.multiplier == pytest.approx(penalty(means[index] - LIMIT, before, RHO)[1], rel=1e-3)
