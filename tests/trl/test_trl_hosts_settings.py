"""The settings a host is run with: precision, checkpointing, compilation, evaluation, other callbacks."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from tiny_trl import build_trainer, logged, record_loss_inputs, same_weights, weights
from transformers import TrainerCallback

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Fixed
from guardrails_trl import GuardrailsCallback, toy

SETTINGS = [
    {"bf16": True},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "bf16": True},
    pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
]
LAM = 0.7


def guarded(model, folder, *parts, **settings):
    trainer = build_trainer(model, folder, **settings)
    callback = GuardrailsCallback(trainer, Guard(*parts), ledger=False)
    trainer.add_callback(callback)
    return trainer, callback


def on_fillers(scheduler, limit=0.5):
    return Constraint("fillers", limit=limit, cost=toy.fillers, scheduler=scheduler)


def advantages(trainer):
    seen = record_loss_inputs(trainer)
    trainer.train()
    return [value for _, value in seen]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_guard_acts_and_steps_aside_in_every_setting(random_model, tmp_path, kind, settings):
    settings = {"kind": kind, "gradient_accumulation_steps": 2, "beta": 0.1, "learning_rate": 1e-2} | settings
    plain = build_trainer(random_model, tmp_path, max_steps=2, **settings)
    start = weights(plain)
    plain.train()
    trainer, callback = guarded(random_model, tmp_path, on_fillers(Fixed(0.0)), max_steps=2, **settings)
    trainer.train()
    assert callback.guard.decision.step == 2
    assert same_weights(weights(plain), weights(trainer))
    assert not same_weights(start, weights(trainer))

    reward = advantages(build_trainer(random_model, tmp_path, **settings))
    settings["beta"] = 0.0 if kind == "rloo" else 0.1  # RLOO's rewards hold its divergence, which a cost does not
    reward = advantages(build_trainer(random_model, tmp_path, **settings))
    cost = advantages(build_trainer(random_model, tmp_path, rewards=toy.fillers, **settings))
    mixed = advantages(guarded(random_model, tmp_path, on_fillers(Fixed(LAM)), **settings)[0])
    expected = [(a_r - LAM * a_c) / (1 + LAM) for a_r, a_c in zip(reward, cost, strict=True)]
    # float32 in the trainer against float64 here
    assert mixed == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_a_divergence_is_measured_and_turned_in_every_setting(random_model, tmp_path, settings):
    kl = Constraint("kl", limit=1.0, cost="kl", scheduler=Fixed(0.3))
    trainer, callback = guarded(
        random_model, tmp_path, kl, beta=0.7, max_steps=3, learning_rate=3e-2, gradient_accumulation_steps=2, **settings
    )
    trainer.train()
    assert 1e-4 < callback.guard.decision.constraints["kl"].cost < 1.0
    assert trainer.beta == 0.3


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_evaluations_in_between_decide_nothing_and_disturb_nothing(random_model, tmp_path, kind):
    settings = {"kind": kind, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_rows": 2}
    plain = build_trainer(random_model, tmp_path, **settings)
    plain.train()
    trainer, callback = guarded(random_model, tmp_path, on_fillers(Fixed(0.0)), **settings)
    trainer.train()
    assert callback.guard.decision.step == 3
    assert len(logged(trainer, "eval_guardrails/fillers/cost")) == 3
    assert same_weights(weights(plain), weights(trainer))


class Watching(TrainerCallback):
    """A user's callback: logs, as wandb's would, and stops early, as `EarlyStoppingCallback` would."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_other_callbacks_are_heard_and_hear_in_any_order(random_model, tmp_path, order):
    trainer = build_trainer(random_model, tmp_path, max_steps=5)
    callback, watching = GuardrailsCallback(trainer, Guard(on_fillers(PID())), ledger=False), Watching()
    for each in (callback, watching) if order == "ours first" else (watching, callback):
        trainer.add_callback(each)
    trainer.train()
    assert trainer.state.global_step == callback.guard.decision.step == 2
    heard = [logs["guardrails/fillers/multiplier"] for logs in watching.logs if "guardrails/fillers/multiplier" in logs]
    assert heard == logged(trainer, "guardrails/fillers/multiplier")
    assert len(heard) == 2
    callback.detach()
    assert watching in trainer.callback_handler.callbacks


SYNCHRONISING = ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "nonzero")


@contextmanager
def counting(monkeypatch):
    """Count the calls that would make a GPU's host wait for it."""
    calls, depth = Counter(), [0]
    with monkeypatch.context() as patch:
        for name in SYNCHRONISING:
            original = getattr(torch.Tensor, name)

            def counted(self, *args, _name=name, _original=original, **kwargs):
                depth[0] += 1
                calls[_name] += depth[0] == 1  # what such a call calls itself does not wait again
                try:
                    return _original(self, *args, **kwargs)
                finally:
                    depth[0] -= 1

            patch.setattr(torch.Tensor, name, counted)
        yield calls


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_nothing_waits_for_the_device_once_per_micro_batch(random_model, tmp_path, kind, monkeypatch):
    parts = [
        Constraint(f"c{i}", limit=0.5, cost=toy.fillers, scheduler=Fixed(0.1 if i else 0.0)) for i in range(3)
    ]  # fmt: skip
    extra = {}
    for micro_batches in (1, 4):
        settings = {
            "kind": kind,
            "beta": 0.1,
            "per_device_train_batch_size": 16 // micro_batches,
            "gradient_accumulation_steps": micro_batches,
            "logging_steps": 100,
        }
        counts = []
        for is_guarded in (False, True):
            trainer = build_trainer(random_model, tmp_path, **settings)
            if is_guarded:
                trainer.add_callback(GuardrailsCallback(trainer, Guard(*parts), ledger=False))
            trainer.train()  # the first step of a process does more
            with counting(monkeypatch) as calls:
                trainer.train()
            counts.append(calls)
        extra[micro_batches] = counts[1].total() - counts[0].total()
    assert extra[4] == extra[1]
    # Per generation: each cost for the decision and for the table of completions; rewards, lengths, a look for rewards
    # that are missing, and the advantages for the table.
    assert 0 < extra[1] <= 2 * len(parts) + 5


def test_a_guarded_rloo_run_holds_a_limit_the_unguarded_one_breaks(speaking_model, tmp_path):
    settings = {
        "kind": "rloo",
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": toy.MAX_COMPLETION_LENGTH,
        "max_steps": 60,
        "rows": 512,
    }
    last = {}
    for name in ("unguarded", "guarded"):
        seen = []

        def reward(completions, **columns):
            seen.append(sum(toy.fillers(completions)) / len(completions))  # noqa: B023
            return toy.reward(completions, **columns)

        if name == "guarded":
            constraint = on_fillers(PID(kp=0.1, ki=0.05, smoothing_p=0.9))
            guarded(speaking_model, tmp_path, constraint, rewards=reward, **settings)[0].train()
            assert max(seen) > 0.5  # it was violated on the way, so something had to hold it
        else:
            build_trainer(speaking_model, tmp_path, rewards=reward, **settings).train()
        last[name] = sum(seen[-15:]) / 15
    assert last["unguarded"] > 2.0
    assert last["guarded"] <= 0.5
