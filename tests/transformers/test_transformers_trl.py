"""TRL's trainers that learn from given texts: each breaks a limit by itself and holds it when guarded."""

import pytest
import torch
import trl
from datasets import Dataset
from devices import DEVICE, ON_CPU
from packaging.version import Version
from tiny_trainer import logged, same, weights
from transformers import AutoModelForCausalLM, PrinterCallback
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

from guardrails import AttachError, Constraint, Dial, Gate, Guard, Require
from guardrails.competence import ConstraintSatisfaction
from guardrails.schedulers import PID, Fixed
from guardrails_transformers import GuardrailsCallback
from guardrails_trl import toy

fused = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="this TRL computes logits, and no log-probabilities beside them"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.build(tmp_path_factory.mktemp("model"), steps=60, layers=1, width=32)


def pairs(n_rows=64):
    """The preferred answer is the one that talks."""
    rows = [(f"{i % 7} + {i % 3} =", str(i % 7 + i % 3)) for i in range(n_rows)]
    return {
        "prompt": [prompt for prompt, _ in rows],
        "chosen": [f" well so {answer} <eos>" for _, answer in rows],
        "rejected": [f" {answer} <eos>" for _, answer in rows],
    }


def data(kind):
    rows = pairs()
    if kind in ("dpo", "reward"):
        return Dataset.from_dict(rows)
    if kind == "sft":
        return Dataset.from_dict({"prompt": rows["prompt"], "completion": rows["chosen"]})
    labels = [True, False] * len(rows["prompt"])
    completions = [text for pair in zip(rows["chosen"], rows["rejected"], strict=True) for text in pair]
    prompts = [prompt for prompt in rows["prompt"] for _ in range(2)]
    return Dataset.from_dict({"prompt": prompts, "completion": completions, "label": labels})


KINDS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "dpo": (DPOTrainer, DPOConfig, {"beta": 0.1}),
    "kto": (KTOTrainer, KTOConfig, {"beta": 0.1}),
    "reward": (RewardTrainer, RewardConfig, {}),
}


def build(kind, model, folder, **settings):
    cls, config, own = KINDS[kind]
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 25,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": ON_CPU,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    } | settings
    peft = arguments.pop("peft", None)
    trainer = cls(model, args=config(**own, **arguments), train_dataset=data(kind), peft_config=peft)
    trainer.remove_callback(PrinterCallback)
    return trainer


def talk(outputs, inputs):
    """Probability mass on filler words, a row each."""
    mass = outputs.logits.softmax(-1)[..., -len(toy.FILLERS) :].sum(-1)
    mask = inputs["attention_mask" if "attention_mask" in inputs else "completion_attention_mask"]  # KTO before 1.15
    return (mass * mask).sum(-1) / mask.sum(-1)


def size(outputs, inputs):
    """Square of each reward."""
    return outputs.logits.squeeze(-1).square()


COSTS = {"sft": (talk, 0.1), "dpo": (talk, 0.1), "kto": (talk, 0.1), "reward": (size, 0.5)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_unguarded_run_breaks_the_limit_and_the_guarded_one_holds_it(model, tmp_path, kind):
    cost, limit = COSTS[kind]
    found = {}
    for name in ("plain", "guarded"):
        trainer = build(kind, model, tmp_path)
        scheduler = PID(kp=1.0, ki=1.0, smoothing_p=0.5, kd=0.0) if name == "guarded" else Fixed(0.0)
        guard = Guard(Constraint("c", limit=limit, cost=cost, scheduler=scheduler))
        callback = GuardrailsCallback(trainer, guard)
        trainer.add_callback(callback)
        trainer.train()
        found[name] = sum(logged(trainer, "guardrails/c/cost")[-5:]) / 5
        callback.detach()
        assert not {"compute_loss", "log", "_save_checkpoint"} & set(vars(trainer))
    assert found["plain"] > 1.5 * limit
    # The mean of five steps of a loop that swings about its limit, from a seed that was chosen on the CPU.
    assert found["guarded"] < (limit if ON_CPU else 1.2 * limit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_of_weight_zero_changes_no_bit(model, tmp_path, kind):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2}
    plain = build(kind, model, tmp_path, **settings)
    plain.train()
    trainer = build(kind, model, tmp_path, **settings)
    guard = Guard(Constraint("c", limit=9.0, cost=COSTS[kind][0], scheduler=Fixed(0.0)))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    assert same(weights(trainer), weights(plain))


@fused
@pytest.mark.parametrize("peft", [False, True])
def test_logits_that_a_host_does_not_compute_are_those_of_its_model(model, tmp_path, peft):
    from peft import LoraConfig

    seen = []

    def cost(outputs, inputs):
        assert "logits" in outputs
        assert outputs.get("nothing", 3) == 3
        assert dict(outputs)["logits"] is outputs.get("logits") is outputs.logits
        seen.append((outputs.logits, outputs["logits"], inputs["input_ids"], outputs.log_probs))
        return outputs.logits.mean((1, 2))

    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2) if peft else None
    trainer = build("sft", model, tmp_path, max_steps=1, peft=config)
    trainer.add_callback(GuardrailsCallback(trainer, Guard(Constraint("c", limit=1.0, cost=cost))))
    trainer.train()
    by_name, by_key, ids, log_probs = seen[0]
    assert by_name is by_key
    own = AutoModelForCausalLM.from_pretrained(model).to(DEVICE)(ids).logits
    torch.testing.assert_close(by_name, own, rtol=1e-5, atol=1e-5)  # attention without and with a mask
    assert log_probs.shape == (8, ids.shape[1] - 1)
    assert by_name.requires_grad


@fused
def test_logits_are_made_in_the_hosts_mixed_precision_whatever_that_of_the_hidden_states(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer, seen, rows = toy.tokenizer(), [], []
    torch.manual_seed(0)
    half = OPTForCausalLM(  # its hidden states leave a projection, and that in half precision
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    for part in (tokenizer, half):
        part.save_pretrained(tmp_path / "opt")

    def cost(outputs, inputs):
        seen.append(outputs.logits)
        return outputs.logits.softmax(-1)[..., 0].mean(-1)

    trainer = build("sft", str(tmp_path / "opt"), tmp_path, max_steps=1, bf16=True)
    trainer.add_callback(GuardrailsCallback(trainer, Guard(Constraint("c", limit=1.0, cost=cost))))
    trainer.data_collator, collate = lambda batch: rows.append(collate(batch)) or rows[-1], trainer.data_collator
    trainer.train()
    assert seen[0].dtype == torch.float32
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "opt").eval().to(DEVICE)
    batch = {name: rows[0][name].to(DEVICE) for name in ("input_ids", "attention_mask")}
    with torch.autocast(own.device.type, torch.bfloat16):
        expected = own(**batch).logits.float()
    torch.testing.assert_close(seen[0], expected)


@fused
def test_a_cost_without_gradient_that_asks_for_logits_first_leaves_the_others_theirs(model, tmp_path):
    trainer = build("sft", model, tmp_path, max_steps=1)
    parts = [Constraint(name, limit=0.01, cost=talk, scheduler=Fixed(0.7)) for name in ("driver", "c")]
    callback = GuardrailsCallback(trainer, Guard(*parts), drives={"driver": "args.max_grad_norm"})
    trainer.add_callback(callback)
    trainer.train()
    assert callback.guard.decision.constraints["c"].cost > 0.0


@fused
def test_a_cost_that_divides_by_none_of_a_rows_words_never_reaches_the_weights(model, tmp_path):
    def after_well(outputs, inputs):
        at = torch.zeros_like(inputs["attention_mask"], dtype=torch.float32)
        at[0] = 1.0  # the other rows have no such word: 0 / 0
        return (outputs.logits.softmax(-1)[..., 0] * at).sum(-1) / at.sum(-1)

    trainer = build("sft", model, tmp_path, max_steps=2)
    guard = Guard(Constraint("c", limit=0.1, cost=after_well, scheduler=Fixed(1.0)))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert guard.decision.constraints["c"].invalid_rows == 7


@fused
def test_logits_of_a_model_that_rescales_them_are_refused_by_name(model, tmp_path):
    trainer = build("sft", model, tmp_path, max_steps=1)
    trainer.model.config.final_logit_softcapping = 30.0
    trainer.add_callback(GuardrailsCallback(trainer, Guard(Constraint("c", limit=1.0, cost=talk))))
    with pytest.raises(AttachError, match=r"LlamaForCausalLM rescales them .final_logit_softcapping.*log_probs"):
        trainer.train()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_beta_is_a_dial_and_can_be_driven(model, tmp_path, kind):
    def surprise(outputs, inputs):
        log_probs = getattr(outputs, "log_probs", None)
        return -(outputs.logits.log_softmax(-1).amax(-1) if log_probs is None else log_probs).sum(-1)

    gate = Gate(Require(ConstraintSatisfaction("c", 0.0), at_least=0.5))
    trainer = build(kind, model, tmp_path, max_steps=2)
    guard = Guard(Constraint("c", limit=1.0, cost=surprise), Dial("beta", gate.between(0.7, 0.1)))
    callback = GuardrailsCallback(trainer, guard)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.beta == 0.7
    callback.detach()
    assert trainer.beta == 0.1
    plain, driven = (build(kind, model, tmp_path, max_steps=2, **{}) for _ in range(2))
    plain.beta = 0.9
    guard = Guard(Constraint("c", limit=1.0, cost=surprise, scheduler=Fixed(0.9)))
    driven.add_callback(GuardrailsCallback(driven, guard, drives={"c": "beta"}))
    plain.train()
    driven.train()
    assert same(weights(driven), weights(plain))


def test_a_copy_of_a_number_among_the_arguments_is_refused(model, tmp_path):
    trainer = build("dpo", model, tmp_path)
    gate = Gate(Require(ConstraintSatisfaction("c", 0.0), at_least=0.5))
    guard = Guard(Constraint("c", limit=1.0, cost=talk), Dial("args.beta", gate.between(0.7, 0.1)))
    with pytest.raises(AttachError, match=r"reads only once, before it trains. Name 'beta'"):
        GuardrailsCallback(trainer, guard)


def test_a_trainer_that_samples_completions_is_sent_to_its_own_adapter(model, tmp_path):
    trainer = object.__new__(GRPOTrainer)
    with pytest.raises(AttachError, match=r"GRPOTrainer samples completions.*guardrails_trl.GuardrailsCallback"):
        GuardrailsCallback(trainer, Guard(Constraint("c", limit=1.0, cost=talk)))
