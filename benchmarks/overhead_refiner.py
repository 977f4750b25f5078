"""Time and memory of a GRPO step with an online refiner, against a step with KL and one without, measured alternately.

    OMP_NUM_THREADS=1 python benchmarks/overhead_refiner.py            # time: results/overhead_refiner.md
    OMP_NUM_THREADS=1 python benchmarks/overhead_refiner.py --memory   # peak memory: results/overhead_refiner_memory.md

A Llama of 2 layers of 128 is taught, on the spot, to repeat a list of 16 to 40 words, with a filler word put in now
and then, and, asked otherwise, to repeat one without its filler words: what a minimal correction is. 8 prompts with 8
completions each. Learning rate 0 and one seed: every variant samples the same completions. Each round trains all
variants for some steps, in an order that changes from round to round, and a ratio is taken within a round. Time is the
processor time of this single-threaded process. "10% detected" takes every tenth row, whatever is in it.

Peak memory is of the tensors of a step, counted by torch's profiler, with weights, reference and optimizer state; of an
untrained model of 4 layers of 512, where these are about as much as the activations. The reference decodes to its
limit, and "all rows changed" then takes two words off each completion, so that no row may use the host's own pass:
the worst that can be.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from guardrails import Guard, Refinement
from guardrails.refine import Acceptance, Always, Detector, ModelRefiner, correction
from guardrails_trl import GuardrailsCallback

RESULTS = Path(__file__).parent / "results"

WORDS = tuple(f"w{i}" for i in range(90))
FILLERS = tuple(f"so{i}" for i in range(6))
SHORTEST, LONGEST = 16, 40
LIMIT = LONGEST + 8
FAULTS = 0.02
"""Filler words per word, in what the policy says: about four completions in ten have one."""

ASK = "fix {completion} :"


class EveryTenth(Detector):
    """Finds 10% of the rows."""

    def detect(self, rows):
        """Return every tenth row, and of a remainder one in proportion."""
        return [row % 10 == 3 for row in range(len(rows))]


class Changing(ModelRefiner):
    """Asks the model, and takes two words off whatever it answers."""

    def refine(self, prompts, completions):
        """Return shorter completions."""
        super().refine(prompts, completions)
        return [" ".join(text.split()[:-2]) for text in completions]


class Clock(TrainerCallback):
    """Processor time of each step, from its beginning to the next one's."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Note when a step begins."""
        self.begun.append(time.process_time())


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a token for each word."""
    names = ("<pad>", "<eos>", "<unk>", "say", "fix", ":", *WORDS, *FILLERS)
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def with_fillers(said: list[str], draw: random.Random, share: float) -> list[str]:
    """Return the words with filler words before some of them."""
    out: list[str] = []
    for word in said:
        out += [draw.choice(FILLERS)] * (draw.random() < share) + [word]
    return out


def build(folder: str, *, steps: int, layers: int, width: int) -> str:
    """Teach a model to say and to fix, save it, and return its folder."""
    torch.manual_seed(0)
    draw, words = random.Random(0), tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    for step in range(steps):
        short = step < steps // 3  # copying is learned on short lists first
        texts = []
        for row in range(64 if short else 16):
            right = draw.sample(WORDS, draw.randint(2, 8) if short else draw.randint(SHORTEST, LONGEST))
            if row % 2:
                texts.append(["fix", *with_fillers(right, draw, 0.05), ":", *right, "<eos>"])
            else:
                texts.append(["say", *right, ":", *with_fillers(right, draw, FAULTS), "<eos>"])
        batch = words([" ".join(text) for text in texts], padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, text in enumerate(texts):
            labels[row, : text.index(":") + 1] = -100
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def reward(completions, **kwargs):
    """Return the number of filler words, so that advantages are not all 0."""
    return [float(text.count("so")) for text in completions]


VARIANTS = {
    "KL": (0.05, None),
    "KL and all rows refined": (0.05, Always()),
    "all rows refined instead of KL": (0.0, Always()),
    "KL and 10% refined": (0.05, EveryTenth()),
    "neither": (0.0, None),
    "10% refined": (0.0, EveryTenth()),
}
RATIOS = (
    ("KL and all rows refined", "KL", 1.6),
    ("all rows refined instead of KL", "KL", 1.6),
    ("KL and 10% refined", "KL", 1.25),
    ("10% refined", "neither", 1.25),
)
"""What is divided by what, and the most that is promised."""


def make(
    model: str,
    folder: str,
    name: str,
    steps: int,
    reference: LlamaForCausalLM | None,
    *,
    changing: bool = False,
    **settings,
):
    """Return the trainer of a variant, and its clock."""
    beta, when = VARIANTS[name]
    draw = random.Random(1)
    lists = [draw.sample(WORDS, draw.randint(SHORTEST, LONGEST)) for _ in range(256)]
    args = GRPOConfig(
        output_dir=folder,
        num_generations=8,
        max_completion_length=LIMIT,
        beta=beta,
        learning_rate=0.0,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 64, "gradient_checkpointing": False} | settings,
    )
    data = Dataset.from_dict({"prompt": [" ".join(["say", *words, ":"]) for words in lists]})
    trainer = GRPOTrainer(model, reward, args=args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    if when is not None:
        refiner = (Changing if changing else ModelRefiner)(None if beta else reference, prompt=ASK)
        accept = Acceptance(sound=None) if changing else Acceptance()
        guard = Guard(Refinement(refiner, 1.0, when, accept=accept))
        trainer.add_callback(GuardrailsCallback(trainer, guard, ledger=False))
    return trainer, clock


def run(trainer: GRPOTrainer, clock: Clock) -> tuple[list[float], dict[str, list[float]]]:
    """Train; return the seconds of every step but the first, and what was logged of the refinement."""
    torch.manual_seed(0)
    clock.begun = []
    trainer.train()
    log: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if key.startswith("guardrails/refinement/"):
                log.setdefault(key.rsplit("refinement/")[-1], []).append(value)
    return np.diff(clock.begun)[1:].tolist(), {key: values[2:] for key, values in log.items()}


def time_steps(rounds: int, steps: int) -> str:
    """Print and return a step's time of each variant, the ratios, the components, and what copying ahead gains."""
    correction.time = types.SimpleNamespace(perf_counter=time.process_time)  # components, else logged as wall time
    with tempfile.TemporaryDirectory() as folder:
        model = build(f"{folder}/model", steps=1200, layers=2, width=128)
        reference = LlamaForCausalLM.from_pretrained(model).eval()
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        parts: dict[str, dict[str, list[float]]] = {name: {} for name in VARIANTS}
        order = list(VARIANTS)
        for number in range(rounds + 1):
            for name in order:
                trainer, clock = make(model, f"{folder}/run", name, steps + 2, reference)
                taken, log = run(trainer, clock)
                if number:  # the first round warms up
                    seconds[name].append(float(np.median(taken)))
                    for key, values in log.items():
                        parts[name].setdefault(key, []).extend(values)
            order = order[1:] + order[:1]
        tables = [_times(seconds), _ratios(seconds), _components(seconds, parts)]
        for table in tables:
            print(table, flush=True)
        gain = _gain(model, reference, rounds)
        print(gain)
        return "\n".join([*tables, gain])


def _times(seconds: dict[str, list[float]]) -> str:
    lines = ["| step | processor time |", "|---|---|"]
    lines += [f"| {name} | {np.median(values) * 1e3:.0f} ms |" for name, values in seconds.items()]
    return "\n".join([*lines, ""])


def _ratios(seconds: dict[str, list[float]]) -> str:
    lines = ["| ratio | median | quartiles | promised |", "|---|---|---|---|"]
    for name, base, most in RATIOS:
        low, middle, high = np.quantile(np.array(seconds[name]) / np.array(seconds[base]), [0.25, 0.5, 0.75])
        lines.append(f"| {name} / {base} | {middle:.3f} | {low:.3f} to {high:.3f} | ≤ {most} |")
    return "\n".join([*lines, ""])


def _components(seconds: dict[str, list[float]], parts: dict[str, dict[str, list[float]]]) -> str:
    """Return what a step takes longer, by component."""
    lines = ["| component | " + " | ".join(name for name, _, _ in RATIOS) + " |", "|---|" + "---|" * len(RATIOS)]
    table: dict[str, list[str]] = {}
    for name, base, _ in RATIOS:
        log = {key: float(np.median(values)) for key, values in parts[name].items()}
        rest = (np.median(seconds[name]) - np.median(seconds[base])) - log["seconds"]
        table.setdefault("rows detected", []).append(f"{log['intervention_rate']:.0%}")
        table.setdefault("rows changed", []).append(f"{log['change_rate']:.0%}")
        for part in ("detect", "refine", "accept"):
            table.setdefault(part, []).append(f"{log[f'seconds/{part}'] * 1e3:.1f} ms")
        table.setdefault("tokens and loss", []).append(f"{rest * 1e3:.1f} ms")
    lines += [f"| {part} | " + " | ".join(cells) + " |" for part, cells in table.items()]
    return "\n".join([*lines, ""])


def _gain(model: str, reference: LlamaForCausalLM, rounds: int) -> str:
    """Return how much sooner copying ahead is done than generating."""
    words, draw = PreTrainedTokenizerFast.from_pretrained(model), random.Random(2)
    lists = [draw.sample(WORDS, draw.randint(SHORTEST, LONGEST)) for _ in range(64)]
    lines = ["| 64 corrections | copying ahead | generating | gain |", "|---|---|---|---|"]
    cases = {
        f"{share:.0%} filler words": [" ".join(with_fillers(said, draw, share)) for said in lists]
        for share in (0.0, 0.02, 0.1)
    }
    cases["filler words alone"] = [" ".join(draw.choices(FILLERS, k=LIMIT - 1)) for _ in lists]
    for label, said in cases.items():
        times: dict[str, list[float]] = {"ahead": [], "generate": []}
        texts = {}
        for _ in range(rounds):
            for kind, generation in (("ahead", None), ("generate", {"do_sample": False})):
                refiner = ModelRefiner(reference, prompt=ASK, generation=generation)
                refiner.attach(_Alone(words))
                begun = time.process_time()
                texts[kind] = refiner.refine(["say :"] * len(said), said)
                times[kind].append(time.process_time() - begun)
        if texts["ahead"] != texts["generate"]:
            raise SystemExit("Copying ahead wrote something else than generating.")
        ahead, generate = (float(np.median(values)) for values in times.values())
        lines.append(f"| {label} | {ahead * 1e3:.0f} ms | {generate * 1e3:.0f} ms | {generate / ahead:.1f} × |")
    return "\n".join([*lines, ""])


class _Alone:
    """A host of a refiner without a trainer."""

    host_name, max_completion_length = "benchmark", LIMIT

    def __init__(self, words: PreTrainedTokenizerFast) -> None:
        self.tokenizer = words


class Peak(TrainerCallback):
    """The largest number of bytes that the tensors of the second step took, above what there was before it."""

    def __init__(self) -> None:
        self.steps, self.bytes = 0, 0
        self.profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )

    def on_step_begin(self, args, state, control, **kwargs):
        """Begin to count."""
        self.steps += 1
        if self.steps == 2:
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        """Add up what was taken and given back."""
        if self.steps == 2:
            self.profiler.stop()
            events = self.profiler.profiler.kineto_results.events()
            changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
            self.bytes = int(np.cumsum([change for _, change in changes]).max())


def memory() -> str:
    """Print and return the peak memory of each variant, and its ratio to KL."""
    lines = ["| peak memory | one micro-batch | of KL | two micro-batches | of KL |", "|---|---|---|---|---|"]
    base: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = build(f"{folder}/model", steps=0, layers=4, width=512)
        for name in ("KL", "KL and all rows refined", "KL and all rows changed", "KL and 10% changed"):
            cells = []
            for batches in (1, 2):
                size = peak(name, model, folder, batches)
                base.setdefault(batches, size)
                cells.append(f"{size / 2**20:.0f} MB | {size / base[batches]:.3f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join([*lines, ""])


def peak(name: str, model: str, folder: str, batches: int) -> int:
    """Return the bytes that a variant takes at most, in a step of some micro-batches of 16 rows."""
    trainer, _ = make(
        model, folder, name.replace("changed", "refined"), 2, None, changing="changed" in name,
        per_device_train_batch_size=16, gradient_accumulation_steps=batches, gradient_checkpointing=True,
    )  # fmt: skip
    counted = Peak()
    trainer.add_callback(counted)
    trainer.train()
    kept = [*trainer.model.parameters(), *trainer.ref_model.parameters()]
    kept += [each for state in trainer.optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    return counted.bytes + sum(each.numel() * each.element_size() for each in kept)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        text, command, file = memory(), "overhead_refiner.py --memory", "overhead_refiner_memory.md"
    else:
        text, command, file = time_steps(options.rounds, options.steps), "overhead_refiner.py", "overhead_refiner.md"
        command += f" --rounds {options.rounds} --steps {options.steps}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    head = f"`OMP_NUM_THREADS=1 python benchmarks/{command}`; Python {platform.python_version()}, {versions}."
    (RESULTS / file).write_text(f"{head}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
