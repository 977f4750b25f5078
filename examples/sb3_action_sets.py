"""Train PPO on HalfCheetah within a box of actions that opens as it shows that it stays on its feet.

    python examples/sb3_action_sets.py --timesteps 150000

Needs `pip install training-guardrails[sb3] gymnasium[mujoco]`.
"""

import argparse
import math

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from guardrails import Gate, Guard, Require
from guardrails.competence import FailureAvoidance
from guardrails_sb3 import ActionBox, RateLimit, evaluate_guarded, wrap


class OnItsBack(gym.Wrapper):
    """Count in info["unsafe_steps"] the steps of an episode on which the cheetah lies on its back."""

    def reset(self, **kwargs):
        self.unsafe_steps = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.unsafe_steps += math.cos(observation[1]) < 0.0
        info["unsafe_steps"] = self.unsafe_steps
        return observation, reward, terminated, truncated, info


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default="", help="where to save the model, the guard's state included")
    args = parser.parse_args()

    env = make_vec_env("HalfCheetah-v5", n_envs=4, seed=args.seed, wrapper_class=OnItsBack)
    upright = FailureAvoidance(lambda info: info["unsafe_steps"] > 25)
    gate = Gate(Require(upright, at_least=0.8), rungs=4, dwell=16, confidence=0.9)
    guard = Guard(ActionBox(gate.between(0.3, 1.0)), RateLimit(1.0))
    model = wrap(PPO("MlpPolicy", env, n_steps=512, seed=args.seed, device="cpu", verbose=1), guard)
    model.learn(args.timesteps)

    print(guard.gates["gate"].text)
    judged = make_vec_env("HalfCheetah-v5", n_envs=4, seed=args.seed + 4, wrapper_class=OnItsBack)
    print(evaluate_guarded(model, judged, n_episodes=8))
    if args.save:
        model.save(args.save)


if __name__ == "__main__":
    main()
