"""How the strength of a remedy moves over training."""

import math


def cosine_anneal(step: int, total_steps: int, start: float, final: float, anneal_start: float) -> float:
    """Half a cosine from `start` to `final` over the last part of training (Nagel et al., ICML 2022, sec. 5.1).

    Args:
        step: optimizer step, counted from 1.
        total_steps: optimizer steps of the whole training.
        start: value until `anneal_start * total_steps`.
        final: value at `total_steps`.
        anneal_start: share of training before the value starts to move, in [0, 1).

    Returns:
        The value at `step`.
    """
    begin = anneal_start * total_steps
    if step <= begin:
        return start
    progress = min(1.0, (step - begin) / (total_steps - begin))
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * progress))


def check_anneal_start(anneal_start: float) -> None:
    """Refuse a start of annealing that is no share of training.

    Raises:
        ValueError: if it is outside [0, 1).
    """
    if not 0 <= anneal_start < 1:
        raise ValueError(
            f"got anneal_start={anneal_start!r}, expected a share of training in [0, 1): at 1 nothing is ever annealed"
        )
