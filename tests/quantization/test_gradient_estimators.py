"""Each estimator against its formula, in float64."""

import itertools
import math

import pytest
import torch

from hf_oscqat import fake_quantize
from hf_oscqat.quantization.functional import live_sentinel, to_int
from hf_oscqat.quantization.gradient_estimators import (
    DSQ,
    EWGS,
    GRADIENT_ESTIMATORS,
    PSG,
    AdditiveNoise,
    GradientEstimator,
    StackedSigmoid,
    StochasticRounding,
    make_gradient_estimator,
)
from hf_oscqat.quantization.quantizer import Quantizer

QMIN, QMAX, SCALE = -4, 3, 0.37
LEVELS = QMAX - QMIN


def ewgs(u, g):
    return 1 + 0.3 * math.copysign(1, g) * (u - round(u))


def ewgs_unit_interval(u, g):
    # As the paper writes it: values in [0, 1], levels 1 / LEVELS apart.
    x, x_q = (u - QMIN) / LEVELS, (round(u) - QMIN) / LEVELS
    return 1 + 0.8 * math.copysign(1, g) * (x - x_q)


def stacked_sigmoid(u, g):
    def logistic(v):
        return 1 / (1 + math.exp(-v))

    a, t = 2.5, u - math.floor(u)
    centre = logistic(a * (t - 0.5))
    return a * centre * (1 - centre) / (logistic(a / 2) - logistic(-a / 2))


def dsq(u, g):
    # By differences of the published staircase, which rounds where its steepness is infinite.
    def phi(u, k=1.7):
        return math.floor(start) + (math.tanh(k * (u - math.floor(start) - 0.5)) / math.tanh(k / 2) + 1) / 2

    start, h = u, 1e-6
    return (phi(u + h) - phi(u - h)) / (2 * h)


def psg(u, g):
    return 3.0 * (abs(u - round(u)) + 0.01)


FORMULAS = {
    "ste": (GradientEstimator(), lambda u, g: 1.0),
    "ewgs": (EWGS(0.3), ewgs),
    "ewgs_unit_interval": (EWGS(0.8, "unit_interval"), ewgs_unit_interval),
    "stacked_sigmoid": (StackedSigmoid(2.5), stacked_sigmoid),
    "dsq": (DSQ(1.7), dsq),
    "psg": (PSG(3.0, 0.01), psg),
}


def values(count=200):
    return 1.2 * torch.randn(count, dtype=torch.float64), torch.randn(count, dtype=torch.float64)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_the_formula(name):
    estimator, slope_at = FORMULAS[name]
    x, grad = values()
    x.requires_grad_()
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, scale, None, QMIN, QMAX, gradient_estimator=estimator)
    y.backward(grad)
    expected_x, expected_scale = [], 0.0
    for value, g in zip(x.tolist(), grad.tolist(), strict=True):
        u = value / SCALE
        if QMIN <= round(u) <= QMAX:
            expected_x.append(g * slope_at(u, g))
            expected_scale += g * (round(u) - slope_at(u, g) * u)
        else:
            expected_x.append(0.0)
            expected_scale += g * (QMIN if u < 0 else QMAX)
    tolerance = 1e-8 if name == "dsq" else 1e-12  # its formula is differenced here, not derived
    torch.testing.assert_close(x.grad, torch.tensor(expected_x, dtype=torch.float64), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scale.grad.item(), expected_scale, rtol=10 * tolerance, atol=10 * tolerance)
    assert torch.equal(y, fake_quantize(x, scale, None, QMIN, QMAX)), "only gradients differ"


def test_every_estimator_is_tested():
    tested = {type(estimator) for estimator, _ in FORMULAS.values()} | {StochasticRounding, AdditiveNoise}
    assert tested == set(GRADIENT_ESTIMATORS.values())


@pytest.mark.parametrize("name", GRADIENT_ESTIMATORS)
def test_backward_may_write_into_what_is_rounded_and_leave_out_a_slope_of_1(name):
    estimator = make_gradient_estimator(name)
    u = torch.tensor([-1.3, 0.0, 0.4, 2.0])
    for noise in (None, torch.zeros(4)):
        assert estimator.round(u, noise).data_ptr() != u.data_ptr()
    slope = estimator.slope(u - u.round(), torch.ones(4), 15)
    assert (slope is not None) == estimator.has_slope


def test_staircases_lead_from_one_integer_to_the_next():
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for estimator in (StackedSigmoid(0.1), StackedSigmoid(-6.0), DSQ(0.3), DSQ(5.0)):
        slope = estimator.slope(t - t.round(), t, LEVELS)
        assert torch.trapezoid(slope, t).item() == pytest.approx(1, abs=1e-6)


def test_dsq_is_the_stacked_sigmoid_of_twice_its_steepness():
    residual = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    torch.testing.assert_close(
        DSQ(1.5).slope(residual, residual, LEVELS), StackedSigmoid(3.0).slope(residual, residual, LEVELS)
    )


def test_units_of_ewgs_convert():
    residual, grad = torch.linspace(-0.5, 0.5, 101), torch.randn(101)
    integer = EWGS(0.2).slope(residual, grad, 15)
    torch.testing.assert_close(EWGS(0.2 * 15, "unit_interval").slope(residual, grad, 15), integer)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradient_of_additive_noise_is_exact(asymmetric):
    x, _ = values(40)
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([3.0], dtype=torch.float64) if asymmetric else None
    qmin, qmax = (0, 7) if asymmetric else (QMIN, QMAX)

    def run(x, scale):
        torch.manual_seed(0)
        return fake_quantize(x, scale, zero_point, qmin, qmax, gradient_estimator="additive_noise")

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), scale))


def test_additive_noise_stays_within_half_a_step_and_the_range():
    x = torch.linspace(-1, 1, 5000, dtype=torch.float64)
    y = fake_quantize(x, torch.tensor([SCALE]), None, QMIN, QMAX, gradient_estimator="additive_noise")
    inside = (x > (QMIN + 0.5) * SCALE) & (x < (QMAX - 0.5) * SCALE)
    error = (y - x)[inside] / SCALE
    assert error.abs().max() <= 0.5 + 1e-6
    assert abs(error.mean()) < 0.02
    assert error.var().item() == pytest.approx(1 / 12, rel=0.1)


def test_additive_noise_is_as_exact_beside_frozen_weights():
    x, scale = torch.linspace(-5, 5, 3000, requires_grad=True), torch.tensor([0.05], requires_grad=True)
    found = []
    for frozen_int in (None, torch.full((3000,), live_sentinel(torch.int16), dtype=torch.int16)):
        torch.manual_seed(0)
        y = fake_quantize(x, scale, None, -128, 127, frozen_int=frozen_int, gradient_estimator="additive_noise")
        found.append((y, *torch.autograd.grad(y[:1].sum(), (x, scale))))
    assert all(map(torch.equal, *found))


def test_stochastic_rounding_is_right_on_average_and_straight_through():
    x = torch.full((20000,), 1.3 * SCALE, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, scale, None, QMIN, QMAX, gradient_estimator="stochastic_rounding")
    u = (y / SCALE).detach()
    assert set(u.round(decimals=9).tolist()) == {1.0, 2.0}
    assert u.mean().item() == pytest.approx(1.3, abs=0.02)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    torch.testing.assert_close(scale.grad.item(), (u - 1.3).sum().item())


@pytest.mark.parametrize("name", ["stochastic_rounding", "additive_noise"])
class TestRandomEstimators:
    def quantizer(self, name):
        quantizer = Quantizer(3, signed=True, gradient_estimator=name)
        quantizer.set_range(torch.tensor([SCALE]))
        return quantizer

    def test_are_random_in_training_and_repeat_with_the_seed(self, name):
        quantizer, x = self.quantizer(name), values()[0].float()
        torch.manual_seed(1)
        first = quantizer(x)
        second = quantizer(x)
        torch.manual_seed(1)
        assert torch.equal(quantizer(x), first)
        assert not torch.equal(second, first)

    def test_round_to_nearest_in_evaluation_and_for_the_tracker(self, name):
        quantizer, x = self.quantizer(name), values()[0].float()
        nearest = fake_quantize(x, quantizer.scale, None, QMIN, QMAX)
        assert torch.equal(quantizer.eval()(x), nearest)
        assert torch.equal(quantizer.train().to_int(x), to_int(x, quantizer.scale, None, QMIN, QMAX))

    def test_leave_frozen_weights_alone(self, name):
        x = values()[0].float()
        frozen_int = torch.full(x.shape, live_sentinel(torch.int8), dtype=torch.int8)
        frozen_int[:50] = -2
        y = fake_quantize(x, torch.tensor([SCALE]), None, QMIN, QMAX, frozen_int=frozen_int, gradient_estimator=name)
        assert torch.equal(y[:50], torch.full((50,), -2 * SCALE))

    def test_half_precision_keeps_its_dtype(self, name):
        x = values()[0].bfloat16()
        assert fake_quantize(x, torch.tensor([SCALE]), None, QMIN, QMAX, gradient_estimator=name).dtype == x.dtype


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("ewgs2", {}, "got gradient_estimator='ewgs2', expected one of ste, ewgs, stacked_sigmoid, dsq, psg, "),
        (
            "ewgs",
            {"factor": 1.0},
            "got argument 'factor' for gradient_estimator='ewgs', expected scaling_factor, units",
        ),
        ("ste", {"alpha": 1.0}, "got argument 'alpha' for gradient_estimator='ste', expected none"),
        ("ewgs", {"scaling_factor": -0.1}, "got ewgs scaling_factor=-0.1, expected a finite number of at least 0"),
        ("ewgs", {"units": "pixels"}, "expected 'integer' or 'unit_interval'"),
        ("stacked_sigmoid", {"alpha": 0}, "use 'ste' for a slope of 1"),
        ("stacked_sigmoid", {"alpha": math.nan}, "expected a finite number"),
        ("dsq", {"k": 0.0}, "expected a positive number"),
        ("dsq", {"k": "steep"}, "got dsq k='steep', expected a finite number"),
        ("psg", {"strength": 0}, "nothing would be trained"),
        ("psg", {"epsilon": -1}, "got psg epsilon=-1"),
    ],
)
def test_bad_settings_are_named(name, args, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_gradient_estimator(name, args)


def test_steepest_staircase_is_finite():
    for steepness, residual in itertools.product((1e-6, 1e3), (-0.5, 0.0, 0.25)):
        slope = StackedSigmoid(steepness).slope(torch.tensor([residual]), torch.ones(1), LEVELS)
        assert torch.isfinite(slope).all()
