"""Where a remedy may act on training.

A remedy is one module with its settings and a subclass of `Remedy`, entered in `hf_oscqat.remedies.REMEDIES`. The
training loop calls the places below and knows none of the remedies by name.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_oscqat.remedies.tracker import OscillationTracker


class Remedy:
    """Something done against oscillation while a prepared model trains.

    Args:
        settings: an instance of the class's `Settings`.

    Attributes:
        name: its key in `REMEDIES` and in the config, and the beginning of what it logs.
        Settings: dataclass of its settings.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Any]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def loss(self, model: nn.Module, step: int, total_steps: int) -> Tensor | None:
        """Return a term to add to the task loss, or None.

        Args:
            model: the prepared model.
            step: the optimizer step being made, counted from 1.
            total_steps: optimizer steps of the whole training.
        """
        return None

    def freeze_threshold(self, step: int, total_steps: int) -> float:
        """Return the oscillation frequency above which the tick of `step` freezes weights; 0 freezes none.

        Args:
            step: see `loss`.
            total_steps: see `loss`.
        """
        return 0.0

    def on_tick(self, tracker: "OscillationTracker", step: int, total_steps: int) -> None:
        """Act once per applied optimizer step, after the tracker's tick and before the weights move.

        Args:
            tracker: has just seen the integers of this step's forward.
            step: see `loss`.
            total_steps: see `loss`.
        """

    def scalars(self, step: int, total_steps: int) -> dict[str, float]:
        """Return what to log about this remedy at `step`; plain numbers, without a look at the device."""
        return {}


def take_tick(tracker: "OscillationTracker", remedies: Sequence[Remedy], step: int, total_steps: int) -> None:
    """Take one tick with everything that remedies do at it; call it between backward and the optimizer's step.

    Args:
        tracker: of the model.
        remedies: those that are switched on.
        step: the optimizer step being made, counted from 1.
        total_steps: optimizer steps of the whole training.
    """
    tracker.tick(max((remedy.freeze_threshold(step, total_steps) for remedy in remedies), default=0.0))
    for remedy in remedies:
        remedy.on_tick(tracker, step, total_steps)
