"""What the augmentation buys: a bandit of two dimensions whose plain Lagrangian is not convex, by one command.

    python benchmarks/algd_bandit.py [--seeds 3]     # results/algd_bandit.md and .png, two minutes of CPU time

Six ridges lead out from the middle; reward rises to their outer ends. On three of them the cost passes the limit in a
steep step half way, so the best that is allowed is to stop there: three safe modes. The three others pay better and
cost more than the limit almost from the start. Along a safe ridge the plain Lagrangian of any multiplier is lowest
either short of the step or beyond it, never at it; the augmented one has its lowest point there.

The actor, its score loss and the multiplier are the package's own, with the exact reward and cost in place of critics.
The multiplier moves by Adam on its logarithm, on the cost of actions replayed from the last 200 batches, as ALGD's
does; so it learns late what it has done. The optimum is exp(-L_A), which is summed on a grid.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from guardrails import Constraint, Guard, Rollout
from guardrails.schedulers import AdamLogDual, Augmented
from guardrails_sb3.algd import energy, score_loss, score_target, ve_schedule
from guardrails_sb3.algd.actor import DiffusionActor

RESULTS = Path(__file__).parent / "results"
LIMIT, UNSAFE = 0.7, 1.0
"""Cost that is allowed, and that of an action which is clearly beyond the step."""

ANGLES = math.pi / 2 + math.pi / 3 * torch.arange(6)
RIDGES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
DEAR = torch.tensor([0.0, 1.0] * 3)
UPDATES, BATCH, MEMORY, SAMPLES, WEIGHT = 2_000, 128, 200, 8, 0.3
RHO = 50.0


def reward(actions):
    """Return a mixture of Gaussians at the ends of the ridges, its logarithm; those of the dear ridges are higher."""
    along = actions @ RIDGES.T
    across = actions.square().sum(dim=-1, keepdim=True) - along.square()
    return torch.logsumexp(-30.0 * ((along - 0.85).square() + across) + 4.0 * DEAR, dim=-1)


def cost(actions):
    """Return a steep step at radius 0.45 on a gentle slope; another at 0.2 on the dear ridges."""
    radius = actions.square().sum(dim=-1).add(1e-6).sqrt()
    dear = torch.softmax(20.0 * actions @ RIDGES.T, dim=-1) @ DEAR
    step = 0.8 * torch.sigmoid((radius - 0.45) / 0.06) + 0.4 * radius
    return step + dear * torch.sigmoid((radius - 0.2) / 0.05)


def ridge_of(actions):
    """Return the nearest ridge, 0 to 5; the even ones are safe."""
    return (actions @ RIDGES.T).argmax(dim=-1)


class Learner:
    """A diffusion policy of no state, guarded by an augmented or (``rho=0``) a plain Lagrangian."""

    def __init__(self, rho, seed):
        torch.manual_seed(seed)
        dual = AdamLogDual(1e-2, initial=3.0, maximum=40.0)
        scheduler = Augmented(dual, rho) if rho else dual
        self.guard = Guard(Constraint("cost", limit=LIMIT, scheduler=scheduler, scale=1.0))
        observed = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.actor = DiffusionActor(
            observed,
            spaces.Box(-1.0, 1.0, (2,), np.float32),
            [128, 128, 128],
            FlattenExtractor(observed),
            1,
            ve_schedule(5, sigma_min=0.1, sigma_max=0.3),
        )
        self.optimizer = torch.optim.Adam(self.actor.parameters(), 1e-3)
        self.spreads = torch.tensor(self.actor.schedule.spreads)
        self.memory = []

    def energy(self, actions):
        """Return L_A, or L, of actions ``(..., 2)``."""
        flat = actions.reshape(-1, 2)
        penalty = self.guard.penalty("cost", cost(flat))
        return energy(reward(flat)[None], penalty).view(actions.shape[:-1])

    def act(self, n):
        return self.actor(torch.zeros(n, 1))

    def update(self):
        """Take one step of the actor and one of the multiplier; return the actions that were taken."""
        actions = self.act(BATCH)
        path, rows = self.actor.path, torch.arange(BATCH)
        steps = torch.randint(len(self.spreads), (BATCH,))
        visited = path.actions[steps, rows]
        samples = visited + self.spreads[steps, None] * torch.randn(SAMPLES, BATCH, 2)
        samples.requires_grad_()
        energies = self.energy(samples)
        (slopes,) = torch.autograd.grad(energies.sum(), samples)
        scores = self.actor.scores(path.observations, visited, steps)
        loss = self.energy(actions).mean() + WEIGHT * score_loss(scores, score_target(energies.detach(), slopes))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        taken = actions.detach()
        self.memory = [*self.memory, cost(taken)][-MEMORY:]
        replayed = torch.cat(self.memory)[torch.randint(len(self.memory) * BATCH, (4 * BATCH,))]
        self.guard.step(Rollout(costs={"cost": replayed.double().numpy()}))
        return taken

    @property
    def multiplier(self):
        """λ, without the penalty's share."""
        state = self.guard.state_dict()["constraints"]["cost"]["state"]
        return state["inner"]["multiplier"] if "inner" in state else state["multiplier"]


def optimum(learner, n=301):
    """Return exp(-L_A) of the multiplier in force on a grid of n x n actions, as (actions, probabilities)."""
    axis = torch.linspace(-1.0, 1.0, n)
    actions = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    return actions, torch.softmax(-learner.energy(actions).flatten(), dim=0).view(n, n)


def shares(actions, weights):
    """Return the share of unsafe actions, and that of each ridge in the others; ``weights`` sum to 1."""
    unsafe = cost(actions) > UNSAFE
    ridges = torch.bincount(ridge_of(actions)[~unsafe], weights[~unsafe], 6) / weights[~unsafe].sum().clamp(min=1e-9)
    return float(weights[unsafe].sum()), ridges.tolist()


def train(rho, seed, updates=UPDATES, every=UPDATES // 4):
    """Return the record of one run: its course, some of its actions, and its end beside the optimum."""
    learner, course, pictures = Learner(rho, seed), [], []
    begun = time.process_time()
    for update in range(1, updates + 1):
        taken = learner.update()
        course.append([learner.multiplier, float(cost(taken).mean()), float((cost(taken) > UNSAFE).float().mean())])
        if update % every == 0:
            with torch.no_grad():
                pictures.append(learner.act(1_000))
    course = np.array(course)
    late = course[updates // 2 :]
    unsafe, ridges = shares(pictures[-1], torch.full((1_000,), 1e-3))
    actions, odds = optimum(learner)
    best_unsafe, best_ridges = shares(actions.view(-1, 2), odds.flatten())
    return {
        "rho": rho, "seed": seed, "course": course, "pictures": pictures, "optimum": odds,
        "swing": late[:, 0].std(), "cost": late[:, 1].mean(), "cost_swing": late[:, 1].std(),
        "unsafe": late[:, 2].mean(), "safe ridges": ridges[::2], "last unsafe": unsafe,
        "optimum unsafe": best_unsafe, "optimum ridges": best_ridges[::2], "cpu_s": time.process_time() - begun,
    }  # fmt: skip


def table(runs):
    """Return the lines of a table."""
    rows = [
        "| Lagrangian | seed | swing of λ | mean cost | swing of the cost | unsafe actions | unsafe at the optimum "
        "| safe actions on the safe ridges | the same at the optimum |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    percent = lambda values: ", ".join(f"{value:.0%}" for value in values)  # noqa: E731
    for run in runs:
        kind = f"augmented, ρ = {run['rho']:g}" if run["rho"] else "plain"
        rows.append(
            f"| {kind} | {run['seed']} | {run['swing']:.2f} | {run['cost']:.2f} | {run['cost_swing']:.2f} "
            f"| {run['unsafe']:.0%} | {run['optimum unsafe']:.0%} | {percent(run['safe ridges'])} "
            f"| {percent(run['optimum ridges'])} |"
        )
    return rows


def picture(runs):
    """Draw landscape, optimum, actions and multiplier of one run of each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(runs), 6, figsize=(21, 3.6 * len(runs)))
    axis = torch.linspace(-1.0, 1.0, 301)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    for row, run in zip(axes, runs, strict=True):
        kind = "augmented" if run["rho"] else "plain"
        row[0].contourf(axis, axis, run["optimum"].clamp(min=1e-12).log().clamp(min=-16.0), 30)
        row[0].set_title(f"{kind}: -L at the last multiplier")
        for number, (panel, actions) in enumerate(zip(row[1:5], run["pictures"], strict=True), start=1):
            panel.contourf(axis, axis, reward(grid).clamp(min=-12.0), 20, cmap="Greys_r", alpha=0.6)
            beyond = (cost(actions) > UNSAFE).numpy()
            for chosen, colour in ((~beyond, "C0"), (beyond, "C3")):
                panel.plot(*actions.numpy()[chosen].T, ".", color=colour, markersize=2)
            panel.set_title(f"actions after {number * UPDATES // 4} updates")
        for panel in row[:5]:
            panel.contour(axis, axis, cost(grid), [LIMIT], colors="white", linewidths=1.2)
            panel.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[], aspect="equal")
        row[5].plot(run["course"][:, 0], label="λ")
        row[5].plot(10.0 * run["course"][:, 1], linewidth=0.7, label="10 x mean cost")
        row[5].axhline(10.0 * LIMIT, color="black", linestyle="--", linewidth=0.8)
        row[5].set(xlabel="update", ylim=(0, 42), title=f"swing of λ {run['swing']:.2f}, unsafe {run['unsafe']:.0%}")
    axes[0, 5].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "algd_bandit.png", dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [train(rho, seed) for rho in (RHO, 0.0) for seed in range(arguments.seeds)]
    picture([runs[0], runs[arguments.seeds]])
    lines = [
        "# Augmented and plain Lagrangian on a bandit",
        "",
        f"`python benchmarks/algd_bandit.py`: {UPDATES} updates, limit {LIMIT:g}; an action is unsafe if it costs more "
        f"than {UNSAFE:g}, which is beyond the step. Swings are standard deviations over the last half; the mean cost "
        "and the share of unsafe actions are means over it. The last two columns are the shares of the three safe "
        "ridges in those actions that are not unsafe, of the last policy and of exp(-L) at the last multiplier. A "
        "policy that also lowers its mean energy is colder than exp(-L): it has the same modes, and is less often "
        "beyond the step.",
        "",
        *table(runs),
        "",
        "![landscapes, actions and multipliers](algd_bandit.png)",
        "",
    ]
    (RESULTS / "algd_bandit.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
