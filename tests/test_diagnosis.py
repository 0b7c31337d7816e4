"""What goes wrong with numbers is found, by name."""

import pytest
import torch
from torch import nn

from hf_oscqat import OscQATConfig, calibrate, dampening_loss, fake_quantize, prepare_qat
from hf_oscqat.diagnosis import dead_quantizers, not_finite, scales_at_minimum
from hf_oscqat.quantization.functional import MIN_SCALE
from hf_oscqat.quantization.layers import quantizers


class TestDeadQuantizers:
    def test_none_in_a_calibrated_model(self, make_prepared, images):
        assert dead_quantizers(make_prepared(), images) == []

    def test_input_whose_scale_has_left_everything_at_zero(self, make_prepared, images):
        model = make_prepared().train()
        with torch.no_grad():
            model.pw.input_quantizer.scale.fill_(1e4)
        assert dead_quantizers(model, images) == ["pw.input_quantizer"]
        assert model.training

    def test_layer_that_is_used_twice_is_dead_if_both_times(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.shared(self.first(x)), self.shared(self.gain * x)

        model, x = Twice(), torch.randn(8, 4)
        model.gain = 1.0
        prepare_qat(model, OscQATConfig(first_last_bits=4))
        calibrate(model, [x])
        model.gain = 0.0
        assert dead_quantizers(model, x) == []
        with torch.no_grad():
            model.shared.input_quantizer.scale.fill_(1e4)
        assert dead_quantizers(model, x) == ["shared.input_quantizer"]

    def test_weight_at_one_integer(self, make_prepared, images):
        model = make_prepared()
        with torch.no_grad():
            model.dw.weight_quantizer.scale.fill_(1e4)
        # What comes out of it is its bias, one value a channel, and not one value.
        assert dead_quantizers(model, images) == ["dw.weight_quantizer"]

    def test_weight_with_a_scale_for_each_channel(self, make_prepared, images):
        model = make_prepared(weight_granularity="per_channel")
        assert dead_quantizers(model, images) == []
        with torch.no_grad():
            model.dw.weight_quantizer.scale.fill_(1e4)
        assert dead_quantizers(model, images) == ["dw.weight_quantizer"]

    def test_everything_clipped_counts_too(self, make_prepared, images):
        model = make_prepared()
        with torch.no_grad():
            model.dw.weight_quantizer.scale.fill_(1e-7)
            model.dw.latent_weight.abs_()
        assert "dw.weight_quantizer" in dead_quantizers(model, images)


class TestNotFinite:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_names_what_is_not(self, value):
        bad = torch.tensor([1.0, value])
        named = [("timm_model.a", torch.ones(3)), ("b", bad), ("c", None), ("timm_model.d", bad.double())]
        assert not_finite(named) == ["b", "d"]

    def test_large_numbers_are_finite(self):
        assert not_finite([("a", torch.full((100,), 3e38))]) == []

    def test_nothing(self):
        assert not_finite([]) == []
        assert not_finite([("a", None)]) == []


class TestScales:
    def test_at_minimum_is_named(self, make_prepared):
        model = make_prepared()
        assert scales_at_minimum(model) == []
        with torch.no_grad():
            model.pw.weight_quantizer.scale.fill_(MIN_SCALE)
            model.dw.input_quantizer.scale.fill_(-1.0)
        assert scales_at_minimum(model) == ["dw.input_quantizer", "pw.weight_quantizer"]

    @pytest.mark.parametrize("scale", [0.0, -1.0, MIN_SCALE / 2])
    def test_computation_takes_a_positive_one_whatever_the_parameter_holds(self, scale):
        x = torch.linspace(-1, 1, 9, requires_grad=True)
        parameter = torch.tensor([scale], requires_grad=True)
        y = fake_quantize(x, parameter, None, -8, 7)
        expected = fake_quantize(x, torch.tensor([MIN_SCALE]), None, -8, 7)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.isfinite(parameter.grad).all()  # it is not stuck there

    def test_plain_optimizer_cannot_make_a_step_that_ruins_the_model(self, make_prepared, images):
        model = make_prepared().train()
        optimizer = torch.optim.SGD([q.scale for _, q in quantizers(model)], lr=1e6)
        for _ in range(3):
            (model(images).square().mean() + dampening_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isfinite(model(images)).all()
