"""Fine-tuning a classifier whose mistakes fall on one group, with a limit on the gap between false-positive rates.

    python examples/trainer_classifier.py
    python examples/trainer_classifier.py --unguarded

Needs `pip install training-guardrails[transformers]`. Runs on a CPU in seconds, without any download: the data are
made up. In group B more rows are positive, so that a classifier which sees the group learns to cry wolf there: at equal
scores it calls more of B's negatives positive than of A's. The guard keeps the gap below 0.05.
"""

import argparse
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Margin
from guardrails_transformers import GuardrailsCallback

LIMIT = 0.05


class Screening(torch.utils.data.Dataset):
    """Applicants of two groups: a score that tells something, and labels of which B has more positive ones."""

    def __init__(self, n_rows, seed):
        draw = torch.Generator().manual_seed(seed)
        self.group = torch.randint(0, 2, (n_rows,), generator=draw)
        self.labels = (torch.rand(n_rows, generator=draw) < 0.25 + 0.35 * self.group).long()
        score = 1.5 * self.labels + torch.randn(n_rows, generator=draw)
        self.features = torch.stack([score, self.group.float()], dim=1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"features": self.features[i], "labels": self.labels[i], "group": self.group[i]}


class Classifier(nn.Module):
    """What stands for a model of yours: it returns a loss and logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, features, labels=None, group=None):
        logits = self.layers(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def false_positive_gap(data):
    """Return the cost: a row's share in (false-positive rate of B) - (that of A), with probabilities for decisions.

    Each negative counts by how rare it is in the data, so the mean over any batch is an unbiased estimate of the gap.
    """
    shares = [((data.labels == 0) & (data.group == which)).float().mean() for which in (0, 1)]

    def cost(outputs, inputs):
        probability = outputs["logits"].softmax(-1)[:, 1]
        negative, b = (inputs["labels"] == 0).float(), inputs["group"].float()
        return probability * negative * (b / shares[1] - (1.0 - b) / shares[0])

    return cost


def rates(trainer, data):
    """False-positive rates of the groups A and B, of decisions at one half."""
    with torch.no_grad():
        positive = trainer.model(data.features, data.labels)["logits"].argmax(-1)
    chosen = [(data.labels == 0) & (data.group == which) for which in (0, 1)]
    return [positive[rows].float().mean().item() for rows in chosen]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unguarded", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, held_out = Screening(4096, seed=options.seed), Screening(8192, seed=options.seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=256,
            learning_rate=1e-2,
            max_steps=options.steps,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            seed=options.seed,
            use_cpu=True,
        )
        trainer = Trainer(Classifier(), args=args, train_dataset=train)
        if not options.unguarded:
            # A batch has few negatives of each group, so its gap is noisy: small gains, and an aim inside the limit.
            scheduler = Margin(PID(kp=0.5, ki=0.005, kd=0.0), 0.3)
            gap = Constraint("gap", limit=LIMIT, cost=false_positive_gap(train), scheduler=scheduler)
            trainer.add_callback(GuardrailsCallback(trainer, Guard(gap)))
        trainer.train()

    a, b = rates(trainer, held_out)
    print(f"False-positive rates on held-out rows: A {a:.3f}, B {b:.3f}, gap {b - a:.3f}, limit {LIMIT}")


if __name__ == "__main__":
    main()
