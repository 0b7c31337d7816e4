"""Every way to run a function over memory computes the same, in any layout; and what happens without a compiler."""

import itertools
import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch
from toolchain import needs_compiler
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hf_oscqat import OscillationTracker, dampening_loss, fake_quantize
from hf_oscqat.quantization import kernels
from hf_oscqat.quantization.functional import live_sentinel, quantize, quantize_backward
from hf_oscqat.quantization.gradient_estimators import EWGS, STRAIGHT_THROUGH, GradientEstimator
from hf_oscqat.quantization.kernels import fused_kernels, one_pass
from hf_oscqat.remedies.dampening import squared_distance, squared_distance_backward
from hf_oscqat.remedies.tracker import track


@pytest.fixture(params=["compiled", "in chunks"], autouse=True)
def way(request, monkeypatch):
    """Run everything, small as it is, by one of the ways other than the plain one."""
    if request.param == "compiled" and needs_compiler.args[0]:
        pytest.skip(needs_compiler.kwargs["reason"])
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "CHUNK", 100)
    monkeypatch.setattr(kernels, "_without_compiler", set())
    monkeypatch.setattr(kernels, "_calls", {})
    with fused_kernels(request.param == "compiled"), torch.no_grad():
        yield request.param


LAYOUTS = {
    "a row": lambda: torch.randn(333),
    "contiguous": lambda: torch.randn(3, 4, 5, 6),
    "channels last": lambda: torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
    "not dense": lambda: torch.randn(3, 4, 5, 12)[..., ::2],
    "one value": lambda: torch.randn(1),
}
BOUNDS = (-8, 7)
BACKWARD = (-8, 7, 0.5)


def some_frozen(x):
    frozen = torch.randint_like(x, -8, 8, dtype=torch.int8)
    return torch.where(x > 0.5, frozen, live_sentinel(torch.int8))


def assert_same(one, other, rtol=1e-5):
    for a, b in zip(one, other, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)


CASES = {
    # what is run over, its dtype, whether some of it is frozen, the activation before it
    **{layout: (make, torch.float32, False, None) for layout, make in LAYOUTS.items()},
    "some frozen": (LAYOUTS["contiguous"], torch.float32, True, None),
    "bfloat16": (LAYOUTS["channels last"], torch.bfloat16, False, None),
    "ReLU6 before": (LAYOUTS["contiguous"], torch.float32, False, (0.0, 6.0)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_quantizing_equals_the_plain_function(case):
    make, dtype, frozen, activation = case
    x, grad = make().to(dtype), make().to(dtype)
    frozen_int = some_frozen(x) if frozen else None
    parameters, static = (torch.tensor([0.11]), None), (STRAIGHT_THROUGH, activation)
    (y,) = one_pass(quantize, (x, frozen_int, None), parameters, BOUNDS, static=static)
    assert torch.equal(y, quantize((x, frozen_int, None), parameters, BOUNDS, 0, *static)[0])
    tensors = (x, grad, frozen_int, None)
    grads = one_pass(quantize_backward, tensors, parameters, BACKWARD, static=static)
    plain = quantize_backward(tensors, parameters, BACKWARD, 0, *static)
    assert_same(grads, plain)
    assert torch.equal(grads[0], plain[0])


@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "not dense"])
def test_a_scale_for_each_channel(layout, axis):
    x = LAYOUTS[layout]()
    grad = torch.randn_like(x)
    parameters = (torch.rand(x.shape[axis]) + 0.1, torch.randn(x.shape[axis]) * 3 + 8)
    static = (EWGS(), None)
    (y,) = one_pass(quantize, (x, None, None), parameters, (0, 15), axis=axis, static=static)
    assert torch.equal(y, quantize((x, None, None), parameters, (0, 15), axis, *static)[0])
    grads = one_pass(quantize_backward, (x, grad, None, None), parameters, (0, 15, 0.5), axis=axis, static=static)
    assert_same(grads, quantize_backward((x, grad, None, None), parameters, (0, 15, 0.5), axis, *static))


def test_gradient_in_another_layout_than_the_values():
    x, scale = LAYOUTS["channels last"](), torch.tensor([0.2])
    static = (STRAIGHT_THROUGH, None)
    for grad in (torch.randn(3, 4, 5, 6), torch.ones(1, 4, 1, 1).expand(3, 4, 5, 6)):
        grads = one_pass(quantize_backward, (x, grad, None, None), (scale, None), BACKWARD, static=static)
        assert_same(grads, quantize_backward((x, grad, None, None), (scale, None), BACKWARD, 0, *static))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "not dense"])
@pytest.mark.parametrize("freezes", [False, True])
def test_ticks_write_the_same_state(layout, freezes):
    weight = LAYOUTS[layout]()
    state = {
        "previous_int": torch.zeros_like(weight, dtype=torch.int8),
        "direction": torch.zeros_like(weight, dtype=torch.int8),
        "frequency": torch.zeros_like(weight),
        "mean_int": torch.zeros_like(weight),
        "frozen_int": torch.full_like(weight, live_sentinel(torch.int8), dtype=torch.int8),
        "total": torch.zeros_like(weight, dtype=torch.int32),
        "total_by_scale": torch.zeros_like(weight, dtype=torch.int32),
    }
    plain = {name: tensor.clone() for name, tensor in state.items()}
    previous = torch.tensor([0.3])
    for step in range(4):
        scale = torch.tensor([0.3 if step % 2 else 0.26])
        parameters, bounds = (scale, None, previous, None), (-8, 7, 0.5, 0.5, 0.4)
        moved = weight * (-1 if step % 3 == 1 else 1)
        counts = one_pass(
            track, (moved, *state.values()), parameters, bounds, static=(freezes, True), shaped=0, in_place=True
        )
        assert_same(counts, track((moved, *plain.values()), parameters, bounds, 0, freezes, True))
        assert counts[0].dtype == torch.float32
        for name, tensor in state.items():
            assert torch.equal(tensor, plain[name]), (step, name)
        previous = scale
    assert state["total"].sum() > 0
    assert bool((state["frozen_int"] != live_sentinel(torch.int8)).any()) is freezes


@pytest.mark.parametrize("layout", ["contiguous", "not dense"])
def test_dampening_equals_the_plain_function(layout):
    tensors, parameters = (LAYOUTS[layout](), None), (torch.tensor([0.1]), None)
    assert_same(
        one_pass(squared_distance, tensors, parameters, BOUNDS, shaped=0),
        squared_distance(tensors, parameters, BOUNDS, 0),
    )
    upstream = (*parameters, torch.tensor([0.7]))
    (grad,) = one_pass(squared_distance_backward, tensors, upstream, BOUNDS)
    assert torch.equal(grad, squared_distance_backward(tensors, upstream, BOUNDS, 0)[0])


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_one_kernel_takes_any_shape_and_any_bounds(way, monkeypatch):
    monkeypatch.setattr(kernels, "_kernels", {})
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(2, 20):
        x, scale = torch.randn([step, step + 3, *[step] * (step % 3)]), torch.tensor([0.1])
        static = (STRAIGHT_THROUGH, None)
        (y,) = one_pass(quantize, (x, None, None), (scale, None), (-step, step), static=static)
        assert torch.equal(y, quantize((x, None, None), (scale, None), (-step, step), 0, *static)[0])
    assert len(kernels._kernels) == 1
    # One for few values, and one for more.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled <= 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"frozen_int": torch.zeros(4999, dtype=torch.int8)}, "size of tensor"),
        ({"scale": torch.ones(3)}, "size of tensor|invalid for input"),
        ({"scale": torch.ones(1, device="meta")}, "device"),
    ],
    ids=["frozen integers of another size", "scales of another number", "scale on another device"],
)
def test_what_does_not_fit_never_reaches_a_kernel(wrong, says):
    x, right = torch.randn(5000), {"scale": torch.tensor([0.1]), "frozen_int": torch.zeros(5000, dtype=torch.int8)}

    def run(scale, frozen_int):
        return one_pass(quantize, (x, frozen_int, None), (scale, None), BOUNDS, static=(STRAIGHT_THROUGH, None))

    for _ in range(2):
        run(**right)  # remembered from here on
        with pytest.raises(RuntimeError, match=says):
            run(**{**right, **wrong})


def test_float64_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", None)
    monkeypatch.setattr(kernels, "_in_chunks", None)
    x = torch.randn(50, dtype=torch.float64)
    (y,) = one_pass(
        quantize, (x, None, None), (torch.tensor([0.1]).double(), None), BOUNDS, static=(STRAIGHT_THROUGH, None)
    )
    assert y.dtype == torch.float64


def test_a_step_of_training_is_the_same(make_prepared, images, way):
    outcomes = []
    for small in (0, 10**9):
        kernels.SMALL = small
        model = make_prepared(weight_granularity="per_channel" if way == "compiled" else "per_tensor").train()
        tracker = OscillationTracker(model, momentum=0.5)
        with torch.enable_grad():
            for _ in range(2):
                (model(images).square().mean() + dampening_loss(model)).backward()
                tracker.tick(0.1)
        outcomes.append([p.grad for p in model.parameters()] + list(tracker.state_dict().values()))
    for fast, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6, equal_nan=True)


class CountedSyncs(TorchDispatchMode):
    """Counts operations, and those that would make a GPU's host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches = getattr(self, "launches", 0) + 1
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        assert func.overloadpacket.__name__ not in waits, f"a tick waits for the device in {func}"
        return func(*args, **(kwargs or {}))


def test_tick_never_waits_for_the_device(make_prepared):
    model = make_prepared()
    tracker = OscillationTracker(model, momentum=0.5)
    tracker.tick(0.1)  # what the first one sets up, and compiles
    tracker.tick()
    with CountedSyncs() as counted:
        tracker.tick()
        tracker.tick(0.1)
    assert counted.launches > 0


def test_tick_runs_one_kernel_for_each_layer(make_prepared, monkeypatch):
    model = make_prepared(weight_bits=4)
    tracker = OscillationTracker(model)
    tracker.tick(0.1)
    calls = []

    def counted(function, *args, **kwargs):
        calls.append(function)
        return one_pass(function, *args, **kwargs)

    monkeypatch.setattr("hf_oscqat.remedies.tracker.one_pass", counted)
    tracker.tick(0.1)
    assert calls == [track] * len(tracker.layers)


class Searching(GradientEstimator):
    """Somebody else's, with an operator that torch's compiler leaves as it is."""

    has_slope = True

    def slope(self, distance, grad, levels):
        return 1 + torch.searchsorted(torch.linspace(-2, 2, 9), grad.contiguous()).to(grad.dtype)


def test_estimators_of_others_see_the_same_tensors_in_every_call():
    torch.manual_seed(0)
    x, grad = (torch.randn(16, 12, 10, 10).to(memory_format=torch.channels_last) for _ in range(2))
    tensors, parameters, static = (x, grad, None, None), (torch.tensor([0.1]), None), (Searching(), None)
    for _ in range(3):
        grads = one_pass(quantize_backward, tensors, parameters, BACKWARD, static=static)
        assert_same(grads, quantize_backward(tensors, parameters, BACKWARD, 0, *static), rtol=1e-4)


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
class TestLaunches:
    """From the second call on, a compiled kernel is called around torch.compile."""

    @pytest.fixture(autouse=True)
    def _no_kernels_yet(self, way, monkeypatch):
        monkeypatch.setattr(kernels, "_kernels", {})

    @staticmethod
    def quantized(x, scale, axis=0):
        return one_pass(quantize, (x, None, None), (scale, None), BOUNDS, axis=axis, static=(STRAIGHT_THROUGH, None))[
            0
        ]

    @staticmethod
    def plain(x, scale, axis=0):
        return quantize((x, None, None), (scale, None), BOUNDS, axis, STRAIGHT_THROUGH, None)[0]

    @pytest.fixture
    def compiler_calls(self, monkeypatch):
        calls = []
        original = kernels._Kernel.__call__

        def counted(kernel, arguments):
            calls.append(arguments[0].shape)
            return original(kernel, arguments)

        monkeypatch.setattr(kernels._Kernel, "__call__", counted)
        return calls

    def test_other_lengths_need_no_torch_compile(self, compiler_calls):
        scale = torch.tensor([0.1])
        for n in (100, 99, 4097, 12_345):
            x = torch.randn(n)
            assert torch.equal(self.quantized(x, scale), self.plain(x, scale))
        assert compiler_calls == [(2**16,)]

    def test_bounds_of_an_activation_are_constants_of_a_kernel(self, compiler_calls):
        parameters, static = (torch.tensor([0.1]), None), (STRAIGHT_THROUGH, (0.0, 6.0))
        for n in (100, 4097):
            tensors = (torch.randn(n) * 5, torch.randn(n), None, None)
            grads = one_pass(quantize_backward, tensors, parameters, BACKWARD, static=static)
            assert_same(grads, quantize_backward(tensors, parameters, BACKWARD, 0, *static))
        assert compiler_calls == [(2**16,)]

    @pytest.mark.parametrize("threads", [1, 2])
    def test_any_number_of_threads(self, threads):
        before = torch.get_num_threads()
        x, scale = torch.randn(20_000), torch.tensor([0.1])
        self.quantized(x, scale)
        torch.set_num_threads(threads)
        try:
            assert torch.equal(self.quantized(x, scale), self.plain(x, scale))
        finally:
            torch.set_num_threads(before)

    def test_channels_that_equal_another_size_do_not_stand_for_it(self, compiler_calls):
        for shape in ((12, 12), (12, 20), (20, 12), (1, 12), (12, 1), (30, 30), (12, 5), (2, 13), (12, 2), (2, 2)):
            x, scale = torch.randn(shape), torch.rand(shape[0]) + 0.1
            if shape[0] > 1:
                assert torch.equal(self.quantized(x, scale), self.plain(x, scale)), shape
        # Seen as [1, channels, values]: equal sizes, any two sizes, one value a channel; there are 2 bounds.
        assert compiler_calls == [(1, 128, 128), (1, 128, 160), (1, 128, 1)]

    def test_what_is_remembered_of_a_call_holds_for_calls_like_it_only(self):
        torch.manual_seed(0)
        forms = {
            "contiguous": lambda x: x.contiguous(),
            "channels last": lambda x: x.to(memory_format=torch.channels_last),
            "not dense": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
            "of few channels, either": lambda x: x[:, :1].to(memory_format=torch.channels_last),
            "negated": lambda x: torch.complex(x, x).conj().imag,
            "bfloat16": lambda x: x.bfloat16(),
            "parameter": nn.Parameter,
            "weight of inference": lambda x: torch.inference_mode()(torch.clone)(x),
        }
        scales = [torch.tensor([0.1]), torch.rand(16) + 0.1, nn.Parameter(torch.tensor(0.3)), torch.rand(16, 1) + 0.1]
        strides: dict[tuple[str, torch.Size, int], tuple[int, ...]] = {}
        for _ in range(3):
            for name, form in forms.items():
                for scale in scales:
                    for axis in (0, 2):
                        x = form(torch.randn(16, 12, 16, 10))
                        y = self.quantized(x, scale, axis)
                        assert torch.equal(y, self.plain(x, scale, axis)), (name, scale.shape, axis)
                        assert y.shape == x.shape
                        assert y.stride() == strides.setdefault((name, scale.shape, axis), y.stride()), name
                        if name in ("contiguous", "channels last"):
                            assert y.stride() == x.stride()
        assert 8 <= len(kernels._calls) <= len(forms) * len(scales) * 2

    def test_remembered_calls_mix_no_layouts_of_two_tensors(self):
        scale, static = torch.tensor([0.1]), (STRAIGHT_THROUGH, None)
        layouts = (torch.contiguous_format, torch.channels_last)
        for _ in range(2):
            for one, other in itertools.product(layouts, layouts):
                x, grad = torch.randn(2, 3, 4, 5, 6)
                tensors = (x.to(memory_format=one), grad.to(memory_format=other), None, None)
                grads = one_pass(quantize_backward, tensors, (scale, None), BACKWARD, static=static)
                assert_same(grads, quantize_backward(tensors, (scale, None), BACKWARD, 0, *static))

    def test_what_is_remembered_is_bounded_and_needs_no_look_at_the_kernel(self, monkeypatch):
        monkeypatch.setattr(kernels, "MAX_CALLS", 3)
        scale = torch.tensor([0.1])
        for n in range(50, 60):
            self.quantized(torch.randn(n), scale)
            assert len(kernels._calls) <= 3
        x = torch.randn(59)
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "_compiled", None)
            for bounds in ((-8, 7), (-4, 3)):  # numbers are no part of the kind
                (y,) = one_pass(quantize, (x, None, None), (scale, None), bounds, static=(STRAIGHT_THROUGH, None))
                assert torch.equal(y, quantize((x, None, None), (scale, None), bounds, 0, STRAIGHT_THROUGH, None)[0])
            x.data = torch.randn(59)
            assert torch.equal(self.quantized(x, scale), self.plain(x, scale))
        with fused_kernels(False), monkeypatch.context() as patched:
            patched.setattr(kernels._Launch, "__call__", None)
            assert torch.equal(self.quantized(x, scale), self.plain(x, scale))

    def test_tracing_with_values_sees_the_operations(self):
        scale = torch.tensor([0.1])
        x, other = torch.randn(2, 50)
        self.quantized(x, scale)
        traced = make_fx(lambda x: self.quantized(x, scale), tracing_mode="real")(x)
        assert torch.equal(traced(other), self.plain(other, scale))

    @pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
    def test_few_values(self, n):
        scale = torch.tensor([0.1])
        self.quantized(torch.randn(50), scale)
        x = torch.randn(n)
        assert torch.equal(self.quantized(x, scale), self.plain(x, scale))

    def test_the_same_tensor_twice_is_two_tensors_the_next_time(self):
        scale, static = torch.tensor([0.1]), (STRAIGHT_THROUGH, None)
        same, other = torch.randn(2, 50)
        for x, grad in ((same, same), (same, other), (other, same)):
            tensors = (x, grad, None, None)
            grads = one_pass(quantize_backward, tensors, (scale, None), BACKWARD, static=static)
            assert_same(grads, quantize_backward(tensors, (scale, None), BACKWARD, 0, *static))

    @pytest.mark.parametrize(
        ("make", "is_taken"),
        {
            "like it": (torch.empty_like, True),
            "in another layout": (lambda x: torch.empty(x.shape).to(memory_format=torch.channels_last), False),
            "of another dtype": (lambda x: torch.empty_like(x, dtype=torch.bfloat16), False),
            "of another shape": (lambda x: torch.empty(x.numel()), False),
            "too small": (lambda x: torch.empty(1).expand(x.shape), False),
        }.values(),
    )
    def test_memory_is_taken_where_it_fits(self, make, is_taken):
        x, grad = torch.randn(2, 3, 4, 5, 6)
        tensors, parameters, static = (x, grad, None, None), (torch.tensor([0.1]), None), (STRAIGHT_THROUGH, None)
        one_pass(quantize_backward, tensors, parameters, BACKWARD, static=static)
        memory = make(x)
        grads = one_pass(quantize_backward, tensors, parameters, BACKWARD, static=static, memory=memory)
        assert (grads[0].data_ptr() == memory.data_ptr()) is is_taken
        assert_same(grads, quantize_backward(tensors, parameters, BACKWARD, 0, *static))
        again = one_pass(quantize_backward, tensors, parameters, BACKWARD, static=static)
        assert again[0].data_ptr() != memory.data_ptr()

    def test_bits_of_a_sum_do_not_depend_on_the_first_size(self, monkeypatch):
        values, grad = torch.randn(2, 300_000)
        scale, static, sums = torch.tensor([0.1]), (STRAIGHT_THROUGH, None), []
        for first in (50, 70_000, 300_000):
            monkeypatch.setattr(kernels, "_kernels", {})
            monkeypatch.setattr(kernels, "_calls", {})
            for n in (first, 300_000):
                tensors = (values[:n].clone(), grad[:n].clone(), None, None)
                grads = one_pass(quantize_backward, tensors, (scale, None), BACKWARD, static=static)
            sums.append(grads[1])
        assert torch.equal(sums[0], sums[1])
        assert torch.equal(sums[0], sums[2])

    @pytest.mark.parametrize("form", ["strided", "expanded", "column", "contiguous"])
    def test_scales_in_any_form(self, form):
        x = torch.randn(40, 50)
        make = {
            "strided": lambda: (torch.rand(80) + 0.1)[::2],
            "expanded": lambda: torch.tensor([0.1]).expand(40),
            "column": lambda: torch.rand(40, 1) + 0.1,
            "contiguous": lambda: torch.rand(40) + 0.1,
        }
        self.quantized(x, make["contiguous"]())
        scale = make[form]()
        assert torch.equal(self.quantized(x, scale), self.plain(x, scale))

    def test_scales_that_do_not_fit_are_an_error(self):
        x = torch.randn(40, 50)
        self.quantized(x, torch.rand(40) + 0.1)
        with pytest.raises(RuntimeError):
            self.quantized(x, torch.rand(20) + 0.1)

    def test_one_scale_with_a_zero_point_for_each_channel(self):
        x, zero_point = torch.randn(40, 50), torch.arange(40.0) % 5
        for scale in (torch.rand(40) + 0.1, torch.tensor([0.2]), torch.tensor(0.2)):
            tensors, static = (x, None, None), (STRAIGHT_THROUGH, None)
            (y,) = one_pass(quantize, tensors, (scale, zero_point), (0, 15), static=static)
            assert torch.equal(y, quantize(tensors, (scale, zero_point), (0, 15), 0, *static)[0])

    def test_estimators_with_settings_of_any_kind_have_their_own_kernels(self):
        class Steep(GradientEstimator):
            def __init__(self, k):
                object.__setattr__(self, "k", k)

            def slope(self, distance, grad, levels):
                return torch.full_like(distance, self.k)

        x = torch.full((50,), 0.03, requires_grad=True)
        with torch.enable_grad():
            for k in (1.0, 3.0):
                y = fake_quantize(x, torch.tensor([0.1]), None, *BOUNDS, gradient_estimator=Steep(k))
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert grad[0] == k

    def test_lazily_negated_and_empty_tensors(self):
        scale = torch.tensor([0.1])
        x = torch.randn(5000)
        negated = torch._neg_view(x)
        assert torch.equal(self.quantized(negated, scale), self.plain(-x, scale))
        assert self.quantized(torch.empty(0), scale).shape == (0,)
        assert torch.equal(self.quantized(x, scale), self.plain(x, scale))

    @pytest.mark.parametrize("lazy", [torch._neg_view, lambda grad: torch._efficientzerotensor(grad.shape)])
    def test_lazy_gradients_are_read_with_their_values(self, lazy):
        x, grad = torch.randn(2, 5000)
        parameters, static = (torch.tensor([0.1]), None), (STRAIGHT_THROUGH, None)
        for gradient in (lazy(grad), grad, lazy(grad)):  # a remembered call is not one for the others
            tensors = (x, gradient, None, None)
            grads = one_pass(quantize_backward, tensors, parameters, BACKWARD, static=static)
            assert_same(grads, quantize_backward((x, gradient.clone(), None, None), parameters, BACKWARD, 0, *static))

    def test_lazy_scales_are_read_with_their_values(self):
        x, scale = torch.randn(5000), torch.tensor([0.1])
        for given in (torch._neg_view(-scale), scale, torch._neg_view(-scale)):
            assert torch.equal(self.quantized(x, given), self.plain(x, scale))

    def test_nothing_is_held_on_to(self):
        x = torch.randn(50)
        self.quantized(x, torch.tensor([0.1]))
        alive = weakref.ref(x)
        del x
        assert alive() is None
        assert all(not kernel._calls for kernel in kernels._kernels.values())


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
class TestWithoutACompiler:
    @pytest.fixture(autouse=True)
    def _broken(self, way, monkeypatch):
        monkeypatch.setattr(kernels, "_kernels", {})

        def refuse(*args, **kwargs):
            raise TorchDynamoException("backend='_compile' raised:\nno compiler found\n\nand a long story")

        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: refuse)

    def test_it_says_so_once_and_goes_on(self, caplog):
        x, scale = torch.randn(1000), torch.tensor([0.1])
        with caplog.at_level(logging.WARNING):
            first, second = (fake_quantize(x, scale, None, *BOUNDS) for _ in range(2))
        with fused_kernels(False):
            assert torch.equal(first, fake_quantize(x, scale, None, *BOUNDS))
        assert torch.equal(first, second)
        (message,) = caplog.messages
        assert "install a C++ compiler" in message
        assert "OSCQAT_FUSED_KERNELS=0" in message
        assert "no compiler found" in message
        assert "long story" not in message


@pytest.mark.parametrize("way", ["in chunks"], indirect=True)
@pytest.mark.parametrize(("value", "expected"), [("0", "False"), ("1", "True"), (None, "True")])
def test_environment_variable_keeps_the_compiler_out(value, expected, way):
    environment = {k: v for k, v in os.environ.items() if k != "OSCQAT_FUSED_KERNELS"}
    environment |= {} if value is None else {"OSCQAT_FUSED_KERNELS": value}
    # As a file, because importing the package would take seconds.
    code = f"import runpy; print(runpy.run_path({kernels.__file__!r})['_enabled'])"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
