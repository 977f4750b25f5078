"""ALGD in numpy and float64, written from its equations, with derivatives by hand: what its tests hold it against.

Nothing here is taken from the package. ``n`` rows of ``a`` action dimensions, ``N`` Monte-Carlo samples, ``M``
cost critics. Rows of arrays are samples, as in the package.
"""

import math

import numpy as np


def relu(x):
    return np.maximum(x, 0.0), (x > 0.0).astype(np.float64)


def silu(x):
    gate = 1.0 / (1.0 + np.exp(-x))
    return x * gate, gate * (1.0 + x * (1.0 - gate))


class MLP:
    """A perceptron with one output, and its derivative by its inputs.

    Args:
        layers: pairs of a weight ``(n_in, n_out)`` and a bias ``(n_out,)``.
        activation: `relu` or `silu`, of every layer but the last.
    """

    def __init__(self, layers, activation):
        self.layers = [(np.asarray(weight, np.float64), np.asarray(bias, np.float64)) for weight, bias in layers]
        self.activation = activation

    def __call__(self, inputs):
        """Return the outputs ``(n,)`` and their derivatives ``(n, n_in)``."""
        hidden, slopes = np.asarray(inputs, np.float64), []
        for index, (weight, bias) in enumerate(self.layers):
            hidden = hidden @ weight + bias
            if index < len(self.layers) - 1:
                hidden, slope = self.activation(hidden)
                slopes.append(slope)
        back = np.ones((len(hidden), 1)) @ self.layers[-1][0].T
        for (weight, _), slope in zip(self.layers[-2::-1], slopes[::-1], strict=True):
            back = (back * slope) @ weight.T
        return hidden[:, 0], back


def evaluate(networks, observations, actions):
    """Return values ``(networks, n)`` and derivatives by the actions ``(networks, n, a)`` of several networks."""
    inputs = np.concatenate([observations, actions], axis=1)
    values, slopes = zip(*(network(inputs) for network in networks), strict=True)
    return np.stack(values), np.stack(slopes)[:, :, observations.shape[1] :]


def penalty(violation, multiplier, rho):
    """ψ(g) = ([λ + ρ g]₊² - λ²) / 2ρ, and λ g for ρ = 0; with its derivative."""
    if rho == 0.0:
        return multiplier * violation, np.full_like(violation, multiplier)
    effective = np.maximum(multiplier + rho * violation, 0.0)
    return (effective**2 - multiplier**2) / (2.0 * rho), effective


def risk(costs, slopes, kappa):
    """Q̄_c = mean + κ · standard deviation over the members, whose number it is divided by; with its derivative."""
    mean, spread = costs.mean(axis=0), costs.std(axis=0)
    apart = (costs - mean) / (len(costs) * spread)
    return mean + kappa * spread, slopes.mean(axis=0) + kappa * np.einsum("mn,mna->na", apart, slopes)


def energy(rewards, reward_slopes, costs, cost_slopes, *, limit, multiplier, rho, kappa=1.0):
    """L_A = -min_j Q_j + ψ(Q̄_c - h), ``(n,)``, and its derivative by the actions, ``(n, a)``."""
    least = rewards.argmin(axis=0)
    rows = np.arange(rewards.shape[1])
    doubt, doubt_slopes = risk(costs, cost_slopes, kappa)
    value, effective = penalty(doubt - limit, multiplier, rho)
    return value - rewards[least, rows], effective[:, None] * doubt_slopes - reward_slopes[least, rows]


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=0))
    return weights / weights.sum(axis=0)


def score_target(energies, gradients, beta):
    """φ* = -(1/β) Σ w_i ∇L_A(a_i), w = softmax(-L_A / β), over the first axis: ``(N, n)`` and ``(N, n, a)``."""
    return -np.einsum("in,ina->na", softmax(-energies / beta), gradients) / beta


def ve_sigmas(steps, least=0.01, greatest=1.0):
    """σ_0 ... σ_{K-1}, geometric."""
    return least * (greatest / least) ** (np.arange(steps) / (steps - 1))


def ve_step(latent, score, sigmas, t, noise):
    """x_{t-1} = x_t + Δσ²_t φ + √Δσ²_t ε with Δσ²_t = σ²_t - σ²_{t-1} and σ_{-1} = 0, without ε for the last, t = 0."""
    variance = sigmas[t] ** 2 - (sigmas[t - 1] ** 2 if t else 0.0)
    return latent + variance * score + (math.sqrt(variance) * noise if t else 0.0)


class DDPM:
    """β_0 ... β_{K-1} linear, α = 1 - β, ᾱ their running product."""

    def __init__(self, steps, least=1e-4, greatest=0.02):
        self.betas = np.linspace(least, greatest, steps)
        self.bars = np.cumprod(1.0 - self.betas)

    def posterior(self, latent, clean, t):
        """Return mean and standard deviation of q(x_{t-1} | x_t, x_0): Bayes, where the precisions add."""
        beta = self.betas[t]
        if t == 0:
            return clean, 0.0
        before = self.bars[t - 1]
        precision = 1.0 / (1.0 - before) + (1.0 - beta) / beta
        pull = math.sqrt(before) * clean / (1.0 - before) + math.sqrt(1.0 - beta) * latent / beta
        return pull / precision, precision**-0.5

    def step(self, latent, score, noise_expected, t, noise, guidance=0.05):
        """The posterior of x̂_0 = (x_t - √(1-ᾱ) ε̂) / √ᾱ, its mean shifted by a step of fixed length along φ."""
        bar = self.bars[t]
        clean = (latent - math.sqrt(1.0 - bar) * noise_expected) / math.sqrt(bar)
        mean, deviation = self.posterior(latent, clean, t)
        return mean + guidance * score / np.linalg.norm(score, axis=-1, keepdims=True) + deviation * noise


def multipliers(violations, *, initial, rate, beta1=0.9, beta2=0.999):
    """λ after each violation v = Q̄_c - h: Adam on ln λ of the loss -λ v, whose derivative by ln λ is itself."""
    log, first, second, values = math.log(initial), 0.0, 0.0, []
    for step, violation in enumerate(violations, start=1):
        gradient = -math.exp(log) * violation
        first = beta1 * first + (1.0 - beta1) * gradient
        second = beta2 * second + (1.0 - beta2) * gradient**2
        log -= rate * (first / (1.0 - beta1**step)) / (math.sqrt(second / (1.0 - beta2**step)) + 1e-8)
        values.append(math.exp(log))
    return values


def reward_targets(rewards, terminated, gamma, following):
    """y = r + γ (1 - terminated) min_j Q'_j(s', a'), with Q' ``(2, n)``; a time limit does not terminate."""
    return rewards + gamma * (1.0 - terminated) * following.min(axis=0)


def cost_targets(costs, terminated, gamma, following, greatest):
    """y_i = c + γ_c (1 - terminated) Q'_i(s', a'), ``(M, n)``: each member follows its own target.

    Costs lie between 0 and ``greatest``, so what follows lies between 0 and ``greatest`` / (1 - γ).
    """
    return costs + gamma * (1.0 - terminated) * np.clip(following, 0.0, greatest / (1.0 - gamma))
