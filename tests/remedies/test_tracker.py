"""Oscillation statistics on integers written by hand, and freezing on what they say."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_oscqat import OscillationTracker, OscQATConfig, pack, prepare_qat, reestimate_batchnorm
from hf_oscqat.quantization.functional import live_sentinel
from hf_oscqat.quantization.packing import unpack_bits

LIVE = live_sentinel(torch.int8)


def one_layer(*initial, bits=4):
    """A layer of which the latent weights are set to integers, on a grid of step 1."""
    model = nn.Sequential(nn.Linear(len(initial), 1, bias=False))
    prepare_qat(model, OscQATConfig(activation_bits=None, first_last_bits=bits))
    model[0].weight_quantizer.set_range(torch.ones(1))
    set_integers(model, *initial)
    return model


def set_integers(model, *integers):
    with torch.no_grad():
        model[0].latent_weight.copy_(torch.tensor([integers], dtype=torch.float32))


def run(model, tracker, sequence, threshold=0.0):
    for integers in sequence:
        set_integers(model, *integers)
        tracker.tick(threshold)


class TestStatistics:
    def test_oscillation_is_a_move_against_the_previous_move(self):
        model = one_layer(0, 0, 0, 0)
        tracker = OscillationTracker(model, momentum=0.5, count_total=True)
        # weight 0 climbs; 1 goes to and fro; 2 goes up, rests, comes back; 3 never moves
        run(model, tracker, [(0, 0, 0, 5), (1, 1, 1, 5), (2, 0, 1, 5), (3, 1, 0, 5)])
        assert model[0].oscillation.total.tolist() == [[0, 2, 1, 0]]
        assert model[0].oscillation.direction.tolist() == [[1, 1, -1, 0]]
        # momentum 0.5: oscillation at steps 2 and 3 gives 0.5, then 0.75; at step 3 alone 0.5
        assert model[0].oscillation.frequency.tolist() == [[0.0, 0.75, 0.5, 0.0]]

    def test_jump_over_several_integers_counts_once(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=1.0, count_total=True)
        run(model, tracker, [(-5,), (7,), (-8,)])
        assert model[0].oscillation.total.tolist() == [[1]]

    def test_frequency_decays_while_a_weight_rests(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=0.25)
        run(model, tracker, [(0,), (1,), (0,)])
        assert model[0].oscillation.frequency.item() == 0.25
        run(model, tracker, [(0,), (0,)])
        assert model[0].oscillation.frequency.item() == pytest.approx(0.25 * 0.75**2)

    def test_first_tick_has_nothing_to_compare_with(self):
        model = one_layer(3)
        tracker = OscillationTracker(model, momentum=1.0)
        assert model[0].oscillation.previous_int.tolist() == [[LIVE]]
        assert tracker.oscillating_fraction == tracker.frozen_fraction == 0
        tracker.tick()
        assert model[0].oscillation.previous_int.tolist() == [[3]]
        assert model[0].oscillation.frequency.tolist() == [[0.0]]
        assert model[0].oscillation.direction.tolist() == [[0]]

    def test_latent_that_moves_within_its_bin_does_not_move(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=1.0, count_total=True)
        run(model, tracker, [(0.4,), (-0.4,), (0.3,)])
        assert model[0].oscillation.direction.item() == 0

    def test_clamped_latent_does_not_move(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=1.0, count_total=True)
        run(model, tracker, [(9,), (20,), (9,), (20,)])
        assert model[0].oscillation.previous_int.item() == 7
        assert model[0].oscillation.total.item() == 0

    def test_fractions_are_shares_of_all_tracked_weights(self):
        model = one_layer(0, 0, 0, 0)
        tracker = OscillationTracker(model, momentum=0.5)
        run(model, tracker, [(0, 0, 0, 0), (1, 1, 0, 0), (0, 0, 0, 0)])
        assert tracker.num_weights == 4
        assert tracker.oscillating_fraction == 0.5
        assert tracker.frozen_fraction == 0.0
        tracker.tick(0.1)
        assert tracker.frozen_fraction == 0.5

    def test_weight_counts_as_oscillating_above_the_given_frequency(self):
        model = one_layer(0, 0)
        tracker = OscillationTracker(model, momentum=0.004)
        run(model, tracker, [(0, 0), (1, 1), (0, 0)])
        assert tracker.oscillating_fraction == 0.0  # 0.004 is not above the default, 0.005
        run(model, tracker, [(1, 0)])
        assert tracker.oscillating_fraction == 0.5  # about 0.008
        assert OscillationTracker(model, oscillating_above=0.003).oscillating_fraction == 1.0

    def test_integers_are_those_of_the_forward(self, make_prepared):
        model = make_prepared(weight_granularity="per_channel", weight_scheme="asymmetric")
        OscillationTracker(model).tick()
        quantizer = model.pw.weight_quantizer
        on_grid = (model.pw.oscillation.previous_int - quantizer.zero_point.round().view(-1, 1, 1, 1)) * (
            quantizer.scale.view(-1, 1, 1, 1)
        )
        assert torch.equal(on_grid, model.pw.weight)

    def test_bytes_per_weight_are_at_most_ten(self):
        model = one_layer(*range(-8, 8))
        OscillationTracker(model).tick(0.01)
        buffers = list(model[0].oscillation.buffers())
        per_weight = [b for b in buffers if b.shape == model[0].latent_weight.shape]
        assert sum(b.element_size() for b in per_weight) <= 10
        assert sum(b.numel() * b.element_size() for b in buffers if b.numel() <= 2) <= 16, "and a little per layer"
        assert all(b.shape == model[0].latent_weight.shape or b.numel() <= 2 for b in buffers)


class TestCauses:
    """A latent weight of 1.45 has integer 1 at scale 1 and 2 at scale 0.9."""

    def ticked(self, model, tracker, steps):
        for weight, scale in steps:
            set_integers(model, *weight)
            model[0].weight_quantizer.set_range(torch.tensor([scale]))
            tracker.tick()
        return model[0].oscillation

    def test_moving_scale_is_counted_apart(self):
        model = one_layer(1.45, 0.0)
        tracker = OscillationTracker(model, momentum=0.5, count_total=True)
        state = self.ticked(model, tracker, [((1.45, 0.0), s) for s in (1.0, 0.9, 1.0, 0.9)])
        assert state.total.tolist() == state.total_by_scale.tolist() == [[2, 0]]
        assert tracker.scale_caused_fraction == 1.0

    def test_moving_weight_is_not(self):
        model = one_layer(1.4)
        tracker = OscillationTracker(model, momentum=0.5, count_total=True)
        state = self.ticked(model, tracker, [((w,), 1.0) for w in (1.4, 1.6, 1.4, 1.6)])
        assert (state.total.item(), state.total_by_scale.item()) == (2, 0)
        assert tracker.scale_caused_fraction == 0.0

    def test_weight_that_would_have_moved_anyway_counts_as_its_own(self):
        model = one_layer(1.4)
        tracker = OscillationTracker(model, momentum=0.5, count_total=True)
        state = self.ticked(model, tracker, [((1.4,), 1.0), ((1.6,), 0.9), ((1.2,), 1.0)])
        assert (state.total.item(), state.total_by_scale.item()) == (1, 0)

    def test_share_is_of_recent_oscillations_of_all_layers(self):
        model = one_layer(1.45, 1.4, 0.0, 0.0)
        tracker = OscillationTracker(model, momentum=0.5)
        steps = [((1.45, w, 0.0, 0.0), s) for w, s in ((1.4, 1.0), (1.6, 0.97), (1.4, 1.0))]
        self.ticked(model, tracker, steps)
        # 1.45 / 0.97 = 1.495, so only the second weight oscillates, by itself
        assert tracker.scale_caused_fraction == 0.0
        self.ticked(model, tracker, [((1.45, 1.4, 0.0, 0.0), s) for s in (0.9, 1.0)])
        # the first has moved up and down with the scale, the second too: 1.4 / 0.9 = 1.56
        assert 0.5 < tracker.scale_caused_fraction < 1.0

    def test_zero_point_counts_as_part_of_the_scale(self):
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        prepare_qat(model, OscQATConfig(activation_bits=None, first_last_bits=4, weight_scheme="asymmetric"))
        set_integers(model, 1.0)
        tracker = OscillationTracker(model, momentum=0.5, count_total=True)
        for zero_point in (3.0, 4.0, 3.0):
            model[0].weight_quantizer.set_range(torch.ones(1), torch.tensor([zero_point]))
            tracker.tick()
        state = model[0].oscillation
        assert (state.total.item(), state.total_by_scale.item()) == (1, 1)


class TestWhatIsTracked:
    def test_wide_layers_are_left_out(self, make_prepared):
        model = make_prepared(weight_bits=4)
        tracker = OscillationTracker(model)
        assert list(tracker.layers) == ["dw", "pw"]
        assert not hasattr(model.stem, "oscillation")
        assert tracker.num_weights == model.dw.latent_weight.numel() + model.pw.latent_weight.numel()

    def test_max_bits_moves_the_limit(self, make_prepared):
        model = make_prepared(weight_bits=4, overrides={"pw": {"weight_bits": 2}})
        assert list(OscillationTracker(model, max_bits=3).layers) == ["pw"]
        assert list(OscillationTracker(model, max_bits=8).layers) == ["stem", "dw", "pw", "head"]

    def test_layer_whose_weight_stays_float_is_left_out(self, make_prepared):
        model = make_prepared(overrides={"pw": {"weight_bits": None}})
        assert list(OscillationTracker(model).layers) == ["dw"]

    def test_model_with_wide_layers_only_is_tracked_by_doing_nothing(self, make_prepared):
        model = make_prepared(weight_bits=8)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        tracker = OscillationTracker(model)
        tracker.tick(0.1)
        assert (tracker.layers, tracker.num_weights, tracker.state_dict()) == ({}, 0, {})
        assert (tracker.oscillating_fraction, tracker.frozen_fraction) == (0.0, 0.0)
        assert model.state_dict().keys() == before.keys()

    def test_float_model_is_an_error(self, make_net):
        with pytest.raises(ValueError, match="expected a prepared one: run prepare_qat first"):
            OscillationTracker(make_net())

    @pytest.mark.parametrize("momentum", [0, -0.5, 1.01, float("nan")])
    def test_momentum_outside_of_its_range_is_an_error(self, momentum):
        with pytest.raises(ValueError, match=rf"got momentum={momentum}, expected a number in \(0, 1\]"):
            OscillationTracker(one_layer(0), momentum=momentum)

    def test_second_tracker_goes_on_where_the_first_was(self):
        model = one_layer(0)
        run(model, OscillationTracker(model, momentum=0.5), [(0,), (1,)])
        run(model, OscillationTracker(model, momentum=0.5), [(0,)])
        assert model[0].oscillation.frequency.item() == 0.5

    def test_second_tracker_counts_totals_if_asked_to(self):
        model = one_layer(0)
        OscillationTracker(model)
        tracker = OscillationTracker(model, count_total=True)
        run(model, tracker, [(0,), (1,), (0,)])
        assert model[0].oscillation.total.tolist() == [[1]]


class TestWhatMovesTheStatistics:
    @pytest.fixture
    def model(self, make_prepared):
        return make_prepared()

    @pytest.fixture
    def tracker(self, model):
        tracker = OscillationTracker(model, momentum=0.5)
        tracker.tick()
        with torch.no_grad():
            model.pw.latent_weight.neg_()
        return tracker

    def state(self, tracker):
        return {name: tensor.clone() for name, tensor in tracker.state_dict().items()}

    @pytest.mark.parametrize("training", [True, False])
    def test_forward_and_backward_do_not(self, model, tracker, images, training):
        before = self.state(tracker)
        model.train(training)
        model(images).sum().backward()
        self.assert_same(before, tracker)

    def test_batchnorm_reestimation_does_not(self, model, tracker, images):
        before = self.state(tracker)
        reestimate_batchnorm(model, [images])
        self.assert_same(before, tracker)

    def test_packing_does_not(self, model, tracker):
        before = self.state(tracker)
        pack(model)
        self.assert_same(before, tracker)

    def test_a_tick_does(self, tracker):
        before = self.state(tracker)
        tracker.tick()
        with pytest.raises(AssertionError):
            self.assert_same(before, tracker)

    def assert_same(self, before, tracker):
        after = tracker.state_dict()
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


class TestFreezing:
    def test_weight_freezes_at_its_rounded_mean_integer(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=0.5)
        # The mean starts at the integer of the first tick with a threshold, 5, and takes half of each later one.
        # means before each tick: 5, 5, 2.5, 3.75; frequency: 0, 0, 0.5, 0.75
        run(model, tracker, [(5,), (0,), (5,), (0,)], threshold=0.6)
        assert model[0].weight_quantizer.frozen_int.tolist() == [[4]]
        assert model[0].oscillation.mean_int.tolist() == [[1.875]]

    def test_weight_freezes_at_its_present_integer_without_the_mean(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=0.5, use_ema=False)
        run(model, tracker, [(4,), (0,), (4,), (0,)], threshold=0.6)
        assert model[0].weight_quantizer.frozen_int.tolist() == [[0]]

    def test_threshold_must_be_exceeded(self):
        model = one_layer(0, 0)
        tracker = OscillationTracker(model, momentum=0.5)
        run(model, tracker, [(0, 0), (1, 1), (0, 0), (1, 0)], threshold=0.5)
        assert model[0].oscillation.frequency.tolist() == [[0.75, 0.25]]
        assert (model[0].weight_quantizer.frozen_int != LIVE).tolist() == [[True, False]]

    def test_threshold_zero_never_freezes(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=1.0)
        run(model, tracker, [(0,), (1,)] * 20)
        assert model[0].oscillation.frequency.item() == 1.0
        assert tracker.frozen_fraction == 0
        assert model[0].oscillation.mean_int.isnan().all()

    def test_mean_begins_anew_after_a_time_without_freezing(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=0.5)
        run(model, tracker, [(0,)] * 3, threshold=0.9)
        run(model, tracker, [(5,), (4,)] * 3)
        assert model[0].oscillation.mean_int.isnan().all()
        run(model, tracker, [(5,)], threshold=0.6)
        assert model[0].weight_quantizer.frozen_int.tolist() == [[5]]

    def test_frozen_integer_acts_from_the_next_forward_on(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=1.0, use_ema=False)
        run(model, tracker, [(0,), (1,)], threshold=0.5)
        set_integers(model, 0)
        assert model(torch.ones(1, 1)).item() == 0.0
        tracker.tick(0.5)
        set_integers(model, 5)
        assert model(torch.ones(1, 1)).item() == 0.0
        assert model[0].weight_quantizer.to_int(model[0].latent_weight).item() == 0

    def test_frozen_weight_keeps_its_integer_while_weight_decay_moves_its_latent(self):
        model = one_layer(6, 6)
        tracker = OscillationTracker(model, momentum=0.5)
        optimizer = torch.optim.SGD([model[0].latent_weight], lr=1.0, momentum=0.9, weight_decay=0.2)
        run(model, tracker, [(6, 6), (7, 6), (6, 6)], threshold=0.4)
        latent = model[0].latent_weight.detach().clone()
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.zeros(1, 2)).sum().backward()
            tracker.tick(0.4)
            optimizer.step()
        assert bool(((model[0].latent_weight - latent).abs() > 1).all())
        integers = model[0].weight_quantizer.to_int(model[0].latent_weight)
        assert integers[0, 0].item() == 6
        assert integers[0, 1].item() != 6
        stored = unpack_bits(pack(model)[0].weight_packed, 4, 2) - 8
        assert stored.tolist() == integers.tolist()

    def test_scale_goes_on_learning_from_a_frozen_weight(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=1.0, use_ema=False)
        run(model, tracker, [(4,), (5,), (4,)], threshold=0.5)
        set_integers(model, -7)
        model(torch.ones(1, 1)).sum().backward()
        assert model[0].weight_quantizer.scale.grad.tolist() == [4.0]
        assert model[0].latent_weight.grad.tolist() == [[0.0]]

    def test_freezing_leaves_latent_weights_alone(self):
        model = one_layer(0)
        tracker = OscillationTracker(model, momentum=1.0)
        run(model, tracker, [(4,), (5,), (4.25,)], threshold=0.5)
        assert model[0].latent_weight.item() == 4.25

    def test_eight_bit_weights_freeze_in_the_whole_range(self):
        model = one_layer(0, 0, bits=8)
        tracker = OscillationTracker(model, momentum=1.0, max_bits=8, use_ema=False)
        run(model, tracker, [(0, 0), (127, -127), (-128, 127)], threshold=0.5)
        assert model[0].weight_quantizer.frozen_int.tolist() == [[-128, 127]]
        assert model[0].weight_quantizer.frozen_int.dtype == torch.int16


class TestResume:
    SEQUENCE = [(0, 0, 2), (1, 0, 2), (0, 1, 3), (1, 1, 3), (2, 0, 4), (1, 1, 4), (2, 1, 5), (1, 0, 5)]

    def finish(self, model, tracker, begin):
        run(model, tracker, self.SEQUENCE[begin:], threshold=0.4)
        return {name: tensor.clone() for name, tensor in tracker.state_dict().items()}

    @pytest.fixture
    def uninterrupted(self):
        model = one_layer(0, 0, 0)
        return self.finish(model, OscillationTracker(model, momentum=0.3, count_total=True), 0)

    def assert_equal(self, state, uninterrupted):
        assert state.keys() == uninterrupted.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, uninterrupted[name], rtol=0, atol=0, equal_nan=True, msg=name)
        assert 0 < int((state["0.frozen_int"] != LIVE).sum()) < 3

    @pytest.mark.parametrize("stop", range(len(SEQUENCE)))
    def test_from_the_trackers_state_dict_equals_a_run_that_never_stopped(self, uninterrupted, stop):
        first = one_layer(0, 0, 0)
        tracker = OscillationTracker(first, momentum=0.3, count_total=True)
        run(first, tracker, self.SEQUENCE[:stop], threshold=0.4)
        state = copy.deepcopy(tracker.state_dict())
        second = one_layer(0, 0, 0)
        tracker = OscillationTracker(second, momentum=0.3, count_total=True)
        tracker.load_state_dict(state)
        self.assert_equal(self.finish(second, tracker, stop), uninterrupted)

    def test_from_the_models_state_dict_equals_a_run_that_never_stopped(self, uninterrupted):
        first = one_layer(0, 0, 0)
        run(first, OscillationTracker(first, momentum=0.3, count_total=True), self.SEQUENCE[:4], threshold=0.4)
        second = one_layer(0, 0, 0)
        tracker = OscillationTracker(second, momentum=0.3, count_total=True)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        self.assert_equal(self.finish(second, tracker, 4), uninterrupted)

    def test_from_a_deep_copy_of_the_model_equals_a_run_that_never_stopped(self, uninterrupted):
        first = one_layer(0, 0, 0)
        run(first, OscillationTracker(first, momentum=0.3, count_total=True), self.SEQUENCE[:4], threshold=0.4)
        second = copy.deepcopy(first)
        tracker = OscillationTracker(second, momentum=0.3, count_total=True)
        self.assert_equal(self.finish(second, tracker, 4), uninterrupted)

    def test_state_with_other_names_is_an_error_that_names_them(self):
        tracker = OscillationTracker(one_layer(0))
        state = tracker.state_dict()
        state["1.frequency"] = state.pop("0.frequency")
        with pytest.raises(ValueError, match=r"without \['0.frequency'\] and with \['1.frequency'\]"):
            tracker.load_state_dict(state)

    def test_state_of_another_shape_is_an_error_that_names_it(self):
        tracker = OscillationTracker(one_layer(0))
        other = OscillationTracker(one_layer(0, 0)).state_dict()
        with pytest.raises(ValueError, match=r"got 0\.\w+ of shape \[1, 2\], expected \[1, 1\]"):
            tracker.load_state_dict(other)

    def test_state_of_another_width_is_an_error(self):
        tracker = OscillationTracker(one_layer(0))
        state = tracker.state_dict()
        state["0.frozen_int"] = torch.full_like(state["0.frozen_int"], 9)
        with pytest.raises(
            ValueError, match=r"expected torch\.int8 in \[-8, 7\]: they are of a grid of another width"
        ):
            tracker.load_state_dict(state)

    @pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
    def test_cast_of_the_model_leaves_the_statistics_in_their_dtypes(self, cast):
        model = one_layer(0)
        run(model, OscillationTracker(model, momentum=0.3), [(0,), (1,), (0,)], threshold=0.1)
        before = {n: (b.dtype, b.clone()) for n, b in model[0].oscillation.named_buffers()}
        getattr(model, cast)()
        for name, buffer in model[0].oscillation.named_buffers():
            assert buffer.dtype == before[name][0]
            assert torch.equal(buffer, before[name][1])


@pytest.mark.parametrize("make", [
    lambda model: ModelEmaV3(model, decay=0.5),
    lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
], ids=["timm", "torch"])  # fmt: skip
def test_averages_of_weights_take_frozen_integers_over_as_they_are(make):
    model = one_layer(0, 2)
    tracker = OscillationTracker(model, momentum=0.5)
    average = make(model)
    for first in (5, 0, 5, 0):
        run(model, tracker, [(first, 2)], threshold=0.6)
        average.update(model) if isinstance(average, ModelEmaV3) else average.update_parameters(model)
    assert model[0].weight_quantizer.frozen_int.tolist() == [[4, LIVE]]
    assert average.module[0].weight.tolist() == [[4.0, 2.0]]
