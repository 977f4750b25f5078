"""ALGD with the settings of its paper, by one call."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stable_baselines3 import SAC
from stable_baselines3.common.base_class import maybe_make_env

from guardrails import ConfigurationError, Constraint, Guard, StateError
from guardrails.constraint import CostFunction
from guardrails.critic import Ensemble, critic_unit
from guardrails.schedulers import AdamLogDual, Augmented, ConstraintScheduler
from guardrails.schedulers.base import check_number, whole_number
from guardrails_sb3 import checkpoint
from guardrails_sb3.algd.policy import DiffusionPolicy
from guardrails_sb3.algd.schedules import Schedule
from guardrails_sb3.safety_critic import horizon as episode_steps
from guardrails_sb3.wrap import wrap

_MEMBERS = 4
_OF_A_RUN = ("device", "tensorboard_log", "verbose", "seed")
"""Arguments of SAC that are not in a saved file, or need not be those of the run so far."""


def make(
    env: Any,
    *,
    cost_limit: float,
    discounted: bool = False,
    cost: CostFunction | str | None = None,
    sde: str | Schedule = "ve",
    steps: int = 5,
    penalty_coefficient: float = 1.0,
    scheduler: ConstraintScheduler[Any] | None = None,
    gradient_steps: int = 10,
    dual_interval: int = 100,
    critic_tau: float | None = None,
    horizon: int | None = None,
    resume: checkpoint.Target | None = None,
    ledger: str | Path | bool = True,
    learning_rate: float = 3e-4,
    gamma: float = 0.99,
    **sac: Any,
) -> SAC:
    """Return a guarded SAC with a diffusion policy, set as in the paper on ALGD (arXiv 2602.02924).

    Twin critics of 2 x 256; four cost critics of 2 x 256 with SiLU (the paper's 3 layers count the output), whose risk
    is their mean and one standard deviation of a sample; a score network of 3 x 128; batches of 256, a replay buffer of
    10⁶, 5,000 steps of warm-up, targets that follow by 0.005 at each second gradient step; Adam at 3e-4 throughout, for
    ln λ as well, from λ = ln 2; ρ = 1, β = 1, 4 samples.

    The constraint is named ``"cost"`` and counts violations in the unit of the discounted critic, so λ and ρ are the
    paper's. λ moves at each ``dual_interval`` gradient steps n, as far as Adam would take it in n steps: by n times the
    rate, with moments that fade by the n-th power. Where a call of ``train`` ends beyond, n is counted to its end.

    Args:
        env: as for SAC, which takes a registered name too; its ``info`` has the cost of each step.
        cost_limit: d ≥ 0, per episode, or h where ``discounted``.
        discounted: the limit is on the discounted sum Σ γᵗ c_t, as the critic estimates it.
        cost: see `Constraint`; None reads ``info["cost"]``.
        sde: see `DiffusionPolicy`.
        steps: K.
        penalty_coefficient: ρ ≥ 0, in λ per discounted cost; 0 is the plain Lagrangian.
        scheduler: moves the multiplier in place of Adam on ln λ, without the penalty unless it has one.
        gradient_steps: ≥ 1, per step of the environments; -1 takes one for each of the environments.
        dual_interval: gradient steps between decisions.
        critic_tau: share in (0, 1] by which the targets of the cost critics follow; None is SAC's ``tau``. With fewer
            gradient steps per step than the preset's ten, a larger one keeps the critics from lagging behind.
        horizon: steps of an episode; default: the environments' time limit.
        resume: the file that a model made with these arguments was saved to, to go on with; see `guardrails_sb3.wrap`.
            SAC is then loaded from it, and of ``sac`` only ``device``, ``tensorboard_log``, ``verbose`` and ``seed``
            are taken up. Its replay buffer is loaded by ``model.load_replay_buffer``, afterwards.
        ledger: see `guardrails_sb3.wrap`.
        learning_rate: of all networks, and of ln λ.
        gamma: discount of rewards and costs.
        **sac: further arguments of SAC, such as ``seed`` and ``tensorboard_log``, or others in place of these; ``tau``
            and ``target_update_interval`` are those of the cost critics too. At each ``train_freq`` steps all of their
            ``gradient_steps`` are taken.

    Raises:
        ConfigurationError: if ``penalty_coefficient``, ``learning_rate``, ``gradient_steps``, ``dual_interval``,
            ``critic_tau``, ``target_update_interval`` or the limit is out of range, or ``train_freq`` counts episodes.
        AttachError: as `wrap` does.
        StateError: if ``resume`` is a file of another guard, of an unguarded model, of another policy or ``gamma``, or
            damaged.

    Example:
        >>> model = make(env, cost_limit=82.748, discounted=True)  # doctest: +SKIP
        >>> model.learn(100_000)  # doctest: +SKIP
    """
    rate = check_number("algd.make", "learning_rate", learning_rate, low=0.0, open_low=True)
    check_number("algd.make", "penalty_coefficient", penalty_coefficient, low=0.0)
    dual_interval = whole_number("algd.make", "dual_interval", dual_interval)
    gradient_steps = whole_number("algd.make", "gradient_steps", gradient_steps, low=-1)
    if gradient_steps == 0:
        raise ConfigurationError(
            "algd.make: gradient_steps is 0, so the model would never train. Give at least 1, or -1 for one for each "
            "environment."
        )
    policy = {"sde": sde, "steps": steps, **sac.pop("policy_kwargs", {})}
    interval = whole_number("algd.make", "target_update_interval", sac.get("target_update_interval", 2))
    rounds = _rounds(sac.pop("train_freq", None), gradient_steps, interval)
    settings: dict[str, Any] = {
        "buffer_size": 1_000_000,
        "learning_starts": 5_000,
        "batch_size": 256,
        "tau": 0.005,
        "target_update_interval": interval,
        "train_freq": rounds,
        "gradient_steps": rounds * gradient_steps,
        "ent_coef": 0.0,
    } | sac
    if resume is None:
        model = SAC(DiffusionPolicy, env, learning_rate, gamma=gamma, policy_kwargs=policy, **settings)
    else:
        env = maybe_make_env(env, sac.get("verbose", 0))  # SAC.load takes no name of one
        model = SAC.load(resume, env=env, **{key: value for key, value in sac.items() if key in _OF_A_RUN})
        _check_resumed(model, gamma)
    unit = critic_unit(episode_steps(model, horizon), gamma)
    if scheduler is None:
        between = _between_decisions(model, dual_interval)
        scheduler = AdamLogDual(
            rate * between, initial=math.log(2.0), mean_smoothing=0.9**between, square_smoothing=0.999**between
        )
        if penalty_coefficient > 0.0:
            scheduler = Augmented(scheduler, penalty_coefficient)
    limit = cost_limit / unit if discounted else cost_limit
    guard = Guard(Constraint("cost", limit=limit, cost=cost, scheduler=scheduler, scale=1.0 / unit))
    critics = Ensemble(
        _MEMBERS,
        kappa=math.sqrt(_MEMBERS / (_MEMBERS - 1)),
        hidden=(256, 256),
        learning_rate=learning_rate,
        tau=settings["tau"] if critic_tau is None else critic_tau,
        target_interval=interval,
        activation="silu",
    )
    return wrap(
        model,
        guard,
        cost_critic=critics,
        horizon=horizon,
        resume=resume,
        ledger=ledger,
        dual_interval=dual_interval,
    )


def _check_resumed(model: SAC, gamma: float) -> None:
    if not isinstance(model.policy, DiffusionPolicy):
        raise StateError(
            f"algd.make: the file to resume holds a SAC whose policy is {type(model.policy).__name__}. Resume it with "
            "SAC.load and guardrails_sb3.wrap(model, guard, resume=...), as it was made."
        )
    if model.gamma != gamma:
        raise StateError(
            f"algd.make: the file to resume was trained with gamma={model.gamma:g}, and gamma is {gamma:g} here, by "
            f"which the limit would be converted. Give gamma={model.gamma:g}."
        )


def _between_decisions(model: SAC, dual_interval: int) -> int:
    """Return the gradient steps from one decision to the next, which waits for the end of a call of ``train``."""
    steps = model.gradient_steps
    if steps < 0:
        steps = model.train_freq.frequency * model.n_envs  # type: ignore[union-attr]  # SAC makes a TrainFreq of it
    return steps * math.ceil(dual_interval / steps)


def _rounds(frequency: Any, gradient_steps: int, interval: int) -> int:
    """Return the steps of an environment from one call of ``train`` to the next."""
    if frequency is None:
        # SAC counts the interval of its targets within one call of train, which so takes a multiple of it.
        return interval // math.gcd(interval, gradient_steps)
    steps, unit = frequency if isinstance(frequency, tuple) else (frequency, "step")
    if getattr(unit, "value", unit) != "step":
        raise ConfigurationError(
            f"algd.make: train_freq={frequency!r} counts episodes, so gradient_steps={gradient_steps} for each step "
            "cannot be kept. Give a number of steps, or leave it out."
        )
    return int(steps)
