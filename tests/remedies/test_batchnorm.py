"""Batch-norm re-estimation: the average over batches, and everything else left as it was."""

import pytest
import timm
import torch
from torch import nn

from hf_oscqat import OscillationTracker, reestimate_batchnorm
from hf_oscqat.remedies.batchnorm import batchnorm_layers


def spoiled():
    """A model with two batch norms whose statistics are wrong, in evaluation mode but for a part."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(4))
    for layer in (model[1], model[3]):
        nn.init.constant_(layer.running_mean, 50.0)
        nn.init.constant_(layer.running_var, 7.0)
        layer.num_batches_tracked.fill_(11)
    return model


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


@pytest.fixture
def batches():
    return [torch.randn(size, 3, 4, 4) * size for size in (2, 5, 3)]


def test_statistics_are_the_average_over_batches(batches):
    model = spoiled()
    reestimate_batchnorm(model, batches)
    with torch.no_grad():
        seen = [model[0](batch) for batch in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)


def test_total_variance_is_that_of_all_images_at_once(batches):
    model = spoiled()
    reestimate_batchnorm(model, batches, total_variance=True)
    with torch.no_grad():
        together = torch.cat([model[0](batch) for batch in batches])
    torch.testing.assert_close(model[1].running_mean, together.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, together.var((0, 2, 3)))


def test_total_variance_adds_that_between_batches():
    batches = [torch.randn(8, 3, 4, 4) + shift for shift in (-3.0, 3.0)]
    within, total = spoiled(), spoiled()
    total.load_state_dict(within.state_dict())
    reestimate_batchnorm(within, batches)
    reestimate_batchnorm(total, batches, total_variance=True)
    torch.testing.assert_close(within[1].running_mean, total[1].running_mean)
    assert bool((total[1].running_var > within[1].running_var).all())


def test_layer_that_is_called_twice_counts_both_calls():
    layer = nn.BatchNorm2d(2)
    first, second = torch.randn(4, 2, 3, 3), 5 + torch.randn(4, 2, 3, 3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + self.layer(second)

    reestimate_batchnorm(Twice(), [first], total_variance=True)
    torch.testing.assert_close(layer.running_mean, torch.cat([first, second]).mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, torch.cat([first, second]).var((0, 2, 3)))


def test_layer_that_the_forward_does_not_reach_keeps_its_statistics(batches):
    model = spoiled()
    model[0].unused = nn.BatchNorm2d(4)
    nn.init.constant_(model[0].unused.running_mean, 3.0)
    reestimate_batchnorm(model, batches)
    assert model[0].unused.running_mean.tolist() == [3.0] * 4
    assert model[0].unused.running_var.tolist() == [1.0] * 4
    assert model[1].running_mean.abs().max() < 10


def test_nothing_is_left_hooked_to_the_layers(batches):
    model = spoiled()
    reestimate_batchnorm(model, batches)
    assert not any(module._forward_hooks for module in model.modules())


class Remembering(nn.Module):
    """Caches in evaluation mode, as timm's attentions do with their biases."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))
        self.kept = None

    def train(self, mode=True):
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x + self.bias
        self.kept = self.bias * 1 if self.kept is None else self.kept
        return x * self.kept


@pytest.mark.parametrize("training", [True, False])
def test_model_trains_on_after_it(batches, training):
    # Tensors of inference mode, were any left, could not be saved for backward.
    model = nn.Sequential(spoiled(), Remembering()).train(training)
    reestimate_batchnorm(model, batches)
    assert not any(tensor.is_inference() for tensor in (*model.buffers(), *model.parameters()))
    model(batches[0]).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model[1].bias.item() != 1


def test_forward_is_in_inference_mode_and_what_the_data_keep_is_not():
    modes, images = [], []

    class Watching(nn.BatchNorm2d):
        def forward(self, x):
            modes.append(torch.is_inference_mode_enabled())
            return super().forward(x)

    def data():
        for _ in range(2):
            images.append(torch.randn(4, 3, 2, 2))
            yield images[-1]

    reestimate_batchnorm(nn.Sequential(Watching(3)), data())
    assert modes == [True, True]
    assert not any(image.is_inference() for image in images)


def test_within_autocast_gradients_reach_the_weights_afterwards(batches):
    # autocast keeps the casts of weights until it ends; one made without a gradient must not serve the next step.
    model = spoiled().train()
    with torch.autocast("cpu", torch.bfloat16):
        reestimate_batchnorm(model, batches)
        loss = model(batches[0]).float().square().mean()
    loss.backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_each_batch_is_read_and_run_once(batches):
    model, runs = spoiled(), []
    model[0].register_forward_hook(lambda *_: runs.append(1))
    reestimate_batchnorm(model, iter(batches))
    assert len(runs) == len(batches)


def test_later_layers_see_what_their_batch_normalized_is(batches):
    model = spoiled()
    reestimate_batchnorm(model, batches)
    with torch.no_grad():
        seen = [nn.functional.batch_norm(model[0](b), None, None, training=True) for b in batches]
    torch.testing.assert_close(model[3].running_mean, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(model[3].running_var, torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0))


def test_a_second_time_gives_the_same(batches):
    model = spoiled()
    reestimate_batchnorm(model, batches)
    first = statistics(model)
    reestimate_batchnorm(model, iter(batches))
    assert all(torch.equal(tensor, first[name]) for name, tensor in statistics(model).items())


@pytest.mark.parametrize("training", [True, False])
def test_modes_momentum_and_counters_are_left_as_they_were(batches, training):
    model = spoiled().train(training)
    model[2].train(not training)
    model[3].train(not training)
    reestimate_batchnorm(model, batches)
    assert [m.training for m in model.modules()] == [training, training, training, not training, not training]
    assert (model[1].momentum, model[3].momentum) == (0.3, 0.1)
    assert [layer.num_batches_tracked.item() for layer in (model[1], model[3])] == [11, 11]


def test_parameters_and_gradients_are_left_alone(batches):
    model = spoiled()
    before = [p.detach().clone() for p in model.parameters()]
    reestimate_batchnorm(model, batches)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_buffers_keep_their_identity(batches):
    model = spoiled()
    before = [id(b) for b in model.buffers()]
    reestimate_batchnorm(model, batches)
    assert [id(b) for b in model.buffers()] == before


def test_model_without_batchnorm_reads_no_batch():
    def never():
        raise AssertionError("read")
        yield

    reestimate_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), never())


def test_batchnorm_without_running_statistics_is_no_batchnorm_here():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    assert batchnorm_layers(model) == [model[1]]


def test_no_batches_is_an_error_and_the_old_statistics_are_back():
    model = spoiled()
    before = statistics(model)
    with pytest.raises(ValueError, match="got no batches for batch-norm re-estimation"):
        reestimate_batchnorm(model, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(model).items())


def test_after_an_error_of_the_data_everything_is_as_it_was(batches):
    def failing():
        yield batches[0]
        raise OSError("disk")

    model = spoiled().train()
    before = statistics(model)
    with pytest.raises(OSError, match="disk"):
        reestimate_batchnorm(model, failing())
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(model).items())
    assert all(m.training for m in model.modules())
    assert (model[1].momentum, model[3].momentum) == (0.3, 0.1)


def test_batch_of_another_type_is_an_error_and_the_old_statistics_are_back(batches):
    model = spoiled()
    before = statistics(model)
    with pytest.raises(TypeError, match="got a batch of type tuple, expected a tensor or a dict"):
        reestimate_batchnorm(model, [batches[0], (batches[1], 0)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(model).items())


def test_batches_may_be_dicts(make_wrapper, pixel_values):
    with_dicts, with_tensors = make_wrapper(), make_wrapper()
    reestimate_batchnorm(with_dicts, [{"pixel_values": pixel_values}])
    reestimate_batchnorm(with_tensors.timm_model, [pixel_values])
    theirs = statistics(with_tensors)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in statistics(with_dicts).items())


def test_every_batchnorm_of_a_timm_model_is_found_and_filled():
    model = timm.create_model("test_efficientnet", num_classes=2).eval()
    layers = batchnorm_layers(model)
    assert len(layers) == sum("running_mean" in name for name, _ in model.named_buffers())
    reestimate_batchnorm(model, [torch.randn(4, 3, 32, 32)])
    assert all(layer.running_mean.abs().sum() > 0 for layer in layers)


def test_prepared_model_is_estimated_with_its_quantized_weights(make_prepared, images):
    model = make_prepared(weight_bits=2, first_last_bits=2)
    tracker = OscillationTracker(model)
    reestimate_batchnorm(model, [images])
    with torch.no_grad():
        expected = model.stem(images).mean((0, 2, 3))
    torch.testing.assert_close(model.bn.running_mean, expected)
    assert tracker.oscillating_fraction == 0
