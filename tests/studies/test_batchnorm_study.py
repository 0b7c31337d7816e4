"""Divergence of batch-norm statistics: the formula, and which convolution stands before which layer."""

import timm
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference

from hf_oscqat.studies.batchnorm import kinds_of_convolutions, kl_divergence


def test_divergence_is_that_of_normal_distributions():
    mean, var = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.1
    other_mean, other_var = torch.randn(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64) + 0.1
    expected = reference(Normal(mean, var.sqrt()), Normal(other_mean, other_var.sqrt()))
    torch.testing.assert_close(kl_divergence(mean, var, other_mean, other_var), expected, rtol=1e-12, atol=1e-12)


def test_no_divergence_from_itself():
    mean, var = torch.randn(3), torch.rand(3) + 0.1
    torch.testing.assert_close(kl_divergence(mean, var, mean, var), torch.zeros(3), atol=1e-6, rtol=0)


def test_kinds_follow_the_convolutions_of_mobilenet():
    kinds = kinds_of_convolutions(timm.create_model("mobilenetv2_035"))
    assert kinds["bn1"] == "full"
    assert kinds["blocks.0.0.bn1"] == "depthwise"
    assert kinds["blocks.0.0.bn2"] == "pointwise"
    assert [kinds[f"blocks.1.0.bn{i}"] for i in (1, 2, 3)] == ["pointwise", "depthwise", "pointwise"]
    assert kinds["bn2"] == "pointwise"
    assert len(kinds) == 52
