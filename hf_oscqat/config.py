"""`OscQATConfig`: everything that decides what a quantized model computes and what is done against oscillation."""

import difflib
import functools
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_oscqat.quantization.gradient_estimators import GRADIENT_ESTIMATORS, GradientEstimator, make_gradient_estimator
from hf_oscqat.quantization.range_estimators import RANGE_ESTIMATORS
from hf_oscqat.remedies import REMEDIES, Remedy

QUANT_METHOD = "oscqat"
CALIBRATION_POLICY = {"never_called": "error", "no_range": "warn", "constant": "warn", "untouched_batchnorm": "warn"}
"""What calibration does about each thing that can be wrong, unless the config says otherwise."""
BITS = range(2, 9)


def check_keys(given: Iterable[str], valid: Collection[str], where: str) -> None:
    """Refuse a key that nothing reads, because it is a typing error more often than not.

    Raises:
        ValueError: naming the key, the one that may have been meant, and all valid ones.
    """
    for key in given:
        if key not in valid:
            matches = difflib.get_close_matches(key, valid, n=1)
            meant = f" Did you mean {matches[0]!r}?" if matches else ""
            valid_keys = f" Valid keys: {', '.join(sorted(valid))}" if len(valid) < 40 else ""
            raise ValueError(f"got unknown key {key!r} in {where}.{meant}{valid_keys}")


def _accept_remedies(cls: type["OscQATConfig"]) -> type["OscQATConfig"]:
    """Let the constructor take one key per entry of `REMEDIES`, and refuse unknown keys with a ValueError."""
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def __init__(self: "OscQATConfig", *args: Any, **kwargs: Any) -> None:
        check_keys(kwargs, cls.valid_keys(), cls.__name__)
        for name, remedy in REMEDIES.items():
            setattr(self, name, _remedy_settings(name, remedy, kwargs.pop(name, None)))
        plain_init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_accept_remedies
@dataclass(eq=False, repr=False)
class OscQATConfig(QuantizationConfigMixin):
    """How a model is quantized and trained.

    Args:
        weight_bits: width of weights, 2 to 8; None leaves them in float.
        activation_bits: width of each layer's input, 2 to 8; None leaves it in float.
        weight_granularity: one scale `"per_tensor"`, or one per output channel, `"per_channel"`.
        weight_scheme: `"symmetric"`, or `"asymmetric"` with a learned zero-point.
        activation_scheme: the same for inputs. A symmetric grid of inputs is unsigned where calibration saw nothing
            negative.
        first_last_bits: width of the first layer's weight and of the last layer's weight and input; None leaves both
            layers in float. The first layer's input, the image, is not quantized.
        overrides: `{name pattern: {"weight_bits": .., "activation_bits": ..}}`; patterns are fnmatch globs on module
            names without `timm_model.`, later ones win, and they win over `first_last_bits`. Pairs of pattern and
            override will do too, and are what `to_dict` returns where the order is not alphabetical.
        modules_to_not_convert: patterns of layers that stay float altogether.
        range_estimator: initial ranges, one of `"mse"`, `"minmax"`, `"running_minmax"`, `"percentile"`,
            or `"mse_published"`, the candidates of the published search.
        calibration_policy: "error" or "warn" for what can be wrong in calibration: a layer whose input quantizer is
            `never_called`, values with `no_range` (nothing but zeros), `constant` inputs, and `untouched_batchnorm`
            statistics, with which activations have no sensible range. Keys that are left out keep
            `CALIBRATION_POLICY`.
        gradient_estimator: how a gradient passes through rounding: `"ste"`, `"ewgs"`, `"stacked_sigmoid"`, `"dsq"`,
            `"psg"`, `"stochastic_rounding"` or `"additive_noise"`.
        gradient_estimator_args: its settings, such as `{"scaling_factor": 0.2}`; see
            `hf_oscqat.quantization.gradient_estimators`.
        scale_domain: learn each scale itself, `"linear"`, or its logarithm, `"log"`, which wants a scale learning rate
            about a hundred times as large.
        lsq_gradient_scaling: scale the gradients of scales as LSQ does; the published method does not.
        tracker_momentum: EMA step of oscillation frequencies, in (0, 1], where no remedy brings its own.
        batchnorm_reestimation_batches: training batches, each with a part from every process, for re-estimating
            batch-norm statistics before each evaluation; 0 turns it off.
        batchnorm_total_variance: re-estimate the variance over all those images at once, which includes that between
            batches; the published method averages the variances of the batches.
        checkpoint_format: `"qat"` (latent weights, trainable) or `"packed"`. Written by `pack`.
        format_version: version of the packed format. Written by `pack`.
        layers: per-layer grids of a packed checkpoint. Written by `pack`.
        dampening: None, or settings of oscillation dampening (`DampeningSettings` or a dict of its arguments).
        freezing: None, or settings of iterative freezing (`FreezingSettings` or a dict of its arguments).
        bin_regularization: None, or settings of bin regularization (`BinRegularizationSettings` or a dict of its
            arguments).

    Raises:
        ValueError: for a bad value or an unknown key; the message says what was got, what is expected and what to do.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)
    weight_bits: int | None = 4
    activation_bits: int | None = 4
    weight_granularity: str = "per_tensor"
    weight_scheme: str = "symmetric"
    activation_scheme: str = "symmetric"
    first_last_bits: int | None = 8
    overrides: dict[str, dict[str, int | None]] = field(default_factory=dict)
    modules_to_not_convert: list[str] = field(default_factory=list)
    range_estimator: str = "mse"
    calibration_policy: dict[str, str] = field(default_factory=dict)
    gradient_estimator: str = "ste"
    gradient_estimator_args: dict[str, Any] = field(default_factory=dict)
    scale_domain: str = "linear"
    lsq_gradient_scaling: bool = False
    tracker_momentum: float = 0.001
    batchnorm_reestimation_batches: int = 50
    batchnorm_total_variance: bool = False
    checkpoint_format: str = "qat"
    format_version: int = 1
    layers: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.modules_to_not_convert = _patterns("modules_to_not_convert", self.modules_to_not_convert)
        for name in ("weight_bits", "activation_bits", "first_last_bits"):
            _check_bits(name, getattr(self, name))
        _check_choice("weight_granularity", self.weight_granularity, ("per_tensor", "per_channel"))
        _check_choice("weight_scheme", self.weight_scheme, ("symmetric", "asymmetric"))
        _check_choice("activation_scheme", self.activation_scheme, ("symmetric", "asymmetric"))
        _check_choice("range_estimator", self.range_estimator, tuple(RANGE_ESTIMATORS))
        _check_choice("gradient_estimator", self.gradient_estimator, tuple(GRADIENT_ESTIMATORS))
        self.calibration_policy = calibration_policy(self.calibration_policy)
        _check_choice("scale_domain", self.scale_domain, ("linear", "log"))
        if self.gradient_estimator_args is None:
            self.gradient_estimator_args = {}
        args = self.gradient_estimator_args
        if not isinstance(args, Mapping):
            raise ValueError(f"got gradient_estimator_args={args!r}, expected a mapping of the estimator's arguments")
        self.make_gradient_estimator()
        _check_choice("checkpoint_format", self.checkpoint_format, ("qat", "packed"))
        self.overrides = _overrides({} if self.overrides is None else self.overrides)
        for name in ("lsq_gradient_scaling", "batchnorm_total_variance"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"got {name}={getattr(self, name)!r}, expected True or False")
        momentum = self.tracker_momentum
        if not (isinstance(momentum, int | float) and 0 < momentum <= 1):
            raise ValueError(f"got tracker_momentum={momentum!r}, expected a number in (0, 1]")
        if not _is_int(self.format_version):
            raise ValueError(f"got format_version={self.format_version!r}, expected a whole number")
        if self.layers is not None and not isinstance(self.layers, Mapping):
            raise ValueError(f"got layers={self.layers!r}, expected what hf_oscqat.pack writes, or nothing")
        count = self.batchnorm_reestimation_batches
        if not _is_int(count) or count < 0:
            raise ValueError(f"got batchnorm_reestimation_batches={count!r}, expected a whole number of batches, or 0")

    @property
    def momentum(self) -> float:
        """EMA step of the oscillation tracker: that of the remedy which acts on its statistics, if one does."""
        own = (getattr(self, name).momentum for name in REMEDIES if hasattr(getattr(self, name), "momentum"))
        return next(own, self.tracker_momentum)

    @property
    def use_ema(self) -> bool:
        """Whether the tracker freezes at mean integers, if a remedy freezes."""
        own = (getattr(self, name).use_ema for name in REMEDIES if hasattr(getattr(self, name), "use_ema"))
        return next(own, True)

    @classmethod
    def valid_keys(cls) -> list[str]:
        """Names that the constructor takes."""
        return [f.name for f in fields(cls) if f.init] + list(REMEDIES)

    def make_gradient_estimator(self) -> GradientEstimator:
        """Return the gradient estimator with its settings."""
        return make_gradient_estimator(self.gradient_estimator, self.gradient_estimator_args)

    def remedies(self) -> list[Remedy]:
        """Return the remedies that are switched on, ready to act on training."""
        chosen = ((remedy, getattr(self, name)) for name, remedy in REMEDIES.items())
        return [remedy(settings) for remedy, settings in chosen if settings is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `from_dict` gives an equal config back. What only `pack` writes is left out before it."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        settings = {name: getattr(self, name) for name in REMEDIES}
        data |= {name: None if s is None else asdict(s) for name, s in settings.items()}
        if data["layers"] is None:
            del data["layers"], data["format_version"]
        # transformers writes config.json with sorted keys, which would let another pattern win.
        if list(self.overrides) != sorted(self.overrides):
            data["overrides"] = list(self.overrides.items())
        return json.loads(json.dumps(data))

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the whole config: a published model must not depend on the defaults of a later version."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a config from plain data.

        Args:
            config_dict: as `to_dict` returns it; a subset will do.
            return_unused_kwargs: also return an empty dict, as transformers expects; nothing is ever unused.
            **kwargs: values that win over those of `config_dict`.

        Returns:
            The config; with `return_unused_kwargs`, the config and the empty dict.

        Raises:
            ValueError: for a bad value or an unknown key.
        """
        data = {**config_dict, **kwargs}
        method = data.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"got quant_method={method!r}, expected {QUANT_METHOD!r}")
        if "checkpoint_format" in data:  # a file that this package wrote, and no person has typed
            check_keys(data, cls.valid_keys(), "the config of a checkpoint, which a newer hf_oscqat may have written")
        config = cls(**data)
        return (config, {}) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OscQATConfig) and self.to_dict() == other.to_dict()


def _overrides(given: Any) -> dict[str, dict[str, int | None]]:
    pairs = isinstance(given, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in given)
    if pairs and all(isinstance(pattern, str) for pattern, _ in given):
        if len(dict(given)) < len(given):
            raise ValueError(f"got overrides={given!r}, expected each pattern once")
        given = dict(given)
    if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"got overrides={given!r}, expected {{name pattern: {{'weight_bits': .., ..}}}}")
    for pattern, override in given.items():
        if not isinstance(override, Mapping):
            raise ValueError(
                f"got overrides[{pattern!r}]={override!r}, expected a mapping such as {{'weight_bits': 8}}"
            )
        for key, value in override.items():
            check_keys([key], ("weight_bits", "activation_bits"), f"overrides[{pattern!r}]")
            _check_bits(f"overrides[{pattern!r}].{key}", value)
    return {pattern: dict(override) for pattern, override in given.items()}


def calibration_policy(given: Any) -> dict[str, str]:
    """Complete and check a calibration policy; see `OscQATConfig`.

    Raises:
        ValueError: for an unknown key or a value other than "error" and "warn".
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"got calibration_policy={given!r}, expected a mapping such as {{'no_range': 'error'}}")
    check_keys(given, CALIBRATION_POLICY, "calibration_policy")
    for key, value in given.items():
        _check_choice(f"calibration_policy[{key!r}]", value, ("error", "warn"))
    return CALIBRATION_POLICY | dict(given)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_bits(name: str, value: Any) -> None:
    if value is not None and not (_is_int(value) and value in BITS):
        raise ValueError(f"got {name}={value!r}, expected a whole number from 2 to 8, or None to leave it in float")


def _check_choice(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"got {name}={value!r}, expected one of {', '.join(map(repr, valid))}")


def _remedy_settings(name: str, remedy: type[Remedy], given: Any) -> Any:
    if given is None or isinstance(given, remedy.Settings):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(
            f"got {name}={given!r}, expected None, {remedy.Settings.__name__} or a mapping of its arguments"
        )
    check_keys(given, [f.name for f in fields(remedy.Settings)], name)
    try:
        return remedy.Settings(**given)
    except TypeError as error:
        raise ValueError(f"got {name}={dict(given)!r}, expected numbers: {error}") from error


def _patterns(name: str, given: Any) -> list[str]:
    patterns = [] if given is None else given
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"got {name}={given!r}, expected a list of module name patterns")
    return list(patterns)
