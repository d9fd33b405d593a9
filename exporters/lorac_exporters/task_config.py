"""What a network is to learn: settings, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorac_runtime.tasks import CLASSIFICATION, CUSTOM, SEGMENTATION


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What a network is to learn. ``kind`` is one of `lorac_runtime.tasks.TASKS`; custom where a loss graph is given.

    ``loss_graph``: an ONNX file with the loss (`lorac_exporters.loss_graph`). ``ignore_index``: the label of pixels
    that do not count, of segmentation; None is 255 where that is no class.

    Raises ValueError for what does not go together.
    """

    kind: str = CLASSIFICATION
    loss_graph: Path | None = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == CUSTOM) != (self.loss_graph is not None):
            raise ValueError(f"task {self.kind!r} and loss graph {self.loss_graph}: a loss graph goes with {CUSTOM!r}")
        if self.ignore_index is not None and self.kind != SEGMENTATION:
            raise ValueError(f"ignore_index is {self.ignore_index}, and only {SEGMENTATION} has labels to ignore")
