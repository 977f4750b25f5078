"""What ALGD asks of critics: many actions at the same states, other activations, slower targets, estimates."""

import pytest
import torch
from torch import nn

from guardrails import ConfigurationError
from guardrails.critic import Ensemble, SafetyCritic, Transitions
from guardrails.critic.networks import EnsembleMLP


def rows(n, *sizes):
    return torch.randn(n, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.fixture(params=[("relu", (8,), 1), ("silu", (8, 8), 1), ("silu", (8, 5, 8), 3), ("relu", (6, 8), 2)], ids=str)
def perceptrons(request):
    activation, hidden, n_outputs = request.param
    torch.manual_seed(0)
    return EnsembleMLP(3, 5, n_outputs, hidden, activation).double()


def test_an_ensemble_is_its_members(perceptrons):
    inputs = rows(9, 5)
    activation = {"relu": torch.relu, "silu": nn.functional.silu}[perceptrons.activation]
    for member in range(3):
        hidden = inputs
        for index, (weight, bias) in enumerate(zip(perceptrons.weights, perceptrons.biases, strict=True)):
            hidden = (activation(hidden) if index else hidden) @ weight[member] + bias[member]
        assert torch.allclose(perceptrons(inputs)[member], hidden, atol=1e-12)


@pytest.mark.parametrize("sloping", [12, 5, 0])
def test_values_and_gradients_by_hand_are_those_of_autograd(perceptrons, sloping):
    """Also where so few rows have a slope that the others are left out."""
    leading, slopes = rows(12, 3), rows(12, 3, perceptrons.weights[-1].shape[-1]).transpose(0, 1).contiguous()
    slopes[:, sloping:] = 0.0
    held = perceptrons.at(leading)
    both = []
    for _ in range(2):  # several evaluations may be open at once
        inputs = rows(24, 2)[12 * len(both) : 12 * len(both) + 12].requires_grad_()
        both.append((inputs, held.evaluate(inputs.detach())))
    for inputs, evaluation in both:
        outputs = perceptrons(torch.cat([leading, inputs], dim=1))
        assert torch.allclose(evaluation.outputs, outputs, atol=1e-12)
        assert torch.allclose(held(inputs), outputs, atol=1e-12)
        (wanted,) = torch.autograd.grad((outputs * slopes).sum(), inputs)
        assert torch.allclose(evaluation.gradient(slopes), wanted, atol=1e-12)
        (through,) = torch.autograd.grad((held(inputs) * slopes).sum(), inputs)
        assert torch.allclose(through, wanted, atol=1e-12)
    assert all(each.grad is None for each in perceptrons.parameters())


def critic(**settings):
    torch.manual_seed(0)
    settings = Ensemble(**{"members": 3, "hidden": (8,)} | settings)
    return SafetyCritic(nn.Identity(), 2, 1, costs=["a", "b"], units=[1.0, 2.0], signs=[1.0, -1.0], settings=settings)


def transitions(n=6):
    torch.manual_seed(1)
    return Transitions(
        torch.randn(n, 2),
        torch.randn(n, 1),
        torch.rand(n, 2),
        torch.randn(n, 2),
        torch.randn(n, 1),
        torch.zeros(n, 1),
        0.9,
    )


def test_risks_at_held_observations_are_the_risks():
    own, batch = critic(activation="silu"), transitions()
    assert torch.allclose(own.risks_at(batch.observations)(batch.actions), own.risks(batch.observations, batch.actions))
    outputs = own.at(batch.observations).evaluate(batch.actions).outputs
    assert torch.allclose(own.risks_of(outputs), own.risks(batch.observations, batch.actions), atol=1e-6)


def test_a_target_of_interval_two_follows_at_every_second_update():
    own, moved = critic(target_interval=2), []
    for _ in range(4):
        before = [each.clone() for each in own.target.parameters()]
        own.update(transitions())
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, own.target.parameters(), strict=True)))
    assert moved == [True, False, True, False]


def test_estimates_are_the_mean_risks_of_the_batch_as_the_update_begins_and_leave_unknown_rows_out():
    own, batch = critic(), transitions()
    own.update(batch)
    assert own.take_estimates().shape == (0, 2)  # nobody has asked for them
    own.estimating = True
    batch.costs[2:] = float("nan")
    wanted = own.risks(batch.observations, batch.actions)[:2].mean(dim=0)
    own.update(batch)
    own.update(batch)
    taken = own.take_estimates()
    assert taken.shape == (2, 2)
    assert torch.allclose(taken[0], wanted, atol=1e-6)
    assert not torch.allclose(taken[1], wanted, atol=1e-6)
    assert own.take_estimates().shape == (0, 2)


def test_a_batch_of_which_no_cost_is_known_gives_no_estimate():
    """An estimate of 0 would be taken for one of no cost, and lower the multiplier."""
    own, known, unknown = critic(), transitions(), transitions()
    own.estimating = True
    unknown.costs[:] = float("nan")
    wanted = own.risks(known.observations, known.actions).mean(dim=0)
    for batch in (unknown, known, unknown):
        own.update(batch)
    assert torch.allclose(own.take_estimates(), wanted.unsqueeze(0), atol=1e-6)  # float32
    own.update(unknown)
    assert own.take_estimates().shape == (0, 2)


@pytest.mark.parametrize("settings", [{"activation": "tanh"}, {"target_interval": 0}, {"target_interval": 1.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        Ensemble(**settings)
