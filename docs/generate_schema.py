"""Write docs/manifest.schema.json from the dataclasses behind manifest.json: `make docs`. A test compares the two."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lorac_runtime import description as d
from lorac_runtime import places
from lorac_runtime.delta import LAYOUTS
from lorac_runtime.manifest import SCHEMA_VERSION

PAGE = Path(__file__).with_name("manifest.schema.json")
SCALARS = {str: "string", bool: "boolean", float: "number", int: "integer"}
POSITIVE, COUNT = {"exclusiveMinimum": 0}, {"minimum": 1}
BELOW_ONE = {"minimum": 0, "exclusiveMaximum": 1}
IO_DTYPES = ["float32", "uint8", "int8"]
# What a field's type does not say, by dataclass and field.
NARROWED: dict[str, dict[str, Any]] = {
    "Manifest.schema_version": {"const": SCHEMA_VERSION},
    "Manifest.bn_policy": {"enum": [*d.BN_POLICIES]},
    "Manifest.coordinates": {"enum": ["folded", "unfolded"]},
    "Manifest.files": {"required": [d.BASE], "propertyNames": {"pattern": r"^(?!\.{1,2}$)[^/\\:\u0000]+$"}},
    "FileEntry.sha256": {"pattern": "^[0-9a-f]{64}$"},
    "FileEntry.nbytes": {"minimum": 0},
    "InputSpec.dtype": {"enum": [*d.INPUT_DTYPES]},
    "InputSpec.scale": POSITIVE,
    "Trainable.role": {"enum": [*d.ROLES]},
    "Adapter.layout": {"enum": [*LAYOUTS]},
    "Adapter.r": COUNT,
    "Adapter.rank": COUNT,
    "Adapter.pairs": COUNT,
    "Partial.groups": COUNT,
    "Patch.dtype": {"enum": [*places.ITEM_SIZES]},
    "Patch.offset": {"minimum": 0},
    "ByteRange.offset": {"minimum": 0},
    "Quantized.axis": {"minimum": 0},
    "Quantized.input_scale": POSITIVE,
    "TfliteEntry.weights": {"enum": [*places.TFLITE_WEIGHTS]},
    "TfliteEntry.input_dtype": {"enum": IO_DTYPES},
    "TfliteEntry.output_dtype": {"enum": IO_DTYPES},
    "Additions.sites": {"minItems": 1},
    "Additions.nodes": COUNT,
    "Additions.parameters": COUNT,
    "Additions.multiply_adds": {"minimum": 0},
    "TrainingDefaults.lr": POSITIVE,
    "TrainingDefaults.batch_size": COUNT,
    "TrainingDefaults.epochs": COUNT,
    "TrainingDefaults.warmup": {"minimum": 0, "maximum": 1},
    "TrainingDefaults.optimizer": {"enum": [*d.OPTIMIZERS]},
    "TrainingDefaults.loss": {"enum": [*d.LOSSES]},
    "TrainingDefaults.label_smoothing": BELOW_ONE,
    "TrainingDefaults.betas": {"prefixItems": [{"type": "number", **BELOW_ONE}] * 2},
    **{f"TrainingDefaults.{name}": {"minimum": 0} for name in ("weight_decay", "clip_norm", "momentum", "eps")},
}


def schema() -> dict[str, Any]:
    """The whole JSON Schema."""
    found: dict[str, Any] = {}
    top = _of(d.Manifest, found)["$ref"].rpartition("/")[2]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of a lorac-deploy training artifact",
        "$comment": "Written by `make docs`. What a schema cannot say is in specification.md, section 5.",
        **found.pop(top),
        "$defs": dict(sorted(found.items())),
    }


def text() -> str:
    """The whole of docs/manifest.schema.json."""
    return json.dumps(schema(), indent=1) + "\n"


def _of(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type; dataclasses are collected in ``found``."""
    if kind in SCALARS:
        return {"type": SCALARS[kind]}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in found:
            found[kind.__name__] = {}
            found[kind.__name__] = _object(kind, found)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return {"anyOf": [_of(option, found) for option in inner if option is not types.NoneType] + [{"type": "null"}]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(inner[1], found)}
    if inner[-1] is Ellipsis:
        return {"type": "array", "items": _of(inner[0], found)}
    return {"type": "array", "prefixItems": [_of(i, found) for i in inner], "items": False, "minItems": len(inner)}


def _object(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    hints, fields = get_type_hints(kind), dataclasses.fields(kind)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    return {
        "type": "object",
        "properties": {f.name: _field(kind, f, hints[f.name], found) for f in fields},
        "required": needed,
        "additionalProperties": False,
    }


def _field(kind: type, field: dataclasses.Field[Any], hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    default = {} if field.default is dataclasses.MISSING else {"default": field.default}
    return {**_of(hint, found), **NARROWED.get(f"{kind.__name__}.{field.name}", {}), **default}


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
