"""GRPO on sums, with a reward that also pays for filler words and a limit on them: 0.5 per answer on average.

    python examples/trl_grpo.py --steps 150

Needs `pip install training-guardrails[trl]`. Runs on a CPU, without any download: model and tokenizer are made and
pre-trained on the spot by `guardrails_trl.toy`. With a model of your own, only `main` matters.
"""

import argparse
import tempfile

from trl import GRPOConfig, GRPOTrainer

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Margin
from guardrails_trl import GuardrailsCallback, toy


def helpful(completions, answer, **kwargs):
    """A TRL reward function: 1 for a right answer, and 0.15 for every filler word. The second part is the mistake."""
    return toy.reward(completions, answer)


def filler_words(completions, **kwargs):
    """A cost has the signature of a TRL reward function: here the number of filler words in each completion."""
    return [sum(word in toy.FILLERS for word in text.split()) for text in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="", help="where checkpoints go; by default nothing is kept")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model, args, ds = tiny_task(folder, options)

        trainer = GRPOTrainer(model, reward_funcs=[helpful], args=args, train_dataset=ds)
        # A controller keeps the mean at its aim, now a little above, now below: aim at 90% of the limit.
        scheduler = Margin(PID(kd=1.0, smoothing_p=0.0), 0.1)
        guard = Guard(Constraint("fillers", limit=0.5, cost=filler_words, scheduler=scheduler))
        trainer.add_callback(GuardrailsCallback(trainer, guard))
        trainer.train(resume_from_checkpoint=options.resume)

    costs = [entry["guardrails/fillers/cost"] for entry in trainer.state.log_history if "reward" in entry]
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    last = max(1, len(costs) // 4)
    print(guard.decision.explain())
    print(f"Last quarter: reward {sum(rewards[-last:]) / last:.2f}, filler words {sum(costs[-last:]) / last:.2f}")


def tiny_task(folder, options):
    """A model that answers sums in a folder, settings for a CPU, and prompts."""
    model = toy.build(f"{folder}/model", seed=options.seed)
    args = GRPOConfig(
        output_dir=options.output or f"{folder}/run",
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=toy.MAX_COMPLETION_LENGTH,
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
