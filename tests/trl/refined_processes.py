"""Run by `test_trl_refiner_distributed.py`, alone or under torchrun: a refined trainer on the same global batch."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from peft import LoraConfig
from tiny_trl import build_trainer, logged

from guardrails import Constraint, Guard, Refinement
from guardrails.refine import Acceptance, FunctionRefiner
from guardrails.schedulers import Fixed
from guardrails_trl import GuardrailsCallback, toy

TEXTS = ["well 4", "so", "7 7", "well well 3", "9", "really 1 so", "12", "so 5"]


def main(model, folder, case):
    torch.set_num_threads(1)
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))

    def rewards(completions, **kwargs):
        if "fails" in case and "5" in completions:
            raise ValueError("no score for a bare 5")
        return [float(len(text.split())) for text in completions]

    def correct(prompt, completion):
        words = completion.split()
        if "one rank" in case and len(words) > 1 and completion != "so 5":  # the rows of the first process, see below
            return None
        return " ".join(word for word in words if word not in toy.FILLERS) or None

    torch.manual_seed(0)  # older versions of TRL make adapters before they seed
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if case == "lora" else None
    n_batches = 2 if case == "accumulated" else 1
    trainer = build_trainer(
        model,
        folder,
        rewards=rewards,
        per_device_train_batch_size=8 // n_processes // n_batches,
        gradient_accumulation_steps=n_batches,
        num_generations=8,
        max_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        log_completions=True,
        shuffle_dataset=False,
        ddp_static_graph=True if case == "static graph" else None,
        peft=adapter,
    )
    rank = trainer.accelerator.process_index
    # Both runs are given the same completions: processes sample from random states of their own.
    tokens = trainer.processing_class
    own = TEXTS[rank * 8 // n_processes : (rank + 1) * 8 // n_processes]
    if "one rank" in case:
        own = sorted(TEXTS, key=lambda text: -len(text.split()))[
            rank * 8 // n_processes : (rank + 1) * 8 // n_processes
        ]

    def generate(prompt_ids, *args, **kwargs):
        return [[*tokens(text)["input_ids"], tokens.eos_token_id] for text in own], None

    trainer._generate_single_turn = generate
    accept = Acceptance(sound=None, reward="reward" in case, similarity=0.0)
    held = Constraint("edits", limit=0.5, scheduler=Fixed(0.8))
    guard = Guard(Refinement(FunctionRefiner(correct), held, accept=accept))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    keys = ("edit_ratio", "intervention_rate", "acceptance_rate", "change_rate", "loss", "weight")
    result = {
        "weights": {name: value.double().tolist() for name, value in policy.named_parameters() if value.requires_grad},
        "logged": {key: logged(trainer, f"guardrails/refinement/{key}") for key in keys},
        "refined": list(trainer._logs["extra"]["guardrails/refined"]),
        "cost": guard.decision.constraints["edits"].cost,
        "has_term": any("guardrails_refined_ids" in batch for batch in trainer._buffered_inputs),
    }
    (Path(folder) / f"{case.replace(' ', '_')}_{n_processes}_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    for each in sys.argv[3:]:
        main(sys.argv[1], sys.argv[2], each)
