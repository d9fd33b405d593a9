"""A PyTorch module as a raw ONNX graph: the only module of this package that imports torch.

Only the plain inference network is exported. The exporter's own optimizer stays off: it would fold batch
normalisation under the old weight names, merge equal initializers and drop zero biases.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lorac_exporters.graph_tools import FILTERS, array, name_of, nodes_of
from lorac_runtime.errors import ConversionError, listed

OPSET = 18
# What a forward pass that cannot be traced raises; torch's own tracing errors are RuntimeErrors.
_TRACING_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError)


def export_graph(
    module: nn.Module, input_shape: tuple[int, ...], *, input_name: str = "input", output_name: str = "logits"
) -> ir.Model:
    """Export ``module`` in evaluation mode with a dynamic batch; the module itself is not touched.

    ``input_shape`` is one sample's, (channels, height, width) or (channels, length), float32. Every parameter and
    buffer that the forward pass uses becomes an initializer under its state-dict name.

    >>> model = export_graph(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2))
    >>> sorted(model.graph.initializers)
    ['1.bias', '1.weight']

    Raises ConversionError if the module cannot be traced, has other than one output, or if a tensor of the graph
    differs from the state dict (all differences are listed).
    """
    twin = copy.deepcopy(module).cpu().float().eval()
    try:
        with _quiet(), torch.no_grad():
            program, model = _trace(twin, input_shape, input_name, output_name)
    except _TRACING_ERRORS as err:
        raise ConversionError(
            f"{type(module).__name__} cannot be exported with an input of shape "
            f"(batch, {', '.join(map(str, input_shape))}): {_first_line(err)}"
        ) from err
    _check_signature(model)
    _check_values(model, twin, program)
    _note_filters(model, twin)
    return model


def _trace(
    module: nn.Module, input_shape: tuple[int, ...], input_name: str, output_name: str
) -> tuple[torch.export.ExportedProgram, ir.Model]:
    sample = torch.zeros(2, *input_shape)  # a batch of 1 would be baked in as a constant
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (sample,), dynamic_shapes=({0: batch},), strict=False)
    _pool_by_mean(program)
    program = _without_scatters(program)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        input_names=[input_name],
        output_names=[output_name],
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no model")
    return program, exported.model


def _pool_by_mean(program: torch.export.ExportedProgram) -> None:
    """Global average pooling as the mean that it is, in place.

    PyTorch's own way to write it out gives the result of a channels-last map other strides, which ONNX has no word for:
    a Gather over the batch, which cannot be trained through.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [-2, -1], True)


def _without_scatters(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """What is written into a slice in place (``x[:, :8] += y``, GhostNet), joined of its parts.

    The exporter would write ScatterND, through which nothing can be trained.
    """
    if not any(_writes_into_slice(node) for node in program.graph.nodes):
        return program
    written = program.run_decompositions({torch.ops.aten.slice_scatter.default: _slice_written})
    return cast(torch.export.ExportedProgram, written)


def _writes_into_slice(node: torch.fx.Node) -> bool:
    written = node.args[0] if node.args else None
    return isinstance(written, torch.fx.Node) and _name(node).endswith("_") and _name(written) == "slice"


def _name(node: torch.fx.Node) -> str:
    """Of the operator that a node calls: "add_" of aten.add_.Tensor."""
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))


def _slice_written(
    whole: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """``whole`` with ``part`` in the place of ``whole[start:end]`` along an axis."""
    if step != 1:
        return cast(Tensor, NotImplemented)
    size = whole.shape[dim]
    if not start and (end is None or end >= sys.maxsize):
        return part
    first, last = (slice(start, end).indices(size))[:2]
    before, after = whole.narrow(dim, 0, first), whole.narrow(dim, last, size - last)
    return torch.cat([piece for piece in (before, part, after) if piece.shape[dim]], dim)


def _check_signature(model: ir.Model) -> None:
    inputs, outputs = model.graph.inputs, model.graph.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ConversionError(
            f"the module has {len(inputs)} inputs and {len(outputs)} outputs; "
            "expected one image batch in and one logits tensor out"
        )


def _check_values(model: ir.Model, module: nn.Module, program: torch.export.ExportedProgram) -> None:
    problems = []
    state = module.state_dict()
    for name in sorted(_used_names(program) & state.keys()):
        expected = state[name].detach().numpy()
        found = array(model.graph.initializers.get(name))
        if found is None:
            problems.append(f"{name} is missing")
        elif found.shape != expected.shape or not np.array_equal(found, expected, equal_nan=True):
            problems.append(f"{name} {_difference(found, expected)}")
    if problems:
        raise ConversionError(listed("the exported graph differs from the module's state dict:", problems))


def _note_filters(model: ir.Model, module: nn.Module) -> None:
    """Buffers that are weights of convolutions (blur pooling) must not train: the metadata says which."""
    weights = {name_of(node.inputs[1]) for node in nodes_of(model.graph, "Conv")}
    filters = sorted(name for name, _ in module.named_buffers() if name in weights)
    if filters:
        model.metadata_props[FILTERS] = json.dumps(filters)


def _used_names(program: torch.export.ExportedProgram) -> set[str]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    return {target for placeholder, target in names.items() if placeholder in used}


def _difference(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> str:
    if found.shape != expected.shape:
        return f"has shape {found.shape}, expected {expected.shape}"
    largest = np.abs(np.subtract(found, expected, dtype=np.float64)).max()
    return f"differs by up to {largest:.3g}"


def _first_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0] if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's remarks about its own internals from the user; what fails is raised, not logged."""
    loggers = [logging.getLogger(name) for name in ("torch.fx", "torch.export", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
