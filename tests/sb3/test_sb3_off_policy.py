"""What an off-policy host is trained on, and when its guard decides."""

import math

import numpy as np
import pytest
import torch
from devices import DEVICE
from sb3_envs import Drift, callback_of, learn, parameters, same, vec
from sb3_hosts import ACTORS, GREEDY, guarded, host
from stable_baselines3 import DDPG, DQN, SAC, TD3

from guardrails import AttachError, Constraint, Dial, Gate, Guard, Require, Rollout
from guardrails.competence import ActionVariance, CriticCalibration, RewardLevel
from guardrails.critic import critic_unit
from guardrails.schedulers import BUILTIN, PID, WRAPPERS, AdaptiveKL, AugmentedLagrangian, Fixed
from guardrails_sb3 import safety_critic, wrap


def psi(kind, risks, limit, scale, unit):
    """The documented penalty, in float64: λ (Q_c - h), or ψ with ρ per violation scale."""
    beyond = risks - limit * unit
    if kind == "fixed":
        return 0.7 * beyond
    lam, rho = 0.3, 2.0 / (scale * unit)
    return (np.maximum(0.0, lam + rho * beyond) ** 2 - lam**2) / (2.0 * rho)


FURTHER = {"cap": {"maximum": 3.0}, "rate_limit": {"max_change": 0.2}, "warmup": {"updates": 2}}

SCHEDULERS = {
    "fixed": lambda: Fixed(0.7),
    "augmented": lambda: AugmentedLagrangian(2.0, initial=0.3, learning_rate=1e-9),
}


@pytest.mark.parametrize("scheduler", ["fixed", "augmented"])
@pytest.mark.parametrize("kind", ACTORS)
def test_the_actor_is_trained_on_q_less_the_documented_penalty(kind, scheduler):
    model = host(kind, gamma=0.95)
    constraint = Constraint("cost", limit=2.0, scheduler=SCHEDULERS[scheduler](), scale=4.0)
    guarded(model, constraint)
    compared = []
    critic, unit = safety_critic(model).critic, critic_unit(9, 0.95)

    def compare(observations, actions, output):
        with torch.no_grad():
            raw = type(model.critic).forward(model.critic, observations, actions)
            risks = critic.risk(observations, actions).cpu().double().numpy()
        if kind in (TD3, DDPG):
            raw, output = raw[0], output
        elif isinstance(output, tuple):
            raw, output = torch.cat(raw, dim=1), torch.cat(output, dim=1)
        taken_off = (raw - output.detach()).cpu().double().numpy().reshape(len(risks), -1)
        wanted = np.broadcast_to(psi(scheduler, risks, 2.0, 4.0, unit)[:, None], taken_off.shape)
        np.testing.assert_allclose(taken_off, wanted, rtol=1e-3, atol=1e-5)  # differences of float32
        compared.append(np.abs(taken_off).max())

    if kind in (TD3, DDPG):
        ours = model.critic.q1_forward
        model.critic.q1_forward = lambda obs, actions: _tell(compare, obs, actions, ours(obs, actions))
    else:
        model.critic.register_forward_hook(
            lambda module, args, output: compare(*args, output) if args[1].requires_grad else None
        )
    model.learn(90)
    assert len(compared) > 5
    assert max(compared) > 0.01


def _tell(compare, observations, actions, output):
    if actions.requires_grad:
        compare(observations, actions, output)
    return output


@pytest.mark.parametrize("name", [*BUILTIN, *WRAPPERS])
def test_every_scheduler_of_the_core_weighs_the_critics_cost_by_its_multiplier(name):
    inner = PID(kp=0.5)
    scheduler = BUILTIN[name]() if name in BUILTIN else WRAPPERS[name](inner, **FURTHER.get(name, {}))
    model = guarded(host(SAC, gamma=0.95), Constraint("cost", limit=2.0, scheduler=scheduler, scale=4.0))
    guard, own = callback_of(model).guard, safety_critic(model)
    for _ in range(6):
        guard.step(Rollout(rewards=[0.0, 0.0], costs={"cost": [5.0, 7.0]}))
    multiplier = guard.multipliers["cost"]
    assert multiplier > 0.0
    at_limit = torch.full((1, 1), own.limit(), dtype=torch.float64)
    slopes = []
    for risk in (0.5 * at_limit, at_limit, 3.0 * at_limit):
        risk.requires_grad_()
        own.penalty(risk).sum().backward()
        slopes.append(risk.grad.item())
    if "augmented" in name:  # λ + ρ v, with ρ per violation scale: the slope grows by ρ (2 * 2.0) / 4.0 from d to 3 d
        assert slopes[2] - slopes[1] == pytest.approx(4.0 / 4.0)
        assert slopes[1] > slopes[0]
    else:
        assert slopes == pytest.approx([multiplier] * 3)


@pytest.mark.parametrize("scheduler", [AdaptiveKL(initial=0.3), Fixed(0.3)])
def test_the_weight_of_the_critics_cost_is_the_multiplier_also_where_the_limit_has_moved(scheduler):
    gate = Gate(Require(RewardLevel(reference=1.0), at_least=0.5), rungs=1, dwell=0, confidence=0.5)
    model = guarded(host(SAC, gamma=0.95), Constraint("cost", limit=gate.between(2.0, 8.0), scheduler=scheduler))
    guard, own = callback_of(model).guard, safety_critic(model)
    for limit in (2.0, 8.0):
        assert own.limit() == pytest.approx(limit * critic_unit(9, 0.95))
        risk = torch.full((1, 1), own.limit(), dtype=torch.float64, requires_grad=True)
        penalty = own.penalty(risk)
        penalty.sum().backward()
        assert penalty.item() == pytest.approx(0.0, abs=1e-9)
        assert risk.grad.item() == pytest.approx(guard.multipliers["cost"])
        while guard.constraints[0].bound < 8.0:
            guard.step(Rollout(rewards=[9.0] * 20, lengths=[9.0] * 20, costs={"cost": [5.0] * 20}))


@pytest.mark.parametrize("kind", GREEDY)
def test_discrete_hosts_choose_by_q_less_penalty_and_bootstrap_from_that_choice(kind):
    model = guarded(host(kind, gamma=0.95))
    critic, unit = safety_critic(model).critic, critic_unit(9, 0.95)
    network, target = (
        (model.q_net, model.q_net_target) if kind is DQN else (model.quantile_net, model.quantile_net_target)
    )
    compared, trained = [], []

    def scores(module, observations, on_target):
        with torch.no_grad():
            raw = type(module).forward(module, observations)
            risks = critic.risks_of_all(observations, target=on_target)[..., 0].cpu().double().numpy()
        mean = (raw if raw.dim() == 2 else raw.mean(dim=1)).cpu().double().numpy()
        return raw, mean - psi("fixed", risks, 2.0, 2.0, unit)

    ours = critic.update
    before = {}

    def update(batch):  # the target is asked before this moves it
        before["scores"] = scores(target, batch.next_observations, True)
        ours(batch)
        raw, score = before["scores"]
        chosen = torch.as_tensor(score.argmax(axis=1), device=DEVICE)
        assert torch.equal(batch.next_actions[:, 0], chosen)
        wanted = raw.gather(-1, chosen.view(-1, *[1] * (raw.dim() - 1)).expand(*raw.shape[:-1], 1)).expand_as(raw)
        before["wanted"] = wanted

    critic.update = update

    def asked(module, args, output):
        if "wanted" in before:
            torch.testing.assert_close(output, before.pop("wanted"))
            compared.append(len(output))

    target.register_forward_hook(asked)
    network.register_forward_hook(
        lambda module, args, output: (
            trained.append(torch.equal(output, type(module).forward(module, *args)))
            if torch.is_grad_enabled()
            else None
        )
    )
    model.learn(90)
    assert len(compared) == model._n_updates > 5
    assert len(trained) > 5
    assert all(trained), "the host's own network must go on learning the reward alone"
    rows = np.random.default_rng(0).uniform(-1, 1, size=(64, 3))
    _, score = scores(network, torch.as_tensor(rows), False)
    assert np.array_equal(model.predict(rows, deterministic=True)[0], score.argmax(axis=1))


@pytest.mark.parametrize("kind", [*ACTORS, *GREEDY])
def test_a_multiplier_of_zero_leaves_training_bit_for_bit_as_unguarded(kind):
    plain, watched = host(kind), host(kind)
    guarded(watched, Constraint("cost", limit=2.0, scheduler=Fixed(0.0)))
    expected = parameters(learn(plain, 120))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert same(expected, parameters(learn(watched, 120)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert safety_critic(watched).critic.updates > 10


@pytest.mark.parametrize("kind", [*ACTORS, *GREEDY])
def test_a_multiplier_above_zero_changes_what_is_learned(kind):
    plain, watched = host(kind), host(kind)
    guarded(watched, Constraint("cost", limit=0.5, scheduler=Fixed(5.0)))
    assert not same(parameters(learn(plain, 120)), parameters(learn(watched, 120)))


def test_the_penalty_of_several_constraints_is_their_sum_and_a_lower_limit_pulls_the_other_way():
    model = guarded(
        host(SAC),
        Constraint("cost", limit=2.0, scheduler=Fixed(0.7)),
        Constraint("effort", limit=1.0, sense=">=", scheduler=Fixed(2.0), scale=3.0),
    )
    own = safety_critic(model)
    risks = torch.tensor([[1.0, 0.5], [3.0, 4.0]])
    unit = critic_unit(9, 0.99)
    expected = 0.7 * (risks[:, 0] - 2.0 * unit) + 2.0 * (1.0 * unit - risks[:, 1])
    torch.testing.assert_close(own.penalty(risks), expected)
    assert own.limit("effort") == pytest.approx(unit)


def test_the_guard_decides_once_per_collection_in_which_episodes_ended_and_not_on_random_warm_up():
    env = vec(2, kind=Drift, length=5)  # episodes of 5 and of 8 steps
    model = guarded(host(SAC, env, learning_starts=30))
    guard, rows = callback_of(model).guard, []
    step = guard.step
    guard.step = lambda rollout: rows.append(rollout) or step(rollout)
    model.learn(80)
    ends = sorted({*range(5, 41, 5), *range(8, 41, 8)})
    assert [row.n_rows for row in rows] == [2 if end % 40 == 0 else 1 for end in ends if 2 * end > 30]
    assert {length for row in rows for length in row.lengths} == {5.0, 8.0}
    assert all(row.columns >= {"cost", "rewards", "infos"} for row in rows)


@pytest.mark.parametrize(("frequency", "ended"), [(80, 8), ((4, "episode"), 12)])
def test_an_episode_of_the_random_warm_up_is_left_out_however_late_the_guard_decides(frequency, ended):
    gate = Gate(Require(ActionVariance(), at_least=0.1))
    model = host(SAC, vec(1, kind=Drift, length=9), learning_starts=27, train_freq=frequency)
    guarded(model, Constraint("cost", limit=gate.between(1.0, 2.0)))
    guard, rows = callback_of(model).guard, []
    step = guard.step
    guard.step = lambda rollout: rows.append(rollout) or step(rollout)
    model.learn(80)
    assert sum(row.n_rows for row in rows) == ended - 3
    assert all(len(row.actions) == len(row.infos) == row.n_rows for row in rows)
    assert all("predicted_cost" in info for row in rows for info in row.infos)


def test_sums_of_an_episode_go_on_through_a_stopped_learn_and_begin_anew_with_the_environments():
    model = guarded(host(SAC, vec(1, kind=Drift, length=10), learning_starts=0))
    guard, lengths = callback_of(model).guard, []
    step = guard.step
    guard.step = lambda rollout: lengths.extend(rollout.lengths) or step(rollout)
    model.learn(4)
    model.learn(10, reset_num_timesteps=False)
    assert lengths == [10.0]
    model.learn(12)
    assert lengths == [10.0, 10.0]
    model.learn(3, callback=lambda locals_, globals_: model.num_timesteps < 3)
    model.learn(10, reset_num_timesteps=False)
    assert lengths == [10.0, 10.0, 10.0]


def test_the_log_names_multiplier_loss_and_calibration():
    model = guarded(host(SAC))
    model.learn(60, log_interval=10_000)
    recorded = model.logger.name_to_value
    for key in ("multiplier", "cost", "critic_loss", "critic_error", "critic_coverage"):
        assert math.isfinite(recorded[f"guardrails/cost/{key}"]), key


def test_metrics_read_trajectories_and_the_calibration_of_the_critic():
    calibration = CriticCalibration("cost", scale=9.0)
    gate = Gate(Require(calibration, at_least=0.5), Require(ActionVariance(), at_least=0.1))
    model = guarded(host(SAC), Constraint("cost", limit=gate.between(1.0, 2.0)))
    rows, own = [], callback_of(model).guard
    step = own.step
    own.step = lambda rollout: rows.append(rollout) or step(rollout)
    model.learn(90)
    assert all(each.rows > 0 and not each.failure for each in own.gates["gate"].requirements)
    missed = [abs(row.infos[0]["predicted_cost"] - row.cost("cost")[0]) for row in rows]
    assert calibration.measure(rows[0])[0] == pytest.approx(max(0.0, 1.0 - missed[0] / 9.0))
    assert min(missed) > 0.0


def test_a_guard_without_constraint_watches_and_moves_its_gate():
    gate = Gate(Require(RewardLevel(), at_least=0.5))
    model = host(SAC)
    with pytest.raises(AttachError, match="Dial 'ent_coef' has nothing to turn on SAC"):
        wrap(model, Guard(Dial("ent_coef", gate.between(1.0, 0.1))))
