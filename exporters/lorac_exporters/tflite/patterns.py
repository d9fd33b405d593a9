"""Rewrites of a graph before it is lowered: several nodes that are one operator in TFLite become that one."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

PATTERNS: tuple[Callable[[ir.Model], None], ...] = ()
