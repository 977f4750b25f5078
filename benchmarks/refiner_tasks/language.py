"""The reference model of a task: a small Llama taught from scratch to answer, imperfectly, and to repair answers."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refiner_tasks.task import Task

SPECIAL = ("<pad>", "<eos>", "<unk>")
STEPS = 600
BATCH = 64


def tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of ``task``."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL, *task.words))}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def reference(
    task: Task, folder: str | os.PathLike[str], *, seed: int, steps: int = STEPS, layers: int = 2, width: int = 64
) -> str:
    """Train the reference of ``task`` and save it with its tokenizer below ``folder``, unless it is there already.

    Returns:
        The folder of the model, for a trainer to load from. Its name changes with the sources of the task.
    """
    sources = (Path(inspect.getfile(each)).read_bytes() for each in (type(task), Task, tokenizer))
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:8]
    folder = Path(folder) / f"{task.name}-{seed}-{steps}-{digest}"
    if not folder.exists():
        words = tokenizer(task)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=64,
                pad_token_id=words.pad_token_id,
                eos_token_id=words.eos_token_id,
                bos_token_id=None,
            )
        )
        teach(model, words, task, steps=steps, draw=random.Random(seed))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            words.save_pretrained(made)
            model.save_pretrained(made)
            with contextlib.suppress(OSError):  # another process was first
                Path(made).rename(folder)
                Path(made).mkdir()
    return str(folder)


def teach(
    model: LlamaForCausalLM, words: PreTrainedTokenizerFast, task: Task, *, steps: int, draw: random.Random
) -> None:
    """Train ``model`` on `Task.example`, its loss on outputs alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=max(steps, 2), pct_start=0.1)
    model.train()
    for _ in range(steps):
        pairs = [tuple(words(text)["input_ids"] for text in task.example(draw)) for _ in range(BATCH)]
        rows = [(prompt, [*output, words.eos_token_id]) for prompt, output in pairs]
        width = max(len(prompt) + len(output) for prompt, output in rows)
        ids, labels, mask = (torch.full((BATCH, width), fill) for fill in (words.pad_token_id, -100, 0))
        for row, (prompt, output) in enumerate(rows):
            end = len(prompt) + len(output)
            ids[row, :end] = torch.tensor(prompt + output)
            labels[row, len(prompt) : end] = torch.tensor(output)
            mask[row, :end] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
