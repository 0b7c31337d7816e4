"""What quantization would do to a timm model, layer by layer, without its weights."""

import difflib

import timm
import torch
from torch import nn

from hf_oscqat.config import OscQATConfig
from hf_oscqat.prepare import LayerDescription, describe, insert_quantizers


def inspect_timm(name: str, config: OscQATConfig) -> list[LayerDescription]:
    """Prepare a timm model on the meta device and list what is quantized and what stays float.

    Args:
        name: a timm name, with or without the tag of pretrained weights.
        config: how to quantize.

    Returns:
        One row per layer, and per other parameter of two or more dimensions; the last row is all the rest.

    Raises:
        ValueError: if timm has no such model, or it cannot be prepared.
    """
    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        close = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ", as timm.list_models() lists them"
        raise ValueError(f"got model {name!r}, expected a timm name{meant}")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    total = sum(p.numel() for p in model.parameters())
    insert_quantizers(model, config)
    rows = describe(model)
    rest = total - sum(row.parameters for row in rows)
    name_of_rest = "(biases, normalisation)"
    return [*rows, LayerDescription(name_of_rest, "", (rest,), None, None, 4 * rest, "no weight of a layer")]
