"""What a gradient step of ALGD costs: updates per second against the processor's matrix rate, part by part.

    OMP_NUM_THREADS=1 python benchmarks/overhead_algd.py            # one thread
    OMP_NUM_THREADS=2 python benchmarks/overhead_algd.py --threads 2

Hopper's shapes (11 observations, 3 actions), batch 256, two critics and four cost critics of 2 x 256, score network
of 3 x 128, K = 5, N = 4. Everything is measured in one process by turns, and the least of many short turns counts,
so that other programs on the machine matter little. With one thread the time is that of the thread, with more the
clock's. ``written out`` is the same method as one would write it down: each network on its own, gradients of
everything autograd can reach, one batch of all samples, evaluated anew for the dual.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import gymnasium as gym
import torch
from torch import nn

from guardrails.critic import Transitions
from guardrails_sb3 import algd, safety_critic
from guardrails_sb3.wrap import attachment_of

BATCH, OBSERVATIONS, ACTIONS, STEPS, SAMPLES, EMBEDDED = 256, 11, 3, 5, 4, 16
CRITIC, SCORE, CRITICS, MEMBERS = (256, 256), (128, 128, 128), 2, 4


class SpeedCost(gym.Wrapper):
    """Hopper whose cost is its speed."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info | {"cost": abs(info["x_velocity"])}


def products(inputs: int, hidden: tuple[int, ...], outputs: int) -> tuple[int, int]:
    """Return multiplications per row of a perceptron, forward, and of those the ones above its first layer."""
    sizes = [inputs, *hidden, outputs]
    each = [a * b for a, b in pairwise(sizes)]
    return sum(each), sum(each[1:])


def counted() -> dict[str, float]:
    """Return GFLOP of each part of one update, nothing computed twice and no gradient that is not used.

    Backward, the inputs of a layer cost as much as it does forward, and so do its weights; of a frozen critic's first
    layer the actions alone are followed.
    """
    critic, above = products(OBSERVATIONS + ACTIONS, CRITIC, 1)
    to_action = above + ACTIONS * CRITIC[0]
    actor, inside = products(OBSERVATIONS + ACTIONS + EMBEDDED, SCORE, ACTIONS)
    first = actor - inside
    path = STEPS * (inside + ACTIONS * SCORE[0]) + first  # the state's share of the first layer is computed once
    every = CRITICS + MEMBERS
    parts = {
        "actions and next actions": 2 * path,
        "critics and cost critics learn": every * (3 * critic + above),
        "energy of the actions": every * (critic + to_action),
        "actor's gradient": 2 * path,
        "energies about the path": SAMPLES * every * (critic + to_action),
        "score loss": 3 * actor,
    }
    return {name: 2.0 * BATCH * count / 1e9 for name, count in parts.items()}


class WrittenOut:
    """ALGD with a variance-exploding diffusion, straight from its equations."""

    def __init__(self) -> None:
        def perceptron(inputs, hidden, outputs, activation):
            sizes, layers = [inputs, *hidden], []
            for n_in, n_out in zip(sizes, hidden, strict=False):
                layers += [nn.Linear(n_in, n_out), activation()]
            return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))

        width = OBSERVATIONS + ACTIONS
        self.critics, self.targets = (
            nn.ModuleList(perceptron(width, CRITIC, 1, nn.ReLU) for _ in range(CRITICS)) for _ in range(2)
        )
        self.weights, self.biases, self.weights_target, self.biases_target = [], [], [], []
        for n_in, n_out in ((width, 256), (256, 256), (256, 1)):
            for weights, biases in ((self.weights, self.biases), (self.weights_target, self.biases_target)):
                weights.append((torch.randn(MEMBERS, n_in, n_out) / (2 * n_in**0.5)).requires_grad_())
                biases.append(torch.zeros(MEMBERS, 1, n_out).requires_grad_())
        self.embedding, self.score = (
            nn.Embedding(STEPS, EMBEDDED),
            perceptron(width + EMBEDDED, SCORE, ACTIONS, nn.ReLU),
        )
        actor = [*self.score.parameters(), *self.embedding.parameters()]
        groups = (actor, self.critics.parameters(), [*self.weights, *self.biases])
        self.optimizers = [torch.optim.Adam(group, lr=3e-4) for group in groups]
        self.log_lambda = torch.tensor(-0.3667, requires_grad=True)
        self.optimizers.append(torch.optim.Adam([self.log_lambda], lr=3e-4))
        self.sigmas = torch.tensor(algd.ve_schedule(STEPS).sigmas)
        squares = self.sigmas**2
        self.increments = squares - torch.cat([torch.zeros(1), squares[:-1]])

    def phi(self, states, actions, t):
        return self.score(torch.cat([states, actions, self.embedding(t)], dim=1))

    def sample(self, states):
        x = torch.randn(len(states), ACTIONS) * self.sigmas[-1]
        chosen, visited = torch.randint(STEPS, (len(states),)), torch.zeros(len(states), ACTIONS)
        for t in reversed(range(STEPS)):
            x = x + self.increments[t] * self.phi(states, torch.tanh(x), torch.full((len(states),), t))
            if t:
                x = x + self.increments[t].sqrt() * torch.randn_like(x)
            visited = torch.where((chosen == t).unsqueeze(1), torch.tanh(x), visited)
        return torch.tanh(x), visited, chosen

    def ensemble(self, inputs, weights, biases):
        hidden = inputs[None].repeat(MEMBERS, 1, 1)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = (nn.functional.silu(hidden) if index else hidden).bmm(weight) + bias
        return hidden

    def risk(self, inputs):
        deviation, mean = torch.std_mean(self.ensemble(inputs, self.weights, self.biases), dim=0)
        return mean + deviation

    def energy(self, states, actions):
        inputs, lam = torch.cat([states, actions], dim=1), self.log_lambda.exp().detach()
        value = torch.min(*(critic(inputs) for critic in self.critics))
        return -value + ((lam + self.risk(inputs) - 5.0).clamp(min=0.0) ** 2 - lam**2) / 2.0

    def step(self, index, loss):
        self.optimizers[index].zero_grad()
        loss.backward()
        self.optimizers[index].step()

    def update(self, states, actions, rewards, costs, following):
        next_actions, _, _ = self.sample(following)
        inputs, next_inputs = torch.cat([states, actions], dim=1), torch.cat([following, next_actions], dim=1)
        with torch.no_grad():
            wanted = rewards + 0.99 * torch.min(*(target(next_inputs) for target in self.targets))
            wanted_costs = costs + 0.99 * self.ensemble(next_inputs, self.weights_target, self.biases_target)
        self.step(1, sum(nn.functional.mse_loss(critic(inputs), wanted) for critic in self.critics))
        learned = self.ensemble(inputs, self.weights, self.biases)
        self.step(2, nn.functional.mse_loss(learned, wanted_costs))
        ends, visited, t = self.sample(states)
        loss = self.energy(states, ends).mean()
        spread = self.sigmas[t].view(-1, 1, 1) * torch.randn(BATCH, SAMPLES, ACTIONS)
        about = (visited.unsqueeze(1) + spread).detach().view(-1, ACTIONS).requires_grad_()
        energies = self.energy(states.repeat_interleave(SAMPLES, dim=0), about)
        (slopes,) = torch.autograd.grad(energies.sum(), about)
        shares = torch.softmax(-energies.detach().view(BATCH, SAMPLES, 1), dim=1)
        target = -(shares * slopes.view(BATCH, SAMPLES, ACTIONS)).sum(dim=1)
        self.step(0, loss + 0.1 * nn.functional.mse_loss(self.phi(states, visited, t), target))
        with torch.no_grad():
            risk = self.risk(inputs)
            online = [*self.critics.parameters(), *self.weights, *self.biases]
            delayed = [*self.targets.parameters(), *self.weights_target, *self.biases_target]
            for own, other in zip(delayed, online, strict=True):
                own.copy_(0.995 * own + 0.005 * other)
        self.step(3, (self.log_lambda.exp() * (5.0 - risk)).mean())


class Turns:
    """The least time of each of several functions, called by turns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.functions: dict[str, tuple[Callable[[], object], int]] = {}

    def add(self, name: str, function: Callable[[], object], per_call: int = 1) -> None:
        self.functions[name] = function, per_call

    def take(self, rounds: int) -> dict[str, float]:
        least = dict.fromkeys(self.functions, float("inf"))
        for _ in range(rounds):
            for name, (function, per_call) in self.functions.items():
                start = self.clock()
                function()
                least[name] = min(least[name], (self.clock() - start) / per_call)
        return least


def model_of(sde: str):
    """Return a guarded model that has stepped a little; its limit is so low that every row has a penalty to follow."""
    model = algd.make(
        SpeedCost(gym.make("Hopper-v5")), cost_limit=0.05, discounted=True, sde=sde, gradient_steps=1, seed=0,
        learning_starts=600, policy_kwargs={"score_matching": algd.ScoreMatching(beta=1e6)},
    )  # fmt: skip
    return model.learn(700)


def add_parts(turns: Turns, model) -> None:
    callback = attachment_of(model).callback
    learner, critic, seams = callback.critic, safety_critic(model).critic, callback.critic._seams
    with learner.training():
        model.replay_buffer.sample(BATCH)
        samples, costs = learner._batch
    drawn, _ = model.actor.action_log_prob(samples.observations)
    following = drawn.detach()
    batch = Transitions(
        samples.observations, samples.actions, costs, samples.next_observations, following, samples.dones, 0.99
    )

    def training(part):
        with learner.training():
            learner._batch = samples, costs
            part()

    def both_samplings():
        with torch.no_grad():
            model.actor.action_log_prob(samples.next_observations)
        model.actor.action_log_prob(samples.observations)[0].sum().backward()

    def critics():
        values = model.critic(samples.observations, samples.actions)
        sum(each.square().mean() for each in values).backward()

    def energy():
        torch.cat(model.critic(samples.observations, following.clone().requires_grad_()), dim=1).amin(
            1
        ).mean().backward()

    turns.add("  actions, next actions, actor's gradient", both_samplings)
    turns.add("  critics learn (without optimizer and target)", critics)
    turns.add("  cost critics learn", lambda: critic.update(batch))
    turns.add("  energy of the actions, and its gradient", lambda: training(energy))
    turns.add("  score loss", lambda: training(lambda: seams._guide(model.actor.optimizer, (), {})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    turns = Turns(clock)
    left, right = torch.randn(MEMBERS, BATCH, 256), torch.randn(MEMBERS, 256, 256)
    turns.add("matrix products", lambda: torch.bmm(left, right))
    models = {sde: model_of(sde) for sde in ("ve", "ddpm")}
    written, batch = WrittenOut(), BATCH
    rows = [torch.randn(batch, n) for n in (OBSERVATIONS, ACTIONS, 1, 1, OBSERVATIONS)]
    for sde, model in models.items():
        turns.add(f"update, {sde}", lambda model=model: model.train(2, BATCH), 2)
    turns.add("update, ve, written out", lambda: written.update(*rows))
    add_parts(turns, models["ve"])
    observation = models["ve"].observation_space.sample()
    for sde, model in models.items():
        turns.add(f"an action, {sde}", lambda model=model: [model.predict(observation) for _ in range(10)], 10)
    times = turns.take(arguments.rounds)
    rate = 2.0 * MEMBERS * BATCH * 256 * 256 / times.pop("matrix products") / 1e9
    floor = sum(counted().values())
    print(f"{arguments.threads} thread(s); matrix rate {rate:.1f} GFLOP/s")
    for name, work in counted().items():
        print(f"  {name:<32} {work:6.3f} GFLOP")
    print(f"  {'an update':<32} {floor:6.3f} GFLOP: at best {rate / floor:.1f} per second")
    for name, seconds in times.items():
        each = (
            f"  {1.0 / seconds:6.1f} per second, {floor / seconds / rate:.0%} of the rate" if "update" in name else ""
        )
        print(f"{name:<46} {seconds * 1e3:8.3f} ms{each}")


if __name__ == "__main__":
    main()
