"""Conversations: messages are refined as the text that the policy wrote, scored and recorded as messages."""

import json

import pytest
import trl
from devices import ON_CPU
from packaging.version import Version
from tiny_trl import logged
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from guardrails import Guard, Refinement
from guardrails.refine import Acceptance, FunctionRefiner, ModelRefiner
from guardrails_trl import GuardrailsCallback, toy


def test_conversations_are_refined_scored_and_recorded(repairing_model, tmp_path):
    words, data = toy.tokenizer(), toy.dataset(64)
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    scored = []

    def brevity(completions, **kwargs):
        scored.append(completions)
        return [-float(len(messages[0]["content"].split())) for messages in completions]

    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=32, num_generations=8, beta=0.05, max_steps=1,
        max_completion_length=toy.MAX_COMPLETION_LENGTH, report_to="none", bf16=False, use_cpu=ON_CPU, logging_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(repairing_model, brevity, args=args, train_dataset=data, processing_class=words)
    accept = Acceptance(sound=None, reward=True)
    guard = Guard(Refinement(ModelRefiner(prompt=toy.REPAIR), 1.0, accept=accept))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()

    logs = trainer._logs
    said = [said if isinstance(said, str) else said[0]["content"] for said in logs["completion"]]  # TRL 1.6 logs texts
    refined = logs["extra"]["guardrails/refined"]
    talk = [target for text, target in zip(said, refined, strict=True) if set(text.split()) & set(toy.FILLERS)]
    assert len(talk) > 3
    assert all(target is None or target.isdigit() for target in talk)
    assert sum(target is not None for target in talk) > 3
    first, again = scored
    assert len(again) < len(first) == 32  # only what was changed
    assert all(set(message) == {"role", "content"} for messages in again for message in messages)
    assert logged(trainer, "guardrails/refinement/loss")[0] > 0.0
    ledger = (tmp_path / "guardrails" / "ledger.jsonl").read_text().splitlines()
    note = next(line for line in map(json.loads, ledger) if line["kind"] == "note")
    assert all(example["prompt"].endswith("=") for example in note["data"]["examples"])


@pytest.mark.parametrize(("trainer_type", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_the_reference_is_asked_with_the_chat_template_settings_of_the_policy(
    random_model, tmp_path, trainer_type, config
):
    words, data = toy.tokenizer(), toy.dataset(8)
    words.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}+ + {% endif %}"
    )
    data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    args = config(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, beta=0.05, max_steps=1,
        max_completion_length=4, report_to="none", bf16=False, use_cpu=ON_CPU, save_strategy="no",
        chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    rewards = lambda completions, **kwargs: [0.0] * len(completions)  # noqa: E731
    trainer = trainer_type(random_model, rewards, args=args, train_dataset=data, processing_class=words)
    refiner, asked = ModelRefiner(prompt="{prompt} {completion} ="), []
    decode = refiner._decode
    refiner._decode = lambda model, words, rows, *rest: asked.extend(rows) or decode(model, words, rows, *rest)
    trainer.add_callback(GuardrailsCallback(trainer, Guard(Refinement(refiner)), ledger=False))
    trainer.train()
    assert len(asked) == 8
    assert all(words.decode(row).endswith("= + +") for row in asked)


@pytest.mark.parametrize(("trainer_type", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_reward_functions_get_a_correction_in_the_shape_of_the_completion(random_model, tmp_path, trainer_type, config):
    """GRPO, from TRL 1.8 on, parses thoughts and answer; it is the prompt that opens the thoughts."""
    words, data = toy.tokenizer(), toy.dataset(8)
    words.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}well {% endif %}"
    )
    thoughts = {"open": "well", "close_pattern": r"so\s*", "content": "text"}
    answer = {"close_pattern": r"<eos>\s*", "content": "text"}
    words.response_template = {
        "defaults": {"role": "assistant"}, "start_anchor": "=",
        "fields": {"reasoning_content": thoughts, "content": answer},
    }  # fmt: skip
    data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    scored = []

    def brevity(completions, **kwargs):
        scored.append([message for (message,) in completions])
        return [-float(len(message["content"].split())) for (message,) in completions]

    args = config(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=1, logging_steps=1,
        max_completion_length=8, report_to="none", bf16=False, use_cpu=ON_CPU, save_strategy="no",
    )  # fmt: skip
    trainer = trainer_type(random_model, brevity, args=args, train_dataset=data, processing_class=words)
    rows = [words("3 so 7 7 <eos>")["input_ids"] for _ in range(8)]
    trainer._generate_single_turn = lambda *_: (rows, None) if trainer_type is GRPOTrainer else rows
    shorten = FunctionRefiner(lambda prompt, completion: completion.removesuffix(" 7"))
    accept = Acceptance(sound=None, reward=True)
    trainer.add_callback(GuardrailsCallback(trainer, Guard(Refinement(shorten, 1.0, accept=accept)), ledger=False))
    trainer.train()
    if trainer_type is GRPOTrainer and Version(trl.__version__) >= Version("1.8"):
        written, refined = {"reasoning_content": "3", "content": "7 7"}, {"reasoning_content": "3", "content": "7"}
    else:
        written, refined = {"content": "3 so 7 7"}, {"content": "3 so 7"}
    assert scored == [[{"role": "assistant", **message}] * 8 for message in (written, refined)]
    assert logged(trainer, "guardrails/refinement/acceptance_rate") == [1.0]
