"""Rounding to a grid and its gradients, compared with the formulas spelled out value by value."""

import itertools
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from toolchain import needs_compiler
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from hf_oscqat import fake_quantize
from hf_oscqat.quantization.functional import (
    broadcast_to_axis,
    frozen_dtype,
    is_frozen,
    live_sentinel,
    lsq_gradient_scale,
    output_axis,
    to_int,
)
from hf_oscqat.quantization.gradient_estimators import StochasticRounding, make_gradient_estimator

LIVE = live_sentinel(torch.int8)


def by_formula(x, scale, zero_point, qmin, qmax, axis, frozen_int, grad):
    """Forward and gradients in plain Python, one value after the other."""
    y, grad_x = torch.zeros_like(x), torch.zeros_like(x)
    grad_scale = torch.zeros_like(scale)
    grad_zero_point = None if zero_point is None else torch.zeros_like(zero_point)
    for index in itertools.product(*map(range, x.shape)):
        channel = index[axis] if scale.numel() > 1 else 0
        s, g, u = scale[channel].item(), grad[index].item(), x[index].item() / scale[channel].item()
        z, zero_on_grid = 0, False
        if zero_point is not None:
            zero_on_grid = qmin <= round(zero_point[channel].item()) <= qmax
            z = min(max(round(zero_point[channel].item()), qmin), qmax)
        w_int = round(u) + z
        if frozen_int is not None and frozen_int[index] != live_sentinel(frozen_int.dtype):
            w_int, state = frozen_int[index].item(), "frozen"
        elif qmin <= w_int <= qmax:
            state = "inside"
        else:
            w_int, state = min(max(w_int, qmin), qmax), "clamped"
        y[index] = s * (w_int - z)
        if state == "inside":
            grad_x[index] = g
            grad_scale[channel] += g * (round(u) - u)
        else:
            grad_scale[channel] += g * (w_int - z)
            if zero_on_grid:
                grad_zero_point[channel] -= g * s
    return y, grad_x, grad_scale, grad_zero_point


def tensors(*, per_channel, asymmetric, axis=0, off_grid=False):
    """Values of which many are clamped on either side, on a grid of 3 bits."""
    x = 2 * torch.randn(4, 5, 3, dtype=torch.float64)
    channels = x.shape[axis] if per_channel else 1
    scale = 0.2 + torch.rand(channels, dtype=torch.float64)
    zero_point = None
    if asymmetric:
        zero_point = torch.linspace(0.6, 6.3, channels + 1, dtype=torch.float64)[1:]
        if off_grid:
            zero_point = zero_point + torch.tensor([-9.0, 9.0]).repeat(channels)[:channels]
    return x, scale, zero_point


CASES = [
    (per_channel, axis, asymmetric, off_grid, frozen)
    for per_channel, axis in ((False, 0), (True, 0), (True, 1), (True, -1))
    for asymmetric, off_grid in ((False, False), (True, False), (True, True))
    for frozen in (False, True)
]


@pytest.mark.parametrize(("per_channel", "axis", "asymmetric", "off_grid", "frozen"), CASES)
def test_forward_and_gradients_equal_the_formulas(per_channel, axis, asymmetric, off_grid, frozen):
    x, scale, zero_point = tensors(per_channel=per_channel, asymmetric=asymmetric, axis=axis, off_grid=off_grid)
    qmin, qmax = (0, 7) if asymmetric else (-4, 3)
    frozen_int = None
    if frozen:
        frozen_int = torch.randint(qmin, qmax + 1, x.shape, dtype=torch.int8)
        frozen_int[torch.rand(x.shape) < 0.5] = LIVE
    grad = torch.randn_like(x)
    expected = by_formula(x, scale, zero_point, qmin, qmax, axis, frozen_int, grad)
    leaves = [t if t is None else t.requires_grad_() for t in (x, scale, zero_point)]
    y = fake_quantize(*leaves, qmin, qmax, axis=axis, frozen_int=frozen_int)
    y.backward(grad)
    for actual, wanted in zip((y, *(None if t is None else t.grad for t in leaves)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    # The case is of use only if it has values of both kinds.
    assert 0 < int((expected[1] != 0).sum()) < x.numel()


def test_gradient_scale_multiplies_the_gradients_of_scale_and_zero_point_only():
    x, scale, zero_point = (t.requires_grad_() for t in tensors(per_channel=True, asymmetric=True))
    once = torch.autograd.grad(fake_quantize(x, scale, zero_point, 0, 7).sum(), (x, scale, zero_point))
    half = torch.autograd.grad(
        fake_quantize(x, scale, zero_point, 0, 7, gradient_scale=0.5).sum(), (x, scale, zero_point)
    )
    assert torch.equal(half[0], once[0])
    torch.testing.assert_close(half[1], once[1] / 2)
    torch.testing.assert_close(half[2], once[2] / 2)


@pytest.mark.parametrize(("qmin", "qmax"), [(-4, 3), (0, 7)])
@pytest.mark.parametrize("zero_point", [None, torch.tensor([3.0])])
def test_values_exactly_at_the_bounds_pass_the_gradient(qmin, qmax, zero_point):
    # torch 2.15 changed the gradient of clamp at its own bounds from 1 to 0.
    z = 0 if zero_point is None else 3
    x = torch.tensor([qmin - z, qmax - z], dtype=torch.float32).mul_(0.5).requires_grad_()
    fake_quantize(x, torch.tensor([0.5]), zero_point, qmin, qmax).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("x", [-4.6, 3.6])
def test_values_half_a_step_beyond_the_bounds_do_not(x):
    x = torch.tensor([x], requires_grad=True)
    fake_quantize(x, torch.ones(1), None, -4, 3).sum().backward()
    assert x.grad.item() == 0


@pytest.mark.parametrize(
    ("zero_point", "passes"), [(0.0, True), (7.0, True), (-0.4, True), (-0.6, False), (7.6, False)]
)
def test_zero_point_learns_while_its_rounded_value_is_on_the_grid(zero_point, passes):
    x = torch.tensor([100.0, -100.0, 100.0])
    zero_point = torch.tensor([zero_point], requires_grad=True)
    fake_quantize(x, torch.tensor([0.5]), zero_point, 0, 7).sum().backward()
    assert zero_point.grad.item() == (-1.5 if passes else 0.0)


def test_frozen_value_has_the_gradient_of_its_integer_and_passes_none_to_the_latent():
    x = torch.tensor([0.2, 0.2], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    frozen_int = torch.tensor([-3, LIVE], dtype=torch.int8)
    y = fake_quantize(x, scale, None, -4, 3, frozen_int=frozen_int)
    assert y.tolist() == [-1.5, 0.0]
    y[0].backward()
    assert x.grad.tolist() == [0.0, 0.0]
    assert scale.grad.tolist() == [-3.0]


def test_halves_round_to_even_as_torch_does():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert to_int(x, torch.ones(1), None, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.floats(0.0009765625, 100, width=32),
    st.integers(2, 8),
    st.booleans(),
)
def test_integers_are_on_the_grid_and_quantizing_twice_changes_nothing(values, scale, bits, signed):
    x, scale = torch.tensor(values), torch.tensor([scale])
    qmin = -(2 ** (bits - 1)) if signed else 0
    qmax = qmin + 2**bits - 1
    x_int = to_int(x, scale, None, qmin, qmax)
    assert bool(((x_int >= qmin) & (x_int <= qmax) & (x_int == x_int.round())).all())
    y = fake_quantize(x, scale, None, qmin, qmax)
    assert torch.equal(y, x_int * scale)
    assert torch.equal(fake_quantize(y, scale, None, qmin, qmax), y)


def test_integers_have_no_gradient():
    x = torch.randn(3, requires_grad=True)
    assert not to_int(x, torch.ones(1, requires_grad=True), None, -4, 3).requires_grad


def test_arguments_are_left_alone():
    x, scale, zero_point = tensors(per_channel=False, asymmetric=True)
    before = x.clone(), scale.clone(), zero_point.clone()
    to_int(x, scale, zero_point, 0, 7)
    fake_quantize(x, scale, zero_point, 0, 7)
    assert all(torch.equal(a, b) for a, b in zip((x, scale, zero_point), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_rounded_in_float32(dtype):
    x = (torch.randn(4096) * 0.7).to(dtype)
    scale = torch.tensor([0.0123])
    y = fake_quantize(x, scale, None, -128, 127)
    assert y.dtype == dtype
    assert torch.equal(y, fake_quantize(x.float(), scale, None, -128, 127).to(dtype))
    assert to_int(x, scale, None, -128, 127).dtype == torch.float32
    # Rounding in half precision would put some of these in another bin.
    assert not torch.equal((x / scale.to(dtype)).round().clamp(-128, 127).float(), to_int(x, scale, None, -128, 127))


def test_scale_in_half_precision_does_not_make_the_rounding_so():
    x = (torch.randn(4096) * 0.7).bfloat16()
    scale = torch.tensor([0.0123], dtype=torch.bfloat16)
    assert torch.equal(to_int(x, scale, None, -128, 127), to_int(x.float(), scale.float(), None, -128, 127))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_input_are_summed_in_float32(dtype):
    x = (torch.randn(4096) * 0.7).to(dtype).requires_grad_()
    scale = torch.tensor([0.0123], requires_grad=True)
    fake_quantize(x, scale, None, -128, 127).backward(torch.ones(4096, dtype=dtype))
    wide = x.detach().float().requires_grad_()
    wide_scale = scale.detach().clone().requires_grad_()
    fake_quantize(wide, wide_scale, None, -128, 127).backward(torch.ones(4096))
    assert x.grad.dtype == dtype
    assert scale.grad.dtype == torch.float32
    assert torch.equal(x.grad.float(), wide.grad)
    torch.testing.assert_close(scale.grad, wide_scale.grad)


def test_float64_is_not_rounded_in_float32():
    x = torch.tensor([0.5 + 1e-9], dtype=torch.float64)
    assert to_int(x, torch.ones(1, dtype=torch.float64), None, -4, 3).tolist() == [1.0]
    assert to_int(x.float(), torch.ones(1), None, -4, 3).tolist() == [0.0]


@pytest.mark.parametrize(
    ("scale_shape", "x_shape", "axis"),
    [
        ((), (2, 3), 0),
        ((1,), (2, 3), 0),
        ((1,), (), 0),
        ((1,), (0, 3), 0),
        ((2,), (2, 3), 0),
        ((3,), (2, 3), 1),
        ((3,), (2, 3), -1),
        ((5,), (5,), 0),
        ((4,), (2, 3, 5, 4), 3),
        ((2, 1), (2, 3), 0),
        ((1, 3), (2, 3), 0),
    ],
)
def test_scale_of_any_documented_shape_gets_a_gradient_of_that_shape(scale_shape, x_shape, axis):
    x = torch.randn(x_shape, requires_grad=True)
    scale = torch.rand(scale_shape).add_(0.1).requires_grad_()
    zero_point = torch.full(scale_shape, 3.0, requires_grad=True)
    y = fake_quantize(x, scale, zero_point, 0, 7, axis=axis)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == (x.shape, x.shape)
    assert scale.grad.shape == zero_point.grad.shape == scale.shape


def test_unknown_gradient_estimator_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="got gradient_estimator='ewgs2', expected one of ste, ewgs, "):
        fake_quantize(torch.ones(1), torch.ones(1), None, -4, 3, gradient_estimator="ewgs2")


@pytest.mark.parametrize("estimator", ["ste", "ewgs"])
@pytest.mark.parametrize(("asymmetric", "frozen"), [(False, False), (True, True)])
def test_compiled_whole_graph_equals_eager(asymmetric, frozen, estimator):
    estimator = make_gradient_estimator(estimator)

    def run(x, scale, zero_point, frozen_int):
        qmin, qmax = (-4, 3) if zero_point is None else (0, 7)
        return fake_quantize(
            x,
            scale,
            zero_point,
            qmin,
            qmax,
            axis=1,
            frozen_int=frozen_int,
            gradient_scale=0.3,
            gradient_estimator=estimator,
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, scale, zero_point = tensors(per_channel=True, asymmetric=asymmetric, axis=1)
    frozen_int = None
    if frozen:
        frozen_int = torch.full(x.shape, LIVE, dtype=torch.int8)
        frozen_int[0] = 2
    grad = torch.randn_like(x)
    results = []
    for function in (run, compiled):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, scale, zero_point)]
        y = function(*leaves, frozen_int)
        y.backward(grad)
        results.append([y.detach(), *(t.grad for t in leaves if t is not None)])
    for eager, ours in zip(*results, strict=True):
        assert torch.equal(eager, ours)


def test_sentinel_lies_outside_of_every_grid_of_its_dtype():
    for bits in range(2, 9):
        dtype = frozen_dtype(bits)
        assert live_sentinel(dtype) < -(2 ** (bits - 1))
        assert torch.iinfo(dtype).max >= 2**bits - 1
    assert frozen_dtype(7) == torch.int8
    assert frozen_dtype(8) == torch.int16


def test_frozen_mask_is_everything_but_the_sentinel():
    frozen_int = torch.tensor([LIVE, 0, -4, 127], dtype=torch.int8)
    assert is_frozen(frozen_int).tolist() == [False, True, True, True]


def test_gradient_scale_of_lsq():
    x = torch.empty(4, 5, 2)
    assert lsq_gradient_scale(x, torch.empty(1), 7) == pytest.approx((40 * 7) ** -0.5)
    assert lsq_gradient_scale(x, torch.empty(4), 7) == pytest.approx((10 * 7) ** -0.5)


def test_output_channels_are_on_axis_one_of_transposed_convolutions_only():
    assert output_axis(nn.ConvTranspose2d(2, 2, 1)) == output_axis(nn.ConvTranspose1d(2, 2, 1)) == 1
    assert output_axis(nn.Conv2d(2, 2, 1)) == output_axis(nn.Linear(2, 2)) == 0
    assert output_axis(nn.ConvTranspose2d(4, 4, 1, groups=4)) == 0  # depthwise: its weight is [channels, 1, ..]
    assert output_axis(nn.ConvTranspose2d(4, 8, 1, groups=4)) == 1


def test_broadcast_is_a_view():
    scale = torch.arange(3.0)
    view = broadcast_to_axis(scale, 4, 1)
    assert view.shape == (1, 3, 1, 1)
    assert view.data_ptr() == scale.data_ptr()


class TestSurrogate:
    """Rounding as u plus a constant: a smooth function that has, where it was linearised, the gradients we define."""

    @pytest.mark.parametrize("activation", [None, (0.0, 1.5)])
    @pytest.mark.parametrize("asymmetric", [False, True])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_gradients_are_its_gradients(self, channels, asymmetric, activation):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(3, 40, generator=generator, dtype=torch.float64).requires_grad_()
        scale = (torch.rand(channels, generator=generator, dtype=torch.float64) * 0.2 + 0.1).requires_grad_()
        zero_point = torch.full((channels,), 6.2, dtype=torch.float64, requires_grad=True) if asymmetric else None
        qmin, qmax = (0, 15) if asymmetric else (-8, 7)
        with torch.no_grad():
            shown = x if activation is None else x.clamp(*activation)
            u = shown / scale.view(-1, 1)
            rounding = u.round() - u
            zero_rounding = zero_point.round() - zero_point if asymmetric else None
            position = u.round() + (zero_point.round().view(-1, 1) if asymmetric else 0)
            clamped = position.clamp(qmin, qmax)

        def surrogate(x, scale, zero_point):
            shown = x if activation is None else x.clamp(*activation)
            z = 0 if zero_point is None else (zero_point + zero_rounding).view(-1, 1)
            inside = shown / scale.view(-1, 1) + rounding + z
            return scale.view(-1, 1) * (torch.where(position == clamped, inside, clamped) - z)

        inputs = [t for t in (x, scale, zero_point) if t is not None]
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)

        def ours(*inputs):
            zero_point = inputs[2] if asymmetric else None
            return fake_quantize(inputs[0], inputs[1], zero_point, qmin, qmax, activation=activation)

        assert torch.autograd.gradcheck(lambda *i: surrogate(*i, *[None] * (3 - len(i))), inputs)
        expected = torch.autograd.grad((surrogate(*inputs, *[None] * (3 - len(inputs))) * weights).sum(), inputs)
        grads = torch.autograd.grad((ours(*inputs) * weights).sum(), inputs)
        assert all(bool((g != 0).any()) for g in grads)
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


class TestTransforms:
    def loss(self, x, scale):
        return fake_quantize(x, scale, None, -8, 7).square().sum()

    def test_grad_is_that_of_autograd(self):
        x, scale = torch.randn(4, 5).requires_grad_(), torch.tensor([0.1]).requires_grad_()
        expected = torch.autograd.grad(self.loss(x, scale), (x, scale))
        found = torch.func.grad(self.loss, argnums=(0, 1))(x.detach(), scale.detach())
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    def test_vmap_is_a_loop(self):
        x, scale = torch.randn(4, 5), torch.tensor([0.1])
        assert torch.equal(
            torch.func.vmap(lambda row: fake_quantize(row, scale, None, -8, 7))(x),
            torch.stack([fake_quantize(row, scale, None, -8, 7) for row in x]),
        )
        torch.testing.assert_close(
            torch.func.vmap(torch.func.grad(self.loss), in_dims=(0, None))(x, scale),
            torch.stack([torch.func.grad(self.loss)(row, scale) for row in x]),
        )

    def test_export_and_compile_trace_it(self):
        class Module(torch.nn.Module):
            def forward(self, x):
                return fake_quantize(x, torch.tensor([0.1]), None, -8, 7)

        x = torch.randn(4, 5)
        assert torch.equal(torch.export.export(Module(), (x,)).module()(x), Module()(x))
        explained = torch._dynamo.explain(Module())(x)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_in_float32(self, dtype):
        # In bfloat16 the quotient would have 8 bits, and neighbouring integers near 250 would be one.
        x = torch.arange(0, 25, 0.125).to(dtype)
        y = fake_quantize(x, torch.tensor([0.1]), None, 0, 255)
        assert y.dtype == dtype
        assert torch.equal(y, fake_quantize(x.float(), torch.tensor([0.1]), None, 0, 255).to(dtype))


@needs_compiler
@pytest.mark.parametrize("activation", [None, (0.0, 6.0), (0.0, float("inf"))])
@pytest.mark.parametrize("estimator", ["ste", "ewgs"])
def test_compiled_whole_each_direction_is_one_loop_over_the_values(activation, estimator):
    x, scale = torch.randn(4, 4, 8, 16, requires_grad=True), torch.ones(1, requires_grad=True)

    def forward(x, scale):
        return fake_quantize(x, scale, None, 0, 15, gradient_estimator=estimator, activation=activation)

    def step():
        torch.compile(forward)(x, scale).backward(torch.ones_like(x))

    torch._dynamo.reset()
    # What a cache holds is not written again.
    with functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        _, sources = run_and_get_code(step)
    loops = [re.findall(r"for\(int64_t \w+=[^;]*; \w+<static_cast<int64_t>\((\d+)L\)", source) for source in sources]
    assert [of_one.count(str(x.numel())) for of_one in loops] == [1, 1]


def test_activation_with_its_bounds_in_the_wrong_order_is_an_error():
    with pytest.raises(ValueError, match=r"got activation=\(6.0, 0.0\), expected its smallest value"):
        fake_quantize(torch.zeros(2), torch.ones(1), None, 0, 7, activation=(6.0, 0.0))


@pytest.mark.parametrize("axis_size", [1, 3])
def test_estimators_of_others_may_expand_what_they_round_to_their_noise(axis_size):
    class Expanding(StochasticRounding):
        def round(self, u, noise):
            return (u.expand(noise.shape) + noise).floor()

    x, scale = torch.randn(2, 3, 4, 5), torch.full((axis_size,), 0.3)
    torch.manual_seed(0)
    y = fake_quantize(x, scale, None, -8, 7, axis=1, gradient_estimator=Expanding(), activation=(0.0, 2.0))
    torch.manual_seed(0)
    expected = fake_quantize(x.clamp(0.0, 2.0), scale, None, -8, 7, axis=1, gradient_estimator=Expanding())
    assert torch.equal(y, expected)


def test_activation_is_that_of_the_module_before():
    x = (torch.randn(1000) * 4).requires_grad_()
    other = x.detach().clone().requires_grad_()
    scale = torch.tensor([0.45])  # 15 steps reach beyond 6
    fake_quantize(x, scale, None, 0, 15, activation=(0.0, 6.0)).square().sum().backward()
    fake_quantize(torch.nn.functional.relu6(other), scale, None, 0, 15).square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert bool((x.grad[(x > 0) & (x < 6)] != 0).any())


@given(
    bounds=st.sampled_from([(0.0, 6.0), (0.0, torch.inf), (-6.0, 6.0), (-torch.inf, -1.0), (2.0, 2.3)]),
    grid=st.sampled_from([(0, 15), (-8, 7), (0, 3)]),
    zero_point=st.sampled_from([None, -9.0, 0.0, 4.4, 7.0, 30.0]),
    scale=st.floats(2**-7, 4.0, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    values=st.lists(
        st.floats(-20, 20, width=32, allow_subnormal=False) | st.sampled_from([torch.inf, -torch.inf, torch.nan]),
        min_size=1,
    ),
    estimator=st.sampled_from(["ste", "stochastic_rounding"]),
)
@example(
    bounds=(0.0, 6.0),
    grid=(0, 15),
    zero_point=None,
    scale=6 / 12.5,
    dtype=torch.float32,
    values=[7.0],
    estimator="ste",
)  # a tie at 6
def test_activation_clamps_first_whatever_it_is(bounds, grid, zero_point, scale, dtype, values, estimator):
    z = None if zero_point is None else torch.tensor([zero_point])
    x = torch.tensor([*values, *bounds, *(scale * (k + 0.5) for k in range(-9, 16))], dtype=dtype)
    rounded = []
    for activation, each in ((bounds, x), (None, x.clamp(*bounds))):
        torch.manual_seed(0)
        arguments = (each.requires_grad_(), torch.tensor([scale]), z, *grid)
        rounded.append(fake_quantize(*arguments, activation=activation, gradient_estimator=estimator).detach())
    assert torch.equal(*(y.nan_to_num(123.0) for y in rounded))
