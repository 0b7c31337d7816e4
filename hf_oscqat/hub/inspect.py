"""What quantization would do to a timm model, layer by layer, without its weights."""

from dataclasses import dataclass
from math import prod

import timm
import torch
from torch import nn

from hf_oscqat.config import OscQATConfig
from hf_oscqat.prepare import LayerDescription, describe, insert_quantizers
from hf_oscqat.quantization.packing import packed_width


@dataclass(frozen=True)
class InspectedLayer:
    """One row of `inspect_timm`.

    Attributes:
        layer: name, class, shape and widths.
        parameters: numbers in its weight.
        bytes: of the weight as it would be stored; scales not included.
    """

    layer: LayerDescription
    parameters: int
    bytes: int


def inspect_timm(name: str, config: OscQATConfig) -> list[InspectedLayer]:
    """Prepare a timm model on the meta device and list what is quantized and what stays float.

    Args:
        name: a timm name.
        config: how to quantize.

    Returns:
        One row per layer, and per other parameter of two or more dimensions; the last row is all the rest.

    Raises:
        ValueError: if timm has no such model, or it cannot be prepared.
    """
    if not timm.is_model(name):
        raise ValueError(f"got model {name!r}, expected a timm name; timm.list_models() lists them")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    total = sum(p.numel() for p in model.parameters())
    insert_quantizers(model, config)
    rows = []
    for layer in describe(model):
        count = prod(layer.shape)
        if layer.weight_bits is None:
            size = 4 * count
        else:
            # The stream begins anew for each output channel; those of a transposed convolution are on axis 1.
            channels = layer.shape[1] if "Transpose" in layer.layer_class else layer.shape[0]
            size = channels * packed_width(count // channels, layer.weight_bits)
        rows.append(InspectedLayer(layer, count, size))
    rest = total - sum(row.parameters for row in rows)
    description = LayerDescription("(biases, normalisation)", "", (rest,), None, None, "no weight of a layer")
    return [*rows, InspectedLayer(description, rest, 4 * rest)]
