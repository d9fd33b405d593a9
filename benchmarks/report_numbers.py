"""Numbers as the report writes them: a sensible unit and three significant digits."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "none"
DIGITS = 3


@dataclasses.dataclass(frozen=True)
class Scale:
    """``factor`` of a base unit make one ``unit``; used for values of at least ``least`` base units."""

    factor: float
    unit: str
    least: float = 0.0


SCALES: dict[str, tuple[Scale, ...]] = {
    "s": (Scale(1.0, "s", 1.0), Scale(1e-3, "ms", 1e-3), Scale(1e-6, "µs")),
    "1/s": (Scale(1e9, "billion/s", 1e9), Scale(1e6, "million/s", 1e6), Scale(1.0, "1/s")),
    "bytes": (Scale(1e9, "GB", 1e10), Scale(1e6, "MB", 1e6), Scale(1e3, "kB", 1e3), Scale(1.0, "bytes")),
}


def scale_for(values: Iterable[float | None], unit: str) -> Scale:
    """One scale for a column of values: that of their median.

    >>> scale_for([0.004, None, 0.007, 2.0], "s").unit
    'ms'
    """
    known = [abs(value) for value in values if value]
    scales = SCALES.get(unit, (Scale(1.0, unit),))
    typical = statistics.median(known) if known else 1.0
    return next((scale for scale in scales if typical >= scale.least), scales[-1])


def significant(value: float) -> str:
    """Three significant digits, or all of a whole number's.

    >>> significant(0.012345), significant(9.996), significant(12345.6), significant(1024)
    ('0.0123', '10.0', '12,300', '1,024')
    """
    if isinstance(value, int) or value == 0:
        return f"{int(value):,}"
    rounded = float(f"{value:.{DIGITS - 1}e}")
    places = max(0, DIGITS - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}"


def scaled(value: float | None, scale: Scale) -> str:
    """A value in a scale's unit, without the unit."""
    if value is None:
        return NONE
    return significant(value if scale.factor == 1.0 else value / scale.factor)


def with_unit(value: float | None, unit: str) -> str:
    """A value in its own best unit.

    >>> with_unit(0.0123, "s"), with_unit(46_800_000, "bytes"), with_unit(91.53, "%"), with_unit(None, "s")
    ('12.3 ms', '46.8 MB', '91.5 %', 'none')
    """
    if value is None:
        return NONE
    scale = scale_for([value], unit)
    return f"{scaled(value, scale)} {scale.unit}".strip()


def ratio(value: float | None) -> str:
    """Three decimals: "the same" is decided within 1 %.

    >>> ratio(1.0042), ratio(0.99), ratio(12.34), ratio(None)
    ('1.004', '0.990', '12.3', 'none')
    """
    if value is None:
        return NONE
    return f"{value:.3f}" if abs(value) < 10 else significant(float(value))


def change(value: float | None) -> str:
    """A relative change in per cent.

    >>> change(0.0312), change(-0.2), change(0.00004), change(12.0)
    ('+3.1 %', '-20.0 %', '0.0 %', '+1,200 %')
    """
    if value is None:
        return NONE
    percent = 100 * value
    if abs(percent) < 0.05:
        return "0.0 %"
    return f"{percent:+.1f} %" if abs(percent) < 1000 else f"{percent:+,.0f} %"


def duration(seconds: float) -> str:
    """How long a whole run took.

    >>> duration(4.2), duration(3000), duration(9000)
    ('4.2 s', '50 min', '2 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def finite(mapping: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a row's details; None where there is none, for anything may stand there."""
    value = mapping.get(name)
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known and value is not None else None


def samples(mapping: Mapping[str, Any]) -> Sequence[float]:
    """The finite numbers among the seconds of single runs."""
    values = mapping.get("samples")
    if not isinstance(values, list | tuple):
        return []
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
