"""The last step of preparing images, done on a batch of bytes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_oscqat.integration.data import DataArguments, build_transforms
from hf_oscqat.integration.pixels import normalize_pixels

CONFIG = {
    "input_size": (3, 24, 24),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.75,
    "crop_mode": "center",
}


@pytest.mark.parametrize("augment", [True, False])
def test_bytes_become_the_pixels_of_the_transforms_to_the_bit(augment):
    arguments = DataArguments(dataset_name="digits", color_jitter=0.0, hflip=0.0, train_scale=[1.0, 1.0])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    position = 0 if augment else 1
    expected = build_transforms(CONFIG, arguments)[position](image)
    as_bytes = build_transforms(CONFIG, arguments, normalize=False)[position](image)
    assert as_bytes.dtype == torch.uint8
    batch = torch.stack([as_bytes, as_bytes])
    # As after from_pretrained, where JSON has made lists of tuples.
    config = SimpleNamespace(pretrained_cfg=CONFIG | {"mean": list(CONFIG["mean"])})
    pixels = normalize_pixels(batch, config)
    assert torch.equal(pixels[1], expected)
    assert batch.dtype == torch.uint8


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_every_value_of_a_byte_is_normalized_as_by_torchvision(device):
    from torchvision.transforms.functional import normalize, to_tensor

    image = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    expected = normalize(to_tensor(image), CONFIG["mean"], CONFIG["std"])
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
    pixels = normalize_pixels(batch, SimpleNamespace(pretrained_cfg=CONFIG))
    assert torch.equal(pixels[0].cpu(), expected)


def test_float_images_stay_as_they_are():
    images = torch.rand(1, 3, 2, 2)
    assert normalize_pixels(images, None) is images


@pytest.mark.parametrize("config", [None, SimpleNamespace(pretrained_cfg=None), SimpleNamespace(pretrained_cfg={})])
def test_bytes_without_mean_and_std_are_refused(config):
    with pytest.raises(ValueError, match="got uint8 images and a config without mean and std"):
        normalize_pixels(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), config)


def test_what_inference_mode_asked_for_first_serves_training_too():
    config = SimpleNamespace(pretrained_cfg={"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5)})
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with torch.inference_mode():
        normalize_pixels(images, config)
    weight = torch.ones(1, requires_grad=True)
    (normalize_pixels(images, config) * weight).sum().backward()
    assert weight.grad.item() == pytest.approx(-12.0)
