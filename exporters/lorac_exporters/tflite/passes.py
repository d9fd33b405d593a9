"""What makes a lowered network lean: activations folded into the operator before, superfluous operators removed."""

from __future__ import annotations

from collections.abc import Callable

from lorac_exporters.tflite.network import Network

PASSES: tuple[Callable[[Network], None], ...] = ()
