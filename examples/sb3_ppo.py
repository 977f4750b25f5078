"""Train PPO on Hopper with a speed limit: at most 25 steps per episode faster than 0.7402 m/s.

    python examples/sb3_ppo.py --timesteps 150000

Needs `pip install training-guardrails[sb3] gymnasium[mujoco]`.
"""

import argparse

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from guardrails import Constraint, Guard
from guardrails_sb3 import wrap


class SpeedCost(gym.Wrapper):
    """Report a cost of 1 in info["cost"] for every step faster than ``limit`` metres per second."""

    def __init__(self, env, limit):
        super().__init__(env)
        self.limit = limit

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["cost"] = float(info["x_velocity"] > self.limit)
        return observation, reward, terminated, truncated, info


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default="", help="where to save the model, the guard's state included")
    args = parser.parse_args()

    env = make_vec_env("Hopper-v5", n_envs=4, seed=args.seed, wrapper_class=SpeedCost, wrapper_kwargs={"limit": 0.7402})
    guard = Guard(Constraint("cost", limit=25.0))
    model = wrap(PPO("MlpPolicy", env, n_steps=512, seed=args.seed, device="cpu", verbose=1), guard)
    model.learn(args.timesteps)

    print(guard.decision.explain())
    if args.save:
        model.save(args.save)


if __name__ == "__main__":
    main()
