"""Initial ranges: each estimator against what its name says, and the MSE search against a search by quantizing."""

import pytest
import torch

from benchmarks.range_search import published_search
from hf_oscqat.quantization.functional import fake_quantize
from hf_oscqat.quantization.quantizer import Quantizer
from hf_oscqat.quantization.range_estimators import (
    MAX_SAMPLES,
    MSE,
    RANGE_ESTIMATORS,
    MinMax,
    NoRangeError,
    Percentile,
    PublishedMSE,
    RunningMinMax,
)


def grid(estimator, *batches):
    for batch in batches:
        estimator.update(batch)
    return estimator.finish()


def squared_error(x, scale, zero_point, qmin, qmax):
    return (fake_quantize(x, scale, zero_point, qmin, qmax) - x).square().sum()


every = pytest.mark.parametrize("estimator", RANGE_ESTIMATORS.values())


class TestMinMax:
    def test_symmetric_signed_grid_spans_the_largest_magnitude(self):
        found = grid(MinMax(Quantizer(4, signed=True)), torch.tensor([-1.0, 2.0]), torch.tensor([-7.0, 1.0]))
        assert found.scale.tolist() == [1.0]
        assert found.zero_point is None
        assert found.signed

    def test_symmetric_unsigned_grid_spans_zero_to_the_largest(self):
        found = grid(MinMax(Quantizer(4)), torch.tensor([0.0, 3.0]), torch.tensor([30.0, 1.0]))
        assert found.scale.tolist() == [2.0]
        assert not found.signed

    def test_asymmetric_grid_spans_smallest_to_largest(self):
        found = grid(MinMax(Quantizer(4, symmetric=False)), torch.tensor([-5.0, 2.0]), torch.tensor([0.0, 10.0]))
        assert found.scale.tolist() == [1.0]
        assert found.zero_point.tolist() == [5.0]

    @pytest.mark.parametrize(("values", "zero_point"), [([2.0, 15.0], 0.0), ([-15.0, -2.0], 15.0)])
    def test_asymmetric_grid_includes_zero(self, values, zero_point):
        found = grid(MinMax(Quantizer(4, symmetric=False)), torch.tensor(values))
        assert found.scale.tolist() == [1.0]
        assert found.zero_point.tolist() == [zero_point]


class TestRunningMinMax:
    def test_average_moves_by_the_momentum(self):
        estimator = RunningMinMax(Quantizer(4, symmetric=False), momentum=0.5)
        grid(estimator, torch.tensor([-4.0, 4.0]), torch.tensor([-8.0, 0.0]), torch.tensor([-2.0, 6.0]))
        assert estimator.low.tolist() == [-4.0]  # -4, then -6, then -4
        assert estimator.high.tolist() == [4.0]  # 4, then 2, then 4

    def test_default_momentum_is_nine_tenths(self):
        estimator = RunningMinMax(Quantizer(4))
        grid(estimator, torch.tensor([10.0]), torch.tensor([20.0]))
        torch.testing.assert_close(estimator.high, torch.tensor([11.0]))


class TestPercentile:
    def test_outliers_stay_outside(self):
        x = torch.arange(1001.0)
        x[-1] = 1e6
        found = grid(Percentile(Quantizer(8, signed=False), percentile=99.0), x)
        assert found.scale.tolist() == [pytest.approx(990 / 255)]

    def test_symmetric_grid_takes_the_share_of_magnitudes(self):
        x = torch.arange(-500.0, 501.0)
        found = grid(Percentile(Quantizer(8, signed=True), percentile=50.0), x)
        assert found.scale.tolist() == [pytest.approx(250 / 127)]

    def test_asymmetric_grid_leaves_half_of_the_rest_on_each_side(self):
        x = torch.arange(-500.0, 501.0)
        found = grid(Percentile(Quantizer(8, symmetric=False), percentile=90.0), x)
        assert found.scale.tolist() == [pytest.approx(900 / 255)]

    def test_all_values_are_inside_at_one_hundred(self):
        x = torch.randn(1000)
        found = grid(Percentile(Quantizer(8, symmetric=False), percentile=100.0), x)
        torch.testing.assert_close(found.scale, (x.max() - x.min()).reshape(1) / 255)

    def test_share_is_taken_over_all_batches(self):
        x = torch.randn(3, 500)
        assert grid(Percentile(Quantizer(8)), *x) == grid(Percentile(Quantizer(8)), x)


class TestMSE:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("signed", [True, False])
    def test_symmetric_grid_is_as_good_as_the_best_of_many_tried_one_by_one(self, bits, signed):
        x = torch.randn(1000, dtype=torch.float64) * 0.03
        x = x if signed else x.abs()
        quantizer = Quantizer(bits, signed=signed)
        qmin, qmax = quantizer.qmin, quantizer.qmax
        found = grid(MSE(quantizer, keep_all=True), x)
        limit = x.abs().max()
        tried = [squared_error(x, limit * i / 200 / qmax, None, qmin, qmax) for i in range(1, 201)]
        ours = squared_error(x, found.scale, None, qmin, qmax)
        assert ours <= min(tried) * 1.001

    @pytest.mark.parametrize("bits", [2, 4])
    def test_asymmetric_grid_is_as_good_as_the_best_of_many_tried_one_by_one(self, bits):
        x = torch.randn(500, dtype=torch.float64) * 0.3 + 0.2
        found = grid(MSE(Quantizer(bits, symmetric=False), keep_all=True), x)
        tried = []
        for low in range(1, 21):
            for high in range(1, 21):
                scale = (x.max() * high - x.min() * low) / 20 / (2**bits - 1)
                tried.append(squared_error(x, scale, -x.min() * low / 20 / scale, 0, 2**bits - 1))
        ours = squared_error(x, found.scale, found.zero_point, 0, 2**bits - 1)
        assert ours <= min(tried) * 1.001

    def test_error_is_far_below_that_of_the_whole_range_where_there_are_outliers(self):
        x = torch.randn(5000)
        x[0] = 20.0
        best = grid(MSE(Quantizer(4, signed=True), keep_all=True), x)
        whole = grid(MinMax(Quantizer(4, signed=True)), x)
        assert squared_error(x, best.scale, None, -8, 7) < squared_error(x, whole.scale, None, -8, 7) / 4

    def test_error_is_summed_over_batches(self):
        a, b = torch.randn(400), 3 * torch.randn(400)
        scale = grid(MSE(Quantizer(3, signed=True)), a, b).scale
        together = torch.cat([a, b])
        least = min(squared_error(together, torch.tensor([s]), None, -4, 3) for s in torch.linspace(0.2, 4, 2000))
        assert squared_error(together, scale, None, -4, 3) <= 1.001 * least

    def test_values_on_a_grid_are_found_without_error(self):
        x = torch.arange(-8.0, 8.0) * 0.25
        found = grid(MSE(Quantizer(4, signed=True), keep_all=True), x)
        assert squared_error(x, found.scale, None, -8, 7) < 0.05 * x.square().sum() / 16

    def test_scale_is_proportional_to_the_data(self):
        # The published search has an absolute margin in it and is of no use for weights of this size.
        x = torch.randn(1000, dtype=torch.float64)
        ours = grid(MSE(Quantizer(4, signed=True), keep_all=True), x * 2**-20).scale
        torch.testing.assert_close(ours * 2**20, grid(MSE(Quantizer(4, signed=True), keep_all=True), x).scale)


@every
class TestAny:
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_proposal_is_accepted_by_the_quantizer(self, estimator, symmetric):
        quantizer = Quantizer(4, symmetric=symmetric)
        found = grid(estimator(quantizer), torch.randn(300))
        quantizer.set_range(found.scale, found.zero_point, signed=found.signed)
        assert quantizer.is_signed is symmetric

    def test_proposal_changes_nothing_in_the_quantizer(self, estimator):
        quantizer = Quantizer(4)
        grid(estimator(quantizer), torch.randn(300))
        assert not quantizer.calibrated
        assert not quantizer.is_signed

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_value_that_is_not_finite_is_an_error(self, estimator, bad):
        with pytest.raises(ValueError, match="got values that are NaN or infinite"):
            estimator(Quantizer(4)).update(torch.tensor([1.0, bad, 0.0]))

    def test_no_batch_is_an_error(self, estimator):
        with pytest.raises(ValueError, match="got no values, expected at least one batch"):
            estimator(Quantizer(4)).finish()

    def test_empty_batch_is_an_error(self, estimator):
        with pytest.raises(ValueError, match="got no values"):
            estimator(Quantizer(4)).update(torch.empty(0, 3))

    def test_zeros_are_an_error(self, estimator):
        with pytest.raises(ValueError, match="got nothing but zeros"):
            grid(estimator(Quantizer(4)), torch.zeros(4), torch.zeros(4))

    def test_half_precision_values_get_the_range_of_the_same_values_in_float32(self, estimator):
        x = torch.randn(300).bfloat16()
        assert grid(estimator(Quantizer(4)), x) == grid(estimator(Quantizer(4)), x.float())

    def test_values_are_left_alone(self, estimator):
        x = torch.randn(300)
        before = x.clone()
        grid(estimator(Quantizer(4), keep_all=True), x)
        assert torch.equal(x, before)

    def test_sign_that_the_quantizer_fixes_is_kept(self, estimator):
        assert grid(estimator(Quantizer(4, signed=True)), torch.rand(20)).signed


class TestSampling:
    def test_large_batch_is_sampled_and_small_one_kept(self):
        estimator = MSE(Quantizer(4))
        estimator.update(torch.rand(3 * MAX_SAMPLES))
        estimator.update(torch.rand(100))
        assert estimator.samples[0].numel() <= MAX_SAMPLES
        assert estimator.samples[0].numel() > MAX_SAMPLES // 8
        assert estimator.samples[1].numel() == 100

    def test_keep_all_keeps_all(self):
        estimator = MSE(Quantizer(4), keep_all=True)
        estimator.update(torch.rand(MAX_SAMPLES + 2))
        assert estimator.samples[0].numel() == MAX_SAMPLES + 2

    def test_sample_reaches_every_image_and_column(self):
        images = torch.arange(8.0).view(8, 1, 1).expand(8, 512, 128).contiguous()
        estimator = MSE(Quantizer(4))
        estimator.update(images)
        assert estimator.samples[0].unique().tolist() == list(range(8))
        columns = torch.arange(128.0).expand(8, 512, 128).contiguous()
        estimator.update(columns)
        assert estimator.samples[1].unique().numel() == 128

    def test_kept_values_do_not_share_memory_with_the_batch(self):
        x = torch.rand(100)
        estimator = MSE(Quantizer(4))
        estimator.update(x)
        x.zero_()
        assert estimator.finish().scale.item() > 0
        assert estimator.samples[0].sum() > 0


class TestChannels:
    """As published, channels share one set of candidates in the published search; everywhere else each is alone."""

    @pytest.mark.parametrize("estimator", [MinMax, RunningMinMax, Percentile])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_each_channel_gets_the_range_it_would_get_alone(self, estimator, axis, symmetric):
        x = torch.randn(3, 40, 2).movedim(0, axis) * torch.tensor([1.0, 10.0, 0.1]).view([-1] + [1] * (2 - axis))
        quantizer = Quantizer(4, signed=True, symmetric=symmetric, channels=3, axis=axis)
        found = grid(estimator(quantizer, keep_all=True), x)
        for channel in range(3):
            alone = Quantizer(4, signed=True, symmetric=symmetric)
            single = grid(estimator(alone, keep_all=True), x.select(axis, channel))
            torch.testing.assert_close(found.scale[channel], single.scale[0])
            if not symmetric:
                torch.testing.assert_close(found.zero_point[channel], single.zero_point[0])

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_error_of_each_channel_is_about_the_least_it_could_have_alone(self, axis, symmetric):
        x = torch.randn(3, 40, 2).movedim(0, axis) * torch.tensor([1.0, 10.0, 0.1]).view([-1] + [1] * (2 - axis))
        quantizer = Quantizer(4, signed=True, symmetric=symmetric, channels=3, axis=axis)
        found = grid(MSE(quantizer, keep_all=True), x)
        qmin, qmax = (-8, 7) if symmetric else (0, 15)
        for channel in range(3):
            values = x.select(axis, channel)
            single = grid(MSE(Quantizer(4, signed=True, symmetric=symmetric), keep_all=True), values)
            zeros = (None, None) if symmetric else (found.zero_point[channel], single.zero_point[0])
            ours = squared_error(values, found.scale[channel], zeros[0], qmin, qmax)
            assert ours <= 1.02 * squared_error(values, single.scale[0], zeros[1], qmin, qmax)

    @pytest.mark.parametrize("estimator", [e for e in RANGE_ESTIMATORS.values() if e is not PublishedMSE])
    def test_channel_of_zeros_takes_the_step_of_the_others(self, estimator):
        x = torch.randn(3, 50)
        x[1] = 0
        found = grid(estimator(Quantizer(4, signed=True, channels=3), keep_all=True), x)
        assert found.scale[1] == found.scale.max()


class TestPublished:
    """The candidate that quantizing with each of them finds, one after the other."""

    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("shift", [0.0, 0.6, 5.0], ids=["centred", "skewed", "positive"])
    @pytest.mark.parametrize("per_channel", [False, True])
    def test_is_the_one_found_by_quantizing(self, bits, symmetric, shift, per_channel):
        batches = [
            (torch.randn(3, 200) + shift).abs() if shift == 5 else torch.randn(3, 200) + shift for _ in range(2)
        ]
        quantizer = Quantizer(bits, symmetric=symmetric, channels=3 if per_channel else None)
        found = grid(PublishedMSE(quantizer), *batches)
        searched = published_search(batches, bits, symmetric=symmetric, signed=shift != 5, per_channel=per_channel)
        quantizer.set_range(found.scale, found.zero_point, signed=found.signed)
        ours = sum(
            squared_error(b, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax) for b in batches
        )
        quantizer.set_range(searched.scale, searched.zero_point, signed=found.signed)
        theirs = sum(
            squared_error(b, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax) for b in batches
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)

    def test_range_is_that_of_the_first_batch_with_its_margin(self):
        first, second = torch.linspace(-1, 1, 1001), 100 * torch.linspace(-1, 1, 1001)
        found = grid(PublishedMSE(Quantizer(8)), first, second)
        assert found.scale.item() == pytest.approx(1.5 / 127)

    def test_margin_is_too_coarse_for_small_weights(self):
        x = 0.02 * torch.randn(5000)
        errors = []
        for estimator in (MSE, PublishedMSE):
            scale = grid(estimator(Quantizer(4, signed=True), keep_all=True), x).scale
            errors.append(squared_error(x, scale, None, -8, 7).item())
        assert errors[0] < 0.98 * errors[1]


def test_percentile_that_leaves_out_all_but_zeros_is_no_range():
    x = torch.zeros(100_000)
    x[:3] = 1.0
    with pytest.raises(NoRangeError, match="the range leaves out everything else"):
        grid(Percentile(Quantizer(4, signed=True)), x)
