"""A saved off-policy run goes on exactly, with its replay buffer and the costs beside it."""

import hashlib
import io
import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from devices import DEVICE
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from sb3_envs import Drift, Gamble, callback_of, parameters, same, vec
from sb3_hosts import GREEDY, SMALL, guarded, host, learner_of, spy
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import CheckpointCallback, ConvertCallback
from stable_baselines3.common.save_util import load_from_pkl, load_from_zip_file, save_to_pkl

from guardrails import Constraint, Gate, Guard, Require, StateError
from guardrails.competence import CriticCalibration, FailureAvoidance, FromFunction
from guardrails.critic import Ensemble
from guardrails.schedulers import PID, DualAscent
from guardrails_sb3 import replay_file, safety_critic, unwrap, wrap
from guardrails_sb3.replay_file import Beside


def environments(kind):
    return vec(2, kind=Gamble if kind in GREEDY else Drift, length=9)


def guard():
    return Guard(
        Constraint("cost", limit=1.0, scheduler=PID(kp=0.3, ki=0.2)),
        Constraint("harm", cost="cost", limit=2.0, scheduler=DualAscent(0.05, initial=0.8)),
    )


def go_on(model):
    """Train on from freshly reset environments and generators, which Stable-Baselines3 does not save."""
    model.set_env(environments(type(model)))
    model.set_random_seed(7)
    return model.learn(100, reset_num_timesteps=False)


def everything(model):
    callback = callback_of(model)
    return parameters(model) | {f"ours.{name}": tensor.clone() for name, tensor in callback.tensors().items()}


@pytest.mark.parametrize("kind", [SAC, TD3, DQN])
def test_training_saving_and_resuming_equals_training_through(tmp_path, kind):
    run, replay = tmp_path / "run.zip", tmp_path / "replay.pkl"
    through = wrap(host(kind, environments(kind)), guard(), cost_critic=SMALL, horizon=9).learn(100)
    through.save(run)
    through.save_replay_buffer(replay)
    assert callback_of(through).guard.multipliers["harm"] > 0.0
    go_on(through)

    own = guard()
    loaded = kind.load(run, env=environments(kind), device=DEVICE)
    resumed = wrap(loaded, own, cost_critic=SMALL, horizon=9, resume=run)
    resumed.load_replay_buffer(replay)
    go_on(resumed)
    assert own.state_dict() == callback_of(through).guard.state_dict()
    assert same(everything(through), everything(resumed))
    ours, theirs = learner_of(resumed)._column.values, learner_of(through)._column.values
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_costs_that_the_buffer_has_rounded_leave_the_range_of_a_resumed_critic_as_it_was(tmp_path):
    def own():
        # in float32, 0.6 is more than 0.6 and -0.4 less than -0.4
        costs = {"cost": lambda info: 0.6 * info["cost"], "debt": lambda info: 0.6 - info["cost"]}
        return Guard(*(Constraint(name, limit=1.0, cost=cost) for name, cost in costs.items()))

    through = wrap(host(gamma=0.9), own(), cost_critic=SMALL, horizon=9).learn(100)
    through.save(tmp_path / "run.zip")
    through.save_replay_buffer(tmp_path / "replay.pkl")
    loaded = SAC.load(tmp_path / "run.zip", env=environments(SAC), device=DEVICE)
    resumed = wrap(loaded, own(), cost_critic=SMALL, horizon=9, resume=tmp_path / "run.zip")
    resumed.load_replay_buffer(tmp_path / "replay.pkl")
    assert same(everything(through), everything(resumed))
    ends = [(each._low.tolist(), each._high.tolist()) for each in (safety_critic(m).critic for m in (through, resumed))]
    assert ends[0] == ends[1]


def gated():
    """A guard whose gates read everything that an off-policy host has of an episode, arrays in its info among it."""
    far = Require(FailureAvoidance(lambda info: info["terminal_observation"][0] > 0.2), at_least=0.6)
    calibrated = Require(CriticCalibration("cost", scale=10.0), at_least=0.2)
    steps = FromFunction(lambda *each: float((each[0] * each[1] > 0).mean()), ("actions", "observations"), name="out")
    gate = Gate(far, calibrated, Require(steps, at_least=0.1), rungs=4, dwell=0, confidence=0.5)
    return Guard(
        Constraint("cost", limit=gate.between(0.5, 2.0), scheduler=PID(kp=0.3, ki=0.2)),
        Constraint("harm", cost="cost", limit=2.0, scheduler=DualAscent(0.05, initial=0.8)),
    )


ELSEWHERE = """
import sys
import torch
from devices import DEVICE
from test_sb3_off_policy_resume import PPO, SAC, digest, environments, gated, go_on, guard, SMALL, wrap

folder, kind = sys.argv[1], {"PPO": PPO, "SAC": SAC}[sys.argv[2]]
own = {"guard": guard, "gated": gated}[sys.argv[3]]()
model = kind.load(f"{folder}/run.zip", env=environments(kind), device=DEVICE)
model = wrap(model, own, cost_critic=SMALL, horizon=9, resume=f"{folder}/run.zip")
if kind is SAC:
    model.load_replay_buffer(f"{folder}/replay.pkl")
print(digest(go_on(model)))
"""


def digest(model):
    """Return a fingerprint of all weights, the critic's and the episodes' state, and the guard's state."""
    state = hashlib.sha256(json.dumps(callback_of(model).guard.state_dict(), sort_keys=True).encode())
    for name, tensor in sorted(everything(model).items()):
        state.update(name.encode() + tensor.cpu().numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize(
    ("make", "steps", "stopped"),
    [(guard, 50, False), (gated, 36, False), (gated, 63, True)],
    ids=["between episodes", "where episodes end", "inside a collection, where one ends"],
)
def test_a_new_process_goes_on_where_the_run_was_saved(tmp_path, kind, make, steps, stopped):
    rollout = 36 if stopped else steps
    settings = {"n_steps": rollout, "batch_size": rollout, "seed": 0, "device": DEVICE}
    model = PPO("MlpPolicy", environments(PPO), **settings) if kind is PPO else host(kind, environments(kind))
    through = wrap(model, make(), cost_critic=SMALL, horizon=9)
    through.learn(1000 if stopped else 2 * steps, callback=lambda *_: through.num_timesteps < 2 * steps or not stopped)
    assert through.num_timesteps == 2 * steps
    if kind is SAC:
        assert callback_of(through)._episodes.ended == stopped
    through.save(tmp_path / "run.zip")
    if kind is SAC:
        through.save_replay_buffer(tmp_path / "replay.pkl")
    saved, through = digest(through), go_on(through)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path), kind.__name__, make.__name__],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest(through) != saved


@pytest.mark.parametrize("anew", [False, True])
def test_a_checkpoint_as_an_episode_ends_holds_that_episode(tmp_path, anew):
    decided = {}

    def look(locals_, globals_):
        if model.num_timesteps > 90:
            decided.setdefault(model.num_timesteps, callback_of(model).guard.state_dict())
        return True

    one = vec(1, kind=Drift, length=9)
    model = wrap(host(SAC, one), gated(), cost_critic=SMALL, horizon=9)
    model.learn(100, callback=[CheckpointCallback(90, str(tmp_path)), ConvertCallback(look)])
    path = tmp_path / "rl_model_90_steps"
    own = gated()
    resumed = wrap(SAC.load(path, env=one), own, cost_critic=SMALL, horizon=9, resume=path)
    before = own.state_dict()["step"]
    resumed.learn(0, reset_num_timesteps=anew)
    assert own.state_dict() == decided[91]
    assert own.state_dict()["step"] == before + 1


def test_an_episode_of_the_random_warm_up_is_left_out_also_after_resuming(tmp_path):
    one = vec(1, kind=Drift, length=9)
    model = wrap(host(SAC, one, learning_starts=27), guard(), cost_critic=SMALL, horizon=9)
    model.learn(30, callback=CheckpointCallback(27, str(tmp_path)))
    path = tmp_path / "rl_model_27_steps"
    own = guard()
    resumed = wrap(SAC.load(path, env=one), own, cost_critic=SMALL, horizon=9, resume=path)
    resumed.learn(1, reset_num_timesteps=False)
    assert own.decision is None


def test_without_the_critics_state_the_run_would_differ(tmp_path):
    through = wrap(host(SAC), guard(), cost_critic=SMALL, horizon=9).learn(100)
    through.save(tmp_path / "run.zip")
    through.save_replay_buffer(tmp_path / "replay.pkl")
    state = callback_of(through).guard.state_dict()
    go_on(through)
    own = guard()
    own.load_state_dict(state)
    fresh = wrap(SAC.load(tmp_path / "run.zip", env=environments(SAC)), own, cost_critic=SMALL, horizon=9)
    fresh.load_replay_buffer(tmp_path / "replay.pkl")
    assert not same(parameters(through), parameters(go_on(fresh)))


@pytest.mark.parametrize("where", ["path", "suffix", "stream"])
def test_a_saved_buffer_keeps_its_costs_and_loads_as_the_hosts_own(tmp_path, where):
    model = guarded(host(SAC)).learn(60)
    before = learner_of(model)._column.values.copy()
    overlaid = sorted(vars(model.replay_buffer))
    target = {"path": tmp_path / "replay.pkl", "suffix": str(tmp_path / "replay"), "stream": io.BytesIO()}[where]
    model.save_replay_buffer(target)
    assert sorted(vars(model.replay_buffer)) == overlaid, "the guard is back in its place"
    if where == "stream":
        target.seek(0)
    plain = load_from_pkl(target)
    assert plain.pos == model.replay_buffer.pos
    assert not {"add", "sample"} & set(vars(plain))
    if where == "stream":
        target.seek(0)
    other = guarded(host(SAC))
    other.load_replay_buffer(target)
    assert np.array_equal(learner_of(other)._column.values, before, equal_nan=True)
    batches = spy(other)
    other.learn(60, reset_num_timesteps=False)
    assert batches
    assert not torch.cat([batch.costs for batch in batches]).isnan().any()


def test_a_buffer_that_was_saved_without_costs_is_taken_up_with_a_warning(tmp_path, caplog):
    host(SAC).learn(60).save_replay_buffer(tmp_path / "replay.pkl")
    model = guarded(host(SAC))
    with caplog.at_level(logging.WARNING):
        model.load_replay_buffer(tmp_path / "replay.pkl")
    assert "costs of 60 transitions" in caplog.text
    assert np.isnan(learner_of(model)._column.values).all()
    model.learn(40, reset_num_timesteps=False)
    assert safety_critic(model).critic.updates > 0


def test_costs_are_taken_up_by_the_names_of_their_constraints(tmp_path, caplog):
    def pair(*names):
        return [Constraint(name, limit=2.0, cost=lambda info, name=name: len(name) + info["cost"]) for name in names]

    model = guarded(host(SAC), *pair("cost", "damage")).learn(60)
    model.save_replay_buffer(tmp_path / "replay.pkl")
    saved = learner_of(model)._column.values

    def taken_up(*names):
        caplog.clear()
        other = guarded(host(SAC), *pair(*names))
        other.load_replay_buffer(tmp_path / "replay.pkl")
        return learner_of(other)._column.values

    assert np.array_equal(taken_up("damage", "cost"), saved[..., ::-1], equal_nan=True)
    assert np.array_equal(taken_up("damage"), saved[..., 1:], equal_nan=True)
    assert not caplog.text
    partly = taken_up("cost", "energy")
    assert np.array_equal(partly[..., 0], saved[..., 0], equal_nan=True)
    assert np.isnan(partly[..., 1]).all()
    assert "costs of 60 transitions" in caplog.text
    assert np.isnan(taken_up("energy")).all()
    assert "costs of 60 transitions" in caplog.text


def test_a_file_without_names_is_taken_up_where_its_columns_fit(tmp_path, caplog):
    model = guarded(host(SAC)).learn(60)
    column = learner_of(model)._column.values
    with learner_of(model).lifted():
        replay_file.save(tmp_path / "replay.pkl", lambda file: save_to_pkl(file, model.replay_buffer), Beside(column))
    other = guarded(host(SAC), Constraint("another", cost="cost", limit=1.0))
    other.load_replay_buffer(tmp_path / "replay.pkl")
    assert np.array_equal(learner_of(other)._column.values, column, equal_nan=True)
    assert not caplog.text
    more = guarded(host(SAC), Constraint("cost", limit=1.0), Constraint("another", cost="cost", limit=1.0))
    more.load_replay_buffer(tmp_path / "replay.pkl")
    assert np.isnan(learner_of(more)._column.values).all()
    assert "costs of 60 transitions" in caplog.text


def test_damaged_costs_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "replay.pkl"
    guarded(host(SAC)).learn(60).save_replay_buffer(path)
    data = bytearray(path.read_bytes())
    data[-60] ^= 0xFF
    size = int.from_bytes(data[-33:-25], "little")
    data[-33 - size : -33 - size + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))
    with pytest.raises(StateError, match=r"The costs in .*replay\.pkl are damaged"):
        guarded(host(SAC)).load_replay_buffer(path)


def test_the_zip_holds_nothing_of_the_guard_in_the_hosts_own_data(tmp_path):
    model = guarded(host(SAC)).learn(60)
    model.save(tmp_path / "guarded", include=["replay_buffer"])
    data = load_from_zip_file(tmp_path / "guarded")[0]
    assert data["replay_buffer"].pos == model.replay_buffer.pos
    unwrap(model)
    model.save(tmp_path / "plain", include=["replay_buffer"])
    assert sorted(data) == sorted(load_from_zip_file(tmp_path / "plain")[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": Ensemble(members=3, hidden=(16,))}, "saved safety critic does not fit"),
        ({"critic": Ensemble(members=2, hidden=(8,))}, "saved safety critic does not fit"),
    ],
)
def test_another_ensemble_is_refused(tmp_path, settings, message):
    guarded(host(SAC)).learn(60).save(tmp_path / "run.zip")
    own = Guard(Constraint("cost", limit=2.0))
    loaded = SAC.load(tmp_path / "run.zip", env=environments(SAC))
    with pytest.raises(StateError, match=message):
        wrap(loaded, own, cost_critic=settings["critic"], horizon=9, resume=tmp_path / "run.zip")
    assert own.host is None


def test_a_state_that_does_not_know_the_range_of_its_costs_is_refused():
    model, other = guarded(host(SAC)).learn(60), guarded(host(SAC))
    saved = learner_of(model).tensors()
    before = learner_of(other).host.critic.tensors()["network.perceptrons.weights.0"].clone()
    del saved["costs.extremes"]
    with pytest.raises(StateError, match=r"no costs\.extremes"):
        learner_of(other).load_tensors(saved, running=True)
    assert torch.equal(learner_of(other).host.critic.tensors()["network.perceptrons.weights.0"], before)


def test_a_discrete_host_says_that_its_zip_alone_acts_without_the_limit(tmp_path, caplog):
    model = guarded(host(DQN)).learn(60)
    with caplog.at_level(logging.WARNING):
        model.save(tmp_path / "run.zip")
        model.save(tmp_path / "run.zip")
    assert caplog.text.count("acts without its constraints unless it is wrapped again") == 1
    rows = np.random.default_rng(0).uniform(-1, 1, size=(64, 3))
    again = DQN.load(tmp_path / "run.zip", env=environments(DQN))
    wrap(again, Guard(*guard_of(model).constraints), cost_critic=SMALL, horizon=9, resume=tmp_path / "run.zip")
    assert np.array_equal(again.predict(rows, deterministic=True)[0], model.predict(rows, deterministic=True)[0])


def guard_of(model):
    return callback_of(model).guard


# A safety critic beside an on-policy host


ROLLOUT = {"n_steps": 40, "batch_size": 40}
ON_POLICY = {
    PPO: (Drift, "MlpPolicy", ROLLOUT | {"n_epochs": 2}),
    A2C: (Drift, "MlpPolicy", {"n_steps": 40}),
    TRPO: (Drift, "MlpPolicy", ROLLOUT),
    RecurrentPPO: (Drift, "MlpLstmPolicy", ROLLOUT | {"n_epochs": 1}),
    MaskablePPO: (lambda length: Gamble(length, masks=True), "MlpPolicy", ROLLOUT | {"n_epochs": 2}),
}


@pytest.mark.parametrize("kind", ON_POLICY)
def test_an_on_policy_host_trains_the_same_with_and_without_a_safety_critic_and_resumes_with_it(tmp_path, kind):
    env, policy, settings = ON_POLICY[kind]

    def build(**critic):
        return wrap(kind(policy, vec(2, kind=env, length=9), seed=0, device=DEVICE, **settings), guard(), **critic)

    def further(model):
        model.set_env(vec(2, kind=env, length=9))
        model.set_random_seed(7)
        return model.learn(80, reset_num_timesteps=False)

    plain, watched = build().learn(160), build(cost_critic=SMALL, horizon=9).learn(160)
    assert same(parameters(plain), parameters(watched))
    watched.save(tmp_path / "run.zip")
    own = guard()
    loaded = kind.load(tmp_path / "run.zip", env=vec(2, kind=env, length=9), device=DEVICE)
    resumed = wrap(loaded, own, cost_critic=SMALL, horizon=9, resume=tmp_path / "run.zip")
    assert same(everything(further(watched)), everything(further(resumed)))
    assert safety_critic(watched).critic.updates >= 3


def test_an_on_policy_host_reports_the_calibration_of_its_critic():
    rows = []
    own = guard()
    step = own.step
    own.step = lambda rollout: rows.append(rollout) or step(rollout)
    model = PPO("MlpPolicy", environments(PPO), n_steps=40, batch_size=40, n_epochs=2, seed=0, device=DEVICE)
    wrap(model, own, cost_critic=SMALL, horizon=9)
    model.learn(80, log_interval=1000)
    assert len(rows[0].infos) > 5
    for info, cost in zip(rows[0].infos, rows[0].cost("cost"), strict=True):
        assert info["predicted_cost"] == info["predicted_cost/cost"] != cost
        assert abs(info["predicted_cost/harm"] - rows[0].cost("harm")[0]) < 100.0
    assert "guardrails/cost/critic_error" in model.logger.name_to_value


@pytest.mark.parametrize("kind", [PPO, SAC])
def test_what_the_critic_can_expect_is_bounded_by_the_costs_so_far_and_stays_so_after_resuming(tmp_path, kind):
    def build(model=None, **settings):
        own = Guard(
            Constraint("cost", limit=1.0), Constraint("debt", cost=lambda info: 3.0 * info["cost"] - 0.5, limit=1.0)
        )
        if model is None:
            model = host(SAC, vec(2, kind=Drift, length=9), gamma=0.9)
            if kind is PPO:
                model = PPO("MlpPolicy", vec(2, kind=Drift, length=9), n_steps=40, batch_size=40, gamma=0.9, seed=0)
        return wrap(model, own, cost_critic=SMALL, horizon=9, **settings)

    def ends(model):
        critic = safety_critic(model).critic
        return [(ends * critic._units).tolist() for ends in (critic._low, critic._high)]

    model = build().learn(160)
    assert ends(model) == [pytest.approx([0.0, -5.0]), pytest.approx([10.0, 25.0])]
    model.save(tmp_path / "run.zip")
    loaded = kind.load(tmp_path / "run.zip", env=vec(2, kind=Drift, length=9))
    assert ends(build(loaded, resume=tmp_path / "run.zip")) == ends(model)
    if kind is SAC:
        model.save_replay_buffer(tmp_path / "replay.pkl")
        fresh = build()
        fresh.load_replay_buffer(tmp_path / "replay.pkl")
        assert ends(fresh) == ends(model)
