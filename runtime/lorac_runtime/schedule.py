"""The learning rate over a run: linear warm-up, then a cosine down to zero.

With frozen batch normalisation a constant rate diverges or sticks; this schedule is why the defaults need no
tuning.
"""

from __future__ import annotations

import math


def one_cycle(step: int, total: int, *, peak: float, warmup: float) -> float:
    """Learning rate of ``step`` (0-based) out of ``total``; ``warmup`` is the fraction of steps that rise.

    Rises linearly to ``peak`` at the last warm-up step, then falls along half a cosine; never zero.

    >>> [round(one_cycle(step, 6, peak=1.0, warmup=0.5), 3) for step in range(6)]
    [0.333, 0.667, 1.0, 0.854, 0.5, 0.146]

    Raises ValueError for a step outside of 0..total-1, a peak that is not positive, a warmup outside of [0, 1].
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is not one of the {total} steps 0..{total - 1}")
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"peak learning rate must be positive, got {peak}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is a fraction of all steps, 0 to 1, got {warmup}")
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising + 1) / (total - rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
