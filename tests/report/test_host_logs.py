"""What the hosts' own TensorBoard logs hold of a guarded run, and the layout that goes with them."""

import json
import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from trl import GRPOConfig, GRPOTrainer

from guardrails import CompetenceMetric, Constraint, Dial, Gate, Guard, Require
from guardrails.errors import GuardrailsError, LedgerError
from guardrails.ledger import read
from guardrails.report import layout
from guardrails_sb3 import wrap
from guardrails_trl import GuardrailsCallback, toy


class Fast(gym.Wrapper):
    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["cost"] = float(abs(observation[1]) > 0.2)
        return observation, reward, terminated, truncated, info


class Calm(CompetenceMetric):
    name = "calm"
    requires = frozenset({"rewards"})

    def measure(self, rollout):
        return np.full(len(rollout.rewards), 0.9)


def scalars(folder):
    """Tag to values, of all event files in ``folder``."""
    accumulator = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def laid_out(folder):
    """The patterns of all charts of the layout in ``folder``."""
    accumulator = EventAccumulator(str(folder)).Reload()
    (event,) = accumulator.Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return [tag for category in found.category for chart in category.chart for tag in chart.multiline.tag]


def recorded(run, constraint, field):
    return [getattr(line.decision.constraints[constraint], field) for line in read(run) if line.kind == "step"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "guardrails", "layout", *map(str, arguments)], capture_output=True, text=True
    )


def test_a_stable_baselines_run_logs_all_and_the_layout_fits_its_tags(tmp_path):
    gate = Gate(Require(Calm(), at_least=0.5), rungs=2, dwell=1)
    guard = Guard(Constraint("cost", limit=gate.between(5.0, 10.0)))
    guard.record(tmp_path / "ledger.jsonl")
    env = Fast(gym.make("CartPole-v1"))
    model = wrap(PPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=1, tensorboard_log=str(tmp_path)), guard)
    model.learn(256)
    guard.ledger.close()
    logs = tmp_path / "PPO_1"
    logged = scalars(logs)
    # Host event files hold float32; the last rollout's scalars are written with the next one or at the end.
    for field in ("cost", "limit", "violation", "multiplier"):
        values, own = logged[f"guardrails/cost/{field}"], recorded(tmp_path, "cost", field)
        assert len(values) >= 3
        assert values == pytest.approx(own[: len(values)], rel=1e-6)
    assert {"guardrails/gate/level", "guardrails/gate/calm/mean", "guardrails/gate/calm/lower"} <= set(logged)
    done = command(tmp_path, logs, "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["guardrails: cost", "guardrails: gate"]
    patterns = laid_out(logs)
    assert len(patterns) == 7
    for pattern in patterns:
        assert sum(bool(re.match(pattern, tag)) for tag in logged) == 1, pattern


def test_a_trl_run_logs_all_and_the_layout_fits_its_tags(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    args = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="tensorboard",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        toy.build(tmp_path / "model", seed=0), toy.reward, args=args, train_dataset=toy.dataset(16, seed=0)
    )
    guard = Guard(Constraint("fillers", limit=0.5, cost=toy.fillers))
    guard.record(tmp_path / "ledger.jsonl")
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    guard.ledger.close()
    (logs,) = {path.parent for path in (tmp_path / "logs").rglob("events.*")}
    logged = scalars(logs)
    for field in ("cost", "limit", "violation", "multiplier"):
        assert logged[f"train/guardrails/fillers/{field}"] == pytest.approx(
            recorded(tmp_path, "fillers", field), rel=1e-6
        )
    assert command(tmp_path, logs).returncode == 0
    for pattern in laid_out(logs):
        assert sum(bool(re.match(pattern, tag)) for tag in logged) == 1, pattern


def test_names_are_no_patterns(tmp_path):
    gate = Gate(Require(Calm(), at_least=0.5))
    guard = Guard(Constraint("a.b(c", limit=1.0), Dial("d+", gate.between(0.1, 0.2)))
    from guardrails import Rollout

    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(rewards=[1.0], costs={"a.b(c": [1.0]}))
    charts = layout.layout(tmp_path)
    _, patterns = charts["guardrails: a.b(c"]["cost against limit"]
    assert [bool(re.match(pattern, "guardrails/a.b(c/cost")) for pattern in patterns] == [True, False]
    assert not re.match(patterns[0], "guardrails/axb(c/cost")
    assert not re.match(patterns[0], "guardrails/a.b(c/cost_2")
    assert re.match(charts["guardrails: dials"]["d+"][1][0], "train/guardrails/d+/value")


def test_a_run_without_steps_and_a_missing_tensorboard_are_refused(tmp_path, monkeypatch):
    guard = Guard(Constraint("cost", limit=1.0))
    guard.record(tmp_path / "ledger.jsonl").close()
    with pytest.raises(LedgerError, match="no step yet"):
        layout.layout(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GuardrailsError, match="pip install tensorboard"):
        layout.write({}, tmp_path)
