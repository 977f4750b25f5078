"""A guarded Stable-Baselines3 run records itself beside its logs."""

import pytest
from devices import DEVICE
from sb3_envs import Gamble
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure

from guardrails import Constraint, Guard
from guardrails.ledger import read, verify
from guardrails_sb3 import unwrap, wrap


def model(**options):
    return PPO("MlpPolicy", Gamble(), n_steps=64, batch_size=64, n_epochs=1, seed=3, device=DEVICE, **options)


def guard():
    return Guard(Constraint("cost", limit=4.0))


def test_a_run_is_recorded_beside_the_logs_of_the_host(tmp_path):
    guarded = wrap(model(tensorboard_log=str(tmp_path)), guard())
    guarded.learn(192)
    (folder,) = tmp_path.iterdir()
    result = verify(folder)
    assert result.ok, result
    assert result.steps == 3
    header = next(read(folder))
    assert (header.data["host"], header.data["seed"]) == ("PPO", 3)
    assert header.data["environment"]["stable-baselines3"]


def test_a_logger_that_the_user_set_says_where(tmp_path):
    guarded = model()
    guarded.set_logger(configure(str(tmp_path), ["csv"]))
    wrap(guarded, guard()).learn(64)
    assert verify(tmp_path).ok


def test_a_model_that_logs_nowhere_records_nothing_unless_told_where(tmp_path):
    silent = wrap(model(), guard())
    silent.learn(64)
    assert unwrap(silent).ledger is None
    told = wrap(model(), guard(), ledger=tmp_path / "ledger.jsonl")
    told.learn(64)
    told.learn(64, reset_num_timesteps=False)
    result = verify(tmp_path)
    assert result.ok, result
    assert result.steps == 2
    assert [line.kind for line in read(tmp_path)] == ["header", "step", "end", "seam", "step", "end"]


def test_recording_can_be_left_out(tmp_path):
    guarded = wrap(model(tensorboard_log=str(tmp_path)), guard(), ledger=False)
    guarded.learn(64)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_resumed_model_goes_on_from_its_checkpoint_in_the_same_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = wrap(model(), guard(), ledger=path)
    first.learn(128)
    first.save(tmp_path / "model")
    first.learn(64, reset_num_timesteps=False)
    again = wrap(PPO.load(tmp_path / "model", env=Gamble()), guard(), resume=tmp_path / "model.zip", ledger=path)
    again.learn(64, reset_num_timesteps=False)
    result = verify(path)
    assert result.ok, result
    assert any("resumed from step 2, after step 3" in note for note in result.notes)


def test_unwrapping_closes_the_ledger_of_a_run_that_was_stopped(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(locals_, globals_):
        raise StoppedError

    guarded = wrap(model(), guard(), ledger=tmp_path / "ledger.jsonl")
    with pytest.raises(StoppedError):
        guarded.learn(128, callback=stop)
    assert not verify(tmp_path).closed
    unwrap(guarded)
    assert verify(tmp_path).closed


def test_a_ledger_that_the_user_opened_is_used_and_left_open(tmp_path):
    own = guard()
    with own.record(tmp_path / "mine.jsonl") as ledger:
        guarded = wrap(model(tensorboard_log=str(tmp_path / "tb")), own)
        guarded.learn(64)
        unwrap(guarded)
        assert not ledger.closed
    assert verify(tmp_path / "mine.jsonl").steps == 1
    assert not list((tmp_path / "tb").rglob("*.jsonl"))
