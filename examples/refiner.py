"""GRPO on sums, with a reward that also pays for filler words, under a dynamic constraint: an online refiner.

    python examples/refiner.py --steps 100

The reference model that GRPO holds anyway corrects what the policy wrote, with as few changes as it can, and the
policy learns the correction beside its reward. Where nothing was wrong the correction is what was written, and the
constraint vanishes.

Needs `pip install training-guardrails[trl]`. Runs on a CPU in less than a minute, without any download: model and
tokenizer are made and pre-trained on the spot by `guardrails_trl.toy`. With a model of your own, only `main` matters;
a model that follows instructions needs no `prompt` of yours.
"""

import argparse
import tempfile

from trl import GRPOConfig, GRPOTrainer

from guardrails import Guard, Refinement
from guardrails.refine import ModelRefiner
from guardrails_trl import GuardrailsCallback, toy


def helpful(completions, answer, **kwargs):
    """A TRL reward function: 1 for a right answer, and 0.15 for every filler word. The second part is the mistake."""
    return toy.reward(completions, answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--weight", type=float, default=3.0, help="of the refinement; 0 trains without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="", help="where checkpoints go; by default nothing is kept")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model, args, ds = tiny_task(folder, options)

        trainer = GRPOTrainer(model, reward_funcs=[helpful], args=args, train_dataset=ds)
        refiner = ModelRefiner(prompt=toy.REPAIR)
        guard = Guard(Refinement(refiner, weight=options.weight))
        trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train()

    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    for entry in steps[:: max(1, len(steps) // 10)]:
        edits, change_rate = (entry[f"guardrails/refinement/{name}"] for name in ("edit_ratio", "change_rate"))
        print(f"reward {entry['reward']:.2f}, edit ratio {edits:.2f}, changed {change_rate:.0%}")
    written = ["well 7 so", "8", "basically well so"]
    for said, corrected in zip(written, refiner.refine(["3 + 4 ="] * 3, written), strict=True):
        print(f"3 + 4 = {said!r}, corrected: {corrected!r}")


def tiny_task(folder, options):
    """A model that answers and corrects sums in a folder, settings for a CPU, and prompts."""
    model = toy.build(f"{folder}/model", seed=options.seed, repairs=True)
    args = GRPOConfig(
        output_dir=options.output or f"{folder}/run",
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=toy.MAX_COMPLETION_LENGTH,
        beta=1e-6,  # above 0, so that the trainer holds a reference model; with PEFT, or ModelRefiner(model), 0 will do
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=options.steps,
        logging_steps=1,
        save_strategy="steps" if options.output else "no",
        save_steps=10,
        report_to="none",
        seed=options.seed,
        bf16=False,
        use_cpu=True,
    )
    return model, args, toy.dataset(2048, seed=options.seed)


if __name__ == "__main__":
    main()
