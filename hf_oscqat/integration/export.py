"""From the training form to the packed form."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification, TimmWrapperModel

from hf_oscqat.checkpoint import FORMAT_VERSION, layers_to_dict
from hf_oscqat.config import OscQATConfig
from hf_oscqat.integration.modeling import (
    OscQATTimmConfig,
    OscQATTimmForImageClassification,
    OscQATTimmModel,
)
from hf_oscqat.prepare import attach_config, short_name, unwrapped
from hf_oscqat.quantization.functional import MIN_SCALE, grid_zero
from hf_oscqat.quantization.layers import QuantizedLayer, quantized_layers
from hf_oscqat.quantization.norms import let_norms_overwrite
from hf_oscqat.quantization.packed import GridFormat, LayerFormat, PackedLayer, fill_packed, make_packed
from hf_oscqat.quantization.quantizer import Quantizer

PUBLISHED = {
    TimmWrapperForImageClassification: OscQATTimmForImageClassification,
    TimmWrapperModel: OscQATTimmModel,
}


@torch.no_grad()
def pack(model: nn.Module) -> nn.Module:
    """Return a new model in integer form that computes the same outputs; the argument stays as it is.

    The weights become integers in a dense bit stream, frozen weights their frozen integers. The result can be run and,
    if the argument was a transformers model, saved with `save_pretrained` and loaded with `AutoModel`. It cannot be
    trained.

    Args:
        model: a prepared and calibrated model: a timm model, or transformers' wrapper around one; what torch.compile
            and DistributedDataParallel have put around it is left behind.

    Raises:
        ValueError: if the model is not prepared, a quantizer has no range or a bad one, or it is a transformers model
            of another class.
    """
    model = unwrapped(model)
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError("got a model without quantized layers, expected a prepared one: run prepare_qat first")
    published = PUBLISHED.get(type(model)) if isinstance(model, PreTrainedModel) else None
    if isinstance(model, PreTrainedModel) and published is None:
        expected = ", ".join(cls.__name__ for cls in PUBLISHED)
        raise ValueError(f"got a {type(model).__name__}, expected {expected} or a bare timm model")
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.latent_weight).all()):
            raise ValueError(f"got weights of {short_name(name)} that are not finite: training has diverged")
        for part in ("weight", "input"):
            _check_range(f"{short_name(name)}.{part}_quantizer", getattr(layer, f"{part}_quantizer"))

    packed = copy.deepcopy(model)
    for name in ("forward", "_original_forward"):  # accelerate's autocast, where it has trained the model
        packed.__dict__.pop(name, None)
    for _, layer in quantized_layers(packed):
        _pack_layer(layer)
    let_norms_overwrite(packed)
    packed.eval().requires_grad_(False)
    if published is not None:
        _publish(packed, published)
    return packed


def _check_range(name: str, quantizer: Quantizer | None) -> None:
    if quantizer is not None and not bool((torch.isfinite(quantizer.scale) & (quantizer.scale > 0)).all()):
        raise ValueError(
            f"got a scale of {name} that is not finite and positive: calibrate the model, or look for where training "
            "diverged. A loop of your own has to keep scales positive, or learn their logarithms (scale_domain='log')"
        )


def _pack_layer(layer: QuantizedLayer) -> PackedLayer:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    layer_format = LayerFormat(
        weight=None if weights is None else _grid_format(weights, tuple(layer.latent_weight.shape)),
        input=None if inputs is None else _grid_format(inputs, (1,)),
    )
    tensors: dict[str, Any] = {}
    for part, quantizer in (("weight", weights), ("input", inputs)):
        if quantizer is not None:
            tensors[f"{part}_scale"] = quantizer.scale.detach().clamp(min=MIN_SCALE)
            if quantizer.zero_point is not None:
                zero_point = quantizer.zero_point.detach()
                tensors[f"{part}_zero_point"] = grid_zero(zero_point, quantizer.qmin, quantizer.qmax)
    if weights is not None:
        tensors["weight_int"] = weights.to_int(layer.float_weight)
    for name in ("weight_quantizer", "input_quantizer", "oscillation"):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.__class__ = type(layer).__bases__[1]
    packed = make_packed(layer, layer_format)
    fill_packed(packed, tensors)
    return packed


def _grid_format(quantizer: Quantizer, shape: tuple[int, ...]) -> GridFormat:
    return GridFormat(
        bits=quantizer.num_bits,
        qmin=quantizer.qmin,
        qmax=quantizer.qmax,
        granularity="per_channel" if quantizer.per_channel else "per_tensor",
        scheme="symmetric" if quantizer.symmetric else "asymmetric",
        shape=shape,
    )


def _publish(model: PreTrainedModel, cls: type[PreTrainedModel]) -> None:
    """Give a packed copy the published class and a config that says what it is."""
    trained: OscQATConfig = model.config.quantization_config
    model.__class__ = cls
    model.config = OscQATTimmConfig.from_dict(model.config.to_dict() | {"model_type": OscQATTimmConfig.model_type})
    # The processor needs timm's preprocessing; without the number of classes, which the config states itself.
    pretrained_cfg = dict(model.timm_model.pretrained_cfg or {}) | (
        getattr(model.config, "pretrained_cfg", None) or {}
    )
    model.config.pretrained_cfg = {k: v for k, v in pretrained_cfg.items() if k != "num_classes"}
    model.config.model_args = model.config.model_args or {}
    # What it was made from; the card there is that of the float model.
    model.config.name_or_path = ""
    written_here = {"checkpoint_format": "packed", "format_version": FORMAT_VERSION, "layers": layers_to_dict(model)}
    attach_config(model, OscQATConfig.from_dict(trained.to_dict() | written_here))
