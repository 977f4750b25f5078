"""Resume is exact: N + M steps equal N, a kill or an end, a new process, M, in weights, state and ledger."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killed_trl import STEPS, trainer_and_guard
from tiny_trl import same_weights, weights
from transformers import TrainerCallback

from guardrails.ledger import read, verify

SCRIPT = Path(__file__).with_name("killed_trl.py")


def start(model, folder, kind, resume=""):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), model, str(folder), kind, str(resume)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=open(Path(folder).with_suffix(".log"), "w"),  # a pipe that nobody reads would fill up and block
        text=True,
    )


def decided(folder):
    """What the ledger says was decided in each step, by the last line that speaks of it."""
    lines = [line.data for line in read(folder) if line.kind == "step"]
    return {line["step"]: (line["evidence"], line["decision"]) for line in lines}


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("kind", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_killed_trl_goes_on_to_the_bit_in_a_new_process(random_model, tmp_path, kind):
    whole, guard = trainer_and_guard(random_model, tmp_path / "whole", kind=kind)
    whole.train()
    assert guard.gates["gate"].rung > 0  # else there would be less state to lose
    assert all(guard.multipliers[name] > 0 for name in ("fillers", "words"))

    killed = start(random_model, tmp_path / "killed", kind)
    last = random.randrange(3, STEPS - 2)
    for line in killed.stdout:
        if line.strip().isdigit() and int(line) >= last:
            break
    time.sleep(random.uniform(0.0, 0.2))  # anywhere in the step, or in the writing of a checkpoint
    killed.kill()
    killed.wait(timeout=60)
    folders = sorted((tmp_path / "killed").glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    # The host takes a step too many, guarded or not, when it resumes from where a run had ended: a kill may come late.
    unfinished = [folder for folder in folders if folder.name != f"checkpoint-{STEPS}"]
    complete = [folder for folder in unfinished if (folder / "trainer_state.json").exists()]
    where = f"killed at step {last}, resumed from {complete[-1].name}"
    resumed = start(random_model, tmp_path / "killed", kind, complete[-1])
    resumed.stdout.read()
    assert resumed.wait(timeout=120) == 0, (tmp_path / "killed.log").read_text()[-3000:]

    resumed_weights = torch.load(tmp_path / "killed" / "weights.pt", weights_only=True)
    assert same_weights(weights(whole), resumed_weights), where
    assert json.loads((tmp_path / "killed" / "state.json").read_text()) == json.loads(json.dumps(guard.state_dict()))
    ledgers = [tmp_path / name / "guardrails" for name in ("whole", "killed")]
    assert decided(ledgers[0]) == decided(ledgers[1]), where
    assert [line.kind for line in read(ledgers[1])].count("seam") == 1
    assert verify(ledgers[1]).ok


@pytest.mark.parametrize(
    "setting",
    [
        {"restore_callback_states_from_checkpoint": True},
        {"save_total_limit": 1},
        {"eval_strategy": "steps", "eval_steps": 3, "eval_rows": 2, "load_best_model_at_end": True},
        {"num_iterations": 2},
    ],
    ids=["callback states", "rotation", "best model", "two iterations"],
)
def test_the_guard_resumes_whatever_else_the_host_does_with_checkpoints(random_model, tmp_path, setting):
    # A generation serves one optimizer step here, or two with two iterations, and the host does not save it: a
    # checkpoint within one generates anew. So checkpoints lie where a generation ends, as the documentation asks.
    settings = {"max_steps": 6, "save_steps": 2} | setting
    if "eval_rows" in settings:
        settings |= {"eval_steps": 2, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    whole, guard = trainer_and_guard(random_model, tmp_path / "whole", **settings)
    whole.train()
    first, _ = trainer_and_guard(random_model, tmp_path / "parts", **settings)
    first.add_callback(Stop(2))
    first.train()
    torch.rand(7)  # a process of its own has another past
    later, later_guard = trainer_and_guard(random_model, tmp_path / "parts", **settings)
    later.train(resume_from_checkpoint=True)
    assert later_guard.state_dict() == guard.state_dict()
    assert later_guard.decision == guard.decision
    assert same_weights(weights(later), weights(whole))
    left = {folder.name for folder in (tmp_path / "parts").glob("checkpoint-*")}
    for name in left:
        state = json.loads((tmp_path / "parts" / name / "guardrails.json").read_text())
        assert state["step"] == int(name[11:]) // settings.get("num_iterations", 1)
    assert left == ({"checkpoint-6"} if "save_total_limit" in setting else {f"checkpoint-{i}" for i in (2, 4, 6)})


def test_a_checkpoint_of_the_model_alone_holds_the_guard_too(random_model, tmp_path):
    first, guard = trainer_and_guard(random_model, tmp_path, max_steps=3, save_only_model=True)
    first.train()
    assert not (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    later, later_guard = trainer_and_guard(random_model, tmp_path / "later", max_steps=4)
    begun = []

    class Beginning(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(later_guard.state_dict())

    later.add_callback(Beginning())
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert begun == [guard.state_dict()]
    assert later_guard.decision.step == 4


def test_a_checkpoint_that_is_being_written_has_the_guards_state_before_it_is_whole(random_model, tmp_path):
    trainer, guard = trainer_and_guard(random_model, tmp_path, max_steps=3, save_steps=3)
    seen = []

    class Interrupting(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append((tmp_path / "checkpoint-3" / "guardrails.json").exists())

    trainer.callback_handler.callbacks.insert(0, Interrupting())  # before any other callback hears of it
    trainer.train()
    assert seen == [True]
    assert guard.decision.step == 3
