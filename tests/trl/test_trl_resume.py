"""Resume is exact: N + M steps equal N, a new trainer, M, in weights and multipliers."""

import json
import random

import pytest
import torch
from tiny_trl import build_trainer, same_weights, weights

from guardrails import Constraint, Guard, StateError
from guardrails.schedulers import PID
from guardrails_trl import GuardrailsCallback, toy


def guarded(model, folder, *, missing_ok=False, limit=0.2, **settings):
    trainer = build_trainer(model, folder, max_steps=5, save_strategy="steps", save_steps=2, **settings)
    guard = Guard(Constraint("fillers", limit=limit, cost=toy.fillers, scheduler=PID()))
    trainer.add_callback(GuardrailsCallback(trainer, guard, missing_ok=missing_ok))
    return trainer, guard


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("resume", ["path", "last"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(random_model, tmp_path, kind, resume):
    whole, guard = guarded(random_model, tmp_path, kind=kind)
    whole.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "guardrails.json").read_text())
    assert saved["step"] == 2

    random.seed(9)
    torch.manual_seed(9)
    later, later_guard = guarded(random_model, tmp_path, kind=kind)
    torch.rand(7)  # a process of its own has another past
    if resume == "last":
        for folder in ("checkpoint-5", "checkpoint-4"):
            (tmp_path / folder).rename(tmp_path / f"aside-{folder}")
    later.train(resume_from_checkpoint=True if resume == "last" else str(tmp_path / "checkpoint-2"))
    assert later_guard.state_dict() == guard.state_dict()
    assert guard.multipliers["fillers"] > 0
    assert later_guard.decision == guard.decision
    assert same_weights(weights(later), weights(whole))


def test_without_its_state_a_resumed_guard_would_differ(random_model, tmp_path):
    whole, guard = guarded(random_model, tmp_path)
    whole.train()
    (tmp_path / "checkpoint-2" / "guardrails.json").unlink()
    later, later_guard = guarded(random_model, tmp_path, missing_ok=True)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert later_guard.multipliers != guard.multipliers
    assert later_guard.decision.step == 3


@pytest.mark.parametrize("damage", ["missing", "cut short", "foreign"])
def test_a_checkpoint_without_a_usable_state_stops_before_the_first_step(random_model, tmp_path, damage):
    trainer, _ = guarded(random_model, tmp_path)
    trainer.train()
    file = tmp_path / "checkpoint-4" / "guardrails.json"
    if damage == "missing":
        file.unlink()
    elif damage == "cut short":
        file.write_text(file.read_text()[:40])
    else:
        file.write_text(json.dumps(Guard(Constraint("other", limit=1.0)).state_dict()))
    message = {"missing": "missing_ok=True", "cut short": "is damaged", "foreign": "of another guard"}[damage]
    later, guard = guarded(random_model, tmp_path)
    before = guard.state_dict()
    with pytest.raises(StateError, match=f"(?s)checkpoint-4.*{message}"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert guard.state_dict() == before


def test_a_fresh_run_ignores_checkpoints_that_lie_in_its_folder(random_model, tmp_path):
    first, guard = guarded(random_model, tmp_path)
    first.train()
    again, again_guard = guarded(random_model, tmp_path)
    again.train()
    assert again_guard.decision.step == 5
    assert again_guard.state_dict() == guard.state_dict()
