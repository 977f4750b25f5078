"""Gates on a Stable-Baselines3 host: columns for metrics, dials that turn, trust earned and lost in a training."""

from pathlib import Path

import numpy as np
import pytest
from devices import DEVICE
from gymnasium import spaces
from sb3_contrib import ARS, TRPO
from sb3_envs import Drift, Gamble, callback_of, learn, parameters, same, vec
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecNormalize

from guardrails import AttachError, CompetenceMetric, Constraint, Dial, Gate, Guard, Require
from guardrails.competence import ActionVariance, CriticCalibration, FailureAvoidance
from guardrails.critic import Ensemble
from guardrails.schedulers import PID
from guardrails_sb3 import checkpoint, unwrap, wrap

SETTINGS = {"n_steps": 40, "batch_size": 40, "n_epochs": 2, "seed": 0, "device": DEVICE}


class Scripted(CompetenceMetric):
    """Scores every row of the i-th rollout by the i-th entry, 1 after the last, and keeps the rollouts."""

    name = "test.scripted"

    def __init__(self, *script, requires=("lengths",)):
        self.script, self.requires, self.seen = list(script), frozenset(requires), []

    def measure(self, rollout):
        self.seen.append(rollout)
        score = self.script[len(self.seen) - 1] if len(self.seen) <= len(self.script) else 1.0
        return np.full(rollout.n_rows, score)


def ready_gate(metric, rungs=1):
    """A gate that a few dozen perfect rows open."""
    return Gate(Require(metric, at_least=0.1), rungs=rungs, dwell=0, confidence=0.5, fall="floor")


def drift_model(guard, envs=None, kind=PPO, **settings):
    settings = {name: value for name, value in (SETTINGS | settings).items() if kind is PPO or name not in _PPO_ONLY}
    return wrap(kind("MlpPolicy", envs or vec(2, kind=Drift, length=8), **settings), guard)


_PPO_ONLY = ("batch_size", "n_epochs")


class Spied(Drift):
    """Drift that remembers the actions it was given."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.received = []

    def step(self, action):
        self.received.append(float(action[0]))
        return super().step(action)


def received(model):
    return [env.unwrapped.received for env in model.env.unwrapped.envs]


def kept(metric, column):
    """The column of all rollouts that a metric has seen, episode by episode."""
    return [row for rollout in metric.seen for row in getattr(rollout, column)]


def test_actions_and_observations_are_those_of_each_episode_also_across_rollouts():
    metric = Scripted(requires=("actions", "observations"))
    gate = Gate(Require(metric, at_least=0.5))
    model = drift_model(Guard(Constraint("cost", limit=gate.between(1.0, 2.0))), vec(3, kind=Spied, length=13))
    model.learn(4 * 3 * 40)
    rows = list(zip(kept(metric, "actions"), kept(metric, "observations"), strict=True))
    lengths = [int(length) for rollout in metric.seen for length in rollout.lengths]
    assert sorted(set(lengths)) == [13, 16, 19]
    for (actions, observations), length in zip(rows, lengths, strict=True):
        assert actions.shape == (length, 1)
        assert observations.shape == (length, 2)
        places = observations[:, 0]
        assert np.allclose(places[1:], 0.9 * places[:-1] + 0.3 * actions[:-1, 0], atol=1e-5)  # float32
        assert np.allclose(observations[:, 1], np.arange(length) / length)
    first = [actions[:, 0] for (actions, _), length in zip(rows, lengths, strict=True) if length == 13]
    assert np.allclose(np.concatenate(first), received(model)[0][: 13 * len(first)])


def test_nothing_is_kept_where_no_metric_reads_it(tmp_path):
    model = drift_model(Guard(Constraint("cost", limit=1.0))).learn(80)
    model.save(tmp_path / "run.zip")
    assert not [name for name in checkpoint.read(tmp_path / "run.zip")[1] if "action" in name or "observ" in name]
    gate = Gate(Require(ActionVariance(), at_least=0.5))
    model = drift_model(Guard(Constraint("cost", limit=gate.between(1.0, 2.0))))
    model.learn(78)
    model.save(tmp_path / "run.zip")
    assert {name for name in checkpoint.read(tmp_path / "run.zip")[1] if name.startswith("traj")} == {
        "trajectories.actions.1"  # of 40 steps, episodes of 8 end together with the rollout, of 11 do not
    }


def test_a_learn_that_was_stopped_leaves_no_half_trajectories_for_the_next():
    metric = Scripted(requires=("actions",))
    guard = Guard(Constraint("cost", limit=Gate(Require(metric, at_least=0.5)).between(1.0, 2.0)))
    model = drift_model(guard, vec(2, kind=Drift, length=25))
    model.learn(80, callback=lambda locals_, globals_: model.num_timesteps < 20)
    model.learn(80)
    assert [len(actions) for actions in kept(metric, "actions")] == [25, 28]
    assert metric.seen[0].lengths.tolist() == [25, 28]


def test_action_variance_tells_a_steady_policy_from_a_shaky_one():
    scores = []
    for log_std in (-4.0, 1.0):
        gate = Gate(Require(ActionVariance(), at_least=0.5))
        guard = Guard(Constraint("cost", limit=gate.between(1.0, 2.0)))
        drift_model(guard, policy_kwargs={"log_std_init": log_std}).learn(160)
        scores.append(guard.decision.gates["gate"].requirements[0].mean)
    assert scores[0] > 0.98
    assert scores[1] < 0.5  # actions are mostly cut to one end or the other


def test_discrete_actions_are_a_column_too_and_dict_observations_are_not():
    metric = Scripted(requires=("actions",))
    gate = Gate(Require(metric, at_least=0.5))
    guard = Guard(Constraint("cost", limit=gate.between(1.0, 2.0)))
    wrap(PPO("MlpPolicy", vec(2, length=8), **SETTINGS), guard).learn(80)
    costs = [cost for rollout in metric.seen for cost in rollout.costs["cost"]]
    assert [actions.sum() for actions in kept(metric, "actions")] == costs
    assert {actions.shape[1] for actions in kept(metric, "actions")} == {1}

    gate = Gate(Require(Scripted(requires=("observations",)), at_least=0.5))
    model = PPO("MultiInputPolicy", vec(2, observation="dict"), **SETTINGS)
    with pytest.raises(AttachError, match=r"test\.scripted.*observations.*PPO"):
        wrap(model, Guard(Constraint("cost", limit=gate.between(1.0, 2.0))))


def test_an_episode_that_is_under_way_at_a_save_is_whole_after_resuming(tmp_path):
    def guard(metric):
        return Guard(Constraint("cost", limit=Gate(Require(metric, at_least=0.5)).between(1.0, 2.0)))

    env = vec(2, kind=Drift, length=25)
    through = drift_model(guard(Scripted(requires=("actions",))), env).learn(80)
    under_way = callback_of(through).tensors()["trajectories.actions.0"].numpy()
    through.save(tmp_path / "run.zip")
    metric = Scripted(requires=("actions",))
    loaded = PPO.load(tmp_path / "run.zip", env=env, device=DEVICE, force_reset=False)
    wrap(loaded, guard(metric), resume=tmp_path / "run.zip").learn(80, reset_num_timesteps=False)
    first = kept(metric, "actions")[0]
    assert len(first) == 25
    assert np.array_equal(first[: len(under_way)], under_way)
    assert len(under_way) == 15


@pytest.mark.parametrize("kind", [PPO, A2C, TRPO])
def test_action_scale_turns_what_the_environment_gets_and_not_what_the_policy_learns_from(kind):
    metric = Scripted(0.0, 0.0, requires=("actions",))
    guard = Guard(Dial("action_scale", ready_gate(metric).between(0.25, 1.0)))
    model = drift_model(guard, vec(2, kind=Spied, length=8), kind)
    own = []

    def look(locals_, globals_):
        own.append(np.clip(locals_["actions"], -1.0, 1.0).ravel())
        return True

    model.learn(6 * 80, callback=look)
    scales = np.array(received(model)).T / np.array(own)
    assert np.allclose(scales[:80], 0.25, atol=1e-4)  # float32 ratios, of actions that may be small
    assert np.allclose(scales[-80:], 1.0)
    assert guard.dials == {"action_scale": 1.0}
    steps = np.concatenate(own).reshape(-1, 2)
    assert np.allclose(metric.seen[0].actions[0][:, 0], steps[:8, 0])
    assert np.abs(model.rollout_buffer.actions).max() > 0.9


def test_action_scale_is_about_the_centre_of_the_action_space():
    class Shifted(Spied):
        action_space = spaces.Box(2.0, 6.0, (1,), np.float32)

    guard = Guard(Dial("action_scale", ready_gate(Scripted(*[0.0] * 9)).between(0.5, 1.0)))
    model = drift_model(guard, vec(1, kind=Shifted, length=8)).learn(80)
    assert 3.0 <= min(received(model)[0]) < 3.3
    assert max(received(model)[0]) <= 5.0
    prediction = model.predict(np.array([[9.0, 0.5]], np.float32))[0]
    assert 3.0 <= prediction[0, 0] <= 5.0


def test_a_scale_of_one_trains_as_no_dial_does():
    plain = wrap(PPO("MlpPolicy", vec(2, kind=Drift, length=8), **SETTINGS), Guard(Constraint("cost", limit=1.0)))
    gate = ready_gate(Scripted(*[0.0] * 99))
    guard = Guard(Constraint("cost", limit=1.0), Dial("action_scale", gate.between(1.0, 0.5)))
    model = drift_model(guard)
    assert same(parameters(learn(plain, 240)), parameters(learn(model, 240)))


def test_predict_acts_within_the_scale_until_unwrap():
    gate = ready_gate(Scripted(*[0.0] * 99))
    model = PPO("MlpPolicy", vec(2, kind=Drift), **SETTINGS)
    observation = np.array([3.0, 0.5], np.float32)
    own = model.predict(observation, deterministic=True)[0]
    wrap(model, Guard(Dial("action_scale", gate.between(0.25, 1.0))))
    assert np.allclose(model.predict(observation, deterministic=True)[0], 0.25 * own)
    assert abs(own[0]) > 1e-3
    unwrap(model)
    assert model.predict(observation, deterministic=True)[0] == own
    assert not {"predict", "collect_rollouts", "train"} & set(vars(model))


def test_the_environment_is_left_clean_between_rollouts_and_after_an_error():
    guard = Guard(Dial("action_scale", ready_gate(Scripted(*[0.0] * 99)).between(0.25, 1.0)))
    env = VecNormalize(vec(2, kind=Spied, length=8))
    model = drift_model(guard, env)
    inner = env.unwrapped
    assert "step_async" not in vars(inner)
    model.learn(80, callback=lambda locals_, globals_: "step_async" in vars(inner))
    assert model.num_timesteps == 80
    assert "step_async" not in vars(inner)

    def fail(locals_, globals_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.learn(80, callback=fail)
    assert "step_async" not in vars(inner)


def test_action_scale_lives_with_normalisation_evaluation_checkpoints_and_set_env(tmp_path):
    guard = Guard(Dial("action_scale", ready_gate(Scripted(*[0.0] * 99)).between(0.25, 1.0)))
    model = drift_model(guard, VecNormalize(vec(2, kind=Spied, length=8)))
    apart = vec(1, kind=Spied, length=8)
    callbacks = [
        EvalCallback(VecNormalize(apart, training=False), eval_freq=20, n_eval_episodes=1, warn=False, verbose=0),
        CheckpointCallback(save_freq=20, save_path=str(tmp_path), save_vecnormalize=True),
    ]
    model.learn(80, callback=callbacks)
    assert len(list(tmp_path.glob("*.pkl"))) == 2
    assert 0.0 < np.abs(apart.envs[0].unwrapped.received).max() <= 0.25
    model.set_env(VecNormalize(vec(2, kind=Spied, length=8)))
    model.learn(80)
    assert 0.2 < np.abs(received(model)).max() <= 0.25


def test_unwrap_inside_a_rollout_ends_the_scaling_at_once():
    guard = Guard(Dial("action_scale", ready_gate(Scripted(*[0.0] * 99)).between(0.01, 1.0)))
    model = drift_model(guard, vec(1, kind=Spied, length=8))

    def leave(locals_, globals_):
        if guard.host and model.num_timesteps == 20:
            unwrap(model)
        return True

    model.learn(40, callback=leave)
    assert np.abs(received(model)[0][:20]).max() <= 0.01
    assert np.abs(received(model)[0][20:]).max() > 0.1
    assert "step_async" not in vars(model.env.unwrapped)


def test_dials_that_could_not_turn_are_refused_and_leave_the_model_alone():
    gate = ready_gate(Scripted())

    def refused(match, name, tight, loose, model=None):
        model = model or PPO("MlpPolicy", vec(1, kind=Drift), **SETTINGS)
        before, guard = (
            sorted(vars(model)),
            Guard(Constraint("cost", limit=1.0), Dial(name, gate.between(tight, loose))),
        )
        with pytest.raises(AttachError, match=match):
            wrap(model, guard)
        assert sorted(vars(model)) == before
        assert guard.host is None

    refused(r"continuous actions, but this PPO acts in Discrete\(2\)", "action_scale", 0.5, 1.0, _gambling())
    refused(r"between 0\.5 and 2; give values in \(0, 1\]", "action_scale", 0.5, 2.0)
    refused(r"between 0 and 1; give values in \(0, 1\]", "action_scale", 0.0, 1.0)
    refused("'target_kl' reaches 0", "target_kl", 0.0, 0.1)
    refused("Dial 'clip_range' has nothing to turn on PPO. Dials here: action_scale, ent_coef", "clip_range", 0.1, 0.2)
    trpo = TRPO("MlpPolicy", vec(1, kind=Drift), n_steps=40, device=DEVICE)
    refused("Dial 'ent_coef' has nothing to turn on TRPO", "ent_coef", 0.0, 0.1, trpo)
    model = PPO("MlpPolicy", VecNormalize(vec(1, kind=Drift)), **SETTINGS)
    model.env.unwrapped.action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)
    refused("a wrapper in between changes them", "action_scale", 0.5, 1.0, model)


def _gambling():
    return PPO("MlpPolicy", vec(1, kind=Gamble), **SETTINGS)


@pytest.mark.parametrize(("kind", "policy"), [(PPO, "MlpPolicy"), (ARS, "LinearPolicy")])
def test_a_metric_of_a_critics_predictions_is_refused_where_there_is_no_critic(kind, policy):
    def guard(**settings):
        gate = ready_gate(CriticCalibration("cost", scale=10.0, **settings))
        return Guard(Constraint("cost", limit=gate.between(1.0, 5.0)))

    def model():
        own = SETTINGS if kind is PPO else {"seed": 0}
        return kind(policy, vec(2, kind=Drift, length=8), **own)

    for settings in ({}, {"predicted": "predicted_cost/cost"}):
        with pytest.raises(AttachError, match=r"what a safety critic predicted.*CriticCalibration\(predicted=...\)"):
            wrap(model(), guard(**settings))
    wrap(model(), guard(predicted="foreseen"))
    if kind is PPO:
        judged = guard()
        wrap(model(), judged, cost_critic=Ensemble(members=1, kappa=0.0, hidden=(8,)), horizon=8).learn(320)
        (requirement,) = judged.gates["gate"].requirements
        assert requirement.failure == ""
        assert requirement.rows > 0


@pytest.mark.parametrize(
    ("kind", "name"), [(PPO, "ent_coef"), (PPO, "target_kl"), (A2C, "ent_coef"), (TRPO, "target_kl")]
)
def test_coefficients_turn_while_the_host_trains_and_stay_its_own_elsewhere(tmp_path, kind, name):
    guard = Guard(Dial(name, ready_gate(Scripted(0.0)).between(0.5, 0.25)))
    model = drift_model(guard, kind=kind)
    own, seen, update = getattr(model, name), [], model.policy.optimizer.zero_grad

    def note(*args, **kwargs):
        seen.append(getattr(model, name))
        return update(*args, **kwargs)

    model.policy.optimizer.zero_grad = note
    model.learn(8 * 80)
    assert seen[0] == 0.5
    assert seen[-1] == 0.25
    assert set(seen) == {0.5, 0.25}
    assert getattr(model, name) == own
    model.save(tmp_path / "run.zip")
    assert load_from_zip_file(tmp_path / "run.zip")[0][name] == own


def test_a_larger_entropy_coefficient_changes_what_is_learned():
    def weights(coefficient):
        guard = Guard(Dial("ent_coef", ready_gate(Scripted(*[0.0] * 99)).between(coefficient, 1.0)))
        return parameters(learn(drift_model(guard), 80))

    assert not same(weights(0.0), weights(0.1))
    assert same(weights(0.1), weights(0.1))


def test_a_gate_resumes_where_it_stood_and_its_dials_are_in_force_at_once(tmp_path):
    def guard():
        gate = ready_gate(FailureAvoidance(cost="cost", level=1e9), rungs=10)
        scale = Dial("action_scale", gate.between(0.2, 1.0))
        return Guard(Constraint("cost", limit=gate.between(1.0, 5.0), scheduler=PID(kp=0.3)), scale)

    through = drift_model(guard(), vec(2, kind=Spied, length=8)).learn(5 * 80)
    through.save(tmp_path / "run.zip")
    state, scale = callback_of(through).guard.state_dict(), callback_of(through).guard.dials["action_scale"]
    assert 0.2 < scale < 1.0

    def go_on(model):
        model.set_env(vec(2, kind=Spied, length=8))
        model.set_random_seed(7)
        return model.learn(240, reset_num_timesteps=False)

    own = guard()
    loaded = PPO.load(tmp_path / "run.zip", env=vec(2, kind=Spied, length=8), device=DEVICE)
    assert own.dials["action_scale"] == 0.2
    wrap(loaded, own, resume=tmp_path / "run.zip")
    assert own.state_dict() == state
    assert own.dials["action_scale"] == scale
    go_on(through), go_on(loaded)
    assert received(loaded) == received(through)
    assert scale - 0.05 < np.abs(np.array(received(loaded))[:, :40]).max() <= scale + 1e-6
    assert own.state_dict() == callback_of(through).guard.state_dict()
    assert same(parameters(loaded), parameters(through))


def test_a_gate_opens_closes_within_a_few_episodes_of_a_change_and_opens_again(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from road import Road

    env = Road(32)
    gate = Gate(Require(FailureAvoidance("failed"), at_least=0.9), rungs=3, dwell=128, fall="floor")
    pid = PID(kp=0.3, ki=0.02, kd=0.0)
    guard = Guard(Constraint("distance", limit=gate.between(4.0, 20.0), scheduler=pid))
    rungs, limits, change, episodes = [], [], 55, []

    def measure(rollout):
        decision = step(rollout)
        rungs.append(decision.gates["gate"].rung)
        limits.append(decision.constraints["distance"].limit)
        episodes.append(rollout.n_rows)
        if decision.step == change:
            env.gain = 0.0
        return decision

    step, guard.step = guard.step, measure
    settings = {"n_steps": 50, "batch_size": 400, "n_epochs": 8, "learning_rate": 2e-3, "gamma": 0.5}
    policy = {"net_arch": [32, 32], "log_std_init": -0.7}
    model = PPO("MlpPolicy", env, seed=0, device=DEVICE, ent_coef=0.005, policy_kwargs=policy, **settings)
    wrap(model, guard).learn(1600 * 110)
    assert rungs[0] == 0
    assert rungs[change - 1] == 3
    closed = rungs.index(0, change)
    assert sum(episodes[change : closed + 1]) <= 128
    assert limits[closed] == 4.0
    assert max(rungs[closed:]) > 0
