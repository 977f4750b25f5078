"""Early termination: an episode ends once its cost has gone over the limit (Sun et al. 2021).

A baseline to compare guards with ("Safe Exploration by Solving Early Terminated MDP", arXiv 2107.04200):
no multiplier and no cost critic, only a shorter episode. It needs rewards that make long episodes
worth having.
"""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import gymnasium as gym

from guardrails import ConfigurationError, Constraint
from guardrails_sb3.costs import cost_reader
from guardrails_sb3.infos import of_vector


class EarlyTermination(gym.Wrapper[Any, Any, Any, Any]):
    """Terminates an episode at the step whose accumulated cost exceeds the constraint's limit.

    That step carries ``info["early_termination"] = True``. A step whose cost is NaN or infinite ends
    the episode too: what cannot be measured is not taken for safe.

    Args:
        env: the environment; its ``info`` gives the cost of a step.
        constraint: limit and source of the cost, as `wrap` reads them. Its scheduler is not used.
        terminal_reward: added to the reward of the step that is cut off; 0 or less.

    Raises:
        ConfigurationError: if the constraint is no fixed upper limit, or ``terminal_reward`` is positive or
            not finite.

    Example:
        >>> env = EarlyTermination(gym.make("Hopper-v5"), Constraint("cost", limit=25.0))  # doctest: +SKIP
        >>> PPO("MlpPolicy", env).learn(1_000_000)  # doctest: +SKIP
    """

    def __init__(self, env: gym.Env[Any, Any], constraint: Constraint, *, terminal_reward: float = 0.0) -> None:
        super().__init__(env)
        if constraint.sense != "<=":
            raise ConfigurationError(
                f"EarlyTermination: constraint '{constraint.name}' has sense '{constraint.sense}'. A running sum can "
                "only be held to an upper limit; give sense='<='."
            )
        if not isinstance(constraint.limit, float):
            raise ConfigurationError(
                f"EarlyTermination: constraint '{constraint.name}' has a limit that a gate moves. This baseline earns "
                "nothing; give a number."
            )
        if not math.isfinite(terminal_reward) or terminal_reward > 0.0:
            raise ConfigurationError(
                f"EarlyTermination: terminal_reward is {terminal_reward!r}; give a finite number of at most 0, or "
                "ending an episode would pay."
            )
        self.limit = constraint.limit
        self.terminal_reward = float(terminal_reward)
        self.accumulated = 0.0
        self._read = cost_reader(constraint)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset the environment and the sum of costs."""
        self.accumulated = 0.0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment, and end the episode if its cost has gone over the limit."""
        outcome = self.env.step(action)
        self.accumulated += self._read(of_vector(outcome))
        if self.accumulated <= self.limit:  # false for NaN
            return outcome
        observation, reward, _, truncated, info = outcome
        return observation, float(reward) + self.terminal_reward, True, truncated, {**info, "early_termination": True}
