"""A guarded TRL run records itself beside its checkpoints."""

import pytest
from tiny_trl import build_trainer, logged

from guardrails import Constraint, Guard
from guardrails.ledger import read, verify
from guardrails.schedulers import PID
from guardrails_trl import GuardrailsCallback, toy


def train(model, folder, resume=None, **options):
    steps = options.pop("steps", 3)
    trainer = build_trainer(model, folder, max_steps=steps, save_strategy="steps", save_steps=2, seed=5)
    guard = Guard(Constraint("fillers", limit=0.5, cost=toy.fillers, scheduler=PID()))
    callback = GuardrailsCallback(trainer, guard, **options)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def test_a_run_is_recorded_closed_and_verified_and_agrees_with_the_hosts_log(random_model, tmp_path):
    trainer, callback = train(random_model, tmp_path)
    path = tmp_path / "guardrails" / "ledger.jsonl"
    result = verify(tmp_path)
    assert result.ok, result
    assert callback.guard.ledger.closed
    header, *lines = read(path)
    assert (header.data["host"], header.data["seed"]) == ("GRPOTrainer", 5)
    assert header.data["environment"]["trl"]
    steps = [line.decision for line in lines if line.kind == "step"]
    assert [step.step for step in steps] == [1, 2, 3]
    assert [step.multipliers["fillers"] for step in steps] == logged(trainer, "guardrails/fillers/multiplier")


def test_a_resumed_run_goes_on_in_the_same_ledger_from_its_checkpoint(random_model, tmp_path):
    train(random_model, tmp_path)
    train(random_model, tmp_path, resume=str(tmp_path / "checkpoint-2"), steps=4)
    result = verify(tmp_path)
    assert result.ok, result
    assert any("resumed from step 2, after step 3" in note for note in result.notes)
    assert [line.data["step"] for line in read(tmp_path) if line.kind == "step"] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize("ledger", [False, "elsewhere"])
def test_the_ledger_can_be_put_elsewhere_or_left_out(random_model, tmp_path, ledger):
    path = tmp_path / "of mine.jsonl"
    _, callback = train(random_model, tmp_path / "run", ledger=path if ledger else False)
    assert not (tmp_path / "run" / "guardrails").exists()
    assert path.exists() == bool(ledger)
    assert (callback.guard.ledger is None) == (not ledger)


def test_a_ledger_that_the_user_opened_is_used_and_left_open(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path / "run", max_steps=1)
    guard = Guard(Constraint("fillers", limit=0.5, cost=toy.fillers))
    with guard.record(tmp_path / "mine.jsonl") as ledger:
        callback = GuardrailsCallback(trainer, guard)
        trainer.add_callback(callback)
        trainer.train()
        assert not ledger.closed
        callback.detach()
        assert not ledger.closed
    assert not (tmp_path / "run" / "guardrails").exists()
    assert verify(tmp_path / "mine.jsonl").steps == 1


def test_detaching_closes_the_ledger_of_a_run_that_was_stopped_by_an_error(random_model, tmp_path):
    def broken(completions, **kwargs):
        raise RuntimeError("the reward is gone")

    trainer = build_trainer(random_model, tmp_path, rewards=broken)
    guard = Guard(Constraint("fillers", limit=0.5, cost=toy.fillers))
    callback = GuardrailsCallback(trainer, guard)
    trainer.add_callback(callback)
    with pytest.raises(RuntimeError, match="the reward is gone"):
        trainer.train()
    assert not guard.ledger.closed
    callback.detach()
    assert guard.ledger.closed
    assert verify(tmp_path).closed
