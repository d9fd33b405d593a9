"""Adapters of onnxruntime 1.20 and later: a model whose adapter is an optional input, and ``.onnx_adapter`` files.

One session serves many adapters: ``RunOptions.add_active_adapter`` chooses for each call, and without one the model
answers as the base. That costs time at every call; a fused file costs none.

The format is a flatbuffer (file identifier TORT), in the words of its schema:
``Adapter {format_version, adapter_version, model_version: int; parameters: [Parameter]}`` and
``Parameter {name: string; dims: [int64]; data_type: int32; raw_data: [uint8], aligned to 8 bytes}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_deploy.interchange.folders import CARD, Folder, card
from lorac_exporters.branches import Factors, Form, add_adapters
from lorac_exporters.gradients.geometry import Geometry
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import remove_unused, to_bytes
from lorac_exporters.partials import inject_partial
from lorac_exporters.references import adapted_state
from lorac_runtime import manifest as mf
from lorac_runtime.delta import adapter_shapes
from lorac_runtime.errors import ArtifactError, ConversionError
from lorac_runtime.manifest import Adapter, Manifest

Floats = npt.NDArray[np.float32]
MODEL, SUFFIX = "model.onnx", ".onnx_adapter"
IDENTIFIER = b"TORT"
FORMAT_VERSION = 1
FLOAT = int(ir.DataType.FLOAT)
_ALIGNMENT = 8
_WORDS = (
    "`model.onnx` answers as the base. With onnxruntime 1.20 or later, load the adapter with `LoraAdapter.Load` and "
    "give it to a call with `RunOptions.add_active_adapter`."
)


def onnx_adapter_folder(artifact: Path, adapter: Path, *, name: str = "adapter") -> Folder:
    """model.onnx, the same for every adapter of this artifact, and ``name``.onnx_adapter.

    Raises ArtifactError or AdapterError; ConversionError for artifacts whose batch normalisations are not folded.
    """
    if not (artifact / mf.FILE_NAME).exists():
        raise ArtifactError(f"{artifact} is no training artifact, whose base.onnx --to onnx_adapter needs")
    manifest = mf.load(artifact)
    mf.verify_files(artifact, manifest, (mf.BASE,))
    state = {k: np.asarray(v, np.float32) for k, v in adapted_state(artifact, manifest, adapter).items()}
    model = ir.load(artifact / mf.BASE)
    make_switchable(model, manifest, state)
    rows = [("tensor", "shape"), *((k, " x ".join(map(str, v.shape))) for k, v in state.items())]
    about = card(manifest.model, "onnxruntime", _WORDS, rows=rows, base_hash=manifest.files[mf.BASE].sha256)
    return Folder({MODEL: to_bytes(model), f"{name}{SUFFIX}": encoded(state), CARD: about})


def make_switchable(model: ir.Model, manifest: Manifest, state: Mapping[str, Floats]) -> None:
    """Give ``model``, the base, the tensors of ``state`` as inputs, in place; their defaults change nothing.

    Raises ConversionError for an artifact whose batch normalisations are not folded.
    """
    if manifest.live_batchnorm:
        raise ConversionError(
            f"the artifact trains with the policy {manifest.bn_policy!r}, under which batch normalisations change too: "
            "only a fused file holds that"
        )
    tape = Tape(model.graph)
    factors = {a.weight: _factors(tape, a) for a in manifest.adapters}
    add_adapters(tape, {a.weight: a for a in manifest.adapters}, factors, _form)
    for partial in manifest.partials:
        inject_partial(model.graph, partial, _stored(model, partial.weight)[:, list(partial.channels)])
    remove_unused(model)
    for name in state:
        model.graph.inputs.append(model.graph.initializers[name])


def _factors(tape: Tape, adapter: Adapter) -> Factors:
    """Constants of zeros, and the alpha that the artifact has."""
    a, b = (tape.constant(np.zeros(shape, np.float32), name) for name, shape in _shapes(adapter).items())
    if adapter.lora_alpha is None:
        return Factors(a, b, adapter.alpha / adapter.r)
    alpha = tape.constant(np.array([adapter.alpha], np.float32), adapter.lora_alpha)
    return Factors(a, b, tape.op("Mul", alpha, 1.0 / adapter.r, shape=(1,)))


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    shape_a, shape_b = adapter_shapes(adapter.weight_shape, adapter.rank, adapter.pairs)
    return {adapter.lora_a: shape_a, adapter.lora_b: shape_b}


def _form(adapter: Adapter, _: Geometry) -> Form:
    """A branch wherever there is one: the weight beside it stays constant, for which engines have fast kernels."""
    return "branch" if adapter.pairs == 1 else "weight"


def _stored(model: ir.Model, name: str) -> Floats:
    value = model.graph.initializers[name].const_value
    if value is None:
        raise ConversionError(f"{name} is computed in the graph, not stored in it")
    return np.asarray(value.numpy(), np.float32)


def encoded(tensors: Mapping[str, Floats]) -> bytes:
    """The content of an ``.onnx_adapter`` file; equal tensors give equal bytes."""
    builder = flatbuffers.Builder(1024 + sum(value.nbytes for value in tensors.values()))
    places = [_parameter(builder, name, value) for name, value in tensors.items()]
    builder.StartVector(4, len(places), 4)
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    parameters = builder.EndVector()
    builder.StartObject(4)
    for slot, number in enumerate((FORMAT_VERSION, 1, 1)):  # of the format, the adapter and the model
        builder.PrependInt32Slot(slot, number, 0)
    builder.PrependUOffsetTRelativeSlot(3, parameters, 0)
    builder.Finish(builder.EndObject(), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _parameter(builder: Any, name: str, value: Floats) -> int:
    """Write a tensor; what its table points to comes first."""
    label = builder.CreateString(name)
    dims = builder.CreateNumpyVector(np.array(value.shape, "<i8"))
    content = np.ascontiguousarray(value, "<f4").tobytes()
    builder.StartVector(1, len(content), _ALIGNMENT)
    builder.head -= len(content)
    builder.Bytes[builder.head : builder.head + len(content)] = content
    data = builder.EndVector()
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, label, 0)
    builder.PrependUOffsetTRelativeSlot(1, dims, 0)
    builder.PrependInt32Slot(2, FLOAT, 0)
    builder.PrependUOffsetTRelativeSlot(3, data, 0)
    return int(builder.EndObject())
