"""Rows in words: what a figure belongs to, and what the row must come out as."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rows import Row, Setting

FAULT = "fault:"
DROP_IN, NO_DROP_IN = "drop-in", "not a drop-in"
NAMES = {  # of quantities and settings in headings
    "ninetieth": "90th percentile",
    "size": "image size",
}


def must(row: Row) -> str:
    """What the verdict has to be: "same", "different", or empty where nothing is known."""
    text = row.details.get("must", "")
    return text if text in ("same", "different") else ""


def is_fault(row: Row) -> bool:
    """A fault was planted in this file."""
    return row.variant.startswith(FAULT)


def is_control(row: Row) -> bool:
    """A negative control: it does more work and must come out slower."""
    return must(row) == "different" and not is_fault(row)


def is_fused(row: Row) -> bool:
    """A fused file's latency beside the base's."""
    return (row.benchmark, row.quantity, row.variant) == ("latency", "latency", "fused")


def slower(row: Row) -> bool:
    """It came out slower than its reference."""
    return row.verdict == "different" and row.ratio is not None and row.ratio > 1


def structure(row: Row) -> str:
    """What the drop-in check said, in one or two words; empty where it did not run."""
    text = str(row.details.get("structure", ""))
    return next((word for word in (NO_DROP_IN, DROP_IN) if text.startswith(word)), text)


def setting(name: str, value: Setting) -> str:
    """A setting in words.

    >>> setting("batch", 8), setting("precision", "int8"), setting("threads", 1)
    ('batch 8', 'int8', '1 thread')
    """
    if name == "threads":
        return f"{value} thread" + ("" if value == 1 else "s")
    return str(value) if name == "precision" else f"{NAMES.get(name, name)} {value}"


def settings(row: Row, *, without: Sequence[str] = ()) -> str:
    """All settings of a row in words."""
    return ", ".join(setting(name, value) for name, value in row.settings.items() if name not in without)


def shared(rows: Sequence[Row]) -> list[str]:
    """Names of the settings that are the same in all rows."""
    return [name for name, value in rows[0].settings.items() if all(row.settings.get(name) == value for row in rows)]


def settings_of(row: Row, names: Sequence[str]) -> str:
    """Only the named settings of a row, in words."""
    return settings(row, without=[name for name in row.settings if name not in names])


def label(row: Row) -> str:
    """What a row is about, in one line."""
    parts = (row.model, row.format, row.runtime, row.variant, settings(row))
    return ", ".join(part for part in parts if part)


def heading(name: str) -> str:
    """A quantity or setting as a heading.

    >>> heading("peak memory"), heading("ninetieth")
    ('Peak memory', '90th percentile')
    """
    text = NAMES.get(name, name)
    return text[:1].upper() + text[1:]


def distinguishing(rows: Sequence[Row], fields: Sequence[str], *, by_settings: bool = False) -> list[str]:
    """Texts that tell rows apart, of as few of their fields (then settings) as that takes, in the order given."""
    parts = [_parts(row, fields, by_settings) for row in rows]
    names = dict.fromkeys(name for own in parts for name in own)
    varying = [name for name in names if len({own.get(name) for own in parts}) > 1]
    for count in range(1, len(varying) + 1):
        texts = [", ".join(dict.fromkeys(own[n] for n in varying[:count] if own.get(n))) for own in parts]
        if len(set(texts)) == len(rows) or count == len(varying):
            return texts
    return [own[fields[0]] for own in parts]


def _parts(row: Row, fields: Sequence[str], by_settings: bool) -> dict[str, str]:
    own = {field: str(getattr(row, field)) for field in fields}
    return own | ({f"setting {n}": setting(n, v) for n, v in row.settings.items()} if by_settings else {})
