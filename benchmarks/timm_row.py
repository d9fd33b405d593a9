"""What is known of one of timm's networks after it has gone the way."""

from __future__ import annotations

import dataclasses
from typing import Any

FLOAT32 = 1e-4  # relative; what float32 may cost where no kink is crossed
OF_PYTORCH = 5.0  # times PyTorch's own float32 error, where kinks make that larger


@dataclasses.dataclass(frozen=True)
class Row:
    """A network at an image size, and how far it came; "" where a stage went well, None where it was not reached.

    ``attach``, ``export``, ``fuse`` and ``dropin`` hold the reason of a failure. ``step_error`` is the largest
    relative distance, over all tensors that train, of the change in one step from PyTorch's in float64,
    ``torch_error`` that of PyTorch's own float32, ``loss_error`` that of the loss. ``tflite`` says why there is no
    base.tflite, ``tflite_dropin`` why the fused one is no drop-in; ``training`` why the engine onnxruntime-training
    cannot train it.
    """

    name: str
    family: str
    pixels: int
    parameters: int = 0
    adapters: int = 0
    attach: str | None = None
    export: str | None = None
    loss_error: float | None = None
    step_error: float | None = None
    torch_error: float | None = None
    fuse: str | None = None
    dropin: str | None = None
    tflite: str | None = None
    training: str | None = None
    tflite_dropin: str | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON; figures with three digits."""
        return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def agrees(self) -> bool:
        """Whether the step is PyTorch's, as far as float32 tells."""
        if self.step_error is None or self.torch_error is None or self.loss_error is None:
            return False
        return self.loss_error <= FLOAT32 and self.step_error <= max(FLOAT32, OF_PYTORCH * self.torch_error)

    @property
    def whole(self) -> bool:
        """Whether it went the whole way."""
        return self.agrees and (self.attach, self.export, self.fuse, self.dropin) == ("", "", "", "")

    @property
    def reason(self) -> str:
        """Why it did not go the whole way; empty if it did."""
        failed = [text for text in (self.attach, self.export, self.fuse, self.dropin) if text]
        if not failed and self.step_error is not None and not self.agrees:
            failed = [f"step differs: {self.step_error:.1e}, PyTorch's float32 {self.torch_error:.1e}"]
        return failed[0] if failed else ""

    def __str__(self) -> str:
        step = "" if self.step_error is None else f" step {self.step_error:.1e} (PyTorch {self.torch_error:.1e})"
        loss = "" if self.loss_error is None else f" loss {self.loss_error:.1e}"
        ways = f"tflite {self.tflite or 'yes'}; onnxruntime-training {self.training or 'yes'}"
        return f"{self.name}:{self.pixels} {'whole' if self.whole else 'NOT'}{loss}{step} {self.reason} | {ways}"
