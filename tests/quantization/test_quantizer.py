"""The learned quantizer: its range, its grid, what casts and state dicts do to it, and frozen integers."""

import copy
import io
import math
import pickle

import pytest
import torch

from hf_oscqat.quantization.functional import fake_quantize, live_sentinel, lsq_gradient_scale
from hf_oscqat.quantization.quantizer import LogScaleQuantizer, Quantizer


def calibrated(num_bits=4, **kwargs):
    quantizer = Quantizer(num_bits, **{"signed": True} | kwargs)
    zero_point = None if quantizer.symmetric else torch.full_like(quantizer.scale, 3.2)
    quantizer.set_range(torch.linspace(0.1, 0.5, quantizer.scale.numel()), zero_point, signed=True)
    return quantizer


class TestUncalibrated:
    @pytest.mark.parametrize("kwargs", [{}, {"symmetric": False}, {"channels": 3}])
    def test_scale_is_nan_and_running_it_is_an_error_that_says_what_to_do(self, kwargs):
        quantizer = Quantizer(4, **kwargs)
        assert bool(quantizer.scale.isnan().all())
        assert not quantizer.calibrated
        with pytest.raises(RuntimeError, match=r"no range yet: run hf_oscqat.calibrate\(model, batches\)"):
            quantizer(torch.randn(3, 4))

    def test_state_dict_of_an_uncalibrated_quantizer_makes_it_uncalibrated_again(self):
        quantizer = calibrated()
        quantizer.load_state_dict(Quantizer(4, signed=True).state_dict())
        with pytest.raises(RuntimeError, match="no range yet"):
            quantizer(torch.randn(3))

    def test_state_dict_of_a_calibrated_quantizer_calibrates(self):
        quantizer = Quantizer(4, signed=True)
        quantizer.load_state_dict(calibrated().state_dict())
        x = torch.randn(5)
        assert torch.equal(quantizer(x), calibrated()(x))


class TestGrid:
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_bounds(self, bits):
        signed = Quantizer(bits, signed=True)
        assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for unsigned in (Quantizer(bits, signed=False), Quantizer(bits, symmetric=False, signed=True)):
            assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)

    @pytest.mark.parametrize("signed", [True, False])
    def test_sign_is_that_of_the_data_where_the_constructor_left_it_open(self, signed):
        quantizer = Quantizer(4)
        assert not quantizer.is_signed
        quantizer.set_range(torch.ones(1), signed=signed)
        assert quantizer.is_signed is signed
        assert quantizer(torch.tensor([-100.0])).item() == (-8.0 if signed else 0.0)

    def test_sign_found_in_data_travels_with_the_state_dict(self):
        source = Quantizer(4)
        source.set_range(torch.ones(1), signed=True)
        assert "signed" in source.state_dict()
        target = Quantizer(4)
        target.set_range(torch.ones(1), signed=False)
        target.load_state_dict(source.state_dict())
        assert (target.qmin, target.qmax) == (-8, 7)

    def test_sign_that_was_given_is_not_in_the_state_dict(self):
        assert set(Quantizer(4, signed=True).state_dict()) == {"scale"}
        assert set(Quantizer(4, symmetric=False).state_dict()) == {"scale", "zero_point"}

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_forward_is_fake_quantize_with_the_quantizers_own_numbers(self, symmetric, axis):
        x = torch.randn(3, 3, 2)
        quantizer = calibrated(symmetric=symmetric, channels=3, axis=axis)
        expected = fake_quantize(
            x, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, axis=quantizer.axis
        )
        assert torch.equal(quantizer(x), expected)
        integers = quantizer.to_int(x)
        assert integers.min() >= quantizer.qmin
        assert integers.max() <= quantizer.qmax

    def test_lsq_gradient_scaling_scales_the_gradient_of_the_scale(self):
        x = torch.randn(50)
        gradients = []
        for scaling in (False, True):
            quantizer = calibrated(lsq_gradient_scaling=scaling)
            quantizer(x).sum().backward()
            gradients.append(quantizer.scale.grad)
        torch.testing.assert_close(gradients[1], gradients[0] * lsq_gradient_scale(x, torch.ones(1), 7))

    def test_lsq_gradient_scaling_takes_an_empty_batch(self):
        quantizer = calibrated(lsq_gradient_scaling=True)
        assert quantizer(torch.empty(0, 3)).shape == (0, 3)

    def test_repr_says_what_grid_it_is(self):
        assert "num_bits=3, qmin=-4, qmax=3, per_channel" in repr(Quantizer(3, signed=True, channels=2))


class TestSetRange:
    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_scale_must_be_finite_and_positive(self, scale):
        quantizer = Quantizer(4, signed=True, channels=2)
        with pytest.raises(ValueError, match=r"got scale \[1.0, .*\], expected finite positive numbers"):
            quantizer.set_range(torch.tensor([1.0, scale]))
        assert not quantizer.calibrated

    def test_zero_point_is_refused_by_a_symmetric_grid(self):
        with pytest.raises(ValueError, match="expected no zero_point: the grid is symmetric"):
            Quantizer(4, signed=True).set_range(torch.ones(1), torch.zeros(1))

    def test_zero_point_is_wanted_by_an_asymmetric_grid(self):
        with pytest.raises(ValueError, match="got zero_point=None, expected a zero_point: it is asymmetric"):
            Quantizer(4, symmetric=False).set_range(torch.ones(1))

    def test_sign_is_wanted_where_the_constructor_left_it_open(self):
        with pytest.raises(ValueError, match="got signed=None, expected True or False"):
            Quantizer(4).set_range(torch.ones(1))

    def test_one_value_fills_every_channel(self):
        quantizer = Quantizer(4, symmetric=False, channels=3)
        quantizer.set_range(torch.tensor(0.5), torch.tensor(2.0))
        assert quantizer.scale.tolist() == [0.5] * 3
        assert quantizer.zero_point.tolist() == [2.0] * 3

    def test_values_are_copied(self):
        scale = torch.ones(1)
        quantizer = Quantizer(4, signed=True)
        quantizer.set_range(scale)
        scale.zero_()
        assert quantizer.scale.item() == 1.0

    def test_parameters_keep_their_identity(self):
        quantizer = Quantizer(4, signed=True)
        scale = quantizer.scale
        quantizer.set_range(torch.ones(1))
        assert quantizer.scale is scale
        assert quantizer.scale.requires_grad


class TestPrecision:
    @pytest.mark.parametrize("cast", ["half", "bfloat16"])
    def test_scale_and_zero_point_stay_float32_in_a_half_precision_model(self, cast):
        quantizer = calibrated(symmetric=False)
        scale = quantizer.scale.clone()
        getattr(quantizer, cast)()
        assert quantizer.scale.dtype == quantizer.zero_point.dtype == torch.float32
        assert torch.equal(quantizer.scale, scale)

    def test_scale_follows_to_float64_and_back(self):
        quantizer = calibrated(symmetric=False).double()
        assert quantizer.scale.dtype == quantizer.zero_point.dtype == torch.float64
        assert quantizer.float().scale.dtype == torch.float32

    def test_frozen_integers_are_not_cast(self):
        quantizer = calibrated()
        quantizer.allow_freezing(torch.zeros(3))
        for cast in ("half", "double", "float"):
            getattr(quantizer, cast)()
            assert quantizer.frozen_int.dtype == torch.int8

    def test_gradient_reaches_the_scale_after_a_cast(self):
        quantizer = calibrated().to(torch.bfloat16)
        quantizer(torch.randn(5, dtype=torch.bfloat16)).sum().backward()
        assert quantizer.scale.grad.dtype == torch.float32


class TestFreezing:
    def freeze(self, quantizer, x, index, value):
        quantizer.allow_freezing(x)[index] = value
        quantizer.refresh()
        return quantizer

    @pytest.mark.parametrize(("bits", "dtype"), [(2, torch.int8), (4, torch.int8), (7, torch.int8), (8, torch.int16)])
    def test_frozen_integers_take_the_smallest_dtype_with_room_for_a_sentinel(self, bits, dtype):
        frozen_int = calibrated(bits).allow_freezing(torch.zeros(2, 3))
        assert frozen_int.dtype == dtype
        assert frozen_int.shape == (2, 3)
        assert bool((frozen_int == live_sentinel(dtype)).all())

    def test_place_for_frozen_integers_is_made_once(self):
        quantizer = calibrated()
        first = quantizer.allow_freezing(torch.zeros(3))
        assert quantizer.allow_freezing(torch.zeros(3)) is first

    def test_frozen_weight_keeps_its_integer_whatever_the_latent_does(self):
        x = torch.tensor([0.1, 0.1])
        quantizer = self.freeze(calibrated(), x, 0, -5)
        for latent in (x, 0 * x, 100 * x):
            assert quantizer.to_int(latent)[0].item() == -5
            assert quantizer(latent)[0].item() == pytest.approx(-0.5)
        assert quantizer.to_int(100 * x)[1].item() == 7

    @pytest.mark.parametrize("value", [-128, 127])
    def test_ends_of_eight_bits_can_be_frozen(self, value):
        x = torch.zeros(2)
        quantizer = self.freeze(calibrated(8), x, 1, value)
        assert quantizer.to_int(x).tolist() == [0, value]

    def test_frozen_integers_survive_the_state_dict(self):
        x = torch.zeros(3)
        source = self.freeze(calibrated(), x, 1, 6)
        target = calibrated()
        target.allow_freezing(x)
        target.load_state_dict(source.state_dict())
        assert target.to_int(x).tolist() == [0, 6, 0]

    def test_state_dict_without_frozen_weights_thaws(self):
        x = torch.zeros(3)
        target = self.freeze(calibrated(), x, 1, 6)
        source = calibrated()
        source.allow_freezing(x)
        target.load_state_dict(source.state_dict())
        assert target.to_int(x).tolist() == [0, 0, 0]

    def test_missing_frozen_integers_are_an_error(self):
        target = calibrated()
        target.allow_freezing(torch.zeros(3))
        with pytest.raises(RuntimeError, match="frozen_int"):
            target.load_state_dict(calibrated().state_dict())

    @pytest.mark.parametrize(
        ("bits", "other", "message"),
        [(8, 4, "in torch.int16, 0 of them"), (4, 3, "in torch.int8, 1 of them outside of the grid")],
    )
    def test_frozen_integers_of_another_width_are_an_error(self, bits, other, message):
        x = torch.zeros(3)
        source, target = self.freeze(calibrated(bits), x, 1, 7), calibrated(other)
        target.allow_freezing(x)
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(source.state_dict())

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
    def test_copies_keep_everything(self, clone):
        x = torch.randn(3)
        quantizer = self.freeze(calibrated(symmetric=False, channels=3), x, 1, 6)
        assert torch.equal(clone(quantizer)(x), quantizer(x))

    def test_saved_module_keeps_everything(self):
        x = torch.randn(3)
        quantizer = self.freeze(calibrated(), x, 1, 6)
        stream = io.BytesIO()
        torch.save(quantizer, stream)
        stream.seek(0)
        assert torch.equal(torch.load(stream, weights_only=False)(x), quantizer(x))


class TestLogScale:
    """`scale = 2 ** log2_scale`: same numbers forward, chain rule backward, positive after any step."""

    def pair(self, channels=None, **kwargs):
        linear = Quantizer(3, signed=True, channels=channels, dtype=torch.float64, **kwargs)
        log = LogScaleQuantizer(3, signed=True, channels=channels, dtype=torch.float64, **kwargs)
        scale = 0.1 + torch.rand(channels or 1, dtype=torch.float64)
        log.set_range(scale)
        linear.set_range(log.scale.detach())
        return linear, log

    @pytest.mark.parametrize("channels", [None, 6])
    @pytest.mark.parametrize("lsq", [False, True])
    def test_gradient_follows_the_chain_rule(self, channels, lsq):
        linear, log = self.pair(channels, lsq_gradient_scaling=lsq)
        x, grad = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
        for quantizer in (linear, log):
            quantizer(x).backward(grad)
        assert torch.equal(linear(x), log(x))
        expected = linear.scale.grad * linear.scale.detach() * math.log(2)
        torch.testing.assert_close(log.log2_scale.grad, expected, rtol=1e-12, atol=1e-12)

    def test_has_one_parameter_of_its_own_name(self):
        _, log = self.pair()
        assert list(dict(log.named_parameters())) == ["log2_scale"]
        assert list(log.state_dict()) == ["log2_scale"]

    def test_stays_positive_after_a_large_step(self):
        _, log = self.pair()
        with torch.no_grad():
            log.log2_scale -= 50
        assert log.scale > 0

    def test_refuses_to_run_until_calibrated_and_loads(self):
        fresh = LogScaleQuantizer(3, signed=True, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="has no range yet"):
            fresh(torch.ones(2))
        _, log = self.pair()
        fresh.load_state_dict(log.state_dict())
        x = torch.randn(9, dtype=torch.float64)
        assert torch.equal(fresh(x), log(x))


def test_a_copy_sees_what_is_frozen_in_it_later():
    quantizer = calibrated()
    x = torch.linspace(-1, 1, 8)
    quantizer.allow_freezing(x)
    average = copy.deepcopy(quantizer)  # as an exponential moving average of weights makes one, and writes into it
    average.frozen_int.copy_(torch.full((8,), 3, dtype=torch.int8))
    assert average.to_int(x).tolist() == [3.0] * 8
    assert quantizer.to_int(x).unique().numel() > 1
    average.load_state_dict(quantizer.state_dict())  # as a run that continues does, before anything is frozen
    average.frozen_int.copy_(torch.full((8,), 3, dtype=torch.int8))
    assert average.to_int(x).tolist() == [3.0] * 8
