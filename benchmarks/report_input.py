"""Results files as the report takes them: read, and refused with a reason where a field is not what it should be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.rows import Results, Row, check_unique, load

NUMBER = (int, float)
TEXTS = ("benchmark", "model", "format", "runtime", "variant", "quantity", "unit", "reference", "verdict", "note")
Kinds = Mapping[str, type | tuple[type, ...]]
RESULTS: Kinds = {
    "command": str,
    "started": str,
    "seconds": NUMBER,
    "quick": bool,
    "environment": Mapping,
    "environments": Mapping,
}
ROW: Kinds = {
    **dict.fromkeys(TEXTS, str),
    "figure": (*NUMBER, type(None)),
    "ratio": (*NUMBER, type(None)),
    "settings": Mapping,
    "details": Mapping,
}


def read(path: Path) -> Results:
    """The results in a file. Raises ValueError if it holds none, OSError if it cannot be read."""
    results = load(path)
    try:
        check(results)
    except ValueError as err:
        raise ValueError(f"{path} is not a results file of `python -m benchmarks`: {err}") from err
    return results


def check(results: Results) -> None:
    """Raise ValueError where a field has the wrong kind, or where two rows have the same key."""
    problems = [*_wrong(results, RESULTS, "the file")]
    for number, row in enumerate(results.rows, start=1):
        problems += _wrong(row, ROW, f"row {number}")
    problems = problems or [*_wrong_within(results), *_unwritable(results)]
    if problems:
        raise ValueError("; ".join(problems[:5]))
    check_unique(results.rows)


def _wrong(thing: Results | Row, kinds: Kinds, name: str) -> Iterator[str]:
    for field, kind in kinds.items():
        value = getattr(thing, field)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            yield f"{name}: {field} is {_shown(value)}, expected {_named(kind)}"


def _wrong_within(results: Results) -> Iterator[str]:
    """Problems one level down: environments and settings."""
    for name, environment in results.environments.items():
        if not isinstance(environment, Mapping):
            yield f"environments: {name} is {_shown(environment)}, expected an object"
    for number, row in enumerate(results.rows, start=1):
        for name, value in row.settings.items():
            if not isinstance(value, str | int | float):
                yield f"row {number}: setting {name} is {_shown(value)}, expected text or a number"


def _unwritable(results: Results) -> Iterator[str]:
    """Half of a pair of surrogates, which JSON can spell, is no text that a page can hold."""
    try:
        json.dumps(dataclasses.asdict(results), ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        yield f"a text holds {err.object[err.start : err.end]!r}, which is no character"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = {str: "text", int: "a number", bool: "true or false", Mapping: "an object", type(None): "null"}
    return " or ".join(names[k] for k in kinds if k in names)
