"""From a float model to one that trains on the grid: choose the layers, give them quantizers, find initial ranges."""

import copy
import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_oscqat.config import CALIBRATION_POLICY, QUANT_METHOD, OscQATConfig, calibration_policy
from hf_oscqat.quantization.activations import fold_activations
from hf_oscqat.quantization.functional import output_axis
from hf_oscqat.quantization.gradient_estimators import STRAIGHT_THROUGH
from hf_oscqat.quantization.layers import (
    QUANTIZABLE,
    QuantizedLayer,
    quantize_layer,
    quantized_layers,
    quantizers,
)
from hf_oscqat.quantization.packed import PackedLayer
from hf_oscqat.quantization.packing import packed_width
from hf_oscqat.quantization.quantizer import LogScaleQuantizer, Quantizer
from hf_oscqat.quantization.range_estimators import RANGE_ESTIMATORS, GridParameters, NoRangeError, RangeEstimator
from hf_oscqat.quantization.timm_layers import forbid_merging, is_standardised, separate_qkv_bias, standardise
from hf_oscqat.remedies.batchnorm import Batch, batchnorm_layers, evaluation_mode, forward_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

REFUSED = {
    "CondConv2d": "it mixes several weights for each image",
    "MultiheadAttention": "it uses its weights without calling the layers that hold them",
    "LSTM": "recurrent layers are not supported",
    "GRU": "recurrent layers are not supported",
    "RNN": "recurrent layers are not supported",
}
"""Classes with matrices that cannot be quantized, and why."""


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done with one layer.

    Attributes:
        name: module name in the model.
        layer: the layer.
        weight_bits: 2 to 8, or None for float.
        input_bits: 2 to 8, or None for float.
    """

    name: str
    layer: nn.Module
    weight_bits: int | None
    input_bits: int | None


def prepare_qat(model: nn.Module, config: OscQATConfig) -> nn.Module:
    """Give the layers of a float model their quantizers, in place; weights get their ranges at once.

    Inputs get theirs from `calibrate`, which must run before the model does. Float checkpoints of the model keep
    loading into it: the latent weight of a layer is still called `<layer>.weight`.

    Args:
        model: a timm model, or a transformers model that wraps one.
        config: what to quantize, and how.

    Returns:
        The same model.

    Raises:
        ValueError: if a layer cannot be quantized, a pattern matches nothing, the model is prepared already or the
            config describes a packed checkpoint. Nothing has been changed then.
    """
    if config.layers is not None or config.checkpoint_format != "qat":
        raise ValueError(
            f"got a config with checkpoint_format={config.checkpoint_format!r} and "
            f"{'its' if config.layers else 'no'} layers, as pack writes it, expected one for training: make a new "
            "OscQATConfig; packed checkpoints cannot be trained on"
        )
    # Here and not above, because it takes a second that looking at a timm model does not need.
    from transformers import PreTrainedModel

    insert_quantizers(model, config)
    if isinstance(model, PreTrainedModel):
        attach_config(model, config)
        # By it transformers saves under the names in the file that the model came from. In one of timm's they lack the
        # wrapper's prefix, and what is no float model of timm any more could not be loaded by them.
        vars(model).pop("_weight_conversions", None)
    return model


def insert_quantizers(model: nn.Module, config: OscQATConfig, *, partial_model: bool = False) -> None:
    """Do the part of `prepare_qat` that concerns layers.

    Args:
        model: see `prepare_qat`; on the meta device the quantizers stay without a range.
        config: see `prepare_qat`.
        partial_model: whether a pattern may match nothing, as in a model loaded without its head.

    Raises:
        ValueError: see `prepare_qat`.
    """
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise ValueError("got a packed model, expected a float model: integers cannot be trained")
    if any(True for _ in quantized_layers(model)):
        raise ValueError("got a model that is prepared already, expected a float model")
    plans = plan_layers(model, config, partial_model=partial_model)
    for plan in plans:
        if plan.weight_bits is not None and cast(Tensor, plan.layer.weight).element_size() < 4:
            raise ValueError(
                f"got {plan.name} with weights of {plan.layer.weight.dtype}, expected float32: one step of training "
                "is too small for 16 bits. Load with dtype=torch.float32, and train with bf16=True"
            )
    ready = [(plan, *_new_quantizers(plan, config)) for plan in plans]
    weights = [(plan, q) for plan, q, _ in ready if q is not None and not plan.layer.weight.is_meta]
    # One after the other, because an estimator keeps a copy of its weight.
    estimators = ((plan.name, _weight_estimator(plan.name, q, _float_weight(plan.layer))) for plan, q in weights)
    grids = _find_ranges(estimators, _Report(config.calibration_policy))
    for (_, quantizer), grid in zip(weights, grids, strict=True):
        quantizer.set_range(grid.scale, grid.zero_point)
    separate_qkv_bias(model)
    for plan, weight_quantizer, input_quantizer in ready:
        quantize_layer(plan.layer, weight_quantizer, input_quantizer)
    fold_activations(model)
    forbid_merging(model)


def plan_layers(model: nn.Module, config: OscQATConfig, *, partial_model: bool = False) -> list[LayerPlan]:
    """Decide what happens to each layer, without changing any.

    Args:
        model: see `prepare_qat`.
        config: see `prepare_qat`.
        partial_model: see `insert_quantizers`.

    Raises:
        ValueError: see `prepare_qat`.
    """
    float_patterns = _Patterns("modules_to_not_convert", config.modules_to_not_convert)
    override_patterns = _Patterns("overrides", list(config.overrides))
    candidates: dict[str, nn.Module] = {}
    float_owners: list[str] = []
    refused: list[str] = []
    why = ""
    for name, module in model.named_modules():
        reason = _why_refused(module)
        if reason is None and not isinstance(module, QUANTIZABLE):
            continue
        if any(name.startswith(f"{owner}.") for owner in [*float_owners, *refused]):
            continue
        if float_patterns.matching(name):
            float_owners.append(name)
        elif reason is not None:
            refused.append(name)
            why = why or f"{short_name(name)!r} of class {type(module).__name__}, which cannot be quantized: {reason}"
        else:
            candidates[name] = module
    if refused:
        them = "it" if len(refused) == 1 else f"it and {len(refused) - 1} more"
        raise ValueError(
            f"got layer {why}. Leave {them} in float with modules_to_not_convert={list(map(short_name, refused))}"
        )
    if not candidates:
        raise ValueError("got a model without a layer to quantize, expected Conv or Linear layers left to convert")

    first, last = _first_and_last(model, candidates)
    plans = []
    for name, layer in candidates.items():
        weight_bits, input_bits = config.weight_bits, config.activation_bits
        if name in first or name in last:
            weight_bits = config.first_last_bits if weight_bits is not None else None
            input_bits = config.first_last_bits if input_bits is not None else None
        if name in first:
            input_bits = None
        for pattern in override_patterns.matching(name):
            override = config.overrides[pattern]
            weight_bits = override.get("weight_bits", weight_bits)
            input_bits = override.get("activation_bits", input_bits)
        if weight_bits is not None or input_bits is not None:
            plans.append(LayerPlan(name, layer, weight_bits, input_bits))
    if not partial_model:
        names = [short_name(name) for name in candidates]
        float_patterns.check_all_matched(names)
        override_patterns.check_all_matched(names)
        if not plans:
            raise ValueError("got a config that leaves every layer in float, expected bits for some: set weight_bits")
    return plans


def check_layers(model: nn.Module, config: OscQATConfig) -> None:
    """Refuse a model with a layer that its config quantizes and that has no quantizers: it was put there afterwards.

    Raises:
        ValueError: naming the layers.
    """
    plans = plan_layers(model, config, partial_model=True)
    late = [short_name(plan.name) for plan in plans if not isinstance(plan.layer, QuantizedLayer)]
    if late:
        raise ValueError(
            f"got float layers {', '.join(late)}, which the config quantizes, expected none put there after "
            "prepare_qat: replace layers (as reset_classifier does) before it"
        )


def calibrate(model: nn.Module, batches: Iterable[Batch], policy: Mapping[str, str] | None = None) -> None:
    """Find the initial range of every quantizer: of weights from their values, of inputs from data.

    The batches pass through the model in float and in evaluation mode; none is kept. Processes do not exchange ranges:
    each has to calibrate with the same batches.

    Args:
        model: a model that `prepare_qat` has prepared.
        batches: training batches, each a tensor or a dict of what the model's forward takes.
        policy: what to do about what is wrong, see `OscQATConfig.calibration_policy`; None takes that of the model's
            config, or the default for a bare timm model. Warnings go to the log; a quantizer without a range gets
            that of [-1, 1].

    Raises:
        ValueError: if the model is not prepared or a layer was replaced afterwards, there are no batches, a quantizer
            saw a NaN, or the policy makes an error of what is wrong. The layer is named, and no range has been
            changed.
    """
    model = unwrapped(model)
    if not any(True for _ in quantized_layers(model)):
        raise ValueError("got a model without quantized layers, expected a prepared one: run prepare_qat first")
    config = _config_of(model)
    if config is not None:
        check_layers(model, config)
    if policy is None:
        policy = CALIBRATION_POLICY if config is None else config.calibration_policy
    report = _Report(calibration_policy(policy))
    untouched = _untouched_batchnorm(model)
    if untouched:
        report(
            "untouched_batchnorm",
            f"got batch-norm statistics that nothing has touched, in {', '.join(untouched[:3])} and {len(untouched)} "
            "layers in all: activations will not have the ranges they have in training. Load trained weights, or run "
            "hf_oscqat.reestimate_batchnorm(model, batches) before prepare_qat",
        )
    with _observing_inputs(model) as observers:
        if observers and _run(model, batches):
            report("constant", "got the same value everywhere in all batches, expected images as in training")
    never_called = [short_name(name) for name, observer in observers.items() if observer.estimator.batches == 0]
    if never_called:
        report(
            "never_called",
            f"got no input at the quantizers of {', '.join(never_called)}: the model uses these weights without "
            f"calling the layer. Leave them in float with modules_to_not_convert={never_called!r}",
        )
    constant = [short_name(name) for name, o in observers.items() if o.estimator.batches and o.estimator.is_constant]
    if constant:
        report(
            "constant",
            f"got the same value everywhere at the inputs of {', '.join(constant)}, expected activations: the network "
            "before may be dead",
        )
    weights = [(name, layer, q) for name, layer in quantized_layers(model) if (q := layer.weight_quantizer)]
    of_weights = ((name, _weight_estimator(name, q, layer.float_weight)) for name, layer, q in weights)
    of_inputs = ((name, observer.estimator) for name, observer in observers.items())
    grids = _find_ranges(chain(of_weights, of_inputs), report)
    found = [q for _, _, q in weights] + [observer.estimator.quantizer for observer in observers.values()]
    for quantizer, grid in zip(found, grids, strict=True):
        quantizer.set_range(grid.scale, grid.zero_point, signed=grid.signed)


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable scales and zero-points."""
    return [p for _, quantizer in quantizers(model) for p in quantizer.parameters() if p.requires_grad]


def model_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return everything trainable that is no scale or zero-point: latent weights, biases, normalisation."""
    of_quantizers = {id(p) for p in quantizer_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in of_quantizers]


@dataclass(frozen=True)
class LayerDescription:
    """One row of `describe`.

    Attributes:
        name: module name without `timm_model.`.
        layer_class: class of the layer before preparation.
        shape: shape of the weight.
        weight_bits: None for float.
        input_bits: None for float.
        bytes: of the weight in a packed checkpoint; scales not included.
        why_float: why the weight is not quantized; None where it is.
    """

    name: str
    layer_class: str
    shape: tuple[int, ...]
    weight_bits: int | None
    input_bits: int | None
    bytes: int
    why_float: str | None = None

    @property
    def parameters(self) -> int:
        """Numbers in the weight."""
        return prod(self.shape)


def describe(model: nn.Module) -> list[LayerDescription]:
    """List every layer and every other parameter of two or more dimensions, with its widths.

    A module that the model holds in several places is listed once, by the name of the first.

    Args:
        model: any model, float, prepared or packed; in one that is neither prepared nor packed everything is float.
    """
    rows = []
    is_float = not any(isinstance(module, QuantizedLayer | PackedLayer) for module in model.modules())
    for name, module in model.named_modules():
        tensors = {n: (tuple(p.shape), p.element_size()) for n, p in module.named_parameters(recurse=False)}
        if isinstance(module, PackedLayer) and module.format.weight is not None:
            tensors["weight"] = (module.format.weight.shape, 0)
        for parameter_name, (shape, element_size) in tensors.items():
            if len(shape) < 2:
                continue
            weight_bits, input_bits = _widths(module) if parameter_name == "weight" else (None, None)
            size = prod(shape) * element_size
            if weight_bits is not None:  # the stream of bits begins anew for each output channel
                channels = shape[output_axis(module)]
                size = channels * packed_width(prod(shape) // channels, weight_bits)
            rows.append(
                LayerDescription(
                    short_name(name if parameter_name == "weight" else f"{name}.{parameter_name}".lstrip(".")),
                    type(module).__name__.removeprefix("Packed").removeprefix("Quantized"),
                    shape,
                    weight_bits,
                    input_bits,
                    size,
                    None if weight_bits else _why_float(module, parameter_name, is_float),
                )
            )
    return rows


def _widths(module: nn.Module) -> tuple[int | None, int | None]:
    if isinstance(module, PackedLayer):
        weight, input = (grid.bits if grid else None for grid in (module.format.weight, module.format.input))
    elif isinstance(module, QuantizedLayer):
        weight, input = (q.num_bits if q else None for q in (module.weight_quantizer, module.input_quantizer))
    else:
        weight = input = None
    return weight, input


def _why_float(module: nn.Module, parameter_name: str, model_is_float: bool) -> str:
    if model_is_float:
        return "the model is not prepared"
    if isinstance(module, QUANTIZABLE) and parameter_name == "weight":
        return "left in float by the config"
    return "no weight of a layer"


def attach_config(model: "PreTrainedModel", config: OscQATConfig) -> None:
    """Make a transformers model say that it is quantized by `config`, on a copy of its own config."""
    from transformers.quantizers import AutoHfQuantizer

    model.config = copy.deepcopy(model.config)
    model.config.quantization_config = config
    # The registry gives the quantizer that `import hf_oscqat` entered there, so this module needs no import of it.
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DistributedDataParallel put around it."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def short_name(name: str) -> str:
    """Name of a module as patterns and messages use it, without the wrapper's `timm_model.`."""
    return name.removeprefix("timm_model.")


class _Patterns:
    """fnmatch globs on short module names that remember whether they ever matched."""

    def __init__(self, key: str, patterns: list[str]) -> None:
        self.key = key
        self.patterns = patterns
        self.matched: set[str] = set()

    def matching(self, name: str) -> list[str]:
        found = [pattern for pattern in self.patterns if fnmatch.fnmatchcase(short_name(name), pattern)]
        self.matched.update(found)
        return found

    def check_all_matched(self, names: list[str]) -> None:
        for pattern in self.patterns:
            if pattern not in self.matched:
                some = ", ".join(names[:3])
                raise ValueError(
                    f"got pattern {pattern!r} in {self.key}, which matches no layer, expected a glob on names such as "
                    f"{some} (hf_oscqat.describe(model) lists all)"
                )


def _why_refused(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized already"
    if isinstance(module, QUANTIZABLE) and "weight" not in module._parameters:
        return "its weight is computed before each forward, by a norm or by pruning"
    refused = next((REFUSED[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in REFUSED), None)
    if refused is not None or isinstance(module, QUANTIZABLE):
        return refused
    # Tokens and position tables have names of their own; what a class calls a weight, it multiplies with.
    matrices = [n for n, p in module.named_parameters(recurse=False) if "weight" in n and p.ndim > 1]
    return f"its {matrices[0]} is a matrix, and the class is not known here" if matrices else None


def _first_and_last(model: nn.Module, candidates: dict[str, nn.Module]) -> tuple[set[str], set[str]]:
    """Names of the layers at both ends: as timm's config names them, else by order of definition."""
    timm_model = getattr(model, "timm_model", model)
    prefix = "timm_model." if timm_model is not model else ""
    modules = {name for name, _ in model.named_modules()}
    pretrained_cfg: Any = getattr(timm_model, "pretrained_cfg", None) or {}

    def named(key: str, otherwise: str) -> set[str]:
        entry = pretrained_cfg.get(key) or ()
        names = {prefix + name for name in ([entry] if isinstance(entry, str) else entry)} & modules
        # What timm names but somebody left in float is still the end of the model: no other layer takes its place.
        return names & candidates.keys() if names else {otherwise}

    names = list(candidates)
    return named("first_conv", names[0]), named("classifier", names[-1])


def _new_quantizers(plan: LayerPlan, config: OscQATConfig) -> tuple[Quantizer | None, Quantizer | None]:
    """Make the quantizers of one layer, without ranges."""
    weight: Tensor = plan.layer.weight  # type: ignore[assignment]
    cls = LogScaleQuantizer if config.scale_domain == "log" else Quantizer
    estimator = config.make_gradient_estimator()
    common: dict[str, Any] = {
        "range_estimator": config.range_estimator,
        "lsq_gradient_scaling": config.lsq_gradient_scaling,
        "device": weight.device,
        "dtype": torch.promote_types(weight.dtype, torch.float32),
    }
    weight_quantizer = input_quantizer = None
    if plan.weight_bits is not None:
        axis = output_axis(plan.layer)
        weight_quantizer = cls(
            plan.weight_bits,
            gradient_estimator=estimator,
            symmetric=config.weight_scheme == "symmetric",
            signed=True,
            channels=weight.shape[axis] if config.weight_granularity == "per_channel" else None,
            axis=axis,
            **common,
        )
    if plan.input_bits is not None:
        input_quantizer = cls(
            plan.input_bits,
            gradient_estimator=estimator if estimator.for_inputs else STRAIGHT_THROUGH,
            symmetric=config.activation_scheme == "symmetric",
            **common,
        )
    return weight_quantizer, input_quantizer


def _float_weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return standardise(layer, weight) if is_standardised(type(layer)) else weight


def _weight_estimator(name: str, quantizer: Quantizer, weight: Tensor) -> RangeEstimator:
    estimator = RANGE_ESTIMATORS[quantizer.range_estimator](quantizer, keep_all=True)
    with _naming_layer(name):
        estimator.update(weight)
    return estimator


class _Report:
    """Raises or logs what is wrong in calibration, as the policy has it."""

    def __init__(self, policy: Mapping[str, str]) -> None:
        self.policy = policy

    def __call__(self, problem: str, message: str) -> None:
        if self.policy[problem] == "error":
            raise ValueError(message)
        logger.warning("%s", message)


def _config_of(model: nn.Module) -> OscQATConfig | None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if isinstance(config, OscQATConfig) else None


def _find_ranges(estimators: Iterable[tuple[str, RangeEstimator]], report: _Report) -> list[GridParameters]:
    """What each estimator proposes, or the grid of [-1, 1] where its values say nothing and the policy allows it."""
    grids, empty = [], []
    for name, estimator in estimators:
        with _naming_layer(name):
            try:
                grids.append(estimator.finish() if estimator.batches else estimator.unit_grid())
            except NoRangeError:
                empty.append(short_name(name))
                grids.append(estimator.unit_grid())
    if empty:
        report(
            "no_range",
            f"no range for {', '.join(map(repr, empty))}: got nothing but zeros, expected values to find a range "
            "from. The policy 'warn' for no_range takes [-1, 1]",
        )
    return grids


def _untouched_batchnorm(model: nn.Module) -> list[str]:
    """Names of batch-norm layers whose running statistics are those of a new layer."""
    layers = {id(layer) for layer in batchnorm_layers(model)}
    return [
        short_name(name)
        for name, module in model.named_modules()
        if id(module) in layers and not module.running_mean.any() and bool((module.running_var == 1).all())
    ]


@contextmanager
def _naming_layer(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"no range for layer {short_name(name)!r}: {error}") from error


class _InputObserver(nn.Module):
    """Stands in for an input quantizer during calibration: looks, and passes on what it saw."""

    def __init__(self, name: str, quantizer: Quantizer) -> None:
        super().__init__()
        self.name = name
        self.estimator = RANGE_ESTIMATORS[quantizer.range_estimator](quantizer)

    def forward(self, x: Tensor) -> Tensor:
        with _naming_layer(self.name):
            self.estimator.update(x)
        return x


@contextmanager
def _observing_inputs(model: nn.Module) -> Iterator[dict[str, _InputObserver]]:
    """Make every quantized layer a float layer whose input is watched; undone at the end."""
    layers = dict(quantized_layers(model))
    kept = {name: (layer.weight_quantizer, layer.input_quantizer) for name, layer in layers.items()}
    observers = {name: _InputObserver(name, inputs) for name, (_, inputs) in kept.items() if inputs is not None}
    try:
        for name, layer in layers.items():
            layer.weight_quantizer = None
            layer.input_quantizer = observers.get(name)  # type: ignore[assignment]
        yield observers
    finally:
        for name, (weights, inputs) in kept.items():
            layers[name].weight_quantizer = weights
            layers[name].input_quantizer = inputs


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Batch]) -> bool:
    """Pass the batches through the model in evaluation mode; return whether they hold one value only."""
    count, low, high = 0, float("inf"), float("-inf")
    with evaluation_mode(model):
        for batch in batches:
            forward_batch(model, batch)
            count += 1
            for x in [batch] if isinstance(batch, Tensor) else batch.values():
                if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                    low, high = min(low, float(x.min())), max(high, float(x.max()))
    if count == 0:
        raise ValueError("got no batches to calibrate with, expected at least one")
    return low == high
