"""What a manifest says of the memory that training takes, so that a device can keep to a limit without the graphs."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from lorac_exporters import training_step as steps
from lorac_exporters.memory import peaks
from lorac_exporters.prefix import PREFIX
from lorac_runtime.manifest import Manifest, MemoryNeed

log = logging.getLogger(__name__)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


def memory_needs(folder: Path, manifest: Manifest) -> tuple[MemoryNeed, ...]:
    """The computed peaks (`memory.peaks`) of the step graphs in ``folder``; () where it has none.

    Also where a size cannot be told from the graphs, which is logged: training works, a limit on memory does not.
    """
    if steps.ENGINE not in manifest.engines:
        return ()
    try:
        return tuple(_needs(folder, manifest.engines[steps.ENGINE].files))
    except ValueError as err:
        log.warning("what training takes cannot be computed, and devices refuse --memory: %s", err)
        return ()


def _needs(folder: Path, files: Collection[str]) -> list[MemoryNeed]:
    front = ir.load(folder / PREFIX) if PREFIX in files else None
    found: list[MemoryNeed] = []
    if steps.TRAIN in files:
        whole = ir.load(folder / steps.TRAIN)
        made = peaks(whole, IMAGES, front=front)
        found += [MemoryNeed(n, peak.total, parts=False) for n, peak in zip(IMAGES, made, strict=True)]
    if steps.GRADIENT in files:
        gradient, last = (ir.load(folder / name) for name in (steps.GRADIENT, steps.OPTIMIZER))
        made = peaks(gradient, IMAGES, optimizer=last, front=front)
        found += [MemoryNeed(n, peak.total, parts=True) for n, peak in zip(IMAGES, made, strict=True)]
    return found
