"""A saved run goes on exactly; a saved zip is the host's own, with or without this package."""

import io
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from devices import DEVICE
from safetensors.torch import load, save
from sb3_envs import Drift, callback_of, parameters, same, vec
from sb3_hosts import SMALL, host
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from guardrails import Constraint, Gate, Guard, Require, StateError
from guardrails.competence import ActionVariance, CriticCalibration
from guardrails.critic import Ensemble
from guardrails.schedulers import PID, DualAscent
from guardrails_sb3 import checkpoint, unwrap, wrap

SETTINGS = {"n_steps": 40, "batch_size": 40, "n_epochs": 3, "seed": 0, "device": DEVICE}


def environments():
    return vec(2, kind=Drift)


def guard():
    return Guard(
        Constraint("cost", limit=1.0, scheduler=PID(kp=0.3, ki=0.2)),
        Constraint("effort", limit=5.0, scheduler=DualAscent(0.1, initial=0.5)),
    )


def wrapped(**settings):
    return wrap(PPO("MlpPolicy", environments(), **SETTINGS), guard(), **settings)


def go_on(model):
    """Train on from freshly reset environments and generators, which Stable-Baselines3 does not save."""
    model.set_env(environments())
    model.set_random_seed(7)
    return model.learn(240, reset_num_timesteps=False)


def everything(model):
    callback = callback_of(model)
    return parameters(model) | {f"ours.{name}": tensor.clone() for name, tensor in callback.tensors().items()}


@pytest.mark.parametrize("cost_critic", [True, False])
def test_training_saving_and_resuming_equals_training_through(tmp_path, cost_critic):
    through = wrapped(cost_critic=cost_critic).learn(240)
    through.save(tmp_path / "run.zip")
    assert callback_of(through).guard.multipliers["cost"] > 0
    go_on(through)

    own = guard()
    loaded = PPO.load(tmp_path / "run.zip", env=environments(), device=DEVICE)
    resumed = go_on(wrap(loaded, own, cost_critic=cost_critic, resume=tmp_path / "run.zip"))
    assert own.multipliers == callback_of(through).guard.multipliers
    assert own.state_dict() == callback_of(through).guard.state_dict()
    assert same(everything(through), everything(resumed))


def test_without_resume_the_run_would_differ(tmp_path):
    through = wrapped().learn(240)
    through.save(tmp_path / "run.zip")
    fresh = wrap(PPO.load(tmp_path / "run.zip", env=environments(), device=DEVICE), guard())
    assert not same(parameters(go_on(through)), parameters(go_on(fresh)))


def test_sums_of_unfinished_episodes_go_on_where_the_environments_do(tmp_path):
    env = environments()
    through = wrap(PPO("MlpPolicy", env, **SETTINGS), guard()).learn(80)
    sums = callback_of(through)._episodes.costs.copy()
    assert sums.any()
    through.save(tmp_path / "run.zip")
    loaded = PPO.load(tmp_path / "run.zip", env=env, device=DEVICE, force_reset=False)
    own = guard()
    wrap(loaded, own, resume=tmp_path / "run.zip")
    lengths, step = [], own.step
    own.step = lambda rollout: lengths.extend(rollout.lengths) or step(rollout)
    loaded.learn(80, reset_num_timesteps=False)
    assert lengths[0] == 23.0


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("go_on", ["on", "saved", "anew"])
def test_an_episode_that_is_under_way_as_the_model_is_wrapped_is_left_out(tmp_path, kind, go_on):
    """After 32 steps, episodes of 8 have just ended and the third of 11 has one more step to go."""

    def watch(model, **settings):
        gate = Gate(Require(CriticCalibration("cost", scale=9.0), 0.5), Require(ActionVariance(), 0.1))
        own = Guard(Constraint("cost", limit=gate.between(1.0, 2.0), cost=lambda info: 1.0))
        rows, step = [], own.step
        own.step = lambda rollout: rows.append(rollout) or step(rollout)
        return wrap(model, own, cost_critic=SMALL, horizon=9, **settings), rows

    env = vec(2, kind=Drift, length=8)
    settings = SETTINGS | {"n_steps": 32, "batch_size": 32}
    model = host(SAC, env, learning_starts=0) if kind is SAC else PPO("MlpPolicy", env, **settings)
    model, rows = watch(model.learn(64))
    if go_on == "saved":
        model.save(tmp_path / "run.zip")
        loaded = kind.load(tmp_path / "run.zip", env=env, device=DEVICE, force_reset=False)
        model, rows = watch(loaded, resume=tmp_path / "run.zip")
    model.learn(64, reset_num_timesteps=go_on == "anew")
    lengths = [length for row in rows for length in row.lengths]
    assert sorted(lengths) == [8.0] * 4 + [11.0] * 2
    assert [cost for row in rows for cost in row.cost("cost")] == lengths
    assert [len(actions) for row in rows for actions in row.actions] == lengths
    assert all("predicted_cost" in info for row in rows for info in row.infos)


def test_no_episode_of_which_a_stopped_learn_had_seen_the_first_step_counts_as_whole():
    """It stops at the first step of the second episode of 5, which the host has not taken up, and at the sixth of 8."""
    model = PPO("MlpPolicy", vec(2, kind=Drift, length=5), **SETTINGS)
    model.learn(80, callback=lambda locals_, globals_: model.num_timesteps < 2 * 6)
    own = Guard(Constraint("cost", limit=1.0, cost=lambda info: 1.0))
    lengths, step = [], own.step
    own.step = lambda rollout: lengths.extend(rollout.lengths) or step(rollout)
    wrap(model, own).learn(80, reset_num_timesteps=False)
    assert sorted(lengths) == [5.0] * 7 + [8.0] * 4


def test_a_save_in_the_middle_of_a_rollout_holds_the_sums_up_to_that_step(tmp_path):
    def save(locals_, globals_):
        if model.num_timesteps == 2 * 27:
            model.save(tmp_path / "run.zip")
        return True

    model = wrapped()
    model.learn(80, callback=save)
    lengths = checkpoint.read(tmp_path / "run.zip")[1]["episodes.lengths"]
    assert lengths.tolist() == [27 - 20, 27 - 23]
    assert callback_of(model).guard.decision.n_rows == 3


def test_saving_leaves_the_wrap_in_place_and_keeps_it_out_of_the_hosts_data(tmp_path):
    model = wrapped().learn(80)
    model.save(tmp_path / "guarded")
    assert callback_of(model).guard.host == "PPO"
    model.learn(80)
    assert callback_of(model).guard.decision.step == 2
    guarded = load_from_zip_file(tmp_path / "guarded")
    unwrap(model)
    model.save(tmp_path / "plain")
    plain = load_from_zip_file(tmp_path / "plain")
    assert guarded[0].keys() == plain[0].keys()
    assert guarded[1].keys() == plain[1].keys()
    assert "guardrails" not in zipfile.ZipFile(tmp_path / "guarded.zip").read("data").decode()


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("guardrails"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
import numpy as np
from stable_baselines3 import PPO

model = PPO.load(sys.argv[1], device="cpu")
print(model.predict(np.zeros(2, np.float32), deterministic=True)[0].tolist(), sorted(vars(model)))
assert not any(name.startswith("guardrails") for name in sys.modules)
"""


def test_a_saved_zip_loads_where_this_package_cannot_be_imported(tmp_path):
    model = wrapped().learn(80)
    model.save(tmp_path / "run.zip")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, str(tmp_path / "run.zip")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    unwrap(model)
    expected = PPO.load(tmp_path / "run.zip")
    action = expected.predict(torch.zeros(2).numpy(), deterministic=True)[0].tolist()
    assert result.stdout.strip() == f"{action} {sorted(vars(expected))}"


class Pretrained(BaseFeaturesExtractor):
    """All but the last layer of a network, as features are taken from one that was trained to classify."""

    def __init__(self, space, last=None):
        super().__init__(space, 4)
        layers = [torch.nn.Linear(space.shape[0], 4), torch.nn.ReLU()]
        self.whole = torch.nn.Sequential(*layers, last or torch.nn.Identity())
        self.body = torch.nn.Sequential(*self.whole[:-1])

    def forward(self, observations):
        return self.body(observations)


class Normed(BaseFeaturesExtractor):
    """A layer whose weights are computed of a direction and a length."""

    def __init__(self, space):
        super().__init__(space, 4)
        self.layer = torch.nn.utils.weight_norm(torch.nn.Linear(space.shape[0], 4))

    def forward(self, observations):
        return self.layer(observations)


def go_on_with(tmp_path, kind, extractor=Pretrained, **given):
    """Return what a model of such an extractor holds, and what one that was resumed from its file does."""
    policy = {"features_extractor_class": extractor, "features_extractor_kwargs": given, "net_arch": [8]}
    if kind is SAC:
        model = host(SAC, environments(), policy_kwargs=policy)
    else:
        model = PPO("MlpPolicy", environments(), policy_kwargs=policy, **SETTINGS)
    settings = {"cost_critic": SMALL, "horizon": 9}
    wrap(model, guard(), **settings).learn(80).save(tmp_path / "run.zip")
    loaded = kind.load(tmp_path / "run.zip", env=environments(), device=DEVICE)
    return everything(model), everything(wrap(loaded, guard(), resume=tmp_path / "run.zip", **settings))


@pytest.mark.parametrize("kind", [PPO, SAC])
def test_a_features_extractor_that_knows_its_layers_by_two_names_is_saved_and_resumed(tmp_path, kind):
    assert same(*go_on_with(tmp_path, kind))


@pytest.mark.parametrize("kind", [PPO, SAC])
def test_a_features_extractor_with_a_layer_that_takes_no_part_is_resumed(tmp_path, kind):
    assert same(*go_on_with(tmp_path, kind, last=torch.nn.Linear(4, 10)))


@pytest.mark.parametrize("kind", [PPO, SAC])
def test_a_features_extractor_with_weight_norm_is_guarded_and_resumed(tmp_path, kind):
    assert same(*go_on_with(tmp_path, kind, Normed))


def test_a_file_object_holds_the_guard_too():
    model = wrapped().learn(80)
    archive = io.BytesIO()
    model.save(archive)
    archive.seek(0)
    loaded = PPO.load(archive, env=environments())
    archive.seek(0)
    own = guard()
    wrap(loaded, own, resume=archive)
    assert own.state_dict() == callback_of(model).guard.state_dict()


def test_the_hosts_checkpoint_callback_writes_the_guard_along(tmp_path):
    model = wrapped()
    model.learn(240, callback=CheckpointCallback(save_freq=100, save_path=str(tmp_path)))
    path = tmp_path / "rl_model_200_steps"
    own = guard()
    wrap(PPO.load(path, env=environments()), own, resume=path)
    assert own.state_dict()["step"] == 2


def rewritten(path, entry, content):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | {entry: content}).items():
            archive.writestr(name, data)


@pytest.fixture
def saved(tmp_path):
    wrapped().learn(80).save(tmp_path / "run.zip")
    return tmp_path / "run.zip"


def refused(path, own, match, **settings):
    model = PPO.load(path, env=environments(), **settings.pop("load", {}))
    before, state = sorted(vars(model)), own.state_dict()
    with pytest.raises(StateError, match=match):
        wrap(model, own, resume=path, **settings)
    assert sorted(vars(model)) == before
    assert own.host is None
    assert own.state_dict() == state


def test_the_file_of_an_unguarded_model_is_refused(tmp_path):
    PPO("MlpPolicy", environments(), **SETTINGS).save(tmp_path / "plain.zip")
    refused(tmp_path / "plain.zip", guard(), "holds no state of a guard")


def test_the_file_of_another_guard_is_refused(saved):
    refused(saved, Guard(Constraint("cost", limit=1.0)), "does not fit|another guard")
    other = Guard(Constraint("cost", limit=1.0), Constraint("noise", limit=1.0))
    refused(saved, other, "another guard")
    refused(saved, Guard(*reversed(guard().constraints)), "in the order cost, effort")


def test_another_setting_of_the_cost_critic_is_refused(saved):
    refused(saved, guard(), "saved with cost_critic=True", cost_critic=False)


def test_damaged_and_newer_state_is_refused(saved):
    with zipfile.ZipFile(saved) as archive:
        state, tensors = archive.read("guardrails/state.json"), archive.read("guardrails/tensors.safetensors")
    rewritten(saved, "guardrails/state.json", b"{")
    refused(saved, guard(), "damaged")
    rewritten(saved, "guardrails/state.json", json.dumps({**json.loads(state), "schema": 99}).encode())
    refused(saved, guard(), "schema 99.*Upgrade")
    rewritten(saved, "guardrails/state.json", b'{"schema": 1}')
    refused(saved, guard(), "'guard' is missing")
    rewritten(saved, "guardrails/state.json", state)
    rewritten(saved, "guardrails/tensors.safetensors", tensors[:100])
    refused(saved, guard(), "damaged")
    for lost in ("optimizer.0.exp_avg.", "optimizer.0."):
        cut = {name: tensor for name, tensor in load(tensors).items() if not f"{name}.".startswith(lost)}
        rewritten(saved, "guardrails/tensors.safetensors", save(cut))
        refused(saved, guard(), r"optimizer\.0\.exp_avg")


def test_a_safety_critic_that_is_left_out_of_a_resume_is_pointed_out(tmp_path, caplog):
    settings = {"cost_critic": Ensemble(members=2, hidden=(8,)), "horizon": 25}
    wrapped(**settings).learn(80).save(tmp_path / "run.zip")
    for given, said in ((settings, 0), ({}, 1)):
        model = PPO.load(tmp_path / "run.zip", env=environments(), device=DEVICE)
        wrap(model, guard(), resume=tmp_path / "run.zip", **given)
        assert sum("safety critic, which is dropped" in record.message for record in caplog.records) == said
