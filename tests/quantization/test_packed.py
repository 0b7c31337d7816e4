"""The packed form of one layer: its buffers, the formats it accepts, and what casts and copies do to it."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

from hf_oscqat import OscQATConfig, calibrate, fake_quantize, pack, prepare_qat
from hf_oscqat.quantization.functional import output_axis
from hf_oscqat.quantization.packed import (
    FormatError,
    GridFormat,
    LayerFormat,
    PackedLayer,
    fill_packed,
    keep_packed,
    make_packed,
    quantizer_tensors,
)
from hf_oscqat.quantization.packing import packed_width, unpack_bits

GRID = {"bits": 4, "qmin": -8, "qmax": 7, "granularity": "per_tensor", "shape": [4, 6]}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
}


def trained(name="linear", **kwargs):
    """A layer in training form and its input."""
    make, shape = LAYERS[name]
    x = torch.randn(shape)
    config = {
        "first_last_bits": kwargs.get("weight_bits", 4),
        "overrides": {"0": {"activation_bits": 4}},
        "range_estimator": "minmax",
    } | kwargs
    model = prepare_qat(nn.Sequential(make()), OscQATConfig(**config))
    calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_output_equals_that_of_the_training_form(name, granularity, scheme):
    model, x = trained(name, weight_granularity=granularity, weight_scheme=scheme, activation_scheme=scheme)
    packed = pack(model)
    assert torch.equal(packed(x), model(x))
    assert torch.equal(packed[0].weight, model[0].weight)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_buffers_have_the_dtypes_and_shapes_of_the_contract(bits, scheme):
    model, _ = trained(
        "transposed",
        weight_bits=bits,
        weight_granularity="per_channel",
        weight_scheme=scheme,
        activation_scheme=scheme,
        overrides={"0": {"activation_bits": bits}},
    )
    layer = pack(model)[0]
    got = {n: (t.dtype, list(t.shape)) for n, t in layer.named_buffers()}
    expected = {
        "weight_packed": (torch.uint8, [2, packed_width(6 * 9, bits)]),
        "weight_scale": (torch.float32, [2]),
        "input_scale": (torch.float32, [1]),
    }
    if scheme == "asymmetric":
        expected |= {"weight_zero_point": (torch.uint8, [2]), "input_zero_point": (torch.uint8, [1])}
    assert got == expected
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    specs = quantizer_tensors("0", layer.format, output_axis(layer))
    assert specs == {f"0.{n}": spec for n, spec in expected.items()}


def test_stored_values_are_integers_minus_qmin_one_row_per_output_channel():
    model, _ = trained("transposed", weight_bits=3)
    layer = pack(model)[0]
    integers = model[0].weight_quantizer.to_int(model[0].latent_weight)
    rows = unpack_bits(layer.weight_packed, 3, 6 * 9)
    for channel in range(2):
        assert torch.equal(rows[channel].float() - 4, integers[:, channel].flatten())


def test_inputs_alone_leave_the_weight_a_parameter():
    model, x = trained(weight_bits=None)
    layer = pack(model)[0]
    assert layer.format.weight is None
    assert set(dict(layer.named_buffers())) == {"input_scale"}
    assert torch.equal(layer.weight, model[0].latent_weight)
    assert torch.equal(layer(x), model(x))


def test_weights_alone_leave_the_input_float():
    model, x = trained(overrides={"0": {"activation_bits": None}})
    layer = pack(model)[0]
    assert layer.format.input is None
    assert set(dict(layer.named_buffers())) == {"weight_packed", "weight_scale"}
    assert torch.equal(layer(x), model(x))


def test_layer_keeps_its_class_and_configuration():
    layer = pack(trained("transposed")[0])[0]
    assert isinstance(layer, nn.ConvTranspose2d)
    assert isinstance(layer, PackedLayer)
    assert layer.groups == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_gives_the_weight_in_that_dtype_and_keeps_the_scales(dtype):
    layer = pack(trained(weight_scheme="asymmetric", activation_scheme="asymmetric")[0])[0]
    exact = layer.weight
    before = {n: t.clone() for n, t in layer.named_buffers()}
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.weight, exact.to(dtype))
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name


def test_cast_to_bfloat16_and_back_loses_nothing_of_the_weight():
    layer = pack(trained()[0])[0]
    exact = layer.weight
    assert torch.equal(layer.bfloat16().float().weight, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_form_in_half_precision_packs_to_equal_outputs(dtype):
    model, x = trained("conv2d")
    model.to(dtype)
    packed = pack(model)
    assert packed(x.to(dtype)).dtype == dtype
    assert torch.equal(packed(x.to(dtype)), model(x.to(dtype)))


def test_float64_training_form_packs_to_the_same_integers_with_scales_in_float32():
    model, _ = trained("conv2d")
    model.double()
    with torch.no_grad():
        model[0].weight_quantizer.scale.mul_(1 + 1e-12)
    layer = pack(model)[0]
    assert layer.weight.dtype == torch.float64
    assert layer.weight_scale.dtype == torch.float32
    torch.testing.assert_close(layer.weight, model[0].weight.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_are_independent(clone):
    model, x = trained(activation_scheme="asymmetric")
    packed = pack(model)
    again = clone(packed)
    assert type(again[0]) is type(packed[0])
    assert torch.equal(again(x), packed(x))
    again[0].weight_packed.zero_()
    assert torch.equal(packed(x), model(x))


def test_compiled_packed_model_equals_eager():
    torch._dynamo.reset()
    model, x = trained("conv2d", weight_granularity="per_channel", activation_scheme="asymmetric")
    packed = pack(model)
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_are_rounded_as_by_fake_quantize(dtype, scheme, bits):
    layer = pack(trained(activation_scheme=scheme, overrides={"0": {"activation_bits": bits}})[0])[0]
    on_thresholds = (torch.arange(-300, 300) + 0.5) * layer.input_scale
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 0.0, -0.0])
    x = torch.cat([on_thresholds, extremes, torch.randn(1000) * 100 * layer.input_scale]).to(dtype)
    before = x.clone()
    grid = layer.format.input
    expected = fake_quantize(x, layer.input_scale, layer.input_zero_point, grid.qmin, grid.qmax)
    for given in (x, x.clone().requires_grad_()):
        rounded = layer._quantized(given)
        assert rounded.dtype == dtype
        torch.testing.assert_close(rounded.detach(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", [(0.0, 6.0), (0.0, 0.35), (0.0, torch.inf)])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_behind_a_folded_activation_the_input_takes_the_result(monkeypatch, activation, scheme, dtype, layout):
    monkeypatch.setattr("hf_oscqat.quantization.kernels.CHUNK", 7)
    layer = pack(trained("conv2d", activation_scheme=scheme)[0])[0]
    layer.input_activation = activation
    scale, zero_point, grid = layer.input_scale, layer.input_zero_point, layer.format.input
    x = torch.cat([(torch.arange(-60, 60) + 0.5) * scale, torch.randn(120) * 20 * scale]).view(2, 6, 4, 5)
    x = x.to(dtype).to(memory_format=layout)
    expected = fake_quantize(x.clamp(*activation), scale, zero_point, grid.qmin, grid.qmax)
    given = x.clone()
    differentiable = x.clone().requires_grad_()
    assert torch.equal(layer._quantized(differentiable), expected)
    assert torch.equal(differentiable, x)
    rounded = layer._quantized(given)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, expected)
    # bfloat16 has not the digits that division needs.
    assert (rounded is given) == (dtype != torch.bfloat16)


def test_input_that_requires_a_gradient_gets_one():
    model, x = trained("conv2d")
    packed = pack(model)
    packed(x.requires_grad_()).square().sum().backward()
    grad, x.grad = x.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)


@pytest.fixture
def unpacked(monkeypatch):
    """The packed tensors that were unpacked, one entry a time."""
    seen = []

    def counting(packed, *args):
        seen.append(packed)
        return unpack_bits(packed, *args)

    monkeypatch.setattr("hf_oscqat.quantization.packed.unpack_bits", counting)
    return seen


def test_weight_is_unpacked_once(unpacked):
    model, x = trained("conv2d")
    packed = pack(model)
    assert torch.equal(packed(x), packed(x))
    assert len(unpacked) == 1


def test_kept_packed_it_is_unpacked_each_time_and_computes_the_same(unpacked):
    model, x = trained("conv2d")
    packed = pack(model)
    expected = packed(x)
    held = weakref.ref(packed[0].weight)
    keep_packed(packed)
    assert held() is None
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x), expected)
    assert len(unpacked) == 3
    keep_packed(packed, False)
    assert torch.equal(packed(x), packed(x))
    assert len(unpacked) == 4


def test_model_without_packed_layers_has_nothing_to_keep_packed():
    with pytest.raises(ValueError, match="got a model without packed layers"):
        keep_packed(nn.Sequential(nn.Linear(2, 2)))


def write_integers(layer):
    layer.weight_packed.fill_(0x37)


def write_scale(layer):
    layer.weight_scale.mul_(2)


def write_zero_point(layer):
    layer.weight_zero_point.add_(1)


def write_through_the_state_dict(layer):
    layer.state_dict()["weight_packed"].fill_(0x37)


def load(layer):
    layer.load_state_dict({name: tensor.flip(0) for name, tensor in layer.state_dict().items()})


def load_by_assignment(layer):
    layer.load_state_dict({name: tensor.flip(0) for name, tensor in layer.state_dict().items()}, assign=True)


def replace(layer):
    layer.weight_scale = layer.weight_scale * 2


def fill(layer):
    fill_packed(layer, {"weight_int": torch.ones(layer.format.weight.shape)})


CHANGES = [
    write_integers,
    write_scale,
    write_zero_point,
    write_through_the_state_dict,
    load,
    load_by_assignment,
    replace,
    fill,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_weight_follows_whatever_changes_its_tensors(change, in_inference_mode):
    layer = pack(trained("conv2d", weight_granularity="per_channel", weight_scheme="asymmetric")[0])[0]
    with torch.inference_mode(in_inference_mode):
        before = layer.weight.clone()
        change(layer)
        after = layer.weight
    assert not torch.equal(after, before)
    keep_packed(layer)
    assert torch.equal(layer.weight, after)


def test_writing_into_the_unpacked_weight_spoils_nothing():
    model, x = trained()
    packed = pack(model)
    packed[0].weight.zero_()
    assert torch.equal(packed(x), model(x))


def test_unpacked_weight_is_in_no_state_dict_and_in_no_pickle():
    model, x = trained()
    packed = pack(model)
    state, pickled = packed.state_dict(), pickle.dumps(packed)
    packed(x)
    assert packed.state_dict().keys() == state.keys()
    assert len(pickle.dumps(packed)) == len(pickled)
    assert len(list(packed.buffers())) == len([name for name in state if name != "0.bias"])


def test_copy_of_a_model_that_has_run_is_independent():
    model, x = trained()
    packed = pack(model)
    expected = packed(x)
    again = copy.deepcopy(packed)
    again[0].weight_packed.zero_()
    assert not torch.equal(again(x), expected)
    assert torch.equal(packed(x), expected)


def test_choice_to_keep_packed_goes_with_a_copy(unpacked):
    model, x = trained()
    packed = pack(model)
    keep_packed(packed)
    again = copy.deepcopy(packed)
    again(x), again(x)
    assert len(unpacked) == 2


def test_weight_unpacked_in_inference_mode_serves_gradients_of_the_input_later():
    model, x = trained("conv2d", overrides={"0": {"activation_bits": None}})
    packed = pack(model)
    with torch.inference_mode():
        packed(x)
    x.requires_grad_()
    packed(x).square().sum().backward()
    grad, x.grad = x.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)


def test_gradient_of_a_scale_is_not_lost_in_what_is_kept():
    layer = pack(trained()[0])[0]
    layer.weight_scale.requires_grad_()
    for _ in range(2):
        layer.weight_scale.grad = None
        layer.weight.sum().backward()
        torch.testing.assert_close(layer.weight_scale.grad, (layer.weight / layer.weight_scale).sum()[None].detach())


def test_tensors_of_inference_mode_which_count_no_writes_are_unpacked_each_time():
    model, x = trained()
    with torch.inference_mode():
        packed = pack(model)
        assert packed[0].weight_packed.is_inference()
        assert torch.equal(packed(x), model(x))
        packed[0].weight_packed.fill_(0x88)
        assert not packed[0].weight.any()


def test_layout_of_the_weight_follows_that_of_the_model():
    model, _ = trained("conv2d")
    packed = pack(model)
    expected = packed[0].weight.clone()
    packed.to(memory_format=torch.channels_last).double().float()
    assert packed[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed[0].weight, expected)
    assert copy.deepcopy(packed)[0].weight.is_contiguous(memory_format=torch.channels_last)
    packed.to(memory_format=torch.contiguous_format)
    assert packed[0].weight.is_contiguous()


@pytest.mark.parametrize("name", LAYERS)
def test_weight_is_contiguous_like_that_of_a_float_layer(name):
    assert pack(trained(name)[0])[0].weight.is_contiguous()


def test_compiled_model_follows_integers_that_change_after_it_has_run():
    torch._dynamo.reset()
    model, x = trained()
    packed = pack(model)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(packed(x), compiled(x))
    packed[0].weight_packed.fill_(0x37)
    assert torch.equal(compiled(x), packed(x))


def test_exported_program_holds_the_integers_and_no_float_weight():
    model, x = trained("conv2d")
    packed = pack(model)
    expected = packed(x)
    program = torch.export.export(packed, (x,))
    assert torch.equal(program.module()(x), expected)
    assert program.state_dict.keys() == packed.state_dict().keys()
    shapes = [tensor.shape for tensor in program.constants.values() if isinstance(tensor, torch.Tensor)]
    assert packed[0].weight.shape not in shapes


def test_attribute_error_inside_the_weight_is_not_swallowed():
    layer = pack(trained()[0])[0]
    del layer.weight_scale
    with pytest.raises(RuntimeError, match=r"weight of PackedLinear cannot be unpacked.*weight_scale"):
        _ = layer.weight


def test_made_layer_has_room_for_what_its_format_says_and_takes_it():
    layer_format = LayerFormat.from_dict("0", {"weight": GRID, "input": None})
    layer = make_packed(nn.Linear(6, 4), layer_format)
    integers = torch.arange(24).view(4, 6) % 16 - 8
    fill_packed(layer, {"weight_int": integers, "weight_scale": torch.tensor([0.5])})
    assert torch.equal(layer.weight, integers * 0.5)


def test_weight_of_another_shape_is_refused():
    layer_format = LayerFormat.from_dict("0", {"weight": GRID, "input": None})
    with pytest.raises(FormatError, match=r"got a weight of shape \[4, 6\], but the model's is \[5, 6\]"):
        make_packed(nn.Linear(6, 5), layer_format)


@pytest.mark.parametrize("weight", [None, GRID, GRID | {"scheme": "asymmetric"}])
@pytest.mark.parametrize("inputs", [None, GRID | {"shape": [1]}])
def test_format_survives_its_dict(weight, inputs):
    data = {"weight": weight, "input": inputs}
    assert LayerFormat.from_dict("0", data).to_dict() == data


def test_scheme_may_be_spelled_out_where_it_is_the_usual_one():
    spelled_out = {"weight": GRID | {"scheme": "symmetric"}, "input": None}
    assert LayerFormat.from_dict("0", spelled_out) == LayerFormat.from_dict("0", {"weight": GRID, "input": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1, "qmin": 0, "qmax": 1}, "2 to 8 bits"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"bits": "4"}, "whole numbers"),
        ({"bits": True}, "whole numbers"),
        ({"qmin": -8.0}, "whole numbers"),
        ({"qmin": -7}, "no grid of 4 bits"),
        ({"qmax": 8}, "no grid of 4 bits"),
        ({"qmin": 0}, "no grid of 4 bits"),
        ({"granularity": "per_group"}, "per_group"),
        ({"scheme": "affine"}, "affine"),
        ({"shape": [4, 6.0]}, "whole numbers"),
        ({"shape": 24}, "'int' object is not iterable"),
        ({"surplus": 1}, "surplus"),
    ],
    ids=str,
)
def test_format_that_cannot_be_is_refused_with_the_name_of_the_layer(change, message):
    with pytest.raises(FormatError, match=f"format of layer 'head' cannot be read: .*{message}"):
        LayerFormat.from_dict("head", {"weight": GRID | change, "input": None})


@pytest.mark.parametrize(
    "data", [None, 3, {}, {"weight": None}, {"weight": 4, "input": None}, {"weight": [], "input": 0}]
)
def test_format_that_is_no_pair_of_grids_is_refused(data):
    with pytest.raises(FormatError, match="format of layer 'head' cannot be read"):
        LayerFormat.from_dict("head", data)


def test_signed_grid_stores_its_zero_point_in_int8():
    grid = {"bits": 4, "granularity": "per_tensor", "shape": (1,), "scheme": "asymmetric"}
    assert GridFormat(qmin=-8, qmax=7, **grid).zero_point_dtype == torch.int8
    assert GridFormat(qmin=0, qmax=15, **grid).zero_point_dtype == torch.uint8
