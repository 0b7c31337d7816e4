"""The last step of preparing images, left to the device that computes on them.

The processes that load images then hand on bytes, a fourth of what floats would be to write, to copy between processes
and to move to the device. What they hand on is divided and shifted by the operations of the transforms, in the same
order, so the pixels are equal to the bit.
"""

import functools
from typing import Any

import torch
from torch import Tensor


def normalize_pixels(pixel_values: Tensor, config: Any) -> Tensor:
    """Turn uint8 images into what the model takes; float images are returned as they are.

    Args:
        pixel_values: `[N, 3, height, width]`, on any device.
        config: of the model; mean and standard deviation stand in its `pretrained_cfg`.

    Raises:
        ValueError: if they do not.
    """
    if pixel_values.dtype != torch.uint8:
        return pixel_values
    timm_cfg = getattr(config, "pretrained_cfg", None) or {}
    if "mean" not in timm_cfg or "std" not in timm_cfg:
        raise ValueError("got uint8 images and a config without mean and std in pretrained_cfg, expected float images")
    mean = _per_channel(tuple(timm_cfg["mean"]), pixel_values.device)
    std = _per_channel(tuple(timm_cfg["std"]), pixel_values.device)
    # By a tensor on the device: a GPU would multiply by the reciprocal of a number, which rounds otherwise.
    white = _per_channel((255.0,), pixel_values.device)
    return pixel_values.to(torch.float32).div_(white).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it serves training too
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
