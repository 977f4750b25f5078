"""What a guarded TRL run does beside its advantages: limits held, logs, tables, options of the host, detach."""

import asyncio
import functools
import gc
import math
import weakref

import pandas
import pytest
import torch
from peft import LoraConfig
from tiny_trl import StepCounter, build_trainer, logged, record_loss_inputs
from trl import GRPOTrainer

from guardrails import AttachError, Constraint, Guard
from guardrails.schedulers import PID, Fixed
from guardrails_trl import GuardrailsCallback, toy


def fillers_constraint(limit=0.5, scheduler=None, cost=toy.fillers):
    return Constraint("fillers", limit=limit, cost=cost, scheduler=scheduler or Fixed(0.5))


def guard_trainer(trainer, *constraints):
    callback = GuardrailsCallback(trainer, Guard(*(constraints or (fillers_constraint(),))))
    trainer.add_callback(callback)
    return callback


def test_guarded_run_holds_a_limit_the_unguarded_one_breaks(speaking_model, tmp_path):
    fillers = {}
    for name in ("unguarded", "guarded"):
        trainer = build_trainer(
            speaking_model,
            tmp_path,
            rewards=[toy.reward, toy.fillers],
            reward_weights=[1.0, 0.0],
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=toy.MAX_COMPLETION_LENGTH,
            max_steps=60,
            rows=512,
        )
        if name == "guarded":
            guard_trainer(trainer, fillers_constraint(scheduler=PID(kp=0.1, ki=0.05, smoothing_p=0.9)))
        trainer.train()
        fillers[name] = logged(trainer, "rewards/fillers/mean")
    last = {name: sum(values[-15:]) / 15 for name, values in fillers.items()}
    assert last["unguarded"] > 4.0
    assert last["guarded"] <= 0.5
    assert max(fillers["guarded"]) > 0.5  # it was violated on the way, so something had to hold it


def test_decisions_reach_the_hosts_own_log(random_model, tmp_path):
    trainer = build_trainer(
        random_model, tmp_path, rewards=[toy.reward, toy.fillers], max_steps=3, reward_weights=[1, 0]
    )
    callback = guard_trainer(trainer, fillers_constraint(scheduler=PID()))
    trainer.train()
    costs = logged(trainer, "guardrails/fillers/cost")
    assert costs == pytest.approx(logged(trainer, "rewards/fillers/mean"))
    assert logged(trainer, "guardrails/fillers/limit") == [0.5] * 3
    assert logged(trainer, "guardrails/fillers/violation") == pytest.approx([cost - 0.5 for cost in costs])
    assert logged(trainer, "guardrails/fillers/multiplier")[-1] == callback.guard.multipliers["fillers"] > 0


def test_completions_table_shows_costs_and_the_advantages_trained_on(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, max_steps=2, log_completions=True, gradient_accumulation_steps=2)
    seen = record_loss_inputs(trainer)
    guard_trainer(trainer)
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table["guardrails/fillers/cost"]) == toy.fillers(list(table["completion"]))
    trained_on = sorted(advantage for _, advantage in seen[: len(table)])
    assert sorted(table["advantage"]) == pytest.approx(trained_on)
    assert len(table) == 16


def test_attaching_in_the_middle_of_a_run_keeps_the_completions_table_whole(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, log_completions=True, eval_rows=1, per_device_eval_batch_size=4)
    trainer.train()
    callback = guard_trainer(trainer)
    trainer.evaluate()  # four further rows in a table of eight
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table["guardrails/fillers/cost"].isna().tolist() == [True] * 4 + [False] * 4
    callback.detach()
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert not [name for name in table.columns if name.startswith("guardrails/")]


def test_evaluation_logs_the_cost_and_decides_nothing(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, rewards=[toy.reward, toy.fillers], eval_rows=8)
    callback = guard_trainer(trainer)
    before = callback.guard.state_dict()
    metrics = trainer.evaluate()
    assert metrics["eval_guardrails/fillers/cost"] == pytest.approx(metrics["eval_rewards/fillers/mean"])
    assert "eval_guardrails/fillers/multiplier" not in metrics
    assert callback.guard.state_dict() == before
    assert callback.guard.decision is None


class Switching(GRPOTrainer):
    """What samples its completions leaves the model in the mode that it samples in, or always in that of training."""

    def __init__(self, *args, training, **kwargs):
        super().__init__(*args, rollout_func=self.rollout, **kwargs)
        self.samples_in = training

    @staticmethod
    def rollout(prompts, trainer):
        trainer.model.train(trainer.samples_in)
        asked = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        words = torch.randint(3, 28, (len(prompts), 3)).tolist()
        return {"prompt_ids": asked, "completion_ids": [[*own, 1] for own in words], "logprobs": None}


@pytest.mark.parametrize("training", [False, True])
def test_what_generates_may_leave_the_model_in_another_mode(random_model, tmp_path, training):
    cls = functools.partial(Switching, training=training)
    trainer = build_trainer(random_model, tmp_path, cls=cls, max_steps=2, eval_rows=2)
    callback = guard_trainer(trainer)
    trainer.train()
    assert callback.guard.decision.step == 2
    trainer.evaluate()
    assert callback.guard.decision.step == 2


@pytest.mark.parametrize(
    ("kind", "settings", "generations"),
    [
        ("grpo", {"gradient_accumulation_steps": 2}, 2),
        ("grpo", {"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 1),
        ("grpo", {"num_iterations": 2}, 1),
        ("grpo", {"beta": 0.1}, 2),
        ("rloo", {"gradient_accumulation_steps": 2, "beta": 0.1}, 2),
    ],
    ids=str,
)
def test_guard_decides_once_per_generation_batch(random_model, tmp_path, kind, settings, generations):
    trainer = build_trainer(random_model, tmp_path, kind=kind, max_steps=2, **settings)
    counter = StepCounter()
    trainer.add_callback(counter)
    callback = guard_trainer(trainer, fillers_constraint(), Constraint("c", limit=1.0, cost=toy.fillers))
    seen = record_loss_inputs(trainer)
    trainer.train()
    assert callback.guard.decision.step == generations
    assert callback.guard.decision.n_rows == trainer.args.generation_batch_size
    assert counter.steps == 2
    assert len(seen) == 2 * 8 * trainer.args.gradient_accumulation_steps


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_lora_adapters_are_trained_by_the_guarded_advantages(random_model, tmp_path, kind):
    results = []
    for lam in (0.0, 1.0, 1.0):
        peft = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = build_trainer(random_model, tmp_path, kind=kind, peft=peft, max_steps=2, beta=0.1)
        guard_trainer(trainer, fillers_constraint(scheduler=Fixed(lam)))
        trainer.train()
        results.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("reward_is_async", [False, True])
def test_asynchronous_costs_run_on_the_hosts_event_loop_or_on_one_of_ours(random_model, tmp_path, reward_is_async):
    async def reward(completions, answer, **kwargs):
        return toy.reward(completions, answer)

    loops = []

    async def cost(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return toy.fillers(completions)

    results = []
    for function in (toy.fillers, cost):
        trainer = build_trainer(random_model, tmp_path, rewards=reward if reward_is_async else toy.reward, max_steps=2)
        before = set(vars(trainer))
        callback = guard_trainer(trainer, fillers_constraint(cost=function))
        trainer.train()
        results.append(callback.guard.decision.constraints["fillers"].cost)
        assert hasattr(trainer, "async_loop") == reward_is_async
    assert results[0] == results[1]
    assert loops[0] is loops[1]
    callback.detach()
    assert loops[0].is_running() == reward_is_async
    assert set(vars(trainer)) - before <= {"current_gradient_accumulation_steps"} | set(vars(trainer))


def test_cost_functions_get_the_data_columns_and_the_hosts_logging_functions(random_model, tmp_path):
    def cost(completions, answer, trainer_state, log_metric, **kwargs):
        log_metric("mean_answer", sum(answer) / len(answer))
        return [float(trainer_state.global_step)] * len(completions)

    trainer = build_trainer(random_model, tmp_path, max_steps=3)
    guard_trainer(trainer, fillers_constraint(cost=cost))
    trainer.train()
    assert logged(trainer, "guardrails/fillers/cost") == [0.0, 1.0, 2.0]
    assert len(logged(trainer, "mean_answer")) == 3


def test_rewards_and_their_logs_do_not_see_the_costs(random_model, tmp_path):
    plain = build_trainer(random_model, tmp_path)
    plain.train()
    trainer = build_trainer(random_model, tmp_path)
    guard_trainer(trainer)
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    own = {name for entry in plain.state.log_history for name in entry}
    assert {name.rsplit("/", 1)[0] for name in names - own} == {"guardrails/fillers"}
    for key in ("reward", "reward_std", "rewards/reward/mean", "frac_reward_zero_std"):
        assert logged(trainer, key) == logged(plain, key)


def test_a_second_train_call_goes_on_with_the_same_multipliers(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, max_steps=2)
    callback = guard_trainer(trainer, fillers_constraint(scheduler=PID()))
    trainer.train()
    first = callback.guard.multipliers["fillers"]
    trainer.train()
    assert callback.guard.decision.step == 4
    assert callback.guard.multipliers["fillers"] > first > 0


def test_training_without_add_callback_stops_with_the_cure(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path)
    GuardrailsCallback(trainer, Guard(fillers_constraint()))
    with pytest.raises(AttachError, match=r"trainer\.add_callback\(callback\)"):
        trainer.train()


def test_a_callback_that_was_added_twice_stops_the_training_with_the_cure(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path)
    callback = GuardrailsCallback(trainer, Guard(Constraint("c", limit=1.0, cost=toy.fillers)), ledger=False)
    for _ in range(2):
        trainer.add_callback(callback)
    with pytest.raises(AttachError, match=r"added to the trainer 2 times.*Call trainer.add_callback\(callback\) once"):
        trainer.train()


def test_a_callback_of_another_trainer_is_refused_when_training_begins(random_model, tmp_path):
    trainer, other = (build_trainer(random_model, tmp_path) for _ in range(2))
    callback = GuardrailsCallback(trainer, Guard(fillers_constraint()))
    other.add_callback(callback)
    with pytest.raises(AttachError, match="built for another trainer"):
        other.train()


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_detach_leaves_the_trainer_as_it_was(random_model, tmp_path, kind):
    trainer = build_trainer(random_model, tmp_path, kind=kind, max_steps=2, logging_steps=5, log_completions=True)
    trainer.evaluate(trainer.train_dataset.select(range(8)))  # the host adds an attribute of its own at its first
    attributes, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    lists = [list(trainer.reward_funcs), list(trainer.reward_func_names), list(trainer.reward_processing_classes)]
    guard = Guard(fillers_constraint())
    callback = GuardrailsCallback(trainer, guard)
    trainer.add_callback(callback)
    trainer.evaluate(trainer.train_dataset.select(range(8)))
    callback.detach()
    callback.detach()
    assert set(vars(trainer)) == set(attributes)
    for name in ("reward_funcs", "reward_func_names", "reward_processing_classes", "_metrics", "_logs", "args"):
        assert getattr(trainer, name) is attributes[name]
    assert lists == [trainer.reward_funcs, trainer.reward_func_names, trainer.reward_processing_classes]
    assert trainer.callback_handler.callbacks == callbacks
    assert not any(name.startswith("guardrails/") for store in trainer._metrics.values() for name in store)
    assert guard.host is None
    trainer.train()
    assert guard.decision is None
    assert not logged(trainer, "guardrails/fillers/cost")
    GuardrailsCallback(trainer, guard).detach()


def test_a_search_over_hyperparameters_is_refused(random_model, tmp_path, monkeypatch):
    # The host takes a trial for one where it could have been asked for it, whatever is installed.
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    trainer = build_trainer(random_model, tmp_path)
    guard = Guard(Constraint("fillers", limit=0.1, cost=toy.fillers))
    trainer.add_callback(GuardrailsCallback(trainer, guard))
    with pytest.raises(AttachError, match="hyperparameter_search trains several models"):
        trainer.train(trial={"learning_rate": 0.1})
    assert guard.decision is None


def test_detach_refuses_to_remove_what_somebody_else_wrapped(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path)
    callback = guard_trainer(trainer)
    ours = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args: ours(*args)
    with pytest.raises(AttachError, match="_calculate_rewards was replaced"):
        callback.detach()
    assert "_generate_and_score_completions" in vars(trainer)
    trainer._calculate_rewards = ours
    callback.detach()
    assert "_calculate_rewards" not in vars(trainer)


def test_what_the_user_put_around_the_saving_stays_and_one_around_the_scoring_is_refused(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, save_strategy="steps", save_steps=1)
    saved, original = [], trainer._save_checkpoint

    def save(*args, **kwargs):
        original(*args, **kwargs)
        saved.append(trainer.state.global_step)

    trainer._save_checkpoint = save
    callback = guard_trainer(trainer)
    trainer.train()
    assert saved == [1]
    assert (tmp_path / "checkpoint-1" / "guardrails.json").exists()
    callback.detach()
    assert trainer._save_checkpoint is save
    score = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args: score(*args)
    with pytest.raises(AttachError, match="something else has wrapped its scoring"):
        guard_trainer(trainer)


def test_a_kept_callback_does_not_keep_a_detached_trainer_alive(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, beta=0.1)
    divergence = Constraint("divergence", limit=0.1, cost="kl", scheduler=Fixed(0.3))  # its cost reads the host
    callback = guard_trainer(trainer, fillers_constraint(), divergence)
    callback.detach()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    assert callback.guard.multipliers == {"fillers": 0.5, "divergence": 0.3}


def test_an_error_in_a_cost_leaves_the_hosts_lists_as_they_were(random_model, tmp_path):
    def broken(completions, **kwargs):
        raise RuntimeError("the judge is offline")

    trainer = build_trainer(random_model, tmp_path)
    before = trainer.reward_funcs, trainer.reward_func_names, trainer.reward_processing_classes
    callback = guard_trainer(trainer, fillers_constraint(cost=broken))
    with pytest.raises(RuntimeError, match="the judge is offline"):
        trainer.train()
    after = trainer.reward_funcs, trainer.reward_func_names, trainer.reward_processing_classes
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert callback.guard.decision is None


def test_saving_the_model_of_a_guarded_trainer_saves_the_model_alone(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path)
    plain, guarded = tmp_path / "plain", tmp_path / "guarded"
    trainer.save_model(str(plain))
    guard_trainer(trainer)
    trainer.save_model(str(guarded))
    assert sorted(file.name for file in plain.iterdir()) == sorted(file.name for file in guarded.iterdir())
    assert (plain / "model.safetensors").read_bytes() == (guarded / "model.safetensors").read_bytes()


def test_a_cost_that_is_never_a_number_violates_and_still_trains(random_model, tmp_path):
    trainer = build_trainer(random_model, tmp_path, max_steps=2)
    callback = guard_trainer(trainer, fillers_constraint(cost=lambda prompts, **kwargs: [math.nan] * len(prompts)))
    trainer.train()
    facts = callback.guard.decision.constraints["fillers"]
    assert facts.invalid_rows == 8
    assert facts.violation > 0
    assert all(math.isfinite(value) for value in logged(trainer, "guardrails/fillers/cost"))
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
