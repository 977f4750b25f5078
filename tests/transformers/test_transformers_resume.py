"""Resume is exact: N + M steps equal N, an end or a kill, a new process, M, in weights, state and ledger."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_training import trainer_and_guard
from tiny_trainer import Rows, build, classifier, positives, same, weights
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from guardrails import Constraint, Guard, StateError
from guardrails.ledger import read, verify
from guardrails.schedulers import PID
from guardrails_transformers import GuardrailsCallback

SCRIPT = Path(__file__).with_name("killed_training.py")


def start(folder, resume=""):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(resume)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def decided(folder):
    """What the ledger says was decided in each step, by the last line that speaks of it."""
    steps = {}
    for line in read(folder):
        if line.kind == "step":
            steps[line.data["step"]] = (line.data["evidence"], line.data["decision"])
    return steps


def test_a_killed_training_goes_on_to_the_bit_in_a_new_process(tmp_path):
    whole, guard = trainer_and_guard(tmp_path / "whole")
    whole.train()
    killed = start(tmp_path / "killed")
    last = random.randrange(9, 32)
    for line in killed.stdout:
        if line.strip().isdigit() and int(line) >= last:
            break
    killed.kill()
    killed.wait(timeout=60)
    folders = sorted((tmp_path / "killed").glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    # The host takes a step too many, guarded or not, when it resumes from where a run had ended: a kill may come late.
    unfinished = [folder for folder in folders if folder.name != "checkpoint-40"]
    complete = [folder for folder in unfinished if (folder / "trainer_state.json").exists()]
    assert complete, f"killed at step {last}, before anything was saved"
    resumed = start(tmp_path / "killed", complete[-1])
    assert resumed.wait(timeout=300) == 0, resumed.stderr.read()[-3000:]

    resumed_weights = torch.load(tmp_path / "killed" / "weights.pt", weights_only=True)
    assert same(weights(whole), resumed_weights), f"killed at step {last}, resumed from {complete[-1].name}"
    assert json.loads((tmp_path / "killed" / "state.json").read_text()) == json.loads(json.dumps(guard.state_dict()))
    ledgers = [tmp_path / name / "guardrails" for name in ("whole", "killed")]
    assert decided(ledgers[0]) == decided(ledgers[1])
    assert len(decided(ledgers[0])) == 40
    assert [line.kind for line in read(ledgers[1])].count("seam") == 1
    assert verify(ledgers[1]).ok


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"restore_callback_states_from_checkpoint": True},
        {"save_total_limit": 1},
        {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True},
    ],
    ids=["plain", "callback states", "rotation", "best model"],
)
def test_the_guard_resumes_whatever_else_the_host_does_with_checkpoints(tmp_path, setting):
    def prepared(folder, steps):
        settings = {"save_total_limit": None} | setting
        if "eval_strategy" in setting:
            settings["eval_data"] = Rows(16, seed=2)
        trainer, guard = trainer_and_guard(folder, max_steps=12, **settings)
        if "eval_strategy" in setting:
            trainer.add_callback(EarlyStoppingCallback(50))
        if steps < 12:
            trainer.add_callback(Stop(steps))
        return trainer, guard

    whole, guard = prepared(tmp_path / "whole", 12)
    whole.train()
    first, _ = prepared(tmp_path / "parts", 8)
    first.train()
    torch.rand(7)  # a process of its own has another past
    later, later_guard = prepared(tmp_path / "parts", 12)
    later.train(resume_from_checkpoint=True)
    assert later_guard.state_dict() == guard.state_dict()
    assert later_guard.decision == guard.decision
    assert same(weights(later), weights(whole))
    left = sorted(folder.name for folder in (tmp_path / "parts").glob("checkpoint-*"))
    for name in left:
        state = json.loads((tmp_path / "parts" / name / "guardrails.json").read_text())
        assert state["step"] == int(name[11:])
    if setting.get("save_total_limit") == 1:
        assert left == ["checkpoint-12"]


def test_a_checkpoint_of_the_model_alone_holds_the_guard_too(tmp_path):
    trainer, guard = trainer_and_guard(tmp_path, max_steps=4, save_only_model=True)
    trainer.train()
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    later, later_guard = trainer_and_guard(tmp_path, max_steps=8, save_only_model=True)
    begun = []

    class Begins(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(later_guard.state_dict())

    later.add_callback(Begins())
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert begun == [guard.state_dict()]


def test_the_state_lies_in_the_folder_before_the_host_pushes_or_rotates_it(tmp_path):
    """transformers asks its exportable callbacks for their state just before it writes its own, pushes and rotates."""
    found = []

    class Asked(TrainerCallback, ExportableState):
        def state(self):
            found.append((tmp_path / f"checkpoint-{trainer.state.global_step}" / "guardrails.json").exists())
            return {"args": {}, "attributes": {}}

    trainer, _ = trainer_and_guard(tmp_path, max_steps=8)
    trainer.add_callback(Asked())
    trainer.train()
    assert found[-2:] == [True, True]


class Stop(TrainerCallback):
    """Ends a training early, as a user would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("damage", ["missing", "cut short", "foreign"])
def test_a_checkpoint_without_a_usable_state_stops_before_the_first_step(tmp_path, damage):
    trainer, _ = trainer_and_guard(tmp_path, max_steps=4)
    trainer.train()
    file = tmp_path / "checkpoint-4" / "guardrails.json"
    if damage == "missing":
        file.unlink()
    elif damage == "cut short":
        file.write_text(file.read_text()[:40])
    else:
        file.write_text(json.dumps(Guard(Constraint("other", limit=1.0)).state_dict()))
    message = {"missing": "missing_ok=True", "cut short": "is damaged", "foreign": "of another guard"}[damage]
    later, guard = trainer_and_guard(tmp_path, max_steps=8)
    before = guard.state_dict()
    with pytest.raises(StateError, match=f"(?s)checkpoint-4.*{message}"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert guard.state_dict() == before
    assert guard.decision is None


def test_an_unguarded_runs_checkpoint_is_taken_by_explicit_choice(tmp_path, caplog):
    plain = build(classifier(), tmp_path, Rows(64), save_strategy="steps", save_steps=2, max_steps=4)
    plain.train()
    later = build(classifier(), tmp_path, Rows(64), max_steps=4)
    guard = Guard(Constraint("c", limit=0.1, cost=positives, scheduler=PID()))
    later.add_callback(GuardrailsCallback(later, guard, missing_ok=True))
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "has no guardrails.json" in caplog.text
    assert guard.decision.step == 2
