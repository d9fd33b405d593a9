"""Settings: what is refused, and where a value comes from."""

from __future__ import annotations

import dataclasses

import pytest

from lorac_runtime.config import FinetuneConfig, Settings
from lorac_runtime.manifest import TrainingDefaults


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("epochs", 0, 1),
        ("batch_size", 0, 1),
        ("threads", -1, 1),
        ("micro_batch", 0, 1),
        ("engine", "abacus", "onnxruntime"),
        ("seed", -1, 0),
        ("lr", 0.0, 1e-9),
        ("lr", float("nan"), 1.0),
        ("lr", float("inf"), 1.0),
        ("warmup", -0.1, 0.0),
        ("warmup", 1.1, 1.0),
        ("val_fraction", 1.0, 0.99),
        ("val_fraction", -0.1, 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, bad: object, good: object) -> None:
    with pytest.raises(ValueError, match=rf"{field} .*got {bad!r}"):
        FinetuneConfig(**{field: bad})
    assert getattr(FinetuneConfig(**{field: good}), field) == good


def test_what_is_not_asked_for_comes_from_the_artifact() -> None:
    defaults = TrainingDefaults(lr=0.5, batch_size=7, epochs=9, warmup=0.25)
    assert FinetuneConfig().resolved(defaults) == Settings(9, 7, 0.5, 0.25, 0.2, 0)
    asked = FinetuneConfig(epochs=1, batch_size=2, lr=3.0, warmup=0.0, val_fraction=0.5, seed=6)
    assert asked.resolved(defaults) == Settings(1, 2, 3.0, 0.0, 0.5, 6)


def test_every_field_has_a_help_text() -> None:
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(FinetuneConfig))
