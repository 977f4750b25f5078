"""wrap and unwrap: what is refused, and that a model is left as it was."""

import logging

import numpy as np
import pytest
from sb3_envs import Drift, callback_of, learn, parameters, same, vec
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, StopTrainingOnMaxEpisodes

from guardrails import AttachError, CompetenceMetric, Constraint, Dial, Gate, Guard, Refinement, Require, RolloutError
from guardrails.refine import FunctionRefiner
from guardrails.schedulers import Fixed
from guardrails_sb3 import unwrap, wrap


def ppo(**settings):
    return PPO("MlpPolicy", vec(), **{"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0} | settings)


def cost_guard(limit=5.0, **settings):
    return Guard(Constraint("cost", limit=limit, **settings))


def trace(model):
    """Everything by which a model could show that something was left in it."""
    hooks = [
        (name, attribute, tuple(getattr(module, attribute)))
        for name, module in model.policy.named_modules()
        for attribute in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    optimizer = model.policy.optimizer
    return (
        sorted(vars(model)),
        sorted(vars(model.rollout_buffer)) if hasattr(model, "rollout_buffer") else None,
        hooks,
        (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)),
        [
            getattr(getattr(model, name), "__func__", getattr(model, name))
            for name in ("_init_callback", "_excluded_save_params", "save", "learn", "train")
        ],
    )


def test_wrap_returns_the_same_object_and_unwrap_leaves_nothing_behind():
    model, guard = ppo(), cost_guard()
    before = trace(model)
    assert wrap(model, guard) is model
    assert guard.host == "PPO"
    assert trace(model) != before
    model.learn(64)
    assert unwrap(model) is guard
    assert guard.host is None
    after_learning = ppo().learn(64)
    assert trace(model) == trace(after_learning)
    assert type(model) is PPO


def test_an_unwrapped_model_trains_as_if_it_had_never_been_wrapped():
    plain, model = ppo(), ppo()
    wrap(model, Guard(Constraint("cost", limit=5.0, scheduler=Fixed(3.0))))
    unwrap(model)
    assert same(parameters(learn(plain, 64)), parameters(learn(model, 64)))


def test_a_model_can_be_wrapped_again_after_unwrap():
    model = wrap(ppo(), cost_guard())
    guard = unwrap(model)
    wrap(model, guard).learn(64)
    assert guard.decision.step == 1


def test_unwrap_refuses_to_remove_what_somebody_else_put_in_the_place_of_a_method():
    model = wrap(ppo(), cost_guard())
    ours, calls = model.save, []
    model.save = lambda *args, **kwargs: calls.append(args)
    with pytest.raises(AttachError, match=r"PPO\.save was replaced"):
        unwrap(model)
    model.save("elsewhere")
    assert calls, "their method is still there"
    assert model.learn(64) is model
    model.save = ours
    assert unwrap(model).decision.step == 1, "it was still guarded"


def test_unwrap_of_a_model_that_is_not_wrapped_is_an_error():
    with pytest.raises(AttachError, match="not wrapped"):
        unwrap(ppo())


def test_unwrap_inside_learn_stops_guarding_at_once():
    model, guard = ppo(), cost_guard()
    wrap(model, guard)

    def leave(locals_, globals_):
        if guard.host and model.num_timesteps > 70:
            unwrap(model)
        return True

    model.learn(256, callback=leave)
    assert guard.decision.step == 1


def test_an_algorithm_without_rollouts_is_refused_by_name():
    class Bandit(BaseAlgorithm):
        def _setup_model(self):
            pass

        def learn(self, *args, **kwargs):
            pass

    with pytest.raises(AttachError, match=r"Bandit collects no rollouts.*PPO, A2C"):
        wrap(Bandit.__new__(Bandit), cost_guard())


def test_something_that_is_no_model_or_no_guard_is_refused():
    with pytest.raises(AttachError, match=r"takes a Stable-Baselines3 model.* not Drift"):
        wrap(Drift(), cost_guard())
    with pytest.raises(AttachError, match=r"takes a Guard.* not Constraint"):
        wrap(ppo(), Constraint("cost", limit=1.0))


def test_wrapping_twice_is_refused_and_the_first_guard_stays():
    model, first, second = ppo(), cost_guard(), cost_guard()
    wrap(model, first)
    before = vars(model)["_init_callback"]
    with pytest.raises(AttachError, match="wrapped already"):
        wrap(model, second)
    assert vars(model)["_init_callback"] is before
    assert second.host is None
    assert unwrap(model) is first


def test_a_guard_of_another_host_is_refused_and_the_model_is_left_alone():
    guard, model = cost_guard(), ppo()
    wrap(ppo(), guard)
    before = trace(model)
    with pytest.raises(AttachError, match="already attached to PPO"):
        wrap(model, guard)
    assert trace(model) == before


def test_a_model_without_environment_is_refused(tmp_path):
    ppo().save(tmp_path / "model.zip")
    with pytest.raises(AttachError, match="no environment"):
        wrap(PPO.load(tmp_path / "model.zip"), cost_guard())


class Politeness(CompetenceMetric):
    name = "test.politeness"
    requires = frozenset({"completions"})

    def measure(self, rollout):
        return np.ones(rollout.n_rows)


class Thrift(CompetenceMetric):
    name = "test.thrift"
    requires = frozenset({"cost", "lengths"})

    def measure(self, rollout):
        return 1.0 - rollout.cost("cost") / rollout.lengths


def test_a_metric_or_a_dial_that_this_host_cannot_serve_is_refused_by_name():
    gate = Gate(Require(Politeness(), at_least=0.5))
    model, before = ppo(), trace(ppo())
    with pytest.raises(AttachError, match=r"test\.politeness.*completions.*PPO"):
        wrap(model, Guard(Constraint("cost", limit=gate.between(5.0, 25.0))))
    gate = Gate(Require(Thrift(), at_least=0.5))
    with pytest.raises(AttachError, match="Dial 'beta' has nothing to turn on PPO"):
        wrap(model, Guard(Constraint("cost", limit=5.0), Dial("beta", gate.between(1.0, 0.1))))
    with pytest.raises(AttachError, match="no Constraint"):
        wrap(model, Guard(Dial("penalty", gate.between(1.0, 0.1))))
    assert trace(model) == before


def test_a_gate_moves_the_limit_by_what_the_episodes_showed():
    env = vec(4, length=5)
    for each in env.envs:
        each.unwrapped.cost_of = lambda step, action: 0.0
    gate = Gate(Require(Thrift(), at_least=0.5), confidence=0.9)
    guard = Guard(Constraint("cost", limit=gate.between(5.0, 25.0)))
    model = wrap(PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0), guard)
    model.learn(64 * 4 * 12)
    assert guard.decision.constraints["cost"].limit > 5.0


@pytest.mark.parametrize("others", [(), (Constraint("cost", limit=5.0),)])
def test_a_refinement_is_refused_by_name_and_the_model_is_left_alone(others):
    model, before = ppo(), trace(ppo())
    guard = Guard(Refinement(FunctionRefiner(lambda prompt, completion: completion), name="cure"), *others)
    with pytest.raises(AttachError, match="Refinement 'cure' has nothing to correct on PPO"):
        wrap(model, guard)
    assert trace(model) == before
    assert guard.host is None


def test_a_host_whose_internals_moved_is_refused_with_its_version(monkeypatch):
    monkeypatch.delattr("stable_baselines3.common.base_class.BaseAlgorithm._excluded_save_params")
    with pytest.raises(AttachError, match=r"PPO of Stable-Baselines3 2\..* has no _excluded_save_params"):
        wrap(ppo(), cost_guard())


def test_a_key_that_no_info_carries_stops_the_first_step():
    model = wrap(ppo(), Guard(Constraint("harm", limit=1.0, cost="damage")))
    with pytest.raises(RolloutError, match=r"'harm' reads info\['damage'\].*Keys here:.*cost"):
        model.learn(64)
    assert model.num_timesteps == 2


def test_a_key_missing_in_one_environment_only_is_an_error():
    env = vec(2)
    env.envs[1].costs = ("other",)
    model = wrap(PPO("MlpPolicy", env, n_steps=32, batch_size=32), cost_guard())
    with pytest.raises(RolloutError, match=r"info\['cost'\]"):
        model.learn(64)


class Count(BaseCallback):
    def __init__(self, stop_at=None):
        super().__init__()
        self.steps = self.ends = 0
        self.stop_at = stop_at

    def _on_step(self):
        self.steps += 1
        return self.steps != self.stop_at

    def _on_rollout_end(self):
        self.ends += 1


def test_user_callbacks_in_every_form_keep_working():
    called = []
    one, two = Count(), Count()
    for callback in (None, one, [one, two], CallbackList([two]), lambda l, g: called.append(1) or True):  # noqa: E741
        guard = cost_guard()
        wrap(ppo(), guard).learn(64, callback=callback)
        assert guard.decision.step == 1
    assert (one.steps, two.steps, len(called)) == (64, 64, 32)


def test_the_list_of_callbacks_a_user_passes_is_not_changed():
    callbacks = [Count()]
    wrap(ppo(), cost_guard()).learn(64, callback=callbacks)
    assert len(callbacks) == 1


def test_user_callbacks_see_the_mixed_advantages():
    seen = []

    class Look(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            seen.append(not np.allclose(buffer.advantages, buffer.returns - buffer.values, atol=1e-3))

    wrap(ppo(), Guard(Constraint("cost", limit=5.0, scheduler=Fixed(2.0)))).learn(64, callback=Look())
    assert seen == [True]


def test_progress_bar_and_evaluation_callback_work_beside_the_guard(tmp_path):
    guard = cost_guard()
    model = wrap(ppo(), guard)
    evaluation = EvalCallback(vec(1), eval_freq=16, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0)
    model.learn(128, callback=evaluation, progress_bar=True)
    assert guard.decision.step == 2
    assert (tmp_path / "best_model.zip").exists()


def test_the_guard_lives_through_several_learn_calls():
    guard = cost_guard()
    model = wrap(ppo(), guard)
    model.learn(64)
    model.learn(64, reset_num_timesteps=False)
    model.learn(64)
    assert guard.decision.step == 3
    assert model.num_timesteps == 64


def test_a_learn_that_a_callback_stops_leaves_no_half_episodes_for_the_next():
    rows = []
    guard = cost_guard()
    step = guard.step
    guard.step = lambda rollout: rows.extend(rollout.lengths) or step(rollout)
    model = wrap(PPO("MlpPolicy", vec(2, length=20), n_steps=32, batch_size=32, seed=0), guard)
    model.learn(64, callback=Count(stop_at=10))
    assert guard.decision is None
    model.learn(64)
    assert sorted(rows) == [20.0, 23.0]


def test_stop_training_on_max_episodes_still_stops():
    model = wrap(ppo(), cost_guard())
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=1))
    assert model.num_timesteps < 200


def test_a_trained_model_under_a_fresh_guard_is_pointed_out(caplog):
    model = ppo().learn(64)
    with caplog.at_level(logging.WARNING):
        wrap(model, cost_guard())
    assert "has trained 64 steps, but its guard starts afresh" in caplog.text


def test_predict_is_the_hosts_own():
    model, observation = ppo(), np.zeros(3)
    expected = model.predict(observation, deterministic=True)[0]
    assert wrap(model, cost_guard()).predict(observation, deterministic=True)[0] == expected


def test_set_env_keeps_the_guard():
    guard = cost_guard()
    model = wrap(ppo(), guard)
    model.learn(64)
    model.set_env(vec())
    model.learn(64, reset_num_timesteps=False)
    assert guard.decision.step == 2
    assert callback_of(model).guard is guard


def test_a2c_is_guarded_with_a_gae_lambda_of_one():
    guard = cost_guard()
    wrap(A2C("MlpPolicy", vec(), seed=0), guard).learn(200)
    assert guard.decision.step == 20
