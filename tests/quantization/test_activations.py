"""Folding an activation into the next quantizer changes nothing that is computed."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from hf_oscqat import OscQATConfig, calibrate, pack, prepare_qat, reestimate_batchnorm
from hf_oscqat.prepare import _observing_inputs
from hf_oscqat.quantization.activations import FoldedActivation, fold_activations
from hf_oscqat.quantization.layers import quantized_layers

FOLDED = {
    # how many activations
    "mobilenetv2_035": 33,  # two in each of 17 blocks but the first
    "efficientnet_lite0": 31,
    "resnet18": 8,
    "resnet26": 16,
}
NOT_FOLDED = ["test_efficientnet", "test_efficientnet_evos", "test_vit", "cspresnet50", "tresnet_m"]


def prepared(name, scheme="symmetric"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    reestimate_batchnorm(model, [images])
    prepare_qat(model, OscQATConfig(activation_scheme=scheme))
    calibrate(model, [images])
    return model, images


def unfold_activations(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, FoldedActivation):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.activation)
    for module in model.modules():
        if hasattr(module, "input_activation"):
            module.input_activation = None


def folded(model):
    return {name: layer.input_activation for name, layer in quantized_layers(model) if layer.input_activation}


@pytest.mark.parametrize("name", FOLDED)
def test_folded_model_computes_the_same_forward_and_backward(name):
    model, images = prepared(name)
    assert len(folded(model)) == FOLDED[name]
    assert sum(isinstance(m, FoldedActivation) for m in model.modules()) == FOLDED[name]
    plain = copy.deepcopy(model)
    unfold_activations(plain)
    assert not folded(plain)
    assert not any(isinstance(m, FoldedActivation) for m in plain.modules())
    outcomes = []
    for each in (model.train(), plain.train()):
        logits = each(images)
        logits.square().sum().backward()
        outcomes.append([logits.detach(), *(p.grad for p in each.parameters()), *each.buffers()])
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_bounds_are_those_of_the_activation():
    assert set(folded(prepared("mobilenetv2_035")[0]).values()) == {(0.0, 6.0)}
    assert set(folded(prepared("resnet18")[0]).values()) == {(0.0, math.inf)}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_activation_stays_where_its_output_may_go_elsewhere(name):
    # other activations, attention in between, or blocks of the same name that are built otherwise
    model = timm.create_model(name)
    prepare_qat(model, OscQATConfig())
    assert not folded(model)


def test_anti_aliasing_between_activation_and_layer_keeps_it_there():
    model = timm.create_model("resnetblur18")
    prepare_qat(model, OscQATConfig())
    assert not any(folded(model).get(f"layer{i}.0.conv2") for i in (2, 3, 4))
    assert folded(model)["layer1.0.conv2"]


def test_layer_without_input_quantizer_keeps_its_activation_before_it():
    model = timm.create_model("resnet18")
    prepare_qat(model, OscQATConfig(activation_bits=None))
    assert not folded(model)
    model = timm.create_model("resnet18")
    prepare_qat(model, OscQATConfig(modules_to_not_convert=["layer1.0.conv2"]))
    assert "layer1.0.conv2" not in folded(model)
    assert type(model.layer1[0].act1) is nn.ReLU


def test_what_a_hook_watches_stays_where_it_is():
    # timm reads features by a hook before the layer; one may also be on the activation
    model = timm.create_model("mobilenetv2_035", features_only=True, feature_location="expansion")
    prepare_qat(model, OscQATConfig())
    watched = {layer for _, layer in quantized_layers(model) if layer._forward_pre_hooks}
    assert watched
    assert all(layer.input_activation is None for layer in watched)
    model = timm.create_model("mobilenetv2_035")
    model.blocks[1][0].bn1.register_forward_hook(lambda *_: None)  # the activation is in this norm
    prepare_qat(model, OscQATConfig())
    assert model.blocks[1][0].conv_dw.input_activation is None
    assert model.blocks[1][1].conv_dw.input_activation is not None
    model = timm.create_model("resnet18")
    model.layer1[0].act1.register_forward_hook(lambda *_: None)
    prepare_qat(model, OscQATConfig())
    assert "layer1.0.conv2" not in folded(model)
    assert "layer1.1.conv2" in folded(model)


def test_observers_and_float_passthrough_still_see_the_activation():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    reestimate_batchnorm(model, [images])
    expected = model.eval()(images)
    prepare_qat(model, OscQATConfig())
    with torch.no_grad(), _observing_inputs(model) as observers:
        torch.testing.assert_close(model(images), expected)
    assert all(float(observers[name].estimator.low) >= 0 for name in folded(model))
    for _, layer in quantized_layers(model):
        layer.weight_quantizer = layer.input_quantizer = None
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet18"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_model_computes_the_same_folded_and_not(name, scheme, dtype):
    model, images = prepared(name, scheme=scheme)
    packed = pack(model.eval()).to(dtype)
    plain = copy.deepcopy(packed)
    unfold_activations(plain)
    assert sum(isinstance(m, FoldedActivation) for m in packed.modules()) == FOLDED[name]
    assert not any(isinstance(m, FoldedActivation) for m in plain.modules())
    images = images.to(dtype)
    before = images.clone()
    with torch.inference_mode():
        assert torch.equal(packed(images), plain(images))
    # With a gradient to compute, nothing is written over.
    assert torch.equal(packed(images.requires_grad_()), plain(images))
    if dtype == torch.float32:
        assert torch.equal(packed(images), model(images))
    assert torch.equal(images, before)
    assert folded(model), "the argument stays as it was"


def test_folding_twice_changes_nothing():
    model, _ = prepared("resnet18")
    before = folded(model)
    fold_activations(model)
    assert folded(model) == before
    assert sum(isinstance(m, FoldedActivation) for m in model.modules()) == len(before)
