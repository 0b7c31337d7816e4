"""Architectures that are each a trap of their own, whole: prepare, calibrate, train, pack, save and load.

Small, with random weights. `training/benchmarks/timm_sweep.py` does the same for every family of timm.
"""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from transformers import AutoModelForImageClassification

from hf_oscqat import (
    OscillationTracker,
    OscQATConfig,
    calibrate,
    dampening_loss,
    describe,
    model_parameters,
    pack,
    prepare_qat,
    quantizer_parameters,
    reestimate_batchnorm,
)
from hf_oscqat.integration.models import timm_wrapper
from hf_oscqat.prepare import _observing_inputs

SWIN = {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 24, "img_size": 64, "window_size": 4}
ARCHITECTURES = {
    # name: (pixels, arguments of timm.create_model, settings)
    "test_vit": (160, {}, {"weight_granularity": "per_channel"}),
    "mobilenetv2_035": (32, {}, {}),
    "tf_efficientnet_b0": (32, {}, {}),  # SAME padding
    "mixnet_s": (32, {}, {}),  # several kernel sizes in one convolution
    "test_nfnet": (32, {}, {}),  # scaled standardised convolutions, gains of 0
    "resnetv2_50x1_bit": (32, {}, {}),  # standardised convolutions
    "beitv2_base_patch16_224": (32, {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}, {}),  # qkv.weight
    "swinv2_tiny_window16_256": (64, SWIN, {}),  # qkv.weight
    "eva02_tiny_patch14_224": (28, {"depth": 2, "img_size": 28}, {}),
    "coat_tiny": (32, {"img_size": 32}, {}),  # shared modules, called several times
    "convit_tiny": (32, {"img_size": 32, "depth": 2, "local_up_to_layer": 1}, {}),  # asks for weight.device
    "lowformer_b0": (32, {}, {}),  # transposed convolution
    "lambda_resnet26t": (64, {}, {}),  # Conv3d
    "repvit_m1": (32, {}, {}),  # would be reparameterized for inference
    "levit_128s": (224, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_path(name, tmp_path):
    pixels, model_args, settings = ARCHITECTURES[name]
    model = timm_wrapper(name, list("abcde"), model_args=model_args)
    images = torch.randn(4, 3, pixels, pixels)
    reestimate_batchnorm(model, [images])
    with torch.no_grad():
        expected = model(images).logits
    config = OscQATConfig(activation_scheme="asymmetric", range_estimator="minmax", **settings)
    prepare_qat(model, config)
    quantized = [row for row in describe(model) if row.weight_bits]
    assert len(quantized) > 4
    with torch.no_grad(), _observing_inputs(model):
        difference = (model(images).logits - expected).abs().max()
    assert difference <= 1e-6 * expected.abs().max(), "with quantizers that let everything pass it is the float model"
    calibrate(model, [images])

    model.train()
    # Away from zeros and saddles, where some gradients would vanish by symmetry.
    loss = (model(images).logits - torch.randn(4, 5)).square().sum() + dampening_loss(model)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without
    tracker = OscillationTracker(model)
    tracker.tick(0.01)
    torch.optim.SGD(model_parameters(model), lr=1e-10).step()
    torch.optim.Adam(quantizer_parameters(model), lr=1e-10).step()
    tracker.tick(0.01)

    model.eval()
    packed = pack(model)
    with torch.no_grad():
        logits = model(images).logits
        assert torch.equal(packed(images).logits, logits)
    for form, saved in (("training", model), ("packed", packed)):
        saved.save_pretrained(tmp_path / form)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / form).eval()
        with torch.no_grad():
            assert torch.equal(loaded(images).logits, logits), form
    assert {row.name: row.weight_bits for row in describe(loaded)} == {
        row.name: row.weight_bits for row in describe(model)
    }


@pytest.fixture
def _fused_attention_as_before():
    yield
    set_fused_attn(True)


@pytest.mark.usefixtures("_fused_attention_as_before")
def test_attention_multiplies_in_float_fused_or_not():
    """Only layers are quantized, so what softmax gives to the values is on no grid of 4 bits."""
    images = torch.randn(2, 3, 160, 160)
    rows, probabilities = [], []
    for fused in (True, False):
        set_fused_attn(fused)
        model = timm.create_model("test_vit").eval()
        attention = model.blocks[0].attn
        assert attention.fused_attn is fused
        prepare_qat(model, OscQATConfig(activation_scheme="asymmetric", range_estimator="minmax"))
        calibrate(model, [images])
        attention.attn_drop.register_forward_pre_hook(lambda _, inputs: probabilities.append(inputs[0]))
        with torch.no_grad():
            model(images)
        rows.append(describe(model))
    assert rows[0] == rows[1]
    assert len(probabilities) == 1
    assert probabilities[0].unique().numel() > 1000
