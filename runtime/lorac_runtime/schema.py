"""JSON text into frozen dataclasses, every mismatch collected instead of the first one raised."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

_SCALARS = {str: "text", bool: "true or false", int: "an integer", float: "a finite number"}


def decode(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Read ``value`` (from JSON) as ``kind``; append to ``problems`` what does not fit.

    Knows str, bool, int, float, tuples, ``dict[str, X]``, ``X | None`` and dataclasses.

    >>> found: list[str] = []
    >>> decode(tuple[int, ...], [3, "x"], "shape", found), found
    ((3, None), ["shape[1]: expected an integer, got 'x'"])
    """
    if kind in _SCALARS:
        return _scalar(kind, value, where, problems)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, problems)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else decode(_not_none(inner), value, where, problems)
    if origin is tuple:
        return _tuple(inner, value, where, problems)
    if origin is dict:
        return _dict(inner[1], value, where, problems)
    raise TypeError(f"no rule to read {kind!r}")


def _not_none(options: tuple[Any, ...]) -> Any:
    return next(option for option in options if option is not type(None))


def _scalar(kind: type, value: Any, where: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:  # neither NaN, nor infinite, nor an integer beyond all floats
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    problems.append(f"{where}: expected {_SCALARS[kind]}, got {_short(value)}")
    return None


def _dataclass(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected an object, got {_short(value)}")
        return None
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    problems += [f"{prefix}{name}: unknown key" for name in value if name not in fields]
    known = {}
    before = len(problems)
    for name, field in fields.items():
        if name in value:
            known[name] = decode(hints[name], value[name], prefix + name, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name}: missing")
    return kind(**known) if len(problems) == before else None


def _tuple(inner: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, list):
        problems.append(f"{where}: expected a list, got {_short(value)}")
        return None
    if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        problems.append(f"{where}: expected {len(inner)} entries, got {len(value)}")
        return None
    pairs = enumerate(zip(inner, value, strict=True))
    return tuple(decode(kind, v, f"{where}[{i}]", problems) for i, (kind, v) in pairs)


def _dict(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected an object, got {_short(value)}")
        return None
    return {str(key): decode(kind, v, f"{where}.{key}", problems) for key, v in value.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
