"""States of oscillating weights: read from the tracker, fixed, and chosen by optimisation."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hf_oscqat import OscillationTracker, OscQATConfig, prepare_qat
from hf_oscqat.quantization.layers import quantized_layers
from hf_oscqat.studies.sampling import SamplingSettings, SoftChoice, choices, fix, optimise


@dataclass
class Output:
    logits: torch.Tensor


class Classifier(nn.Module):
    """Two classes from two inputs, by a layer of whole-number weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)

    def forward(self, pixel_values):
        return Output(self.layer(pixel_values))


class Batches:
    """Inputs whose class is right only where both weights of the diagonal are at their upper integer."""

    def training_batches(self, count, *, seed=0, labels=False):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            labels = torch.randint(2, (32,), generator=generator)
            yield {"pixel_values": nn.functional.one_hot(labels, 2).float(), "labels": labels}


@pytest.fixture
def oscillating(request):
    """The diagonal oscillates between 0 and 1, up in three of four steps; the rest is at 0."""
    scheme = getattr(request, "param", "symmetric")
    model = Classifier()
    prepare_qat(model, OscQATConfig(activation_bits=None, first_last_bits=4, weight_scheme=scheme))
    model.layer.weight_quantizer.set_range(torch.ones(1), None if scheme == "symmetric" else torch.tensor([5.0]))
    tracker = OscillationTracker(model, momentum=0.05)
    for step in range(200):
        up = 0.9 if step % 4 else 0.1
        with torch.no_grad():
            model.layer.latent_weight.copy_(torch.tensor([[up, 0.1], [0.1, up]]))
        tracker.tick(threshold=0.999)
    return model, tracker


def test_states_are_those_the_weight_was_seen_in(oscillating):
    _, tracker = oscillating
    choice = choices(tracker, 0.005)["layer"]
    assert choice.mask.tolist() == [[True, False], [False, True]]
    assert choice.lower.tolist() == [0, 0]
    torch.testing.assert_close(choice.probability, torch.full((2,), 0.75), atol=0.06, rtol=0)


@pytest.mark.parametrize("upper", [[True, False], [False, False], [True, True]])
def test_fixed_weights_take_the_chosen_integers_and_no_others_move(oscillating, upper):
    model, tracker = oscillating
    fix(tracker, choices(tracker, 0.005), [torch.tensor(upper)])
    assert model.layer.weight.tolist() == [[float(upper[0]), 0.0], [0.0, float(upper[1])]]


@pytest.mark.parametrize("oscillating", ["symmetric", "asymmetric"], indirect=True)
def test_soft_choice_at_its_ends_is_the_fixed_choice(oscillating):
    model, tracker = oscillating
    choice = choices(tracker, 0.005)["layer"]
    quantizer = model.layer.weight_quantizer
    with torch.no_grad():
        quantizer.scale.fill_(0.3)
        model.layer.latent_weight.mul_(0.3)
    soft = SoftChoice(quantizer, model.layer.latent_weight, choice)
    with torch.no_grad():
        soft.logit.copy_(torch.tensor([20.0, -20.0]))
    fix(tracker, {"layer": choice}, [torch.tensor([True, False])])
    torch.testing.assert_close(soft(model.layer.latent_weight), model.layer.weight)


def test_soft_choice_starts_where_the_weight_spent_its_time(oscillating):
    model, tracker = oscillating
    choice = choices(tracker, 0.005)["layer"]
    soft = SoftChoice(model.layer.weight_quantizer, model.layer.latent_weight, choice)
    torch.testing.assert_close(soft.position().detach(), choice.probability)
    soft(model.layer.latent_weight).sum().backward()
    assert bool((soft.logit.grad > 0).all())


def test_optimisation_finds_the_better_states_and_leaves_the_model_alone(oscillating):
    model, tracker = oscillating
    states = choices(tracker, 0.005)
    states["layer"].probability.fill_(0.4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = optimise(model, states, Batches(), SamplingSettings(optimization_steps=100))
    assert [c.tolist() for c in chosen] == [[True, True]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.weight_quantizer is not None for _, layer in quantized_layers(model))
