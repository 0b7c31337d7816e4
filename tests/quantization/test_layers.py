"""Layers in training form: their class, names and forward stay; only the weight and the input are quantized."""

import contextlib
import copy
import gc
import pickle
from functools import partial

import numpy
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from toolchain import needs_compiler
from torch import nn
from torch._dynamo import compiled_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from hf_oscqat import OscillationTracker, OscQATConfig, pack, prepare_qat
from hf_oscqat.quantization.gradient_estimators import StochasticRounding
from hf_oscqat.quantization.kernels import fused_kernels
from hf_oscqat.quantization.layers import QuantizedLayer, quantize_layer, quantized_layers, quantizers
from hf_oscqat.quantization.quantizer import Quantizer


def quantize(layer, num_bits=4, axis=0, inputs=True):
    weights = Quantizer(num_bits, signed=True, axis=axis)
    weights.set_range(torch.full((1,), 0.05))
    input_quantizer = None
    if inputs:
        input_quantizer = Quantizer(num_bits, signed=True)
        input_quantizer.set_range(torch.full((1,), 0.2))
    return quantize_layer(layer, weights, input_quantizer)


LAYERS = [
    (lambda: nn.Linear(6, 4), (2, 6)),
    (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5)),
    (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", groups=2), (2, 6, 5, 5)),
    (lambda: nn.Conv3d(6, 4, 3, dilation=2), (2, 6, 5, 5, 5)),
    (lambda: nn.ConvTranspose1d(6, 4, 3), (2, 6, 5)),
    (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (2, 6, 5, 5)),
    (lambda: nn.ConvTranspose3d(6, 4, 2), (2, 6, 3, 3, 3)),
    (lambda: timm.layers.Conv2dSame(6, 4, 3, stride=2), (2, 6, 7, 8)),
    (lambda: timm.layers.Linear(6, 4), (2, 6)),
]


@pytest.mark.parametrize(
    ("make", "shape"), LAYERS, ids=lambda part: str(part()).split("(")[0] if callable(part) else ""
)
def test_forward_is_that_of_the_layer_on_quantized_weight_and_input(make, shape):
    layer = make()
    plain = copy.deepcopy(layer)
    x = torch.randn(shape)
    quantized = quantize(layer)
    with torch.no_grad():
        plain.weight.copy_(quantized.weight_quantizer(plain.weight))
    expected = plain(quantized.input_quantizer(x))
    assert torch.equal(quantized(x), expected)
    assert not torch.equal(quantized(x), make()(x))


def test_layer_is_the_same_object_and_still_of_its_class():
    layer = nn.Conv2d(3, 4, 3)
    assert quantize(layer) is layer
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(layer, QuantizedLayer)


def test_layers_of_one_class_share_one_class():
    assert type(quantize(nn.Linear(2, 2))) is type(quantize(nn.Linear(5, 3)))
    assert type(quantize(nn.Linear(2, 2))) is not type(quantize(nn.Conv2d(2, 2, 1)))


def test_names_in_the_state_dict_stay_and_those_of_quantizers_are_added():
    layer = nn.Conv2d(3, 4, 3)
    before = list(layer.state_dict())
    quantize(layer)
    added = ["weight_quantizer.scale", "input_quantizer.scale", "input_quantizer.signed"]
    assert list(layer.state_dict()) == before + [n for n in added if n in layer.state_dict()]
    assert {"weight_quantizer.scale", "input_quantizer.scale"} <= set(layer.state_dict())


def test_same_padding_of_timm_is_kept():
    layer = timm.layers.Conv2dSame(3, 4, 3, stride=2)
    x = torch.randn(1, 3, 7, 8)
    shape = layer(x).shape
    quantized = quantize(layer, inputs=False)
    assert quantized(x).shape == shape == (1, 4, 4, 4)
    padded = F.pad(x, (0, 1, 1, 1))
    torch.testing.assert_close(quantized(x), F.conv2d(padded, quantized.weight, quantized.bias, stride=2))


def test_state_dict_holds_the_latent_weight_and_not_the_rounded():
    layer = nn.Linear(6, 4)
    latent = layer.weight.detach().clone()
    quantized = quantize(layer)
    assert torch.equal(quantized.state_dict()["weight"], latent)
    assert torch.equal(quantized.latent_weight, latent)
    assert not torch.equal(quantized.weight, latent)
    torch.testing.assert_close(quantized.weight / 0.05, (quantized.weight / 0.05).round())


def test_gradient_reaches_latent_weight_scales_bias_and_input():
    quantized = quantize(nn.Linear(6, 4))
    x = torch.randn(3, 6, requires_grad=True)
    quantized(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in quantized.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_either_quantizer_may_be_missing():
    x = torch.randn(2, 6)
    weights_only = quantize(nn.Linear(6, 4), inputs=False)
    assert torch.equal(weights_only(x), F.linear(x, weights_only.weight, weights_only.bias))
    layer = nn.Linear(6, 4)
    inputs = Quantizer(4, signed=True)
    inputs.set_range(torch.ones(1))
    inputs_only = quantize_layer(layer, None, inputs)
    assert inputs_only.weight is inputs_only.latent_weight
    assert torch.equal(inputs_only(x), F.linear(inputs(x), inputs_only.latent_weight, inputs_only.bias))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: timm.layers.Conv2dSame(6, 6, 1)])
def test_copy_is_of_the_same_class_and_independent(clone, make):
    layer = quantize(make())
    again = clone(layer)
    assert type(again) is type(layer)
    assert again.state_dict().keys() == layer.state_dict().keys()
    before = layer.weight.detach().clone()
    assert torch.equal(again.weight, before)
    with torch.no_grad():
        again.latent_weight.add_(1)
        again.weight_quantizer.scale.mul_(2)
    assert torch.equal(layer.weight, before)


def test_attribute_error_inside_the_weight_is_not_swallowed():
    # nn.Module would answer an AttributeError of a property by looking `weight` up among its parameters.
    layer = quantize(nn.Linear(6, 4))
    del layer.weight_quantizer
    with pytest.raises(RuntimeError, match=r"weight of QuantizedLinear cannot be quantized.*weight_quantizer"):
        _ = layer.weight


def test_new_parameter_assigned_to_weight_becomes_the_latent_weight():
    layer = quantize(nn.Linear(6, 4))
    new = nn.Parameter(torch.randn(4, 6))
    layer.weight = new
    assert layer.latent_weight is new
    assert torch.equal(layer.weight, layer.weight_quantizer(new))
    assert torch.equal(layer.state_dict()["weight"], new)


def test_uncalibrated_weight_is_an_error_when_it_is_used():
    layer = quantize_layer(nn.Linear(6, 4), Quantizer(4, signed=True), None)
    with pytest.raises(RuntimeError, match="no range yet"):
        layer(torch.randn(2, 6))


def test_weight_on_the_meta_device_is_the_latent_one():
    with torch.device("meta"):
        layer = quantize_layer(nn.Linear(6, 4), Quantizer(4, signed=True), None)
    assert layer.weight is layer.latent_weight
    assert layer.weight.shape == (4, 6)


def test_model_prepared_on_the_meta_device_takes_a_state_dict(make_net, make_prepared, images):
    trained = make_prepared().eval()
    with torch.device("meta"):
        empty = make_net()
    prepare_qat(empty, OscQATConfig())
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(trained.state_dict(), assign=True)
    for _, quantizer in quantizers(empty):
        quantizer.refresh()
    assert torch.equal(empty.eval()(images), trained(images))


def test_half_precision_model_computes_with_weights_of_its_dtype(make_prepared, images):
    model = make_prepared().bfloat16().eval()
    assert model.pw.weight.dtype == model.pw.latent_weight.dtype == torch.bfloat16
    assert model(images.bfloat16()).dtype == torch.bfloat16
    assert {q.scale.dtype for _, q in quantizers(model)} == {torch.float32}


def test_autocast_runs_the_layer_in_half_precision_and_sums_gradients_in_float32(make_prepared, images):
    model = make_prepared()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(images)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_compiled_layers_equal_eager(make_prepared):
    torch._dynamo.reset()
    model = make_prepared(activation_scheme="asymmetric")[3:5]
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 8, 5, 5)
    outputs = []
    for module in (model, compiled):
        y = module(x)
        y.square().sum().backward()
        outputs.append([y.detach(), *(p.grad for p in module.parameters())])
    for eager, ours in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_layers_and_quantizers_are_listed_by_module_name(make_prepared):
    model = make_prepared()
    assert [name for name, _ in quantized_layers(model)] == ["stem", "dw", "pw", "head"]
    assert [name for name, _ in quantizers(model)] == [
        "stem.weight_quantizer",
        "dw.weight_quantizer",
        "dw.input_quantizer",
        "pw.weight_quantizer",
        "pw.input_quantizer",
        "head.weight_quantizer",
        "head.input_quantizer",
    ]


def kept_bytes(run):
    """Bytes that autograd keeps for backward, each storage once, parameters and buffers of the model apart."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = run()
    assert outputs.requires_grad
    return storages


@pytest.mark.parametrize(
    ("make", "shape"), LAYERS, ids=lambda part: str(part()).split("(")[0] if callable(part) else ""
)
def test_backward_keeps_the_input_and_not_its_quantized_form_besides(make, shape, monkeypatch):
    layer = quantize(make())
    x = torch.randn(shape, requires_grad=True)
    values = x * 1  # what came out of the layer before
    again = 0
    rounded = layer.input_quantizer.forward

    def counted(*args):
        nonlocal again
        again += torch.is_grad_enabled() is False
        return rounded(*args)

    monkeypatch.setattr(layer.input_quantizer, "forward", counted)
    y = layer(values)
    assert again == 0
    y.square().sum().backward()
    # Conv2dSame pads what it gets, and autograd keeps the padded copy.
    assert again == (0 if isinstance(layer, timm.layers.Conv2dSame) else 1)


@pytest.mark.parametrize(
    ("make", "shape"), LAYERS, ids=lambda part: str(part()).split("(")[0] if callable(part) else ""
)
def test_gradients_are_those_of_keeping_both(make, shape, monkeypatch):
    layer = quantize(make())
    both = copy.deepcopy(layer)
    monkeypatch.setattr(both, "_keeping", lambda input, quantized: contextlib.nullcontext())
    x = torch.randn(shape)
    grads = []
    for each in (layer, both):
        own = x.clone().requires_grad_()
        each(own * 1).square().sum().backward()
        grads.append([own.grad, *(p.grad for p in each.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


@needs_compiler
class TestMemory:
    """The gradient of a quantized input is written over what backward rounded again, where nobody else sees that."""

    X = torch.randn(4, 6, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5

    @pytest.fixture(autouse=True)
    def _every_call_is_of_a_kernel(self):
        with fused_kernels(True):
            for _ in range(2):  # the first one compiles, and is not given any memory
                self.step(self.layer())
            yield

    @staticmethod
    def layer(cls=nn.Conv2d):
        torch.manual_seed(0)
        return quantize(cls(6, 6, 3, padding=1, groups=2))

    def step(self, layer, *, keep=None, give=None):
        """Gradients of a step and the tensors that backward rounded again.

        `keep` makes what is kept of those, `give` what backward gets in their place.
        """
        made, kept = [], []

        def seen(quantizer, args, rounded):
            if torch.is_grad_enabled():
                return None
            rounded = rounded if give is None else give(rounded)
            made.append(rounded.data_ptr())
            kept.append(None if keep is None else keep(rounded))
            return rounded

        x = self.X.clone().requires_grad_()
        with layer.input_quantizer.register_forward_hook(seen):
            layer(x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in layer.parameters())], made, kept

    def reference(self, layer):
        layer = copy.deepcopy(layer)
        layer._keeping = lambda input, quantized: contextlib.nullcontext()
        return self.step(layer)[0]

    def test_gradient_lies_in_it(self):
        grads, made, _ = self.step(self.layer())
        assert made == [grads[0].data_ptr()]
        assert all(map(torch.equal, grads, self.reference(self.layer())))

    KEPT = {
        "tensor": lambda t: t,
        "another tensor": lambda t: t.detach(),
        "view": lambda t: t[0],
        "array": lambda t: t.numpy(),
        "array by DLPack": numpy.from_dlpack,
        "storage": lambda t: t.untyped_storage(),
        "typed storage": lambda t: t.storage(),
    }

    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
    @pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
    def test_what_somebody_holds_stays_as_it_is(self, keep):
        layer = self.layer()
        grads, made, (kept,) = self.step(layer, keep=keep)
        assert made != [grads[0].data_ptr()]
        assert kept.tolist() == keep(layer.input_quantizer(self.X).detach()).tolist()
        assert all(map(torch.equal, grads, self.reference(layer)))

    def test_what_another_process_or_library_may_hold_stays_as_it_is(self):
        array = numpy.empty(self.X.shape, dtype=numpy.float32)

        def in_an_array(rounded):
            numpy.copyto(array, rounded)
            return torch.from_numpy(array)

        layer = self.layer()
        for give in (in_an_array, lambda t: t.share_memory_(), lambda t: torch._neg_view(-t)):
            grads, made, _ = self.step(layer, give=give)
            assert made != [grads[0].data_ptr()]
            assert all(map(torch.equal, grads, self.reference(layer)))
            layer.zero_grad()
        assert torch.equal(torch.from_numpy(array), layer.input_quantizer(self.X))

    def test_nothing_before_a_detached_input_is_kept(self):
        class Detaching(nn.Conv2d):
            def forward(self, x):
                return super().forward(x.detach())

        layer = self.layer(Detaching)
        before = self.X.clone().requires_grad_().exp()
        kept = StorageWeakRef(before.untyped_storage())
        y = layer(before * 1)
        del before
        gc.collect()
        assert kept.expired()
        y.sum().backward()

    def test_what_the_layer_itself_holds_stays_as_it_is(self):
        seen = []

        class Squares(torch.autograd.Function):
            """Its backward returns the very tensor that it kept."""

            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.square() / 2

            @staticmethod
            def backward(ctx, grad):
                (x,) = ctx.saved_tensors
                seen.append(x)
                return x

        class Squaring(nn.Conv2d):
            def forward(self, x):
                return Squares.apply(x)

        layer = self.layer(Squaring)
        grads, made, _ = self.step(layer)
        assert len(made) == 1
        assert torch.equal(seen[0], layer.input_quantizer(self.X))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, self.reference(layer), strict=True))

    def test_a_graph_of_backward_keeps_what_it_needs(self):
        def second(layer):
            weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
            x = self.X.clone().requires_grad_()
            # Not the layer's weight, whose quantizer cannot be differentiated twice.
            y = layer(x, weight)
            grads = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
            return grads[1].square().sum(), weight

        class Given(nn.Conv2d):
            def forward(self, x, weight):
                return F.conv2d(x, weight, groups=2)

        grads = []
        for keeping in (None, lambda input, quantized: contextlib.nullcontext()):
            layer = self.layer(Given)
            if keeping is not None:
                layer._keeping = keeping
            loss, weight = second(layer)
            grads.append(torch.autograd.grad(loss, weight)[0])
        assert torch.equal(*grads)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look
    def test_compiled_autograd_is_one_graph(self):
        x = self.X.clone().requires_grad_()
        layer = self.layer()
        loss = layer(x).square().sum()
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss.backward()
        grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        for ours, theirs in zip(grads, self.reference(self.layer()), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_backward_may_be_run_again(self):
        layer = self.layer()
        x = self.X.clone().requires_grad_()
        loss = layer(x).square().sum()
        first, second = (torch.autograd.grad(loss, [x, layer.latent_weight], retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))
        assert first[0].data_ptr() != second[0].data_ptr()


def test_a_block_keeps_little_more_than_the_float_block():
    def block():
        torch.manual_seed(0)
        return timm.create_model("mobilenetv2_100").blocks[1]

    images = torch.randn(8, 16, 24, 24)
    plain, quantized = block(), timm.create_model("mobilenetv2_100")
    prepare_qat(quantized, OscQATConfig())
    for _, q in quantizers(quantized):
        q.set_range(torch.full((1,), 0.05), **({"signed": False} if q.signed is not None else {}))
    kept = {}
    for name, each in (("float", plain), ("quantized", quantized.blocks[1])):
        own = {t.untyped_storage().data_ptr() for t in [*each.parameters(), *each.buffers()]}
        storages = kept_bytes(lambda each=each: each.train()(images.clone().requires_grad_()))
        kept[name] = sum(size for pointer, size in storages.items() if pointer not in own)
    assert 0.5 < kept["quantized"] / kept["float"] <= 1.05


def test_random_rounding_is_not_done_again():
    layer = quantize(nn.Linear(6, 4))
    layer.input_quantizer.gradient_estimator = StochasticRounding()
    x = torch.randn(3, 6, requires_grad=True)
    y = layer(x)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_model_is_one_graph_for_the_compiler(make_prepared, images):
    torch._dynamo.reset()
    model = make_prepared(activation_scheme="asymmetric", weight_granularity="per_channel").train()
    OscillationTracker(model, momentum=1.0).tick(0.5)
    explained = torch._dynamo.explain(model)(images)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_model_can_be_exported(make_prepared, images):
    model = make_prepared().eval()
    exported = torch.export.export(model, (images,)).module()
    assert torch.equal(exported(images), model(images))


@pytest.mark.parametrize("form", ["training", "packed"])
def test_exported_model_takes_any_number_of_images(make_prepared, images, form):
    # also where a layer sees few values, of which kernels would be asked how many they are
    model = make_prepared(activation_scheme="asymmetric").eval()
    model = pack(model) if form == "packed" else model
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for count in (2, 200):
        batch = torch.randn(count, *images.shape[1:])
        assert torch.equal(exported(batch), model(batch))


def test_gradient_checkpointing_keeps_neither_the_input_nor_the_quantized_one():
    layer = quantize(nn.Conv2d(6, 4, 3, padding=1))
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 6, 5, 5)
    grads, alive = [], []

    def block(each, images):
        values = images * 1  # what came out of the layer before
        alive.append(StorageWeakRef(values.untyped_storage()))
        return each(values)

    for each, run in ((layer, partial(checkpoint, block, use_reentrant=False)), (plain, block)):
        own = x.clone().requires_grad_()
        y = run(each, own)
        gc.collect()
        assert alive[-1].expired() == (each is layer)
        y.square().sum().backward()
        grads.append([own.grad, *(p.grad for p in each.parameters())])
    assert all(map(torch.equal, *grads))
