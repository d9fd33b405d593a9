"""PyTorch's exporter takes seconds for the smallest network: tests that export the same one share its graph.

For tests of what is done with a graph; those of the exporting itself call `lorac_exporters.torch_graph`.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict

import onnx_ir as ir
import torch
from torch import nn

from lorac_exporters import torch_graph

KEPT = 6  # a ResNet-50 has 100 MB
_graphs: OrderedDict[tuple[str, tuple[int, ...]], ir.Model] = OrderedDict()


def export_graph(module: nn.Module, shape: tuple[int, ...]) -> ir.Model:
    """What `lorac_exporters.torch_graph.export_graph` gives, once for each network; not to be changed."""
    key = (_digest(module), shape)
    if key not in _graphs:
        _graphs[key] = torch_graph.export_graph(module, shape)
    _graphs.move_to_end(key)
    while len(_graphs) > KEPT:
        _graphs.popitem(last=False)
    return _graphs[key]


def _digest(module: nn.Module) -> str:
    """Of the classes, every attribute and every tensor: whatever the exporter could see."""
    content = io.BytesIO()
    torch.save(module, content)
    return hashlib.sha256(content.getbuffer()).hexdigest()
