"""Is FUSED a drop-in for BASE? A report of every promise, checked on the files themselves.

The checks: same operators, edges, attributes, order; same initializers, shapes, dtypes; same inputs and
outputs; same opset and IR version; same file size; and (with the artifact's manifest) only bytes inside the
patch table differ. `numeric_check` adds that the fused graph answers like the unfused training graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import google.protobuf.message
import onnx

from lorac_exporters.checks import Check, DropinReport, bytes_check, numeric_check, same, same_list
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import Patch

__all__ = ["Check", "DropinReport", "compare_files", "compare_models", "interface_check", "numeric_check", "read_model"]


Format = Literal["onnx", "tflite"]
TFLITE_IDENTIFIER = b"TFL3"  # bytes 4 to 8 of every .tflite file; of an ONNX file they are the producer's name


def file_format(path: Path) -> Format:
    """What a model file is: by its content, with which its suffix must agree.

    Raises ArtifactError if it is missing, or named as one format and written in the other.
    """
    try:
        with path.open("rb") as stream:
            is_tflite = stream.read(8)[4:] == TFLITE_IDENTIFIER
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} not found") from err
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read: {err.strerror or err}") from err
    if path.suffix == ".tflite" and not is_tflite:
        raise ArtifactError(f"{path} is not a TFLite file: bytes 4 to 8 are not TFL3. Is it empty, cut off or renamed?")
    if path.suffix == ".onnx" and is_tflite:
        raise ArtifactError(f"{path} is named .onnx, but its content is TFLite; give it its own name back")
    return "tflite" if is_tflite else "onnx"


def compare_files(base: Path, fused: Path, patches: Iterable[Patch] | None = None) -> DropinReport:
    """Compare two .onnx files; ``patches`` (of the base file) allow the check of every single byte.

    Raises ArtifactError if a file is missing or is not ONNX.
    """
    old, new = read_model(base), read_model(fused)
    checks = [
        *compare_models(old, new),
        same("file size", base.stat().st_size, fused.stat().st_size, "bytes"),
        bytes_check(base, fused, None if patches is None else [(p.offset, p.nbytes) for p in patches]),
    ]
    return DropinReport(str(base), str(fused), tuple(checks))


def compare_models(old: onnx.ModelProto, new: onnx.ModelProto) -> list[Check]:
    """The structural checks, on models in memory."""
    return [
        same_list("operators", _operators(old), _operators(new), "nodes"),
        same_list("edges", _edges(old), _edges(new), "nodes"),
        same_list("attributes", _attributes(old), _attributes(new), "nodes"),
        same_list("initializers", _initializers(old), _initializers(new), "tensors"),
        same_list("inputs", _values(old.graph.input), _values(new.graph.input), "inputs"),
        same_list("outputs", _values(old.graph.output), _values(new.graph.output), "outputs"),
        same("opset", _opsets(old), _opsets(new)),
        same("IR version", old.ir_version, new.ir_version),
    ]


def read_model(path: Path) -> onnx.ModelProto:
    """Load an .onnx file. Raises ArtifactError with what is wrong."""
    try:
        model = onnx.load(path)
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} not found") from err
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read: {err.strerror or err}") from err
    except (google.protobuf.message.DecodeError, ValueError) as err:
        raise ArtifactError(f"{path} is not an ONNX file, or is truncated ({err})") from err
    if not model.graph.node:
        raise ArtifactError(f"{path} is not an ONNX file, or is truncated (there is no graph in it)")
    return model


def interface_check(name: str, own: Iterable[onnx.ValueInfoProto], new: Iterable[onnx.ValueInfoProto]) -> Check:
    """Whether an app that used a user's own file can use the canonical one: a size that was fixed may be free now."""
    old_values, new_values = list(own), list(new)
    accepted = len(old_values) == len(new_values) and all(map(_accepts, old_values, new_values))
    old_text, new_text = _values(old_values), _values(new_values)
    if accepted:
        return Check(name, "pass", f"{'; '.join(old_text)} accepted as {'; '.join(new_text)}")
    return Check(name, "fail", f"your file has {'; '.join(old_text)}, fused has {'; '.join(new_text)}")


def _accepts(own: onnx.ValueInfoProto, new: onnx.ValueInfoProto) -> bool:
    old_type, new_type = own.type.tensor_type, new.type.tensor_type
    old_dims, new_dims = list(old_type.shape.dim), list(new_type.shape.dim)
    if (own.name, old_type.elem_type, len(old_dims)) != (new.name, new_type.elem_type, len(new_dims)):
        return False
    return all(b.dim_value in (0, a.dim_value) for a, b in zip(old_dims, new_dims, strict=True))


def _operators(model: onnx.ModelProto) -> list[str]:
    return [f"{node.domain}:{node.op_type}" for node in model.graph.node]


def _edges(model: onnx.ModelProto) -> list[str]:
    return [f"{','.join(n.input)} => {','.join(n.output)}" for n in model.graph.node]


def _attributes(model: onnx.ModelProto) -> list[str]:
    """Each node's attributes as text; sorted, since their order means nothing."""
    return [
        f"{node.name}({', '.join(sorted(f'{a.name}={onnx.helper.get_attribute_value(a)!r}' for a in node.attribute))})"
        for node in model.graph.node
    ]


def _initializers(model: onnx.ModelProto) -> list[str]:
    names = onnx.TensorProto.DataType.Name
    return [f"{t.name}: {names(t.data_type)}{list(t.dims)}" for t in model.graph.initializer]


def _values(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        found.append(f"{value.name}: {onnx.TensorProto.DataType.Name(tensor.elem_type)}{dims}")
    return found


def _opsets(model: onnx.ModelProto) -> str:
    return ", ".join(sorted(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import))
