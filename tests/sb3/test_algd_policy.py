"""A diffusion policy in an untouched SAC: acting, learning, saving, and what a guard adds and takes away again."""

import gc
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from devices import DEVICE, ON_CPU
from gymnasium import Env, spaces
from sb3_envs import Drift, callback_of, learn, parameters, same, vec
from sb3_hosts import SMALL, guarded, host
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from guardrails import AttachError, ConfigurationError, Constraint, Dial, Gate, Guard, Require, StateError
from guardrails.competence import FailureAvoidance
from guardrails.critic import Ensemble, critic_unit
from guardrails.schedulers import AdamLogDual, Augmented, DualAscent, Fixed
from guardrails_sb3 import algd, safety_critic, unwrap, wrap
from guardrails_sb3.algd import DiffusionPolicy, ScoreMatching, ve_schedule

NETS = {"net_arch": {"pi": [16, 16], "qf": [16]}}


def diffusion(sde="ve", env=None, policy=None, **settings):
    kwargs = NETS | {"sde": sde, "steps": 3} | (policy or {})
    return host(SAC, env, DiffusionPolicy, ent_coef=0.0, policy_kwargs=kwargs, **settings)


class Target(Env):
    """One step; an action is worth the less the farther it is from (0.8, 0.15), in bounds that are not [-1, 1]."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float64)
    action_space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 0.5], np.float32))
    goal = np.array([0.8, 0.15])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2), {}

    def step(self, action):
        width = self.action_space.high - self.action_space.low
        return np.zeros(2), -20.0 * float(np.sum(((action - self.goal) / width) ** 2)), True, False, {"cost": action[0]}


class Seen(Drift):
    """Drift whose observation is a dict."""

    observation_space = spaces.Dict({"seen": Drift.observation_space})

    def _observation(self):
        return {"seen": super()._observation()}


@pytest.mark.parametrize("sde", ["ve", "ddpm"])
def test_actions_lie_in_the_environments_bounds_and_only_the_stochastic_ones_vary(sde):
    model = diffusion(sde, Target(), n_steps=1)
    observations = np.zeros((200, 2))
    drawn = model.predict(observations)[0]
    assert (drawn >= Target.action_space.low).all()
    assert (drawn <= Target.action_space.high).all()
    assert len(np.unique(drawn[:, 0])) == 200
    fixed = model.predict(observations, deterministic=True)[0]
    assert len(np.unique(fixed, axis=0)) == 1
    assert np.array_equal(fixed, model.predict(observations, deterministic=True)[0])


def test_the_deterministic_action_is_the_path_from_zero_without_noise():
    actor = diffusion("ve").actor
    observations = torch.randn(4, 2, device=DEVICE)
    latents, outputs = torch.zeros(4, 1, device=DEVICE), actor.network.at(observations)
    for t in (2, 1, 0):
        latents = latents + actor.schedule.increment(t) * outputs(torch.tanh(latents), t)[:, 0]
    assert torch.allclose(actor(observations, deterministic=True), torch.tanh(latents), atol=1e-6)  # float32


def test_the_path_of_a_sampling_is_what_the_score_network_was_asked_about():
    actor = diffusion("ve").actor
    observations, asked, at = torch.randn(5, 2, device=DEVICE), {}, actor.network.at

    def listening(features):
        outputs = at(features)
        return lambda actions, t: asked.update({t: actions.detach().clone()}) or outputs(actions, t)

    actor.network.at = listening
    actions, log_prob = actor.action_log_prob(observations)
    assert log_prob.tolist() == [0.0] * 5
    assert actions.requires_grad
    assert actor.path.observations is observations
    assert torch.equal(actor.path.actions, torch.stack([asked[t] for t in range(3)]))
    before = actor.path
    with torch.no_grad():
        actor.action_log_prob(observations)
    assert actor.path is before  # next actions are no path of the actor's loss


@pytest.mark.parametrize("sde", ["ve", "ddpm"])
def test_a_plain_diffusion_policy_finds_the_best_action_of_an_untouched_sac(sde):
    nets = {"net_arch": {"pi": [32, 32], "qf": [32, 32]}, "steps": 5}
    model = diffusion(sde, Target(), nets, learning_starts=200, batch_size=64, learning_rate=3e-3, gamma=0.0)
    model.learn(900)
    width = Target.action_space.high - Target.action_space.low
    found = model.predict(np.zeros(2), deterministic=True)[0]
    assert np.abs((found - Target.goal) / width).max() < 0.1  # random actions miss by 0.25 on average


@pytest.mark.parametrize("sde", ["ve", "ddpm", ve_schedule(4, sigma_max=0.5)])
def test_a_saved_model_and_a_saved_policy_act_as_before(tmp_path, sde):
    model = diffusion(sde, policy={"score_matching": ScoreMatching(samples=2, beta=3.0)}).learn(60)
    model.save(tmp_path / "run.zip")
    model.policy.save(tmp_path / "policy")
    observations = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    wanted = model.predict(observations, deterministic=True)[0]
    for other in (
        SAC.load(tmp_path / "run.zip", device=DEVICE).policy,
        DiffusionPolicy.load(tmp_path / "policy", device=DEVICE),
    ):
        assert np.array_equal(other.predict(observations, deterministic=True)[0], wanted)
        assert other.diffusion == model.policy.diffusion
        assert other.score_matching == ScoreMatching(samples=2, beta=3.0)


def test_twin_critics_give_what_separate_networks_would_and_the_actors_loss_leaves_them_alone():
    critic = diffusion("ve").critic
    observations, actions = torch.randn(7, 2, device=DEVICE), torch.rand(7, 1, device=DEVICE, requires_grad=True)
    nets = critic.q_networks
    for member, values in enumerate(critic(observations, actions)):
        hidden = torch.cat([observations, actions], dim=1)
        hidden = torch.relu(hidden @ nets.weights[0][member] + nets.biases[0][member])
        wanted = hidden @ nets.weights[1][member] + nets.biases[1][member]
        assert torch.allclose(values, wanted, atol=1e-5)  # float32, summed in another order
        assert torch.allclose(critic(observations, actions.detach())[member], wanted, atol=1e-5)
    sum(each.sum() for each in critic(observations, actions)).backward()
    assert actions.grad.abs().sum() > 0.0
    assert all(each.grad is None for each in critic.parameters())
    sum(each.sum() for each in critic(observations, actions.detach())).backward()
    assert all(each.grad.abs().sum() > 0.0 for each in critic.parameters())


def environments():
    return vec(2, kind=Drift, length=9)


def own_guard():
    return Guard(Constraint("cost", limit=1.0, scale=1.0, scheduler=Augmented(AdamLogDual(0.1), 0.5)))


def wrapped(model, guard, **settings):
    return wrap(model, guard, cost_critic=SMALL, horizon=9, dual_interval=7, **settings)


def go_on(model):
    """Train on from freshly reset environments and generators, which Stable-Baselines3 does not save."""
    model.set_env(environments())
    model.set_random_seed(7)
    return model.learn(100, reset_num_timesteps=False)


def everything(model):
    return parameters(model) | {f"ours.{name}": tensor.clone() for name, tensor in callback_of(model).tensors().items()}


@pytest.mark.parametrize("sde", ["ve", "ddpm"])
def test_a_guarded_run_that_is_saved_and_resumed_equals_one_that_was_not(tmp_path, sde):
    through = wrapped(diffusion(sde, environments()), own_guard()).learn(100)
    through.save(tmp_path / "run.zip")
    through.save_replay_buffer(tmp_path / "replay.pkl")
    go_on(through)
    guard = own_guard()
    resumed = wrapped(
        SAC.load(tmp_path / "run.zip", env=environments(), device=DEVICE), guard, resume=tmp_path / "run.zip"
    )
    resumed.load_replay_buffer(tmp_path / "replay.pkl")
    go_on(resumed)
    assert guard.state_dict() == callback_of(through).guard.state_dict()
    assert same(everything(through), everything(resumed))


def test_a_generator_of_another_kind_of_device_starts_afresh_and_says_so(caplog):
    seams = callback_of(wrapped(diffusion(), own_guard())).critic._seams
    before = seams.tensors()["generator"]
    seams.load_tensors({"generator": torch.zeros(16 if ON_CPU else 5056, dtype=torch.uint8)})  # 16 is a GPU's
    assert torch.equal(seams.tensors()["generator"], before)
    assert "starts afresh" in caplog.text


def trace(model):
    optimizers = (model.actor.optimizer, model.critic.optimizer)
    hooks = [tuple(each._optimizer_step_pre_hooks) for each in optimizers]
    networks = [
        (name, tuple(module._forward_hooks), sorted(vars(module))) for name, module in model.policy.named_modules()
    ]
    return sorted(vars(model)), sorted(vars(model.replay_buffer)), hooks, networks


def test_unwrap_leaves_nothing_behind_and_the_host_trains_as_if_it_had_never_been_wrapped():
    plain, model = diffusion(), diffusion()
    before = trace(model)
    guarded(model)
    assert trace(model) != before
    unwrap(model)
    assert trace(model) == before
    assert same(parameters(learn(plain, 80)), parameters(learn(model, 80)))


def test_without_multiplier_and_score_loss_training_is_bit_for_bit_unguarded():
    """The samples of the score target are drawn from a generator of their own."""
    settings = {"policy": {"score_matching": ScoreMatching(weight=0.0)}}
    plain = diffusion(**settings).learn(80)
    model = guarded(diffusion(**settings), Constraint("cost", limit=2.0, scheduler=Fixed(0.0)))
    assert same(parameters(plain), parameters(model.learn(80)))
    scored = guarded(diffusion(), Constraint("cost", limit=2.0, scheduler=Fixed(0.0))).learn(80)
    assert not same(parameters(plain), parameters(scored))


def test_the_score_loss_joins_the_gradient_of_the_actors_own_loss():
    model = guarded(diffusion(), Constraint("cost", limit=0.2, scheduler=Fixed(3.0)))
    model.learn(40)
    optimizer, gradients = model.actor.optimizer, []

    def note(*_):
        gradients.append(torch.cat([each.grad.flatten() for each in model.actor.parameters()]))

    hooks = optimizer._optimizer_step_pre_hooks
    first = optimizer.register_step_pre_hook(note)
    hooks.move_to_end(first.id, last=False)
    optimizer.register_step_pre_hook(note)
    model.train(1, 16)
    host_own, total = gradients
    assert not torch.equal(host_own, total)

    optimizer.step()  # outside of training a step of the optimizer is the host's alone
    assert torch.equal(*gradients[2:])


def test_the_score_target_knows_every_constraint_and_the_dial_of_their_penalty():
    """One limit of either side in units of their own; at a gate's first rung the dial is at its tight end."""
    gate = Gate(Require(FailureAvoidance("cost"), at_least=0.99), name="gate")
    guard = Guard(
        Constraint("cost", limit=1.0, scheduler=Augmented(Fixed(0.7), 0.5)),
        Constraint("worth", cost=lambda info: 3.0 * info["cost"] - 0.5, limit=2.0, sense=">=", scheduler=Fixed(0.4)),
        Dial("penalty", gate.between(0.25, 1.0)),
    )
    model = wrapped(diffusion(env=environments()), guard).learn(60)
    host, seams = safety_critic(model), callback_of(model).critic._seams
    assert guard.dials["penalty"] == 0.25
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(20, 2, generator=generator).to(DEVICE)
    samples = torch.randn(4, 20, 1, generator=generator).to(DEVICE)
    with torch.no_grad():
        for parameter in [*model.critic.parameters(), *host.critic.network.parameters()]:
            parameter.mul_(2.0)  # young networks are nearly flat
    energies, gradients = seams._slopes(observations, samples)
    unit, (scale, _) = critic_unit(9, 0.99), [part.violation_scale for part in guard.constraints]
    for index, drawn in enumerate(samples):
        actions = drawn.clone().requires_grad_()
        cost, worth = host.critic.risks(observations, actions).unbind(dim=1)
        effective = (0.7 + 0.5 * (cost / unit - 1.0) / scale).clamp(min=0.0)
        penalty = scale * unit * (effective**2 - 0.7**2) / (2.0 * 0.5) + 0.4 * (2.0 * unit - worth)
        wanted = 0.25 * penalty - model.critic.at(observations)(actions).amin(dim=0).squeeze(-1)
        assert torch.allclose(energies[index], wanted, atol=1e-5)  # float32
        assert torch.allclose(gradients[index], torch.autograd.grad(wanted.sum(), actions)[0], atol=1e-5)


def test_after_learn_the_critic_tells_rewards_alone_also_where_gradients_are_wanted():
    model = guarded(diffusion(), Constraint("cost", limit=0.2, scheduler=Fixed(3.0))).learn(60)
    observations, actions = torch.zeros(4, 2, device=DEVICE), torch.zeros(4, 1, device=DEVICE)
    plain = model.critic(observations, actions)[0]
    assert torch.allclose(model.critic(observations, actions.clone().requires_grad_())[0], plain, atol=1e-6)  # float32
    seams, updates = callback_of(model).critic._seams, model._n_updates
    acted = seams.acted
    model.learn(20, reset_num_timesteps=False)
    assert seams.acted - acted == model._n_updates - updates > 0  # and the next one is guarded again


def test_where_no_episode_ends_losses_do_not_pile_up():
    model = wrapped(diffusion(env=vec(1, kind=Drift, length=10**9)), own_guard())

    def held():
        gc.collect()
        return sum(type(each) is torch.Tensor and each.dim() == 0 for each in gc.get_objects())

    model.learn(60)
    before = held()
    model.learn(60, reset_num_timesteps=False)
    assert held() < before + 10  # and 60 gradient steps


def test_an_adam_that_is_not_to_be_fused_is_not():
    model = diffusion(policy={"optimizer_kwargs": {"foreach": True}})
    assert model.actor.optimizer.defaults["foreach"]
    assert diffusion().actor.optimizer.defaults["fused"]


def test_an_adapting_entropy_coefficient_is_refused_and_the_model_left_as_it_was():
    model = host(SAC, None, DiffusionPolicy, policy_kwargs=NETS)
    before = trace(model)
    with pytest.raises(AttachError, match=r"entropy is not known, so what it adapts to means nothing.*ent_coef=0\.0"):
        guarded(model)
    assert trace(model) == before
    guarded(host(SAC, None, DiffusionPolicy, policy_kwargs=NETS, ent_coef=0.3))  # 0.3 times a log-probability of 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sde": "vp"}, "give 've', 'ddpm', or a schedule"),
        ({"steps": 0}, "steps is 0"),
        ({"use_sde": True}, "Leave use_sde out"),
        ({"net_arch": []}, "at least one hidden layer"),
        ({"net_arch": {"pi": [16], "qf": []}}, "at least one hidden layer"),
    ],
)
def test_a_policy_that_cannot_be_built_says_why(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DiffusionPolicy(Drift.observation_space, Drift.action_space, lambda _: 1e-3, **settings)


def test_observations_that_are_a_dict_need_an_extractor_for_them():
    def made(**policy):
        env = vec(2, kind=Seen, length=9)
        return algd.make(env, cost_limit=1.0, horizon=9, learning_starts=20, batch_size=16, policy_kwargs=NETS | policy)

    with pytest.raises(ConfigurationError, match="features_extractor_class=CombinedExtractor"):
        made()
    model = made(features_extractor_class=CombinedExtractor).learn(30)
    assert model._n_updates > 0
    assert model.predict(model.env.reset())[0].shape == (2, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScoreMatching(samples=0),
        lambda: ScoreMatching(beta=0.0),
        lambda: ve_schedule(3, sigma_min=2.0),
        lambda: algd.VESchedule((0.5, 0.1)),
        lambda: algd.DDPMSchedule((0.1, 1.0)),
        lambda: algd.ddpm_schedule(3, beta_min=0.5, beta_max=0.1),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, penalty_coefficient=-1.0),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, learning_rate=lambda _: 1e-3),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, dual_interval=0),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, critic_tau=0.0),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, dual_interval=None),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps=0),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, target_update_interval=0),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps=-2),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps=1.5),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps="a"),
        lambda: algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps=True),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


class TestDecisionsOnTheCritic:
    def decisions(self, guard, steps=120, interval=7, **settings):
        seen, decide = [], guard.decide
        guard.decide = lambda evidence: seen.append((evidence, decide(evidence))) or seen[-1][1]
        model = wrap(
            diffusion(env=environments(), **settings), guard, cost_critic=SMALL, horizon=9, dual_interval=interval
        )
        risks, critic = [], safety_critic(model).critic
        estimate = critic._estimate
        critic._estimate = lambda values, known: (
            risks.append(critic.combine(values * critic._units).mean()) or estimate(values, known)
        )
        return model.learn(steps), seen, risks

    def test_j_is_the_mean_risk_of_replayed_actions_over_the_interval_in_units_of_an_episode(self):
        guard = Guard(Constraint("cost", limit=2.0, scheduler=DualAscent(0.1, initial=1.0)))
        _, seen, risks = self.decisions(guard)
        assert len(seen) == len(risks) // 7 > 3
        for index, (evidence, decision) in enumerate(seen):
            wanted = np.mean([float(each) for each in risks[7 * index : 7 * index + 7]]) / critic_unit(9, 0.99)
            assert decision.constraints["cost"].cost == pytest.approx(wanted, rel=1e-5)  # a mean of float32
            assert evidence.n_rows == 0

    def test_episodes_move_gates_and_no_multiplier(self):
        gate = Gate(Require(FailureAvoidance("cost"), at_least=0.2), name="gate")
        constraint = Constraint("cost", limit=gate.between(1.0, 2.0), scheduler=DualAscent(0.1, initial=1.0))
        model, seen, _ = self.decisions(Guard(constraint), interval=10_000)
        assert len(seen) > 4
        assert all(evidence.gates["gate"].n_rows == evidence.n_rows > 0 for evidence, _ in seen)
        assert not any(reason.verdict == "failed" for _, decision in seen for reason in decision.reasons)
        assert {decision.multipliers["cost"] for _, decision in seen} == {1.0}
        assert all("no costs in this step, λ stays 1" in decision.explain() for _, decision in seen)
        assert model.logger.name_to_value["guardrails/cost/episode_cost"] >= 0.0

    def test_the_ledger_replays_them(self, tmp_path):
        from guardrails.ledger import verify

        guard = own_guard()
        with guard.record(tmp_path / "ledger.jsonl"):
            _, seen, _ = self.decisions(guard)
        assert verify(tmp_path / "ledger.jsonl").steps == len(seen) > 3

    def test_another_thread_sees_them_as_a_whole_or_not_at_all(self):
        states, threads = [], []

        class Watched(DualAscent):
            def update(self, state, violation):
                threads.append(threading.Thread(target=lambda: states.append(guard.state_dict())))
                threads[-1].start()
                threads[-1].join(0.02)
                return super().update(state, violation)

        limits = {"a": 1.0, "b": 2.0}
        guard = Guard(*(Constraint(name, limit, "cost", Watched(0.1, initial=1.0)) for name, limit in limits.items()))
        _, decided, _ = self.decisions(guard, 90)
        for thread in threads:
            thread.join()
        assert len(states) == 2 * len(decided) > 4
        for state in states:
            after = decided[state["step"] - 1][1].multipliers
            assert {name: each["multiplier"] for name, each in state["constraints"].items()} == after

    @pytest.mark.parametrize("interval", [0, 2.5, True])
    def test_an_interval_that_is_none_is_refused(self, interval):
        with pytest.raises(AttachError, match="dual_interval"):
            wrap(diffusion(), own_guard(), cost_critic=SMALL, horizon=9, dual_interval=interval)

    def test_an_interval_may_be_a_whole_number_of_numpy(self):
        wrap(diffusion(), own_guard(), cost_critic=SMALL, horizon=9, dual_interval=np.int64(7))

    def test_an_on_policy_host_is_refused(self):
        with pytest.raises(AttachError, match="gradient steps of an off-policy algorithm"):
            wrap(PPO("MlpPolicy", environments()), own_guard(), dual_interval=10)


class TestPreset:
    def test_it_resumes_what_it_made(self, tmp_path):
        def made(**more):
            settings = {"learning_starts": 20, "batch_size": 16, "gradient_steps": 1, "dual_interval": 7, "tau": 0.01}
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
            return algd.make(environments(), cost_limit=1.0, horizon=9, seed=0, ledger=path, **settings, **more)

        through = made().learn(60)
        through.save(tmp_path / "run.zip")
        through.save_replay_buffer(tmp_path / "replay.pkl")
        go_on(through)
        resumed = made(resume=tmp_path / "run.zip", tensorboard_log=None)
        resumed.load_replay_buffer(tmp_path / "replay.pkl")
        go_on(resumed)
        assert resumed.num_timesteps == through.num_timesteps
        assert same(everything(through), everything(resumed))
        assert callback_of(resumed).guard.ledger.path.parent == tmp_path

    @pytest.mark.parametrize("how", ["policy", "gamma"])
    def test_it_resumes_nothing_that_it_would_not_have_made(self, tmp_path, how):
        settings = {"cost_limit": 1.0, "horizon": 9, "buffer_size": 50}
        if how == "gamma":
            algd.make(environments(), **settings, gamma=0.9).save(tmp_path / "run.zip")
        else:
            model = host(SAC, environments())
            wrap(model, Guard(Constraint("cost", limit=1.0)), cost_critic=SMALL, horizon=9)
            model.save(tmp_path / "run.zip")
        with pytest.raises(StateError, match="policy is SACPolicy" if how == "policy" else "Give gamma=0.9"):
            algd.make(environments(), **settings, resume=tmp_path / "run.zip")

    def test_it_resumes_in_an_environment_given_by_its_name(self, tmp_path):
        settings = {"cost_limit": 1.0, "cost": lambda info: 0.0, "buffer_size": 50}
        algd.make("Pendulum-v1", **settings).save(tmp_path / "run.zip")
        resumed = algd.make("Pendulum-v1", **settings, resume=tmp_path / "run.zip")
        assert resumed.env.get_attr("spec")[0].id == "Pendulum-v1"

    def test_a_discounted_limit_is_the_critics_own_and_counts_in_its_unit(self):
        model = algd.make(Drift(), cost_limit=3.0, discounted=True, horizon=25, seed=0)
        critic, part = safety_critic(model), callback_of(model).guard.constraints[0]
        assert critic.limit() == pytest.approx(3.0)
        assert critic.units.tolist() == pytest.approx([1.0])
        risks = torch.tensor([[1.0], [5.0]])
        lam = part.scheduler.scheduler.initial
        wanted = [(max(0.0, lam + r - 3.0) ** 2 - lam**2) / 2.0 for r in (1.0, 5.0)]
        assert critic.penalty(risks).tolist() == pytest.approx(wanted, rel=1e-5)

    def test_an_undiscounted_limit_is_converted(self):
        model = algd.make(Drift(), cost_limit=10.0, horizon=400)
        assert safety_critic(model).limit() == pytest.approx(10.0 * (1.0 - 0.99**400) / (0.01 * 400))

    def test_it_has_the_papers_settings(self):
        model = algd.make(Drift(), cost_limit=1.0, horizon=25)
        settings = safety_critic(model).critic.settings
        assert settings == Ensemble(
            4,
            kappa=(4 / 3) ** 0.5,
            hidden=(256, 256),
            learning_rate=3e-4,
            tau=0.005,
            target_interval=2,
            activation="silu",
        )
        assert (model.batch_size, model.learning_starts, model.buffer_size) == (256, 5000, 1_000_000)
        assert (model.tau, model.gamma, model.target_update_interval) == (0.005, 0.99, 2)
        assert (model.gradient_steps, model.train_freq.frequency) == (10, 1)
        assert [layer.out_features for layer in model.actor.network.layers] == [128, 128, 128]
        assert [tuple(each.shape) for each in model.critic.q_networks.weights] == [
            (2, 3, 256),
            (2, 256, 256),
            (2, 256, 1),
        ]
        assert model.policy.score_matching == ScoreMatching(samples=4, beta=1.0, weight=0.1)
        assert model.policy.diffusion.sigmas == pytest.approx([10 ** (t / 2 - 2) for t in range(5)])

    def test_the_targets_of_all_critics_follow_alike(self):
        model = algd.make(Drift(), cost_limit=1.0, horizon=25, tau=0.05, target_update_interval=4)
        settings = safety_critic(model).critic.settings
        assert (settings.tau, settings.target_interval) == (model.tau, model.target_update_interval) == (0.05, 4)

    def test_the_targets_of_the_cost_critics_may_follow_faster(self):
        model = algd.make(Drift(), cost_limit=1.0, horizon=25, critic_tau=0.05)
        assert (safety_critic(model).critic.settings.tau, model.tau) == (0.05, 0.005)

    def test_an_odd_number_of_gradient_steps_keeps_the_targets_interval(self):
        model = algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps=3)
        assert (model.gradient_steps, model.train_freq.frequency) == (6, 2)

    @pytest.mark.parametrize(("steps", "interval"), [(10, 4), (2, 3), (1, 1)])
    def test_the_hosts_targets_follow_as_often_as_those_of_the_cost_critics(self, steps, interval):
        settings = {"learning_starts": 20, "batch_size": 16, "target_update_interval": interval}
        model = algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps=steps, **settings)
        critic, weight = safety_critic(model).critic, next(model.critic_target.q_networks.parameters())
        followed, costs = [weight.clone()], [critic._followed[0].clone()]
        learn, update = model.critic.optimizer.step, critic.update

        def step(*args, **kwargs):  # the host's targets have followed by the critics' next step
            followed.append(weight.clone())
            return learn(*args, **kwargs)

        model.critic.optimizer.step = step
        critic.update = lambda batch: (update(batch), costs.append(critic._followed[0].clone()))
        model.learn(44)
        moves = [sum(not torch.equal(a, b) for a, b in pairwise(each)) for each in ([*followed, weight], costs)]
        assert moves[0] == moves[1] == -(-model._n_updates // interval) > 4

    def test_one_gradient_step_for_each_environment_is_minus_one(self):
        env = vec(3, kind=Drift, length=9)
        model = algd.make(env, cost_limit=1.0, horizon=9, gradient_steps=-1, learning_starts=6, batch_size=16)
        assert model.learn(30)._n_updates == 24

    @pytest.mark.parametrize("frequency", [4, (4, "step"), TrainFreq(4, TrainFrequencyUnit.STEP)])
    def test_trained_at_every_fourth_step_each_still_brings_its_gradient_steps(self, frequency):
        model = algd.make(Drift(), cost_limit=1.0, horizon=25, gradient_steps=3, train_freq=frequency)
        assert (model.gradient_steps, model.train_freq.frequency) == (12, 4)

    def test_trained_at_the_end_of_episodes_gradient_steps_cannot_be_kept(self):
        with pytest.raises(ConfigurationError, match="counts episodes"):
            algd.make(Drift(), cost_limit=1.0, horizon=25, train_freq=(1, "episode"))

    def test_the_dual_moves_as_far_as_adam_at_every_gradient_step_would_take_it(self):
        """On a violation that stands still, both take steps of the rate."""
        each = {"train_freq": 1, "gradient_steps": 1, "dual_interval": 1}
        duals = [algd.make(Drift(), cost_limit=1.0, horizon=25, **kind) for kind in (each, {"dual_interval": 50})]
        ends = []
        for model, times in zip(duals, (500, 10), strict=True):
            scheduler = callback_of(model).guard.constraints[0].scheduler.scheduler
            state = scheduler.init()
            for _ in range(times):
                state, strength = scheduler.update(state, 4.0)
            ends.append(strength)
        # the moments of λ v follow a λ that grows by 15% on the way
        assert ends[0] == pytest.approx(ends[1], rel=0.02)
        assert ends[0] == pytest.approx(np.log(2.0) * np.exp(500 * 3e-4), rel=0.02)

    @pytest.mark.parametrize(
        ("settings", "taken"),
        [
            ({"gradient_steps": 10, "dual_interval": 1}, 10),
            ({"gradient_steps": 3, "dual_interval": 7}, 12),
            ({"gradient_steps": 1, "train_freq": 20, "dual_interval": 5}, 20),
            ({"gradient_steps": -1, "dual_interval": 7}, 8),
        ],
    )
    def test_a_decision_that_waits_for_the_end_of_train_takes_the_dual_as_far_as_the_steps_until_then(
        self, settings, taken
    ):
        env = vec(2, kind=Drift, length=9)
        model = algd.make(env, cost_limit=1.0, horizon=9, learning_starts=20, batch_size=16, **settings)
        decided, guard, dual = [], callback_of(model).guard, callback_of(model)._dual
        settle = guard.settle
        guard.settle = lambda evidence: decided.append(dual._host.critic.updates) or settle(evidence)
        model.learn(150)
        assert len(decided) > 1
        assert set(np.diff([0, *decided])) == {taken}
        assert guard.constraints[0].scheduler.scheduler.learning_rate == pytest.approx(3e-4 * taken)

    def test_rho_of_zero_and_a_scheduler_of_ones_own_have_no_quadratic_penalty(self):
        plain = algd.make(Drift(), cost_limit=1.0, horizon=25, penalty_coefficient=0.0)
        assert isinstance(callback_of(plain).guard.constraints[0].scheduler, AdamLogDual)
        other = algd.make(Drift(), cost_limit=1.0, horizon=25, scheduler=Fixed(2.0))
        risks = torch.tensor([[0.0], [4.0]])
        penalties = safety_critic(other).penalty(risks)
        assert float(penalties[1] - penalties[0]) == pytest.approx(8.0, rel=1e-5)
