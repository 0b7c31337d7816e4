"""The packed form of one layer: its buffers, the formats it accepts, and what casts and copies do to it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat
from hf_oscqat.quantization.functional import output_axis
from hf_oscqat.quantization.packed import (
    FormatError,
    GridFormat,
    LayerFormat,
    PackedLayer,
    fill_packed,
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
