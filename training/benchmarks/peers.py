"""Other libraries' quantization-aware training, made ready to train the same timm model.

One function for each, through the interface that its documentation shows for convolutional networks. Each takes a
float model of its own, a batch of images and a number of bits, and returns a `Prepared`. Where it cannot, it raises
ImportError or `Unavailable`, and the benchmark shows the reason in its row.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_oscqat.remedies.batchnorm import evaluation_mode


class Unavailable(RuntimeError):
    """The library is there and cannot train this model here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train.

    Attributes:
        model: in training form.
        bits: width of its weights; None for float.
        trains: what it trains, in a few words.
        scales: parameters of its quantizers; empty where they are fixed.
        positive: those of them that an optimizer must keep positive.
    """

    model: nn.Module
    bits: int | None
    trains: str
    scales: list[nn.Parameter] = field(default_factory=list)
    positive: list[nn.Parameter] = field(default_factory=list)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Everything trainable that belongs to no quantizer."""
        of_quantizers = {id(p) for p in self.scales}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in of_quantizers]


Prepare = Callable[[nn.Module, Tensor, int], Prepared]


class _Round(torch.autograd.Function):
    """Rounds; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


def plain_fake_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Learned step size quantization as most papers' code writes it: one torch operation after the other."""
    return scale * _Round.apply(x / scale).clamp(qmin, qmax)


class PlainQuantizer(nn.Module):
    """`plain_fake_quantize` with a scale that starts as in Esser et al. (ICLR 2020), sec. 2.1.

    Args:
        x: values to start from.
        bits: width of the grid, which reaches below 0 if `x` does.
    """

    def __init__(self, x: Tensor, bits: int) -> None:
        super().__init__()
        self.qmin = -(2 ** (bits - 1)) if bool((x < 0).any()) else 0
        self.qmax = self.qmin + 2**bits - 1
        self.scale = nn.Parameter(2 * x.detach().abs().mean().float().reshape(1) / self.qmax**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`."""
        return plain_fake_quantize(x, self.scale, self.qmin, self.qmax)


def plain(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """LSQ in a few lines, elementwise and unfused, on every Conv2d and Linear, as in the published code of the method.

    Ends at 8 bits and the image in float, per tensor, symmetric, learned scales: what this package does by default.
    Source: Nagel et al. (ICML 2022) and its code, github.com/qualcomm-ai-research/oscillations-qat.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    widths = {layer: 8 if layer in (layers[0], layers[-1]) else bits for layer in layers}

    def start(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer.input_quantizer = PlainQuantizer(args[0], widths[layer])

    def quantize_input(layer: Any, args: tuple[Tensor, ...]) -> Tensor:
        return layer.input_quantizer(args[0])

    starting = [layer.register_forward_pre_hook(start) for layer in layers[1:]]
    with torch.no_grad():
        model(images)
    for hook in starting:
        hook.remove()
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", PlainQuantizer(layer.weight, widths[layer]))
    for layer in layers[1:]:
        layer.register_forward_pre_hook(quantize_input)
    scales = [m.scale for m in model.modules() if isinstance(m, PlainQuantizer)]
    return Prepared(model, bits, f"W{bits}A{bits}, per tensor, learned scales", scales, scales)


def brevitas(model: nn.Module, images: Tensor, bits: int, end_bits: int | None = None) -> Prepared:
    """Brevitas: `layerwise_quantize` with its per-tensor integer quantizers, ranges by `calibration_mode`.

    W and A at `bits` in every layer, the image included; scales of both learned, started from statistics
    (`ScalingImplType.PARAMETER_FROM_STATS`; by default the scale of a weight is its maximum anew in each step). Inputs
    that are never negative on the images have its unsigned quantizer, as behind its own `QuantReLU`.
    With `end_bits` the first and the last layer have that width and the image stays float, as in this package.
    Source: xilinx.github.io/brevitas, "Getting started" and "Settings".
    """
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    names = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    unsigned = _never_negative(model, names, images)

    def replace(chosen: list[str], bits: int, *, image: bool = False) -> None:
        weight = Int8WeightPerTensorFloat.let(bit_width=bits, scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS)
        for input_quantizer, own in (
            (Uint8ActPerTensorFloat, unsigned.intersection(chosen)),
            (Int8ActPerTensorFloat, set(chosen) - unsigned),
        ):
            quantizers = {
                "weight_quant": weight,
                "input_quant": None if image else input_quantizer.let(bit_width=bits),
                "return_quant_tensor": False,
            }
            kinds = {nn.Conv2d: (qnn.QuantConv2d, quantizers), nn.Linear: (qnn.QuantLinear, quantizers)}
            layerwise_quantize(model, kinds, [name for name in names if name not in own])

    if end_bits is None:
        replace(names, bits)
    else:
        replace(names[:1], end_bits, image=True)
        replace(names[1:-1], bits)
        replace(names[-1:], end_bits)
    with torch.no_grad(), calibration_mode(model):
        model(images)
    ends = "every layer" if end_bits is None else f"ends at {end_bits} bits"
    trains = f"W{bits}A{bits}, per tensor, learned scales, {ends}"
    return Prepared(model, bits, trains, _named(model, "scaling_impl"))


@torch.no_grad()
def _never_negative(model: nn.Module, names: list[str], images: Tensor) -> set[str]:
    """Names of the layers whose inputs are never negative on some images."""
    lowest: dict[str, float] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, args: lowest.update({name: float(args[0].min())})

    hooks = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    with evaluation_mode(model):
        model(images)
    for hook in hooks:
        hook.remove()
    return {name for name, low in lowest.items() if low >= 0}


def with_plain_batchnorm(model: nn.Module) -> nn.Module:
    """Replace each `BatchNormAct2d` of timm by `BatchNorm2d` with the same tensors, and its activation; in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BatchNormAct2d):
                batchnorm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
                batchnorm._parameters, batchnorm._buffers = layer._parameters, layer._buffers
                setattr(parent, name, nn.Sequential(batchnorm, layer.drop, layer.act).train(layer.training))
    return model


def aimet(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """AIMET: `prepare_model`, `QuantizationSimModel` with its defaults, `compute_encodings`; range learning.

    W and A at `bits`; learned minimum and maximum, per output channel for weights and per tensor for activations. The
    outputs of convolutions, batch-norms, activations and additions are each quantized. Batch-norm is not folded, as in
    AIMET's example with batch-norm re-estimation. timm's batch-norm with its activation is taken apart first: a trace
    makes a constant of its mode, and AIMET would train with the statistics of the float model.
    Source: AIMET's example notebooks `bn_reestimation` and `qat_range_learning`.
    """
    from aimet_torch import QuantizationSimModel
    from aimet_torch.model_preparer import prepare_model

    simulation = QuantizationSimModel(
        prepare_model(with_plain_batchnorm(model).eval()), images[:1], default_output_bw=bits, default_param_bw=bits
    )
    with torch.no_grad():
        simulation.compute_encodings(lambda simulated: simulated(images))
    trains = f"W{bits} per channel, A{bits}, learned ranges, A of every operation"
    return Prepared(simulation.model, bits, trains, _named(simulation.model, "quantizer"))


def torch_fx(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """PyTorch's own FX graph mode: `prepare_qat_fx` with `_LearnableFakeQuantize`.

    W and A at `bits`, the image and the output included; per tensor, learned scales and zero-points, of activations
    asymmetric. Batch-norm stays where it is: that of timm becomes a function in the graph, and only modules are fused.
    PyTorch calls the learnable module experimental, and both deprecated in favour of torchao.
    Source: docs.pytorch.org, "Quantization"; torch/ao/quantization/_learnable_fake_quantize.py.
    """
    from torch.ao.quantization import MovingAverageMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    def learnable(dtype: torch.dtype, qmin: int, qscheme: torch.qscheme) -> Any:
        return _LearnableFakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver,
            dtype=dtype,
            quant_min=qmin,
            quant_max=qmin + 2**bits - 1,
            qscheme=qscheme,
            use_grad_scaling=True,
        )

    inputs = learnable(torch.quint8, 0, torch.per_tensor_affine)
    weight = learnable(torch.qint8, -(2 ** (bits - 1)), torch.per_tensor_symmetric)
    model = prepare_qat_fx(model.train(), QConfigMapping().set_global(QConfig(inputs, weight)), (images,))
    model.to(images.device)
    with torch.no_grad():
        model(images)
    quantizers = [m for m in model.modules() if isinstance(m, _LearnableFakeQuantize)]
    for quantizer in quantizers:
        quantizer.enable_param_learning()
    scales = [p for q in quantizers for p in (q.scale, q.zero_point)]
    return Prepared(model, bits, f"W{bits}A{bits}, per tensor, learned scales", scales)


def torchao(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """torchao: `prepare_qat_pt2e` on the exported graph, `X86InductorQuantizer`, `LearnableFakeQuantize`.

    W and A at `bits`, per tensor, learned scales and zero-points, of activations asymmetric; batch-norm fused as in FX
    graph mode. The quantizer's ready-made config is W8A8 with moving averages. torchao's other interface for training,
    `QATConfig`, knows Linear and Embedding only: of MobileNetV2 it would quantize the classifier alone.
    Source: docs.pytorch.org/ao, "PyTorch 2 Export Quantization-Aware Training (QAT)".
    """
    from torchao.quantization.pt2e import LearnableFakeQuantize, MovingAverageMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

    def learnable(dtype: torch.dtype, qmin: int, qscheme: torch.qscheme) -> Any:
        return QuantizationSpec(
            dtype=dtype,
            quant_min=qmin,
            quant_max=qmin + 2**bits - 1,
            qscheme=qscheme,
            is_dynamic=False,
            observer_or_fake_quant_ctr=LearnableFakeQuantize.with_args(
                observer=MovingAverageMinMaxObserver, use_grad_scaling=True
            ),
        )

    activations = learnable(torch.uint8, 0, torch.per_tensor_affine)
    weights = learnable(torch.int8, -(2 ** (bits - 1)), torch.per_tensor_symmetric)
    config = QuantizationConfig(activations, activations, weights, None, True)
    exported = torch.export.export(model.train(), (images,)).module()
    model = prepare_qat_pt2e(exported, X86InductorQuantizer().set_global(config)).to(images.device)
    with torch.no_grad():
        model(images)
    quantizers = [m for m in model.modules() if isinstance(m, LearnableFakeQuantize)]
    for quantizer in quantizers:
        quantizer.enable_range_learning()
    scales = [p for q in quantizers for p in (q.scale, q.zero_point)]
    return Prepared(model, bits, f"W{bits}A{bits}, per tensor, learned scales", scales)


def nncf(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """NNCF: `nncf.quantize`, then plain training of what it returns. It has no other width than 8 bits here.

    W8A8 whatever `bits` says; learned ranges, per channel for weights and for inputs of depthwise convolutions. Needs
    ninja and a C++ compiler, on CUDA nvcc, for its own extension, which it builds at first use; that takes a minute.
    Source: docs.openvino.ai, "Quantization-aware Training (QAT) with PyTorch".
    """
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # or the build fails on a busy machine
    import nncf as library

    model = library.quantize(model.eval(), library.Dataset([images]), subset_size=1)
    scales = _named(model, "_scale_param_storage", "input_low", "_input_range_param_storage")
    return Prepared(model, 8, "W8A8, per channel, learned ranges", scales)


def modelopt(model: nn.Module, images: Tensor, bits: int) -> Prepared:
    """NVIDIA ModelOpt: `mtq.quantize` with a config of its documented form; training goes on with fixed ranges.

    W and A at `bits`, per tensor, symmetric; ranges are the maximum of calibration and are not trained.
    Source: nvidia.github.io/Model-Optimizer, "PyTorch Quantization", its sections on configs and on QAT.
    """
    import modelopt.torch.quantization as mtq

    integers = {"num_bits": bits, "axis": None}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": integers},
            {"quantizer_name": "*input_quantizer", "cfg": integers},
            {"quantizer_name": "*", "parent_class": "nn.BatchNorm2d", "enable": False},
        ],
        "algorithm": "max",
    }
    with torch.no_grad():
        model = mtq.quantize(model, config, lambda quantized: quantized(images))
    return Prepared(model, bits, f"W{bits}A{bits}, per tensor, fixed scales")


def _named(model: nn.Module, *parts: str) -> list[nn.Parameter]:
    """Trainable parameters with one of `parts` in their name.

    Raises:
        Unavailable: if there are none; another version of the library calls them something else.
    """
    found = [p for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in parts)]
    if not found:
        raise Unavailable(f"no parameter is called {' or '.join(parts)}, which is what earlier versions call scales")
    return found


PEERS: dict[str, Prepare] = {
    "plain": plain,
    "brevitas": brevitas,
    "aimet": aimet,
    "torch-fx": torch_fx,
    "torchao": torchao,
    "nncf": nncf,
    "modelopt": modelopt,
}
"""By name of the row."""
PACKAGES = ("brevitas", "aimet-torch", "torchao", "nncf", "nvidia-modelopt")
"""Distributions whose versions belong to a measurement."""
