"""What the hosts' own TensorBoard logs hold of a guarded run, and the layout that goes with them."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse

import gymnasium as gym
import numpy as np
import pytest
from devices import ON_CPU
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from trl import GRPOConfig, GRPOTrainer

from guardrails import CompetenceMetric, Constraint, Dial, Gate, Guard, Refinement, Require, Rollout
from guardrails.errors import GuardrailsError, LedgerError
from guardrails.ledger import read
from guardrails.refine import FunctionRefiner
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


def record(folder):
    """A ledger of one step: a constraint, a gate and a dial."""
    gate = Gate(Require(Calm(), at_least=0.5))
    guard = Guard(Constraint("cost", limit=gate.between(1.0, 2.0)))
    with guard.record(folder / "ledger.jsonl"):
        guard.step(Rollout(rewards=[1.0], costs={"cost": [1.0]}))


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "guardrails", "layout", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


class Recorder:
    """A server that takes what the Weights & Biases client sends, and answers as theirs does."""

    def __init__(self, status=200):
        recorder = self
        self.received = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = {}
                if self.path == "/graphql":  # else the client's own telemetry
                    recorder.received.append(json.loads(body))
                    answer = {
                        "viewer": {"id": "1", "username": "u", "entity": "acme", "flags": "{}", "teams": {"edges": []}},
                        "upsertView": {"view": {"id": "1", "name": "nw-saved"}, "inserted": True},
                    }
                data = json.dumps({"data": answer}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": "a" * 40, "WANDB_SILENT": "true"}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


def test_a_stable_baselines_run_logs_all_and_the_layout_fits_its_tags(tmp_path):
    gate = Gate(Require(Calm(), at_least=0.5), rungs=2, dwell=1)
    guard = Guard(Constraint("cost", limit=gate.between(5.0, 10.0)))
    guard.record(tmp_path / "ledger.jsonl")
    env = Fast(gym.make("CartPole-v1"))
    model = wrap(
        PPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=1, tensorboard_log=str(tmp_path), seed=0), guard
    )
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
    told = json.loads(done.stdout)
    assert list(told["charts"]) == ["guardrails: cost", "guardrails: gate"]
    assert told["written"] == {"tensorboard": str(logs)}
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
        use_cpu=ON_CPU,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        toy.build(tmp_path / "model", seed=0), toy.reward, args=args, train_dataset=toy.dataset(16, seed=0)
    )
    answer = FunctionRefiner(lambda prompt, completion: " ".join(w for w in completion.split() if w not in toy.FILLERS))
    guard = Guard(Constraint("fillers", limit=0.5, cost=toy.fillers), Refinement(answer))
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
    patterns = laid_out(logs)
    assert len(patterns) == 4 + 7
    for pattern in patterns:
        assert sum(bool(re.match(pattern, tag)) for tag in logged) == 1, pattern


def test_names_are_no_patterns(tmp_path):
    gate = Gate(Require(Calm(), at_least=0.5))
    guard = Guard(Constraint("a.b(c", limit=1.0), Dial("d+", gate.between(0.1, 0.2)))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(rewards=[1.0], costs={"a.b(c": [1.0]}))
    charts = layout.charts(tmp_path)
    cost, _ = map(layout.pattern, charts["guardrails: a.b(c"]["cost against limit"])
    assert re.match(cost, "guardrails/a.b(c/cost")
    assert not re.match(cost, "guardrails/a.b(c/limit")
    assert not re.match(cost, "guardrails/axb(c/cost")
    assert not re.match(cost, "guardrails/a.b(c/cost_2")
    assert re.match(layout.pattern(charts["guardrails: dials"]["d+"][0]), "train/guardrails/d+/value")


def test_a_view_of_the_run_is_saved_in_weights_and_biases(tmp_path):
    record(tmp_path)
    with Recorder() as server:
        done = command(tmp_path, "--wandb", "acme/toys", "--json", **server.environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == {"wandb": f"{server.address}/acme/toys?nw=saved"}
    (saved,) = (body["variables"] for body in server.received if "upsertView" in body["query"])
    assert (saved["entityName"], saved["projectName"]) == ("acme", "toys")
    spec = json.loads(saved["spec"])
    sections = {each["name"]: each["panels"] for each in spec["section"]["panelBankConfig"]["sections"]}
    charts = layout.charts(tmp_path)
    assert list(sections) == list(charts)
    for name, panels in sections.items():
        assert [each["config"]["chartTitle"] for each in panels] == list(charts[name])
        for panel, drawn in zip(panels, charts[name].values(), strict=True):
            for logged in drawn:
                assert re.search(panel["config"]["metricRegex"], f"train/{logged}")
            assert not re.search(panel["config"]["metricRegex"], "train/loss")


@pytest.mark.parametrize("project", ["toys", "acme/", "/toys", "a/b/c"])
def test_a_project_needs_its_entity(tmp_path, project):
    record(tmp_path)
    done = command(tmp_path, "--wandb", project)
    assert done.returncode == 2
    assert "Give entity/project" in done.stderr


def test_a_server_that_refuses_the_view_is_told_in_words(tmp_path):
    record(tmp_path)
    with Recorder(status=403) as server:
        done = command(tmp_path, "--wandb", "acme/toys", **server.environment)
    assert done.returncode == 2
    assert "The view of acme/toys could not be saved" in done.stderr
    assert "Traceback" not in done.stderr


def test_trackio_is_asked_for_the_scalars_of_the_run_alone(tmp_path):
    record(tmp_path)
    done = command(tmp_path, "--trackio", "toys & more", "--json")
    assert done.returncode == 0, done.stderr
    query = urllib.parse.parse_qs(json.loads(done.stdout)["written"]["trackio"].removeprefix("?"))
    assert query["project"] == ["toys & more"]
    (wanted,) = query["metric_filter"]
    drawn = [scalar for each in layout.charts(tmp_path).values() for names in each.values() for scalar in names]
    assert len(drawn) == 7
    assert all(re.search(wanted, f"train/{scalar}") for scalar in drawn)
    assert not re.search(wanted, "train/loss")
    assert not re.search(wanted, "train/guardrails/other/cost")


def test_a_layout_for_nothing_is_refused(tmp_path):
    record(tmp_path)
    done = command(tmp_path)
    assert done.returncode == 2
    assert "Say where" in done.stderr


def test_a_run_without_steps_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    guard = Guard(Constraint("cost", limit=1.0))
    guard.record(tmp_path / "ledger.jsonl").close()
    with pytest.raises(LedgerError, match="no step yet"):
        layout.charts(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GuardrailsError, match="pip install tensorboard"):
        layout.tensorboard({}, tmp_path)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(GuardrailsError, match="pip install wandb-workspaces"):
        layout.wandb({}, "acme/toys")
