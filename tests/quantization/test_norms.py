"""A batch-norm that the packed layer behind it computes changes nothing that anybody sees."""

import copy
import functools
import pickle

import pytest
import timm
import torch
from torch import nn

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat, reestimate_batchnorm
from hf_oscqat.quantization import kernels, norms
from hf_oscqat.quantization.norms import DeferredBatchNorm2d, DeferredNorm

DEFERRED = {"mobilenetv2_035": 33, "efficientnet_lite0": 31, "resnet18": 8, "resnet26": 16}


def packed_model(name):
    return copy.deepcopy(_packed_model(name))


@functools.cache
def _packed_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    images = torch.randn(3, 3, 32, 32)
    reestimate_batchnorm(model, [images])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    prepare_qat(model, OscQATConfig())
    calibrate(model, [images])
    return pack(model.eval()), images


def deferred(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DeferredNorm)}


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch):
    monkeypatch.setattr(norms, "LARGE", 1)


def calls(monkeypatch, model, images):
    """How many norms are computed by the layer behind them in a forward."""
    counted = []
    parts = DeferredNorm.parts
    with monkeypatch.context() as patched:
        patched.setattr(DeferredNorm, "parts", lambda *args: counted.append(args) or parts(*args))
        model(images)
    return len(counted)


def plain(model):
    """The same model, each norm on its own."""
    model = copy.deepcopy(model)
    for norm in deferred(model).values():
        norm.__class__ = type(norm).__bases__[1]
    assert not deferred(model)
    return model


@pytest.mark.parametrize("chunk", [200, 3000, kernels.CHUNK])  # some rows or channels, some images, all at once
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", DEFERRED)
def test_same_bits_together_and_apart(name, layout, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    model, images = packed_model(name)
    model, images = model.to(memory_format=layout), images.to(memory_format=layout)
    assert len(deferred(model)) == DEFERRED[name]
    before = images.clone()
    with torch.inference_mode():
        assert calls(monkeypatch, model, images) == DEFERRED[name]
        assert torch.equal(model(images), plain(model)(images))
        assert torch.equal(model(images[:1]), plain(model)(images[:1]))
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (3, 8, 1, 1), (1, 6, 9, 2), (4, 1, 5, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [1, 10, 40, 10**6])
def test_parts_cover_every_value_once(shape, layout, count):
    torch.manual_seed(0)
    norm = DeferredBatchNorm2d(shape[1]).eval().requires_grad_(False)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_()
    x = torch.randn(shape).to(memory_format=layout)
    expected = nn.BatchNorm2d.forward(norm, x)
    for part, normalised in norm.parts(x, count):
        assert part.numel() <= max(count, shape[1], shape[2] * shape[3])
        part.copy_(normalised)  # writes into x
    assert torch.equal(x, expected)


def test_norm_works_by_itself_in_training_with_gradients_and_where_traced(monkeypatch):
    model, images = packed_model("mobilenetv2_035")
    expected = plain(model)(images)
    assert calls(monkeypatch, model, images) == 0  # gradients are on
    with torch.no_grad():
        assert calls(monkeypatch, model, images) == 33
        assert torch.equal(model(images), expected)
        exported = torch.export.export(model, (images,))
        torch.testing.assert_close(exported.module()(images), expected)
        training = plain(model).train()
        model.train()
        assert calls(monkeypatch, model, images) == 0
        training(images)
    for ours, theirs in zip(model.buffers(), training.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norm_works_by_itself_in_other_dtypes(dtype, monkeypatch):
    model, images = packed_model("mobilenetv2_035")
    model, images = model.to(dtype), images.to(dtype)
    with torch.inference_mode():
        assert calls(monkeypatch, model, images) == 0
        assert torch.equal(model(images), plain(model)(images))


@pytest.mark.parametrize("watched", ["conv_pw", "bn1", "conv_dw"])
def test_hooks_see_what_they_would_see_otherwise(watched, monkeypatch):
    model, images = packed_model("mobilenetv2_035")
    seen = []
    for each in (plain(model), model):
        module = getattr(each.blocks[2][0], watched)
        if watched == "conv_dw":
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        else:
            module.register_forward_hook(lambda *args: seen.append(args[2]))
        with torch.inference_mode():
            seen.append(each(images))
    # What the norm gives out the packed layer writes into, deferred or not.
    assert len(seen) == 4
    assert all(map(torch.equal, seen[:2], seen[2:]))
    with torch.inference_mode():
        assert calls(monkeypatch, model, images) == 32


def test_small_tensors_are_left_to_the_norm(monkeypatch):
    model, images = packed_model("resnet18")
    monkeypatch.setattr(norms, "LARGE", 64 * 8 * 8 * len(images))
    with torch.inference_mode():
        assert calls(monkeypatch, model, images) == 2, "those of the first stage"
        assert torch.equal(model(images), plain(model)(images))


def test_activation_taken_out_of_the_layer_again_is_not_lost():
    model, images = packed_model("resnet18")
    other = plain(model)
    for each in (model, other):
        block = each.layer1[0]
        block.act1, block.conv2.input_activation = block.act1.activation, None
    with torch.inference_mode():
        assert torch.equal(model(images), other(images))


def test_state_copies_and_pickles_are_those_of_a_norm():
    model, images = packed_model("mobilenetv2_035")
    assert model.state_dict().keys() == plain(model).state_dict().keys()
    copied = copy.deepcopy(model)
    norm, block = copied.blocks[2][0].bn1, copied.blocks[2][0]
    assert norm.around == (block.conv_pw, block.conv_dw), "the layers of the copy and not of the original"
    assert isinstance(norm, type(plain(model).blocks[2][0].bn1))
    again = pickle.loads(pickle.dumps(model))
    with torch.inference_mode():
        for each in (copied, again):
            assert torch.equal(each(images), model(images))


def test_norms_of_another_kind_stay():
    without_weights = functools.partial(nn.BatchNorm2d, affine=False)
    for norm_layer in (functools.partial(nn.GroupNorm, 1), without_weights):
        torch.manual_seed(0)
        model = timm.create_model("resnet18", num_classes=5)
        for name, module in list(model.named_modules()):
            if name.endswith("layer1.0.bn1"):
                model.layer1[0].bn1 = norm_layer(module.num_features)
        images = torch.randn(2, 3, 32, 32)
        prepare_qat(model, OscQATConfig())
        calibrate(model, [images])
        packed = pack(model.eval())
        assert len(deferred(packed)) == 7
        with torch.inference_mode():
            assert torch.equal(packed(images), model(images))
