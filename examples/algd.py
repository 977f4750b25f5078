"""ALGD on Hopper: a diffusion policy in Stable-Baselines3's own SAC, its speed bounded.

    python examples/algd.py --steps 20000

The cost of a step is the speed |v|; 82.748 is the limit of the paper (arXiv 2602.02924) on its discounted sum.
"""

import argparse

import gymnasium as gym

from guardrails_sb3 import algd, evaluate_guarded


class SpeedCost(gym.Wrapper):
    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info | {"cost": abs(info["x_velocity"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--limit", type=float, default=82.748, help="of the discounted sum of costs")
    parser.add_argument("--sde", choices=["ve", "ddpm"], default="ve")
    arguments = parser.parse_args()
    env, judged = SpeedCost(gym.make("Hopper-v5")), SpeedCost(gym.make("Hopper-v5"))
    model = algd.make(
        env, cost_limit=arguments.limit, discounted=True, sde=arguments.sde, gradient_steps=1, seed=0, verbose=1
    )
    model.learn(arguments.steps, log_interval=10)
    print(evaluate_guarded(model, judged, n_episodes=10))
    model.save("algd_hopper")


if __name__ == "__main__":
    main()
