"""Continuous action sets on real hosts: enforced where the model acts, learned from soundly, counted, resumed."""

import copy
import logging

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from devices import DEVICE
from gymnasium import spaces
from sb3_contrib import TRPO, RecurrentPPO
from sb3_envs import Drift, callback_of, learn, parameters, same, vec
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from guardrails import ActionSet, AttachError, CompetenceMetric, Constraint, Dial, Gate, Guard, Require, RolloutError
from guardrails.competence import FailureAvoidance
from guardrails.ledger import read, verify
from guardrails.schedulers import Fixed
from guardrails_sb3 import (
    ActionBox,
    CriticShield,
    Projection,
    RateLimit,
    SafeActions,
    evaluate_guarded,
    unwrap,
    wrap,
)
from guardrails_sb3.wrap import attachment_of

SETTINGS = {"n_steps": 40, "batch_size": 40, "n_epochs": 2, "seed": 0, "device": DEVICE}
OFF_POLICY = {"learning_starts": 20, "buffer_size": 400, "batch_size": 16, "seed": 0, "device": DEVICE}
OFF_POLICY |= {"train_freq": 4}
PLACE = Drift.observation_space


class Spied(Drift):
    """Drift that remembers the actions it was given, episode by episode."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.episodes = []

    def reset(self, **settings):
        self.episodes.append([])
        return super().reset(**settings)

    def step(self, action):
        self.episodes[-1].append(float(action[0]))
        return super().step(action)


class Editing(Spied):
    """Edits the array that it is given as its action, once it has taken a step."""

    def step(self, action):
        outcome = super().step(action)
        action *= 5.0
        return outcome


class Scripted(CompetenceMetric):
    """Scores every row of the i-th rollout by the i-th entry, 1 after the last."""

    name = "test.scripted"
    requires = frozenset({"lengths"})

    def __init__(self, *script):
        self.script, self.calls = list(script), 0

    def measure(self, rollout):
        self.calls += 1
        return np.full(rollout.n_rows, self.script[self.calls - 1] if self.calls <= len(self.script) else 1.0)


def opening(*script, name="gate"):
    """A gate of one rung that a few dozen perfect rows open."""
    return Gate(Require(Scripted(*script), at_least=0.1), rungs=1, dwell=0, confidence=0.5, fall="floor", name=name)


def closed(name="gate"):
    return opening(*[0.0] * 999, name=name)


def model_of(*parts, kind=PPO, env=None, **settings):
    basic = SETTINGS if issubclass(kind, PPO) else {k: v for k, v in SETTINGS.items() if k not in _PPO_ONLY}
    return wrap(kind("MlpPolicy", env or vec(2, kind=Spied, length=8), **{**basic, **settings}), Guard(*parts))


_PPO_ONLY = ("batch_size", "n_epochs")


def executed(model):
    return [env.unwrapped.episodes for env in model.env.unwrapped.envs]


def joined(episodes):
    return [action for episode in episodes for action in episode]


def flat(model):
    return np.array([action for env in executed(model) for episode in env for action in episode])


def changes(model):
    """Largest change from one action to the next within an episode."""
    pairs = [np.abs(np.diff(episode)) for env in executed(model) for episode in env if len(episode) > 1]
    return np.concatenate(pairs).max()


@pytest.mark.parametrize("kind", [PPO, A2C, TRPO, RecurrentPPO])
def test_no_action_outside_the_sets_reaches_an_environment_and_the_policy_learns_from_its_own(kind):
    own = []
    policy = {} if kind is not RecurrentPPO else {"policy_kwargs": {"lstm_hidden_size": 8}}
    env = vec(2, kind=Spied, length=8)
    model = kind("MlpLstmPolicy" if policy else "MlpPolicy", env, n_steps=40, seed=0, device=DEVICE, **policy)
    wrap(model, Guard(ActionBox(0.5), RateLimit(0.2)))
    model.learn(160, callback=lambda locals_, globals_: own.append(np.array(locals_["actions"])) or True)
    assert np.abs(flat(model)).max() <= 0.5
    assert changes(model) <= 0.2 + 1e-6  # float32 differences
    first = [abs(episode[0]) for each in executed(model) for episode in each if episode]
    assert max(first) > 0.2, "the first action of an episode is free"
    learned_from = model.rollout_buffer.actions  # shuffled by environment once it has been trained on
    assert np.array_equal(np.sort(learned_from.ravel()), np.sort(np.stack(own)[-40:].ravel()))
    assert np.abs(np.stack(own)).max() > 1.0


def test_a_guard_of_nothing_but_fixed_sets_counts_its_episodes_and_hides_no_step_from_callbacks():
    ended, steps = [0, 0, 0], []

    def look(locals_, globals_):
        steps.append(locals_["n_steps"])
        ended[(len(steps) - 1) // 40] += int(locals_["dones"].sum())
        return True

    class Looking(ConvertCallback):
        looks = False  # a name of the user's own

    model = model_of(RateLimit(0.2))
    guard, counted, step = callback_of(model).guard, [], Guard.step
    guard.step = lambda rollout: counted.append(rollout.n_rows) or step(guard, rollout)
    model.learn(240, callback=[ConvertCallback(look), counting := Looking(None)])
    assert counted == ended
    assert counting.n_calls == len(steps) == 120
    assert steps == [*range(40)] * 3


def test_log_probabilities_stay_those_of_the_actions_the_policy_drew():
    model = model_of(ActionBox(0.125), n_epochs=1, learning_rate=0.0).learn(80)
    buffer = model.rollout_buffer  # flat, once it has been trained on
    observations, actions = map(buffer.to_torch, (buffer.observations, buffer.actions))
    _, log_probabilities, _ = model.policy.evaluate_actions(observations, actions)
    assert np.allclose(log_probabilities.detach().cpu().numpy(), buffer.log_probs.ravel(), atol=1e-5)  # float32 sums
    assert np.abs(flat(model)).max() <= 0.125


def test_a_set_of_everything_trains_bit_for_bit_as_no_set_does():
    plain = wrap(PPO("MlpPolicy", vec(2, kind=Drift, length=8), **SETTINGS), Guard(Constraint("cost", limit=1.0)))
    env = vec(2, kind=Drift, length=8)
    everything = [ActionBox(1.0), RateLimit(9.0), Projection(lambda action, observation: action)]
    shielded = CriticShield(1.0, risk=lambda observations, actions: np.zeros(len(actions)))
    model = model_of(Constraint("cost", limit=1.0), *everything, shielded, env=env)
    assert same(parameters(learn(plain, 240)), parameters(learn(model, 240)))


def test_a_gate_widens_a_box_and_the_box_narrows_again_when_it_falls():
    script = [0.0] * 2 + [1.0] * 8 + [0.0] * 8
    gate = Gate(Require(Scripted(*script), at_least=0.5), rungs=1, dwell=0, confidence=0.5, fall="floor")
    model = model_of(ActionBox(gate.between(0.25, 0.75)))
    guard, widest, scales = callback_of(model).guard, [], []
    for _ in range(16):
        before = len(flat(model))
        per_env = [sum(map(len, each)) for each in executed(model)]
        scales.append(guard.dials["action_box_scale"])
        model.learn(80, reset_num_timesteps=False)
        new = [joined(each)[seen:] for each, seen in zip(executed(model), per_env, strict=True)]
        widest.append(np.abs(new).max())
        assert len(flat(model)) == before + 80
    assert set(scales) == {0.25, 0.75}
    assert scales[-1] == 0.25
    assert np.all(np.array(widest) <= np.array(scales) + 1e-6)
    assert np.array(widest)[np.array(scales) == 0.75].min() > 0.25


def test_every_info_says_what_was_changed_and_a_constraint_may_bound_it():
    seen = []
    box, rate = ActionBox(0.5, name="box"), RateLimit(0.2, name="rate")
    model = model_of(Constraint("interventions", limit=2.0, scheduler=Fixed(1.0)), box, rate)
    own = []

    def look(locals_, globals_):
        own.append(locals_["clipped_actions"].ravel())
        seen.append(locals_["infos"])
        return True

    model.learn(80, callback=look)
    sent = np.concatenate([np.array(joined(each))[:40, None] for each in executed(model)], axis=1)
    told = np.array([[info["interventions"] for info in infos] for infos in seen])
    assert np.array_equal(told, (np.array(own) != sent).astype(float))
    boxed = np.array([[info["interventions/box"] for info in infos] for infos in seen])
    assert np.array_equal(boxed, (np.abs(np.array(own)) > 0.5).astype(float))
    rated = np.array([[info["interventions/rate"] for info in infos] for infos in seen])
    assert 0.0 < rated.mean() < 1.0
    ends = [
        (step, env)
        for step, infos in enumerate(seen)
        for env, info in enumerate(infos)
        if "episode_interventions" in info
    ]
    assert len(ends) == 5 + 3  # episodes of 8 and of 11 steps
    begun = [0, 0]
    for step, env in ends:
        within = slice(begun[env], step + 1)
        counts = {"box": boxed[within, env].sum(), "rate": rated[within, env].sum(), "total": told[within, env].sum()}
        assert seen[step][env]["episode_interventions"] == counts
        begun[env] = step + 1
    decision = callback_of(model).guard.decision
    totals = [seen[step][env]["episode_interventions"]["total"] for step, env in ends]
    assert decision.constraints["interventions"].cost == pytest.approx(np.mean(totals))


def test_interventions_are_in_the_hosts_logger_per_episode_and_per_step(tmp_path):
    model = model_of(ActionBox(0.5, name="box"), env=vec(1, kind=Spied, length=8))
    own = []
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(40, callback=lambda locals_, globals_: own.append(abs(locals_["actions"].item()) > 0.5) or True)
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    for key in ("guardrails/box/", "guardrails/"):
        assert float(row[f"{key}interventions"]) == pytest.approx(8 * np.mean(own))
        assert float(row[f"{key}intervention_rate"]) == pytest.approx(np.mean(own))


def test_long_names_of_sets_do_not_break_the_console(capsys):
    names = ("left_arm_of_the_first_robot_a", "left_arm_of_the_first_robot_b")
    model = model_of(*(ActionBox(0.5, name=name) for name in names), verbose=1)
    model.learn(80)
    assert "guardrails/" in capsys.readouterr().out


def test_a_metric_reads_interventions_from_the_last_info_of_an_episode():
    free = FailureAvoidance(lambda info: info["episode_interventions"]["total"] > 0)
    gate = Gate(Require(free, at_least=0.5))
    model = model_of(ActionBox(gate.between(0.01, 1.0)))
    model.learn(80)
    assert callback_of(model).guard.decision.gates["gate"].requirements[0].mean == 0.0


def test_a_nominal_action_sees_the_environments_own_observations_under_normalisation():
    seen = []

    def back(observation):
        seen.append(observation.copy())
        return [-np.sign(observation[0])]

    env = VecNormalize(vec(2, kind=Spied, length=8))
    model = model_of(ActionBox(0.25, centre=back), env=env).learn(80)
    places = []
    for each in executed(model):
        for episode in each:
            place = 0.0
            for step, action in enumerate(episode):
                places.append((place, step))
                assert (-1.0 <= action <= -0.75 if place > 0 else 0.75 <= action <= 1.0) or place == 0.0
                place = np.clip(0.9 * place + 0.3 * action, -10.0, 10.0)
    observed = np.array(seen)
    assert np.allclose(np.sort(observed[:, 0]), np.sort([place for place, _ in places[: len(observed)]]), atol=1e-5)
    assert not np.allclose(env.normalize_obs(observed), observed, atol=0.1)
    seen.clear()
    raw = np.array([0.7, 0.5], np.float32)
    action, _ = model.predict(env.normalize_obs(raw))
    assert np.allclose(seen[0], raw, atol=1e-5)
    assert action[0] <= -0.75


def test_predict_is_held_to_the_sets_until_unwrap():
    model = PPO("MlpPolicy", vec(2, kind=Spied), **SETTINGS)
    observation = np.array([[9.0, 0.5]] * 40, np.float32)
    model.set_random_seed(3)
    own, _ = model.predict(observation)
    wrap(model, Guard(ActionBox(0.25)))
    model.set_random_seed(3)
    held, _ = model.predict(observation)
    assert np.array_equal(held, np.clip(own, -0.25, 0.25))
    assert np.abs(own).max() > 0.5
    single, _ = model.predict(observation[0], deterministic=True)
    assert single.shape == (1,)
    unwrap(model)
    model.set_random_seed(3)
    assert np.array_equal(model.predict(observation)[0], own)
    assert not {"predict", "collect_rollouts"} & set(vars(model))


def test_predict_takes_what_the_host_takes_and_refuses_the_rest_in_its_words():
    plain = PPO("MlpPolicy", vec(1, kind=Drift), **SETTINGS)
    held = wrap(PPO("MlpPolicy", vec(1, kind=Drift), **SETTINGS), Guard(ActionBox(0.5)))
    for observation in ([0.5, -3.0], (0.5, -3.0), [[0.5, -3.0], [1.0, 2.0]], np.array([0.5, -3.0])):
        expected, _ = plain.predict(observation, deterministic=True)
        found, _ = held.predict(observation, deterministic=True)
        assert found.shape == expected.shape
        assert np.array_equal(found, np.clip(expected, -0.5, 0.5))
    for refused in (Drift().reset(), None, "ab", np.zeros(3), [np.zeros(2), {}], {"place": np.zeros(2)}):
        errors = []
        for model in (plain, held):
            with pytest.raises(Exception) as error:
                model.predict(refused)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
    keyed = gym.wrappers.TransformObservation(Drift(), lambda each: {"place": each}, spaces.Dict({"place": PLACE}))
    held = wrap(PPO("MultiInputPolicy", keyed, **SETTINGS), Guard(ActionBox(0.5)))
    assert held.predict({"place": [0.5, -3.0]})[0].shape == (1,)


def test_a_rate_limit_holds_in_evaluate_policy_and_in_loops_that_hand_the_state_on():
    model = model_of(RateLimit(0.05))
    env = vec(2, kind=Spied, length=8)
    evaluate_policy(model, env, n_eval_episodes=6, deterministic=False, warn=False)
    counted = [episode for each in env.envs for episode in each.unwrapped.episodes[:3]]
    assert max(np.abs(np.diff(episode)).max() for episode in counted) <= 0.05 + 1e-6
    assert max(np.abs(np.diff([episode[0] for episode in counted]))) > 0.2, "a new episode begins free"
    state, actions = None, []
    for _ in range(20):
        action, state = model.predict(np.array([0.3, 0.5], np.float32), state=state)
        actions.append(action[0])
    assert np.abs(np.diff(actions)).max() <= 0.05 + 1e-6


def test_a_rate_limit_counts_from_what_was_executed_also_where_an_environment_edits_it_in_place():
    def largest(env):
        return max(np.abs(np.diff(each)).max() for each in env.unwrapped.episodes if len(each) > 1)

    model = model_of(RateLimit(0.05), env=vec(2, kind=Editing, length=8)).learn(80)
    assert changes(model) <= 0.05 + 1e-6
    evaluated = vec(1, kind=Editing, length=8)
    evaluate_policy(model, evaluated, n_eval_episodes=6, deterministic=False, warn=False)
    assert largest(evaluated.envs[0]) <= 0.05 + 1e-6
    env = SafeActions(Editing(length=8), Guard(RateLimit(0.05)))
    env.reset()
    for place in np.linspace(-1.0, 1.0, 8):
        env.step(np.array([place], np.float32))
    assert largest(env) <= 0.05 + 1e-6


def test_a_recurrent_policy_keeps_its_own_state_beside_the_sets(caplog):
    env = vec(2, kind=Spied, length=8)
    model = RecurrentPPO("MlpLstmPolicy", env, n_steps=40, seed=0, device=DEVICE, policy_kwargs={"lstm_hidden_size": 8})
    observations = np.random.default_rng(0).normal(size=(6, 2, 2)).astype(np.float32)

    def rolled():
        state, actions = None, []
        for step, rows in enumerate(observations):
            action, state = model.predict(rows, state=state, episode_start=np.full(2, step == 0), deterministic=True)
            actions.append(action)
        return np.stack(actions)

    plain = rolled()
    wrap(model, Guard(RateLimit(9.0)))
    assert np.array_equal(rolled(), plain)
    with caplog.at_level(logging.WARNING):
        model.predict(observations[0])
        assert not caplog.records
        model.predict(observations[0])
        model.predict(observations[0])
    assert len(caplog.records) == 1
    assert "without the state it returned last" in caplog.text


def test_sets_that_read_policies_nothing_of_the_model_or_environment_is_left_after_rollouts_and_errors():
    model = model_of(ActionBox(0.5), RateLimit(0.1))
    inner = model.env.unwrapped
    inside = []
    model.learn(80, callback=lambda locals_, globals_: inside.append("step_async" in vars(inner)) or True)
    assert all(inside)
    assert not {"step_async", "step_wait"} & set(vars(inner))

    def fail(locals_, globals_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.learn(80, callback=fail)
    assert not {"step_async", "step_wait"} & set(vars(inner))
    unwrap(model)
    fresh = PPO("MlpPolicy", vec(2, kind=Spied), **SETTINGS).learn(80)
    assert sorted(vars(model)) == sorted(vars(fresh))


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_rate_limit_remembers_the_action_before_an_error(kind, error):
    def fail(locals_, globals_):
        if model.num_timesteps == 2 * 23:
            raise error
        return True

    env = vec(2, kind=Spied, length=8)
    model = model_of(RateLimit(0.02), env=env) if kind is PPO else SAC("MlpPolicy", env, **OFF_POLICY)
    if kind is SAC:
        wrap(model, Guard(RateLimit(0.02)))
    with pytest.raises(error):
        model.learn(120, callback=fail)
    model.learn(80, reset_num_timesteps=False)
    assert changes(model) <= 0.02 + 1e-6


def test_unwrap_inside_a_rollout_ends_the_holding_at_once():
    model = model_of(ActionBox(0.01), env=vec(1, kind=Spied, length=8))
    guard = callback_of(model).guard

    def leave(locals_, globals_):
        if guard.host and model.num_timesteps == 20:
            unwrap(model)
        return True

    model.learn(40, callback=leave)
    assert np.abs(flat(model)[:20]).max() <= 0.01
    assert np.abs(flat(model)[20:]).max() > 0.1
    assert not {"step_async", "step_wait"} & set(vars(model.env.unwrapped))


def test_sets_apply_after_the_dial_that_scales_actions():
    scale = Dial("action_scale", closed().between(0.5, 1.0))
    own = []
    model = model_of(scale, ActionBox(0.25), env=vec(1, kind=Spied, length=8))
    model.learn(40, callback=lambda locals_, globals_: own.append(np.clip(locals_["actions"].item(), -1, 1)) or True)
    assert np.allclose(flat(model), np.clip(0.5 * np.array(own), -0.25, 0.25))
    observation = np.array([9.0, 0.5], np.float32)
    assert abs(model.predict(observation)[0][0]) <= 0.25


def test_sets_work_in_environments_of_other_processes():
    env = SubprocVecEnv([lambda: Monitor(Drift(length=8))] * 2, start_method="fork")
    efforts = []

    def look(locals_, globals_):
        efforts.extend(info["effort"] for info in locals_["infos"])
        return all("interventions" in info for info in locals_["infos"])

    model = model_of(ActionBox(0.25), env=env)
    model.learn(80, callback=look)
    env.close()
    assert len(efforts) == 80
    assert 0.2 < max(efforts) <= 0.25


def test_a_saved_zip_loads_without_the_sets_and_resumes_with_the_episode_under_way(tmp_path):
    def guard():
        ready = Gate(Require(Scripted(), at_least=0.1), rungs=4, dwell=0, confidence=0.5)
        return Guard(RateLimit(ready.between(0.02, 0.5)), Constraint("interventions", limit=3.0, scheduler=Fixed(0.5)))

    def environments():
        return vec(2, kind=Spied, length=25)

    env = environments()
    through = wrap(PPO("MlpPolicy", env, **SETTINGS), guard()).learn(160)
    through.save(tmp_path / "run.zip")
    assert not [key for key in load_from_zip_file(tmp_path / "run.zip")[0] if "collect" in key or key == "predict"]
    plain = PPO.load(tmp_path / "run.zip")
    observation = np.array([[9.0, 0.5]] * 20, np.float32)
    assert np.ptp(plain.predict(observation)[0]) > 0.5
    state = callback_of(through).guard.state_dict()

    own = guard()
    loaded = PPO.load(tmp_path / "run.zip", env=env, device=DEVICE, force_reset=False)
    wrap(loaded, own, resume=tmp_path / "run.zip")
    assert own.state_dict() == state
    assert own.dials == callback_of(through).guard.dials
    before = [len(each.unwrapped.episodes[-1]) for each in env.envs]
    assert before[0] > 0
    limit = own.dials["rate_limit_max_change"]
    loaded.learn(80, reset_num_timesteps=False)
    resumed = [each.unwrapped.episodes for each in env.envs]
    longest = max((episode for each in resumed for episode in each), key=len)
    assert len(longest) == 28
    running = [
        next(e for e in reversed(each) if len(e) > start > 0)
        for each, start in zip(resumed, before, strict=True)
        if start
    ]
    assert running
    joints = [
        abs(np.diff(episode)[start - 1]) for episode, start in zip(running, [b for b in before if b], strict=True)
    ]
    assert max(joints) <= limit + 1e-6, "the first action after resuming is held to the last one before"


def test_resuming_equals_training_through(tmp_path):
    def guard():
        return Guard(RateLimit(opening(0.0).between(0.05, 0.5)), ActionBox(0.8), Constraint("interventions", limit=1.0))

    def go_on(model):
        model.set_env(vec(2, kind=Spied, length=25))
        model.set_random_seed(7)
        return model.learn(160, reset_num_timesteps=False)

    through = wrap(PPO("MlpPolicy", vec(2, kind=Spied, length=25), **SETTINGS), guard()).learn(160)
    through.save(tmp_path / "run.zip")
    loaded = PPO.load(tmp_path / "run.zip", env=vec(2, kind=Spied, length=25), device=DEVICE)
    resumed = wrap(loaded, guard(), resume=tmp_path / "run.zip")
    assert same(parameters(go_on(through)), parameters(go_on(resumed)))
    assert executed(through) == executed(resumed)


def test_a_run_with_sets_alone_is_recorded_and_its_ledger_verified(tmp_path):
    moving, mixed = Guard(ActionBox(opening().between(0.25, 1.0))), Guard(Constraint("cost", limit=1.0), ActionBox(0.5))
    for number, guard in enumerate((moving, mixed, Guard(ActionBox(0.5)))):
        path = tmp_path / str(number) / "ledger.jsonl"
        model = PPO("MlpPolicy", vec(2, kind=Spied, length=8), **SETTINGS)
        wrap(model, guard, ledger=path).learn(240)
        assert (checked := verify(path)).ok, checked
        assert [line.kind for line in read(path)].count("step") == 3


class Foreign(ActionSet):
    @property
    def widths(self):
        return {}


def test_guards_that_cannot_act_here_are_refused_and_leave_the_model_alone():
    def refused(match, *parts, env=None):
        model = PPO("MlpPolicy", env or vec(1, kind=Drift), **SETTINGS)
        before, guard = sorted(vars(model)), Guard(*parts)
        with pytest.raises(AttachError, match=match):
            wrap(model, guard)
        assert sorted(vars(model)) == before
        assert guard.host is None

    refused("Action set 'x' is a Foreign", Foreign("x"))
    refused("needs continuous actions", ActionBox(0.5), env=vec(1))
    refused("no risk to judge by", CriticShield(1.0))
    env = vec(1, kind=Drift)
    between = VecNormalize(env)
    env.action_space = spaces.Box(-2.0, 2.0, (1,))
    refused("a wrapper in between changes them", ActionBox(0.5), env=between)


def far_out(observations, actions):
    return np.abs(actions[:, 0])


def test_a_shield_with_a_thread_of_its_own_is_copied_without_it():
    guard = Guard(ActionBox(0.9), CriticShield(0.3, risk=far_out, budget_ms=60_000.0))
    wrap(PPO("MlpPolicy", vec(1, kind=Drift), **SETTINGS), guard).learn(40)
    for copied in (cloudpickle.loads(cloudpickle.dumps(guard)), copy.deepcopy(guard)):
        env = SafeActions(Spied(), copied)
        env.reset()
        assert env.step(np.ones(1, np.float32))[4]["interventions/critic_shield"] == 1.0
        assert 0.2 < env.unwrapped.episodes[-1][0] <= 0.3


def test_a_risk_of_another_shape_is_named_with_what_is_needed():
    guard = Guard(CriticShield(0.3, risk=lambda observations, actions: np.zeros(5)))
    model = wrap(PPO("MlpPolicy", vec(2, kind=Drift), **SETTINGS), guard)
    with pytest.raises(RolloutError, match=r"its risk returned shape \(5,\) for 2 actions; 2 numbers are needed"):
        model.learn(40)


def test_an_action_that_is_not_finite_never_reaches_the_environment():
    inner = Spied(length=8)
    env = SafeActions(inner, Guard(ActionBox(0.5), RateLimit(0.1)))
    env.reset()
    with pytest.raises(RolloutError, match="not finite"):
        env.step(np.array([np.nan], np.float32))
    assert inner.episodes == [[]]


@pytest.mark.parametrize("kind", [SAC, TD3])
def test_an_off_policy_host_stores_what_it_proposed_while_the_sets_stand_still(kind):
    env = vec(2, kind=Spied, length=8)
    model = wrap(kind("MlpPolicy", env, **OFF_POLICY), Guard(ActionBox(0.25), RateLimit(0.1)))
    model.learn(80)
    assert np.abs(flat(model)).max() <= 0.25
    assert changes(model) <= 0.1 + 1e-6
    stored = model.replay_buffer.actions[:40, :, 0]
    assert np.abs(stored).max() > 0.25, "proposals"
    observation = np.array([9.0, 0.5], np.float32)
    assert abs(model.predict(observation, deterministic=True)[0][0]) <= 0.25


def test_a_width_that_moves_relabels_what_was_stored_under_the_old_one_with_what_was_executed():
    gate = opening(*[0.0] * 3)
    env = vec(2, kind=Spied, length=8)
    model = wrap(SAC("MlpPolicy", env, **OFF_POLICY), Guard(ActionBox(gate.between(0.25, 0.75))))
    guard, moved_at, stored = callback_of(model).guard, [], []

    def look(locals_, globals_):
        if guard.dials["action_box_scale"] == 0.75 and not moved_at:
            moved_at.append(model.replay_buffer.pos)
            stored.append(model.replay_buffer.actions[: model.replay_buffer.pos].copy())
        return True

    model.learn(300, callback=look)
    assert moved_at, "the gate opened"
    buffer = model.replay_buffer
    sent = np.stack([np.array(joined(each))[: buffer.pos] for each in executed(model)], axis=1)
    before = moved_at[0]
    assert before > 8
    assert np.abs(stored[0]).max() > 0.75 or np.abs(sent[:before]).max() <= 0.25
    assert np.allclose(buffer.actions[: before - 1, :, 0], sent[: before - 1])
    later = buffer.actions[before + 1 : buffer.pos, :, 0]
    assert np.abs(later).max() > 0.75, "what is stored since is proposed again"
    assert np.allclose(np.clip(later, -0.75, 0.75), sent[before + 1 : buffer.pos], atol=1e-6)


def test_no_train_after_a_width_has_moved_is_on_proposals_of_before():
    model = SAC("MlpPolicy", vec(2, kind=Spied, length=8), **OFF_POLICY | {"train_freq": 16})
    train, widths, proposals = model.train, [], []

    def watched(**settings):
        widths.append(guard.dials["action_box_scale"])
        proposals.append(bool(np.abs(model.replay_buffer.actions[: model.replay_buffer.pos]).max() > 0.25))
        train(**settings)

    model.train = watched
    guard = Guard(ActionBox(opening(*[0.0] * 2).between(0.25, 0.75)))
    wrap(model, guard).learn(160)
    opened = widths.index(0.75)
    assert proposals[:opened] == [True] * opened != []
    assert not proposals[opened], "executed under the narrow box, every one of them"


def held(env=None, load=None, **settings):
    """SAC under a box that opens after some dozen episodes and a fixed limit on its changes."""
    own = Guard(ActionBox(opening().between(0.25, 0.75)), RateLimit(0.1))
    env = env or vec(2, kind=Spied, length=8)
    model = SAC("MlpPolicy", env, **OFF_POLICY) if load is None else SAC.load(load, env=env, device=DEVICE)
    return wrap(model, own, **settings)


OPENED = 36
"""Steps of each environment after which the box of `held` is open, and the buffer relabelled."""


@pytest.mark.parametrize("steps", [OPENED - 12, OPENED, OPENED + 12])
def test_a_run_resumed_with_its_buffer_relabels_it_as_the_run_would_have(tmp_path, steps):
    def go_on(model):
        model.set_env(vec(2, kind=Spied, length=8))
        model.set_random_seed(7)
        return model.learn(160, reset_num_timesteps=False)

    through = held().learn(2 * steps)
    assert (callback_of(through).guard.dials["action_box_scale"] == 0.75) == (steps >= OPENED)
    through.save(tmp_path / "run.zip")
    through.save_replay_buffer(tmp_path / "replay.pkl")
    stored = through.replay_buffer.actions[:steps].copy()
    go_on(through)
    resumed = held(load=tmp_path / "run.zip", resume=tmp_path / "run.zip")
    resumed.load_replay_buffer(tmp_path / "replay.pkl")
    go_on(resumed)
    assert (stored != through.replay_buffer.actions[:steps]).any() == (steps < OPENED)
    assert np.array_equal(resumed.replay_buffer.actions, through.replay_buffer.actions)
    assert same(parameters(through), parameters(resumed))
    assert callback_of(through).guard.dials["action_box_scale"] == 0.75


def test_a_buffer_saved_inside_a_collection_holds_what_was_executed_and_the_run_goes_on_knowing_it(tmp_path):
    def save(locals_, globals_):
        if model.num_timesteps == 2 * 22:
            model.save_replay_buffer(tmp_path / "replay.pkl")
        return True

    model, other = held(), held()
    model.learn(2 * 40, callback=save)
    other.load_replay_buffer(tmp_path / "replay.pkl")
    ours, theirs = (acting_of(each).replayed.kept() for each in (other, model))
    assert ours[1].sum() == 21
    assert theirs[1].sum() == 40
    assert np.array_equal(ours[0][:21], theirs[0][:21])


def acting_of(model):
    return attachment_of(model).acting


def test_a_buffer_without_executed_actions_is_pointed_out_where_sets_move(tmp_path, caplog):
    SAC("MlpPolicy", vec(2, kind=Spied, length=8), **OFF_POLICY).learn(64).save_replay_buffer(tmp_path / "plain.pkl")
    wrap(SAC("MlpPolicy", vec(2, kind=Spied), **OFF_POLICY), Guard(ActionBox(0.5))).load_replay_buffer(
        tmp_path / "plain.pkl"
    )
    assert not caplog.text
    model = held()
    model.load_replay_buffer(tmp_path / "plain.pkl")
    assert caplog.text.count("The executed actions of 64 transitions in the replay buffer are not known") == 1
    caplog.clear()
    model.learn(40, reset_num_timesteps=False)
    model.save_replay_buffer(tmp_path / "partly.pkl")
    held().load_replay_buffer(tmp_path / "partly.pkl")
    assert "The executed actions of 64 transitions" in caplog.text


def test_safe_actions_keeps_what_was_earned_after_the_model_has_left_the_guard(tmp_path):
    def guard():
        return Guard(ActionBox(opening().between(0.25, 0.75)), RateLimit(0.2))

    model = wrap(PPO("MlpPolicy", vec(2, kind=Spied, length=8), **SETTINGS), guard()).learn(400)
    assert callback_of(model).guard.dials == {"action_box_scale": 0.75}
    model.save(tmp_path / "run.zip")
    plain = PPO.load(tmp_path / "run.zip")
    inner = Spied(length=8)
    env = SafeActions(inner, guard(), resume=tmp_path / "run.zip")
    observation, _ = env.reset()
    for _ in range(40):
        action, _ = plain.predict(observation)
        observation, _, terminated, truncated, info = env.step(action)
        assert info["interventions"] == float(inner.episodes[-1][-1] != action[0])
        if terminated or truncated:
            assert set(info["episode_interventions"]) == {"action_box", "rate_limit", "total"}
            observation, _ = env.reset()
    assert 0.25 < np.abs(joined(inner.episodes)).max() <= 0.75
    assert max(np.abs(np.diff(episode)).max() for episode in inner.episodes if len(episode) > 1) <= 0.2 + 1e-6
    closed_env = SafeActions(Spied(length=8), guard())
    closed_env.reset()
    closed_env.step(np.array([1.0], np.float32))
    assert closed_env.unwrapped.episodes[-1] == [0.25]


def test_safe_actions_refuses_what_it_cannot_enforce(tmp_path):
    with pytest.raises(AttachError, match="this Guard has none"):
        SafeActions(Drift(), Guard(Constraint("cost", limit=1.0)))
    with pytest.raises(AttachError, match="no risk to judge by"):
        SafeActions(Drift(), Guard(CriticShield(1.0)))
    model = model_of(ActionBox(0.5))
    with pytest.raises(AttachError, match="belongs to PPO"):
        SafeActions(Drift(), callback_of(model).guard, resume=tmp_path / "run.zip")
    with pytest.raises(AttachError, match="The model acts in"):
        SafeActions(gym.make("CartPole-v1"), Guard(ActionBox(0.5)), model=model)
    assert SafeActions(Drift(), callback_of(model).guard, model=model).reset()


def test_safe_actions_scale_by_the_dial_as_in_training_and_once(tmp_path):
    def guard():
        return Guard(Dial("action_scale", opening().between(0.25, 0.75)), ActionBox(0.5))

    def executed_of(env, action):
        env.reset()
        env.step(np.array([action], np.float32))
        return env.unwrapped.episodes[-1][-1]

    model = model_of(*guard().parts, env=vec(2, kind=Spied, length=8)).learn(400)
    own, path = callback_of(model).guard, tmp_path / "run.zip"
    assert own.dials["action_scale"] == 0.75
    model.save(path)
    loaded = PPO.load(path, device=DEVICE)
    env = SafeActions(Spied(), guard(), resume=path, model=loaded)
    assert executed_of(env, 0.4) == pytest.approx(0.3)
    assert executed_of(env, 9.0) == 0.5, "cut to the action space, scaled, held to the box"
    with pytest.raises(AttachError, match="would do so once more"):
        evaluate_guarded(loaded, env, guard())
    wrapped = SafeActions(Spied(), own, model=model)
    assert executed_of(wrapped, 0.4) == pytest.approx(0.4), "predict has scaled it"
    with pytest.raises(AttachError, match=r"Give model="):
        SafeActions(Spied(), guard(), resume=path)
    with pytest.raises(AttachError, match="wrapped with another guard"):
        SafeActions(Spied(), guard(), resume=path, model=model)
    unwrap(model)
    assert executed_of(wrapped, 0.4) == pytest.approx(0.3)
    boxed = Guard(ActionBox(opening().between(0.25, 0.75), name="action"))
    assert "action_scale" in boxed.dials, "the width of a set, not the dial"
    assert SafeActions(Spied(), boxed)


def test_safe_actions_serves_as_an_environment_to_train_in():
    env = DummyVecEnv([lambda: SafeActions(Spied(length=8), Guard(ActionBox(0.25)))] * 1)
    PPO("MlpPolicy", env, **SETTINGS).learn(40)
    assert np.abs(joined(env.envs[0].unwrapped.episodes)).max() <= 0.25
