"""What the term promises, with exact gradients: every output of a small policy is enumerated, in float64.

E_y~π[∇ -log π(y⁺)] is zero where every output with mass is faultless, and grows with the share of faults.
"""

import itertools
import math

import pytest
import torch

from guardrails.refine import Acceptance, Always, Corrector, FunctionRefiner, Predicate, Rows

LETTERS = "abcx"
"""An output is three letters; x is a fault."""

OUTPUTS = ["".join(word) for word in itertools.product(LETTERS, repeat=3)]
FAULTY = torch.tensor(["x" in word for word in OUTPUTS])
EXACT = 1e-12  # sums of 64 float64 terms of size one


def oracle(prompt, completion):
    """Correct exactly what is wrong: a fault becomes the letter that belongs in its place."""
    return "".join(right if letter == "x" else letter for letter, right in zip(completion, "abc", strict=True))


def targets(when=None):
    """y⁺ of every output, by the code under test."""
    corrector = Corrector(FunctionRefiner(oracle), when or Always(), Acceptance(sound=None))
    return corrector.correct(Rows(prompts=["Spell"] * len(OUTPUTS), completions=OUTPUTS)).targets


class Table:
    """A softmax over all 64 outputs, its logits free."""

    def __init__(self, seed):
        self.parameter = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def with_faults(self, share):
        """Return log-probabilities with this share of the mass on faulty outputs, the rest as it was."""
        logits = self.parameter.clone()
        for mask, mass in ((FAULTY, share), (~FAULTY, 1.0 - share)):
            # log 0 would make 0 · ∞ of a gradient; 1e-300 is no mass that float64 sees beside 1
            logits[mask] += math.log(max(mass, 1e-300)) - logits[mask].logsumexp(0)
        return logits.requires_grad_()

    @staticmethod
    def log_probs(parameter):
        return parameter.log_softmax(0)


class Autoregressive(Table):
    """A letter at a time, each given the one before it; the logit of a fault sets its share."""

    def __init__(self, seed):
        self.parameter = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def with_faults(self, share):
        """Return logits with this share of faults at every position."""
        logits = self.parameter.clone()
        good = logits[:, :3].logsumexp(1)
        logits[:, 3] = good + torch.logit(torch.tensor(share, dtype=torch.float64), eps=1e-300)
        return logits.requires_grad_()

    @staticmethod
    def log_probs(parameter):
        steps, places = parameter.log_softmax(1), {letter: i for i, letter in enumerate(LETTERS)}
        return torch.stack(
            [sum(steps[places[word[i - 1]] if i else 4, places[word[i]]] for i in range(3)) for word in OUTPUTS]
        )


def gradient(policy, parameter, corrected):
    """E_y~π[∇ -log π(y⁺)], the outputs weighed by the probabilities they have."""
    log_probs = policy.log_probs(parameter)
    place = {word: i for i, word in enumerate(OUTPUTS)}
    terms = [
        log_probs[row].detach().exp() * -log_probs[place[word]]
        for row, word in enumerate(corrected)
        if word is not None
    ]
    (result,) = torch.autograd.grad(sum(terms), parameter)
    return result


@pytest.mark.parametrize("policy", [Table(0), Table(1), Autoregressive(0), Autoregressive(1)])
def test_the_terms_gradient_is_zero_where_nothing_is_wrong(policy):
    parameter = policy.with_faults(0.0)
    log_probs = policy.log_probs(parameter)
    assert log_probs.exp()[FAULTY].sum() < EXACT
    assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=EXACT)
    assert gradient(policy, parameter, targets()).abs().max() < EXACT
    single = torch.autograd.grad(-policy.log_probs(parameter)[OUTPUTS.index("abc")], parameter)[0]
    assert single.abs().max() > 0.1  # of a single output it is not: zero is the mean


@pytest.mark.parametrize("seed", range(3))
def test_of_a_table_it_grows_in_proportion_to_the_share_of_faults(seed):
    policy = Table(seed)
    shares = [0.001, 0.01, 0.1, 0.3, 0.6, 0.9]
    norms = [gradient(policy, policy.with_faults(share), targets()).norm().item() for share in shares]
    for share, norm in zip(shares, norms, strict=True):
        assert norm / norms[-1] == pytest.approx(share / 0.9, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_of_an_autoregressive_policy_it_grows_with_the_share_of_faults(seed):
    policy = Autoregressive(seed)
    norms = [
        gradient(policy, policy.with_faults(share), targets()).norm().item() for share in (1e-6, 0.001, 0.01, 0.1, 0.3)
    ]
    assert norms == sorted(norms)
    assert norms[0] < 1e-5
    assert norms[-1] > 100 * norms[1]


@pytest.mark.parametrize("policy", [Table(2), Autoregressive(2)])
def test_a_step_against_it_takes_mass_from_faulty_outputs(policy):
    parameter = policy.with_faults(0.3)
    before = policy.log_probs(parameter).exp()[FAULTY].sum()
    step = gradient(policy, parameter, targets())
    after = policy.log_probs((parameter - 0.1 * step).detach()).exp()[FAULTY].sum()
    assert after < before


def test_a_detector_of_the_faults_gives_a_push_towards_the_corrections_only():
    policy = Table(3)
    found = Predicate(lambda prompt, completion: "x" in completion)
    assert [word for word in targets(found) if word is not None] == [
        oracle("", word) for word in OUTPUTS if "x" in word
    ]
    faultless = gradient(policy, policy.with_faults(0.0), targets(found))
    assert faultless.abs().max() < EXACT
