"""What a run may take: time between checkpoints, time in all, memory."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from lorac_runtime.errors import LimitError
from lorac_runtime.manifest import Manifest, MemoryNeed

ENGINE = "onnxruntime"
MARGIN = 1.1  # computed peaks were up to 8 % below measured ones (docs/memory.md)


class Clock:
    """Tells when a checkpoint is due, and when the time of a run is over.

    ``every`` and ``budget`` are seconds; the budget counts from when the clock was made.

    >>> Clock(every=60.0, budget=None).due()
    False
    >>> Clock(every=60.0, budget=1e-9).over
    True
    """

    def __init__(self, every: float, budget: float | None = None) -> None:
        self._every, self._begun = every, time.monotonic()
        self._end = None if budget is None else self._begun + budget
        self._saved = self._begun

    @property
    def over(self) -> bool:
        """Whether the time of the run is up."""
        return self._end is not None and time.monotonic() >= self._end

    def due(self) -> bool:
        """Whether a checkpoint should be written now."""
        return self.over or time.monotonic() - self._saved >= self._every

    def saved(self) -> None:
        """Begin to count anew: a checkpoint was just written."""
        self._saved = time.monotonic()


def pieces_within(manifest: Manifest, budget: int, *, batch: int, data: int, asked: int | None) -> int | None:
    """How many images of a ``batch`` to compute at once, None for all of them, to stay within ``budget`` bytes.

    What was computed counts with a `MARGIN`. ``data`` bytes of local data are held beside it. ``asked`` is a number of
    images that is settled already.

    Raises LimitError, saying what is needed, if no number fits, or if the artifact does not say what it needs.
    """
    if not manifest.memory:
        raise LimitError(
            "the artifact does not say how much memory training takes, so --memory cannot be kept: export it again for "
            f"the engine {ENGINE}, or leave --memory out"
        )
    sizes = [None, *sorted({n.images for n in manifest.memory if n.parts and n.images < batch}, reverse=True)]
    sizes = sizes if asked is None else [asked]
    needs = [data + math.ceil(MARGIN * memory_need(manifest, batch, size)) for size in sizes]
    for size, need in zip(sizes, needs, strict=True):
        if need <= budget:
            return size
    least = min(needs)
    smaller = "" if batch == 1 else f", a smaller --batch-size than {batch}"
    raise LimitError(
        f"training takes {least / 1e6:.0f} MB at least, of which {data / 1e6:.0f} MB are local data; --memory allows "
        f"{budget / 1e6:.0f} MB. Try fewer samples{smaller}, or an artifact of which less trains (lorac-deploy plan)"
    )


def memory_need(manifest: Manifest, batch: int, pieces: int | None) -> int:
    """Bytes that a process takes at most which trains in batches, computed in pieces of so many images, or whole."""
    known = [need for need in manifest.memory if need.parts == (pieces is not None)]
    if not known:
        return 1 << 62  # this artifact cannot compute so
    images = batch if pieces is None else pieces
    kept = 4 * sum(math.prod(feature.shape) for feature in manifest.features)
    given = 4 * math.prod(manifest.input.shape) if manifest.features else 0
    return _at(known, images) + (batch - images) * (kept + given)


def _at(known: Sequence[MemoryNeed], images: int) -> int:
    """The need between two known ones on the line through them, beyond the last on that through the last two."""
    exact = {need.images: need.nbytes for need in known}
    if images in exact or len(known) == 1:
        return exact.get(images, known[-1].nbytes)
    pairs = list(itertools.pairwise(sorted(exact.items())))
    (x, low), (z, high) = next((pair for pair in pairs if images < pair[1][0]), pairs[-1])
    return math.ceil(low + (high - low) * (images - x) / (z - x))
