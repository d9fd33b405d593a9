"""JSON into dataclasses, with every mismatch collected."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.schema import decode


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    points: tuple[Point, ...]
    size: tuple[int, int]
    closed: bool
    tags: dict[str, int] = dataclasses.field(default_factory=dict)


def read(kind: Any, value: Any) -> tuple[Any, list[str]]:
    problems: list[str] = []
    return decode(kind, value, "", problems), problems


POINTS = st.builds(Point, st.floats(allow_nan=False, allow_infinity=False), st.none() | st.text())
SHAPES = st.builds(
    Shape,
    st.lists(POINTS, max_size=3).map(tuple),
    st.tuples(st.integers(), st.integers()),
    st.booleans(),
    st.dictionaries(st.text(), st.integers(), max_size=3),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(shape=SHAPES)
def test_what_is_written_is_read_back(shape: Shape) -> None:
    assert read(Shape, json.loads(json.dumps(dataclasses.asdict(shape)))) == (shape, [])


@given(value=JSON)
def test_anything_else_is_a_list_of_problems_not_an_exception(value: Any) -> None:
    found, problems = read(Shape, value)
    assert problems
    assert found is None


def test_every_mismatch_is_reported_with_its_place() -> None:
    value = {"points": [{"x": 1}, {"x": "far"}, {"y": 2}], "size": [1], "tags": {"a": 1.5}, "colour": "red"}
    assert read(Shape, value)[1] == [
        "colour: unknown key",
        "points[1].x: expected a finite number, got 'far'",
        "points[2].y: unknown key",
        "points[2].x: missing",
        "size: expected 2 entries, got 1",
        "closed: missing",
        "tags.a: expected an integer, got 1.5",
    ]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, 3, 3.0),
        (float, 2.5, 2.5),
        (int, 3, 3),
        (bool, True, True),
        (str, "a", "a"),
        (str | None, None, None),
        (tuple[int, ...], [], ()),
        (dict[str, int], {"a": 1}, {"a": 1}),
    ],
)
def test_matching_values_are_taken(kind: Any, value: Any, expected: Any) -> None:
    found, problems = read(kind, value)
    assert problems == []
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (float, True),
        (int, 3.0),
        (bool, 1),
        (str, None),
        (float, math.nan),
        (float, math.inf),
        (float, 10**400),
        (tuple[int, ...], "12"),
        (tuple[int, ...], {"0": 1}),
        (dict[str, int], [1]),
        (Point, [1.0]),
        (str | None, 1),
    ],
)
def test_values_of_another_type_are_named(kind: Any, value: Any) -> None:
    found, problems = read(kind, value)
    assert found is None or found == ()
    assert len(problems) == 1
    assert "expected" in problems[0]


def test_long_values_are_shortened() -> None:
    assert len(read(int, "x" * 1000)[1][0]) < 80
