"""Track oscillations of quantized weights.

A weight oscillates at a step when its integer moves against its previous move; its oscillation frequency is the
exponential moving average of that event (Nagel et al., ICML 2022, sec. 2.2 and eq. 5). The published code counts in
every forward, evaluation included, so its frequencies decay with the size of the validation set. Here a tick is taken
by whoever drives training, between backward and the optimizer's step, and nothing else moves the statistics.

An integer moves because the latent weight did or because the scale did. The frequency counts both, as published; the
share that is the scale's doing is counted apart.

The state of a layer sits in the layer as buffers. It follows the model between devices, is saved with it and comes
back with it, which is what makes a resumed run equal to one that was never stopped.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_oscqat.quantization.functional import frozen_dtype, is_frozen, live_sentinel, to_int
from hf_oscqat.quantization.kernels import one_pass
from hf_oscqat.quantization.layers import QuantizedLayer, quantized_layers
from hf_oscqat.quantization.quantizer import Quantizer


def track(tensors: Any, parameters: Any, bounds: Any, axis: int, freezes: bool, use_ema: bool) -> tuple[Tensor, ...]:
    """One tick of one weight, as a function for `one_pass`; it writes the new state into the old.

    Args:
        tensors: latent weight; `previous_int`, `direction`, `frequency` and `mean_int`; frozen integers or None;
            `total` and `total_by_scale`, or None; all shaped like the weight.
        parameters: scale and zero-point, or None, of this step, and those of the step before.
        bounds: qmin, qmax, momentum, 1 - momentum, threshold.
        axis: channel dimension.
        freezes: whether weights of a frequency above the threshold freeze, from the next forward on. One that was
            frozen before and is still above it is set anew, as in the published code.
        use_ema: whether they freeze at their rounded mean integer of the steps before; otherwise at the present one.

    Returns:
        How many weights oscillated, and how many of those because the scale moved: `(2,)`.
    """
    weight, previous_int, direction, frequency, mean_int, frozen_int, total, total_by_scale = tensors
    scale, zero_point, previous_scale, previous_zero_point = parameters
    qmin, qmax, momentum, rest, threshold = bounds

    w_int = to_int(weight, scale, zero_point, qmin, qmax, axis=axis, frozen_int=frozen_int)
    previous, last_move = previous_int.to(w_int.dtype), direction.to(w_int.dtype)
    # Masks are numbers here, because on a CPU torch is several times slower with booleans.
    move = (w_int - previous).sign_()
    oscillated = (move * last_move).eq_(-1)
    # On the grid of the step before, would the weight have stayed where it was? Then the scale has moved it.
    stayed = to_int(weight, previous_scale, previous_zero_point, qmin, qmax, axis=axis, frozen_int=frozen_int)
    by_scale = stayed.eq_(previous).mul_(oscillated)
    # Summed before any state is written: otherwise torch's compiler keeps each new state in a temporary until the sums
    # have read the old one.
    counts = torch.stack([oscillated.sum(), by_scale.sum()]).float()

    # The product in float32 also where the sum is float64, as published: with a threshold that equals the momentum,
    # its rounding decides whether a single oscillation freezes a weight.
    frequency.mul_(rest).add_(oscillated.float() * momentum)
    direction.copy_(torch.addcmul(last_move, move.abs(), move - last_move))
    previous_int.copy_(w_int)
    if total is not None:
        total.add_(oscillated.to(total.dtype))
        total_by_scale.add_(by_scale.to(total.dtype))
    if freezes:
        target = mean_int.round() if use_ema else w_int
        frozen = frozen_int.to(target.dtype)
        frozen_int.copy_(torch.addcmul(frozen, target - frozen, frequency.clone().gt_(threshold)))
        mean_int.lerp_(w_int.to(mean_int.dtype), momentum)
    return (counts,)


class OscillationState(nn.Module):
    """Running oscillation statistics of one weight.

    Args:
        weight: the latent weight, for shape and device.
        quantizer: its quantizer, for the width of its integers and the shape of its scale.
        count_total: also count every oscillation of every weight.

    Attributes (buffers shaped like the weight):
        previous_int: its integer at the last tick; `live_sentinel` before the first.
        direction: int8, sign of its last move; 0 if it never moved.
        frequency: float32 (float64 for a float64 weight), oscillations per optimizer step, in [0, 1].
        mean_int: typed like `frequency`, moving average of its integer; NaN until freezing starts.
        total: int32, oscillations so far, or None.
        total_by_scale: int32, those of them that a moving scale caused, or None.

    Attributes (buffers of the layer):
        previous_scale: the quantizer's scale at the last tick; NaN before the first.
        previous_zero_point: its zero-point then, or None.
        events: float32 `(2,)`, moving averages of the share of weights that oscillated in a step: of all, and of those
            that a moving scale caused.
    """

    previous_int: Tensor
    direction: Tensor
    frequency: Tensor
    mean_int: Tensor
    total: Tensor | None
    total_by_scale: Tensor | None
    previous_scale: Tensor
    previous_zero_point: Tensor | None
    events: Tensor

    def __init__(self, weight: Tensor, quantizer: Quantizer, *, count_total: bool = False) -> None:
        super().__init__()
        weight = weight.detach()
        dtype = frozen_dtype(quantizer.num_bits)
        precision = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("previous_int", torch.full_like(weight, live_sentinel(dtype), dtype=dtype))
        self.register_buffer("direction", torch.zeros_like(weight, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(weight, dtype=precision))
        self.register_buffer("mean_int", torch.full_like(weight, torch.nan, dtype=precision))
        self.register_buffer("total", None)
        self.register_buffer("total_by_scale", None)
        if count_total:
            self.count_total()
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
        self.register_buffer("previous_scale", torch.full_like(scale, torch.nan))
        self.register_buffer(
            "previous_zero_point", None if zero_point is None else torch.full_like(zero_point.detach(), torch.nan)
        )
        self.register_buffer("events", torch.zeros(2, device=weight.device))
        # Plain bools, so that a tick never asks the device; `refresh` reads them from the buffers after loading.
        self.has_previous = False
        self.has_mean = False

    def tick(self, weight: Tensor, quantizer: Quantizer, momentum: float, threshold: float, use_ema: bool) -> Tensor:
        """Take one step of statistics, and freeze what oscillates too often.

        Args:
            weight: the float weight of this step's forward.
            quantizer: its quantizer.
            momentum: EMA step in (0, 1].
            threshold: freeze weights whose frequency exceeds it; 0 freezes nothing.
            use_ema: see `OscillationTracker`.

        Returns:
            How many weights oscillated, and how many of those because the scale moved: `(2,)`.
        """
        frozen_int = quantizer.allow_freezing(weight) if threshold > 0 else quantizer.frozen_if_any
        if not self.has_previous or (threshold > 0 and not self.has_mean):
            w_int = quantizer.to_int(weight)
            if not self.has_previous:
                self.previous_int.copy_(w_int)
                torch._foreach_copy_(*self.grid(quantizer))
                self.has_previous = True
            if threshold > 0 and not self.has_mean:
                self.mean_int.copy_(w_int)
                self.has_mean = True
        elif threshold == 0 and self.has_mean:
            # Not kept up without freezing, and stale by the time that freezing begins again.
            self.mean_int.fill_(torch.nan)
            self.has_mean = False
        state = self._buffers  # not by attribute: nn.Module takes its time to find one
        (counts,) = one_pass(
            track,
            (
                weight,
                state["previous_int"],
                state["direction"],
                state["frequency"],
                state["mean_int"],
                frozen_int,
                state["total"],
                state["total_by_scale"],
            ),
            (quantizer.scale, quantizer.zero_point, state["previous_scale"], state["previous_zero_point"]),
            (quantizer.qmin, quantizer.qmax, momentum, 1 - momentum, threshold),
            axis=quantizer.axis,
            static=(threshold > 0, use_ema),
            shaped=0,
            in_place=True,
        )
        return counts

    def grid(self, quantizer: Quantizer) -> tuple[list[Tensor], list[Tensor]]:
        """Scale and zero-point, if there is one, of the last tick; and those of the quantizer now."""
        previous, zero_point = self._buffers, quantizer.zero_point
        previous_scale, previous_zero_point = previous["previous_scale"], previous["previous_zero_point"]
        assert previous_scale is not None
        if previous_zero_point is None or zero_point is None:
            return [previous_scale], [quantizer.scale]
        return [previous_scale, previous_zero_point], [quantizer.scale, zero_point]

    def count_total(self) -> None:
        """Count every oscillation of every weight from now on."""
        self.total = torch.zeros_like(self.previous_int, dtype=torch.int32)
        self.total_by_scale = torch.zeros_like(self.total)

    def refresh(self) -> None:
        """Read the plain attributes anew from the buffers; called after something else has filled them."""
        sentinel = live_sentinel(self.previous_int.dtype)
        self.has_previous = not bool((self.previous_int == sentinel).any())
        self.has_mean = not bool(self.mean_int.isnan().any())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.previous_int.is_meta:
            self.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> "OscillationState":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)


class OscillationTracker:
    """Tracks the oscillations of all low-bit weights of a prepared model, and freezes those that oscillate too often.

    In a plain training loop, between `loss.backward()` and `optimizer.step()`:

        tracker.tick(threshold)

    Make it before loading a state dict of a model that was tracked: its statistics and frozen integers are part of it.

    Args:
        model: a model that `prepare_qat` has prepared. Its layers receive the state (or keep what they have).
        momentum: EMA step of the frequency and of the mean integer, in (0, 1]; memory is about 1/momentum steps.
        max_bits: widest weights that are tracked; wider ones do not oscillate to any effect.
        use_ema: freeze a weight at the rounded moving average of its integer; otherwise at its present integer.
        oscillating_above: frequency above which a weight counts as oscillating.
        count_total: also count every oscillation of every weight (4 bytes a weight more).

    Attributes:
        layers: name -> tracked layer.

    Raises:
        ValueError: if `momentum` is outside (0, 1] or the model is not prepared.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.001,
        max_bits: int = 4,
        use_ema: bool = True,
        *,
        oscillating_above: float = 0.005,
        count_total: bool = False,
    ) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"got momentum={momentum!r}, expected a number in (0, 1]")
        self.momentum = momentum
        self.use_ema = use_ema
        self.oscillating_above = oscillating_above
        prepared = dict(quantized_layers(model))
        if not prepared:
            raise ValueError("got a model without quantized layers, expected a prepared one: run prepare_qat first")
        self.layers: dict[str, QuantizedLayer] = {}
        for name, layer in prepared.items():
            quantizer = layer.weight_quantizer
            if quantizer is not None and quantizer.num_bits <= max_bits:
                attach_oscillation_state(layer, count_total=count_total)
                quantizer.allow_freezing(layer.latent_weight)
                self.layers[name] = layer

    @torch.no_grad()
    def tick(self, threshold: float = 0.0) -> None:
        """Take one step of statistics; call it once per applied optimizer step, before that step.

        Args:
            threshold: freeze weights whose frequency exceeds it, from the next forward on; 0 freezes nothing.
        """
        counts: list[Tensor] = []
        sizes: list[float] = []
        events: list[Tensor] = []
        before: list[Tensor] = []
        now: list[Tensor] = []
        for layer in self.layers.values():
            quantizer, state = layer.weight_quantizer, oscillation_state(layer)
            assert quantizer is not None
            weight = layer.float_weight
            counts.append(state.tick(weight, quantizer, self.momentum, threshold, self.use_ema))
            sizes.append(float(weight.numel()))
            events.append(state.events)
            for grids, its in zip((before, now), state.grid(quantizer), strict=True):
                grids += its
            if threshold > 0 and not quantizer.has_frozen:
                quantizer.has_frozen = True
        if events:
            torch._foreach_copy_(before, now)
            torch._foreach_div_(counts, sizes)
            torch._foreach_lerp_(events, counts, self.momentum)

    @property
    def num_weights(self) -> int:
        """Number of tracked weights."""
        return sum(layer.latent_weight.numel() for layer in self.layers.values())

    @property
    def oscillating_fraction(self) -> float:
        """Share of tracked weights whose frequency is above `oscillating_above`, in [0, 1]; 0 if none is tracked."""
        return self._fraction(
            [(oscillation_state(layer).frequency > self.oscillating_above).sum() for layer in self.layers.values()]
        )

    @property
    def scale_caused_fraction(self) -> float:
        """Share of recent oscillations that happened because a scale moved, in [0, 1]; 0 if there were none."""
        if not self.layers:
            return 0.0
        events = [oscillation_state(layer).events * layer.latent_weight.numel() for layer in self.layers.values()]
        total, by_scale = torch.stack(events).sum(0).tolist()
        return by_scale / total if total > 0 else 0.0

    @property
    def frozen_fraction(self) -> float:
        """Share of tracked weights that are frozen, in [0, 1]; 0 if none is tracked."""
        quantizers = [layer.weight_quantizer for layer in self.layers.values()]
        return self._fraction([is_frozen(q.frozen_int).sum() for q in quantizers if q and q.frozen_int is not None])

    def state_dict(self) -> dict[str, Tensor]:
        """Statistics and frozen integers by `<layer>.<name>`: the tensors that the model's state dict has too."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            state |= oscillation_state(layer).state_dict(prefix=f"{name}.")
            if layer.weight_quantizer is not None and layer.weight_quantizer.frozen_int is not None:
                state[f"{name}.frozen_int"] = layer.weight_quantizer.frozen_int
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if its names, shapes or frozen integers are not those of this tracker's model.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(
                f"got a state without {missing[:3]} and with {extra[:3]} besides, expected that of the same model"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"got {name} of shape {list(state[name].shape)}, expected {list(tensor.shape)}")
        for name, layer in self.layers.items():
            if layer.weight_quantizer is not None and (key := f"{name}.frozen_int") in state:
                layer.weight_quantizer.check_frozen(state[key])
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for layer in self.layers.values():
            oscillation_state(layer).refresh()
            assert layer.weight_quantizer is not None
            layer.weight_quantizer.refresh()

    def _fraction(self, counts: list[Tensor]) -> float:
        return float(torch.stack(counts).sum()) / self.num_weights if counts else 0.0


def attach_oscillation_state(layer: QuantizedLayer, *, count_total: bool = False) -> None:
    """Give a layer a place for its statistics, as `layer.oscillation`; does nothing if it has one."""
    assert layer.weight_quantizer is not None
    if not hasattr(layer, "oscillation"):
        layer.oscillation = OscillationState(layer.latent_weight, layer.weight_quantizer, count_total=count_total)
    elif count_total and oscillation_state(layer).total is None:
        oscillation_state(layer).count_total()


def oscillation_state(layer: QuantizedLayer) -> OscillationState:
    """Return the statistics of a tracked layer."""
    state = layer.oscillation
    assert isinstance(state, OscillationState)
    return state
