"""Small real trainers for the tests: a classifier with two groups, and a causal language model."""

import torch
from devices import ON_CPU
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

WORDS = 19


class Classifier(nn.Module):
    """A loss that is a mean over the batch; the host divides it by the number of accumulated batches."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))

    def forward(self, features, labels=None):
        logits = self.layers(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    """Two groups; in group 1 what looks like a positive is often none, which the third feature gives away."""

    def __init__(self, n_rows, seed=0):
        draw = torch.Generator().manual_seed(seed)
        group = torch.randint(0, 2, (n_rows,), generator=draw)
        labels = (torch.rand(n_rows, generator=draw) < 0.3 + 0.4 * group).long()
        seen = labels.float() + 0.7 * torch.randn(n_rows, generator=draw)
        features = torch.stack([seen, torch.randn(n_rows, generator=draw), 2.0 * group - 1.0], dim=1)
        self.rows = [{"features": f, "labels": y} for f, y in zip(features, labels, strict=True)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Sentences(torch.utils.data.Dataset):
    """Rows of random words; some have fewer words to predict than others."""

    def __init__(self, n_rows, length=8, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(n_rows):
            words = torch.randint(0, WORDS, (length,), generator=draw)
            labels = words.clone()
            labels[: int(torch.randint(0, length - 2, (), generator=draw))] = -100
            self.rows.append({"input_ids": words, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def language_model(seed=0, width=16, dropout=0.0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            attention_dropout=dropout,
        )
    )


def classifier(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return Classifier(dropout)


def build(model, folder, data, *, cls=Trainer, eval_data=None, callbacks=None, extra=None, **settings):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": ON_CPU,
        "disable_tqdm": True,
        "seed": 3,
    } | settings
    trainer = cls(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=eval_data,
        callbacks=callbacks,
        **(extra or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Gradients(TrainerCallback):
    """The gradients that the optimizer is about to use, and the losses the host backpropagated."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: value.grad.clone() for name, value in model.named_parameters()})


def positives(outputs, inputs):
    """Probability of the positive class, a row each."""
    return outputs["logits"].softmax(-1)[:, 1]


def first_words(outputs, inputs):
    """Probability mass on the first three words, a row each."""
    return outputs.logits.softmax(-1)[..., :3].sum(-1).mean(-1)
