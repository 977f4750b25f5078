"""Passes of changed rows alone: when they come, what scales and clips them, and whose step they are part of."""

import math
import time

import pytest
import torch
import trl
from packaging.version import Version
from refined_gradients import ANY, WEIGHT, Gradients, assert_close, divisors, edit, expected_gradient, run
from tiny_trl import build_trainer, logged
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import GRPOTrainer

from guardrails import AttachError, Guard, Refinement
from guardrails.refine import FunctionRefiner
from guardrails_trl import GuardrailsCallback, toy
from guardrails_trl.refine_seams import RefineSeams

EDITING = Refinement(FunctionRefiner(edit), WEIGHT, accept=ANY)


def replaced(prompt, completion):
    return "7 so"


def test_changed_rows_are_read_after_the_hosts_backward_in_passes_of_half_as_many(speaking_model, tmp_path):
    """So that the host's activations are gone when theirs are made: the peak of memory is the host's."""
    passes = []
    everything = Refinement(FunctionRefiner(replaced), WEIGHT, accept=ANY)
    run(speaking_model, tmp_path, refinement=everything, passes=passes)
    assert passes[0] == (8, False)
    assert passes[1:] in ([(4, True)] * 2, [(4, True), (3, True)])  # one of them may have said just that


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_gradients_scaled_for_half_precision_are_scaled_alike(speaking_model, tmp_path, kind):
    def scaled(trainer):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    trainer, measured, batches = run(
        speaking_model, tmp_path, refinement=EDITING, kind=kind, gradient_accumulation_steps=2, prepare=scaled
    )
    expected = expected_gradient(trainer, batches, divisors("rloo" if kind == "rloo" else "dapo", batches, 2), edit)
    assert_close(measured[0], {name: 8.0 * WEIGHT * value for name, value in expected.items()})


def test_the_sum_is_clipped(speaking_model, tmp_path):
    trainer, measured, batches = run(speaking_model, tmp_path, refinement=EDITING, max_grad_norm=1e-2)
    expected = expected_gradient(trainer, batches, divisors("dapo", batches, 1), edit)
    norm = torch.cat([value.flatten() for value in expected.values()]).norm()
    assert norm > 1e-2
    assert logged(trainer, "grad_norm") == [pytest.approx(float(WEIGHT * norm), rel=1e-4)]  # of float32 gradients
    assert_close(measured[0], {name: 1e-2 * value / norm for name, value in expected.items()})


def test_an_optimizer_that_steps_in_the_backward_steps_once(speaking_model, tmp_path):
    """As layerwise GaLore and APOLLO do, by hooks on the parameters: a pass apart would be a step of its own."""
    steps = []

    def prepare(trainer):
        trainer.optimizer = LayerWiseDummyOptimizer({}, lr=1e-3)
        trainer.model.get_input_embeddings().weight.register_post_accumulate_grad_hook(steps.append)

    run(speaking_model, tmp_path, refinement=EDITING, prepare=prepare)
    assert len(steps) == 1


def test_their_time_is_part_of_the_hosts_step(speaking_model, tmp_path):
    def slow(module, arguments, keywords):
        if torch.is_grad_enabled() and any(p.grad is not None for p in module.parameters()):
            time.sleep(0.4)

    def prepare(trainer):
        trainer.model.register_forward_pre_hook(slow, with_kwargs=True)

    everything = Refinement(FunctionRefiner(replaced), WEIGHT, accept=ANY)
    trainer, _, _ = run(speaking_model, tmp_path, refinement=everything, prepare=prepare)
    assert logged(trainer, "step_time")[0] > 0.8


def test_a_step_that_calls_the_backward_by_itself_learns_them_too(speaking_model, tmp_path):
    class OwnStep(GRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            self._step += 1
            return loss.detach()

    trainer, measured, batches = run(speaking_model, tmp_path, refinement=EDITING, cls=OwnStep)
    expected = expected_gradient(trainer, batches, divisors("dapo", batches, 1), edit)
    assert_close(measured[0], {name: WEIGHT * value for name, value in expected.items()})


def test_a_step_that_computes_its_loss_in_parts_learns_all_of_them(speaking_model, tmp_path):
    class Halves(GRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch):
            model.train()
            whole = self._prepare_inputs(inputs)
            for half in (slice(0, 4), slice(4, 8)):
                part = {name: value[half] if getattr(value, "ndim", 0) else value for name, value in whole.items()}
                self.compute_loss(model, part).backward()
            self._step += 1
            return torch.zeros(())

    trainer, measured, batches = run(speaking_model, tmp_path, refinement=EDITING, cls=Halves, loss_type="dr_grpo")
    expected = expected_gradient(trainer, batches, [4.0 * 6] * 2, edit)
    assert_close(measured[0], {name: WEIGHT * value for name, value in expected.items()})


def test_a_loss_computed_outside_of_a_step_has_the_term_at_once(speaking_model, tmp_path):
    """As by a script that asks for the loss itself: nothing waits for a backward that may never come."""
    trainer = build_trainer(speaking_model, tmp_path, learning_rate=0.0)
    trainer.add_callback(GuardrailsCallback(trainer, Guard(EDITING)))
    trainer.train()
    gradients = [p.grad for p in trainer.model.parameters()]
    assert not any(gradient is not None and gradient.any() for gradient in gradients)
    trainer.compute_loss(trainer.model, trainer._buffered_inputs[0])
    assert any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())


def test_an_error_within_a_step_leaves_nothing_on_the_accelerator(speaking_model, tmp_path):
    def fails(module, arguments, keywords):
        if torch.is_grad_enabled():
            raise RuntimeError("out of memory")

    trainer = build_trainer(speaking_model, tmp_path)
    before = set(vars(trainer.accelerator))
    callback = GuardrailsCallback(trainer, Guard(EDITING))
    trainer.add_callback(callback)
    handle = trainer.model.register_forward_pre_hook(fails, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert set(vars(trainer.accelerator)) == before
    handle.remove()
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    assert len(gradients.steps) == 1
    assert set(vars(trainer.accelerator)) == before
    callback.detach()
    assert not {"training_step", "compute_loss"} & set(vars(trainer))


def test_a_step_that_was_interrupted_is_not_in_the_loss_logged_next(speaking_model, tmp_path):
    class Interrupts(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = build_trainer(speaking_model, tmp_path, gradient_accumulation_steps=2, learning_rate=0.0)
    everything = Refinement(FunctionRefiner(replaced), WEIGHT, accept=ANY)
    trainer.add_callback(GuardrailsCallback(trainer, Guard(everything), ledger=False))
    trainer.add_callback(Interrupts)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupts)
    with torch.no_grad():
        for weights in trainer.model.parameters():
            weights.zero_()
    trainer.train()
    uniform = math.log(len(trainer.processing_class))
    assert logged(trainer, "guardrails/refinement/loss") == [pytest.approx(uniform, rel=1e-5)]  # sums in float32


@pytest.fixture(scope="module")
def model_of_experts(tmp_path_factory):
    """Untrained, with a load-balancing loss."""
    folder, words = tmp_path_factory.mktemp("experts"), toy.tokenizer()
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
            decoder_sparse_step=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            router_aux_loss_coef=0.1,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.9"), reason="this TRL leaves load-balancing losses out")
def test_the_load_balancing_of_experts_is_that_of_what_was_sampled(model_of_experts, tmp_path, monkeypatch):
    aux = []
    for refinement in (None, Refinement(FunctionRefiner(replaced), WEIGHT, accept=ANY)):
        trainer, _, _ = run(model_of_experts, tmp_path, refinement=refinement)
        aux.append(logged(trainer, "aux_loss"))
    assert aux[0] == aux[1] != []
    monkeypatch.setattr(RefineSeams, "learns_apart", False)  # as with FSDP
    trainer = build_trainer(model_of_experts, tmp_path)
    with pytest.raises(AttachError, match=r"load-balancing loss of experts.*router_aux_loss_coef=0"):
        GuardrailsCallback(trainer, Guard(EDITING))
    assert "compute_loss" not in vars(trainer)
    GuardrailsCallback(build_trainer(model_of_experts, tmp_path, router_aux_loss_coef=0.0), Guard(EDITING))
