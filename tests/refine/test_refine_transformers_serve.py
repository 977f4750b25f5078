"""EndpointRefiner against ``transformers serve`` with a tiny model, and when that process stops or dies."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guardrails.refine import Acceptance, Always, Corrector, EndpointRefiner, Rows
from guardrails_trl import toy

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPTS = [f"{a} + {b} =" for a, b in [(1, 2), (3, 4), (5, 6), (7, 8)]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model that answers sums, and with a chat template that passes the text on."""
    folder = toy.build(tmp_path_factory.mktemp("served"), steps=250)
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    return folder


@contextmanager
def serving(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", model]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = Path(model) / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        _wait(process, port, log)
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process, port, log):
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2.0).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"transformers serve did not start: {log.read_text()[-2000:]}")


def greedy(folder, prompt):
    """What the model says by itself, without a server."""
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = words(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return words.decode(out, skip_special_tokens=True)


def test_a_served_model_refines_and_its_silence_or_death_stops_nothing(model, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(model) as (process, url):
        refiner = EndpointRefiner(
            url, model, prompt=lambda prompt, completion: prompt, max_tokens=12, timeout=30.0, retries=0
        )
        corrector = Corrector(refiner, Always(), Acceptance(sound=None))
        rows = Rows(prompts=PROMPTS, completions=["well so 9"] * 4)
        assert corrector.correct(rows).targets == [greedy(model, prompt) for prompt in PROMPTS]
        refiner.timeout = refiner.budget = 1.0
        os.killpg(process.pid, signal.SIGSTOP)
        begun = time.perf_counter()
        assert corrector.correct(rows).targets == [None] * 4
        assert time.perf_counter() - begun < 1.0 + 1.0 + 0.5  # budget, grace, and a thread to be scheduled
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert corrector.correct(rows).targets == [None] * 4
