"""One callback for every trainer of TRL: served where a cost can act, refused by name with the reason elsewhere."""

import importlib
import inspect
import pkgutil

import pytest
import trl.experimental
import trl.trainer
from devices import ON_CPU
from tiny_trl import build_trainer
from transformers import AutoModelForSequenceClassification, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import guardrails_transformers
from guardrails import AttachError, Constraint, Guard
from guardrails.schedulers import Fixed
from guardrails_trl import GuardrailsCallback, hosts, toy


def trainer_classes():
    """Every trainer this version of TRL has, by name."""
    found = {}
    for package in (trl.trainer, trl.experimental):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name.endswith("_trainer"):
                try:
                    members = vars(importlib.import_module(module.name))
                except ImportError:  # needs a package that is not here
                    continue
                for name, value in members.items():
                    if inspect.isclass(value) and issubclass(value, Trainer) and value.__module__ == module.name:
                        found.setdefault(name, value)
    return {name: value for name, value in found.items() if name.endswith("Trainer") and not name.startswith("_")}


CLASSES = trainer_classes()
SERVED = {
    **dict.fromkeys(("GRPOTrainer", "RLOOTrainer", "GMPOTrainer"), "groups"),
    **dict.fromkeys(("GFPOTrainer", "PAPOTrainer", "DPPOTrainer", "MiniLLMTrainer"), "groups"),
    "GRPOWithReplayBufferTrainer": "groups",  # refused later: it replaces the scoring
    "OnlineDPOTrainer": "pairs",
    **dict.fromkeys(("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer"), "loss"),
    **dict.fromkeys(("CPOTrainer", "ORPOTrainer", "TPOTrainer", "BCOTrainer", "PRMTrainer"), "loss"),
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_trainer_is_served_or_refused_with_a_reason(name):
    instance = CLASSES[name].__new__(CLASSES[name])
    if name in SERVED:
        assert hosts.kind(instance) == SERVED[name]
        return
    guard = Guard(Constraint("c", limit=1.0, cost=toy.fillers))
    with pytest.raises(AttachError, match=rf"{name} cannot be guarded: .+\. (Use|Guard) .*Trainer"):
        GuardrailsCallback(instance, guard)
    assert guard.host is None


def test_a_users_class_of_the_same_name_is_not_the_one_that_is_refused():
    class PPOTrainer(Trainer):
        pass

    assert hosts.kind(PPOTrainer.__new__(PPOTrainer)) == "loss"

    class GRPOTrainer(Trainer):
        pass

    assert hosts.kind(GRPOTrainer.__new__(GRPOTrainer)) == "loss"


def loss_hosts(model, folder):
    common = {"output_dir": str(folder), "report_to": "none", "use_cpu": ON_CPU, "bf16": False, "max_steps": 1}
    sums = toy.dataset(8)
    texts = sums.map(lambda row: {"completion": " 1"}, remove_columns=["answer"])
    preferences = sums.map(lambda row: {"chosen": " 1", "rejected": " 2"}, remove_columns=["answer"])
    labelled = texts.map(lambda row, i: {"label": i % 2 == 0}, with_indices=True)
    words = toy.tokenizer()
    yield SFTTrainer(model, args=SFTConfig(**common), train_dataset=texts)
    yield DPOTrainer(model, args=DPOConfig(**common), train_dataset=preferences)
    yield KTOTrainer(model, args=KTOConfig(**common), train_dataset=labelled)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    yield RewardTrainer(scorer, args=RewardConfig(**common), train_dataset=preferences, processing_class=words)


def test_trainers_whose_loss_comes_from_a_batch_get_the_callback_for_losses(random_model, tmp_path):
    for trainer in loss_hosts(random_model, tmp_path):
        guard = Guard(Constraint("size", limit=1e-3, cost=lambda outputs, inputs: outputs.logits.square().mean()))
        callback = GuardrailsCallback(trainer, guard, ledger=False, drives={}, missing_ok=True)
        assert type(callback) is guardrails_transformers.GuardrailsCallback
        trainer.add_callback(callback)
        trainer.train()
        assert guard.decision.constraints["size"].cost > 0.0
        callback.detach()


class Mine(GuardrailsCallback):
    """A user's own, with something in it that must not be lost."""

    steps = 0

    def on_step_end(self, *arguments, **kwargs):
        super().on_step_end(*arguments, **kwargs)
        self.steps += 1


def test_a_subclass_serves_the_trainers_of_its_base_and_is_refused_where_it_would_be_lost(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path)
    mine = Mine(trainer, Guard(Constraint("c", limit=1.0, cost=toy.fillers)), ledger=False)
    trainer.add_callback(mine)
    trainer.train()
    assert (type(mine), mine.steps) == (Mine, 1)
    guard = Guard(Constraint("size", limit=1.0, cost=lambda outputs, inputs: outputs.logits.square().mean()))
    loss, pairs = next(loss_hosts(random_model, tmp_path)), CLASSES["OnlineDPOTrainer"]
    for other, address in (
        (loss, r"a guardrails_transformers\.GuardrailsCallback"),
        (pairs.__new__(pairs), r"a guardrails_trl\.pairs\.PairsCallback"),
    ):
        before = dict(vars(other))
        with pytest.raises(AttachError, match=rf"^Mine extends .* is guarded by {address},.* Derive it from"):
            Mine(other, guard)
        assert vars(other) == before
        assert guard.host is None


def test_arguments_of_another_kind_of_host_are_refused(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path)
    guard = Guard(Constraint("c", limit=1.0, cost=toy.fillers, scheduler=Fixed(1.0)))
    with pytest.raises(TypeError, match="drives"):
        GuardrailsCallback(trainer, guard, drives={"c": "beta"})
    assert guard.host is None
    assert type(GuardrailsCallback(trainer, guard)) is GuardrailsCallback
    assert isinstance(trainer, GRPOTrainer)
