"""Iterative weight freezing: a weight that oscillates too often keeps its mean integer for the rest of training.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (ICML 2022), sec. 4.2 and algorithm 1. The
threshold falls along a cosine, so that the wildest weights freeze first and the others get time to settle.
"""

from dataclasses import dataclass

from hf_oscqat.remedies.base import Remedy
from hf_oscqat.remedies.schedules import check_anneal_start, cosine_anneal


@dataclass(frozen=True)
class FreezingSettings:
    """Settings of iterative weight freezing.

    Args:
        threshold: oscillation frequency above which a weight freezes when freezing begins.
        threshold_final: the same at the end of training; None keeps `threshold`.
        anneal_start: share of training without freezing, in [0, 1).
        momentum: EMA step of frequency and mean integer, in (0, 1].
        use_ema: freeze at the rounded mean integer; otherwise at the present one.

    Raises:
        ValueError: if a value is out of range, or a threshold is below `momentum`, unless both are 0.
    """

    threshold: float = 0.1
    threshold_final: float | None = 0.01
    anneal_start: float = 0.25
    momentum: float = 0.001
    use_ema: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"got freezing momentum={self.momentum!r}, expected a number in (0, 1]")
        if not isinstance(self.use_ema, bool):
            raise ValueError(f"got freezing use_ema={self.use_ema!r}, expected True or False")
        check_anneal_start(self.anneal_start)
        for name in ("threshold", "threshold_final"):
            value = getattr(self, name)
            if value is None and name == "threshold_final":
                continue
            if not 0 <= value <= 1:
                raise ValueError(f"got freezing {name}={value!r}, expected an oscillation frequency in [0, 1]")
            off = value == 0 and self.threshold == 0 and not self.threshold_final
            if value < self.momentum and not off:
                raise ValueError(
                    f"got freezing {name}={value!r} with momentum={self.momentum!r}, expected a threshold of at least "
                    "the momentum: below it a single oscillation freezes a weight. Set both thresholds to 0 to track "
                    "without freezing"
                )


class Freezing(Remedy):
    """Makes each tick freeze what oscillates above the annealed threshold."""

    name = "freezing"
    Settings = FreezingSettings
    settings: FreezingSettings

    def freeze_threshold(self, step: int, total_steps: int) -> float:
        """Frequency above which weights freeze at `step`; 0 until annealing begins."""
        s = self.settings
        if step < s.anneal_start * total_steps:
            return 0.0
        final = s.threshold if s.threshold_final is None else s.threshold_final
        return cosine_anneal(step, total_steps, s.threshold, final, s.anneal_start)

    def scalars(self, step: int, total_steps: int) -> dict[str, float]:
        """Return the threshold, for the log."""
        return {"freeze_threshold": self.freeze_threshold(step, total_steps)}
