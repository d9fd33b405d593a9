"""The reference pages say what the code has: manifest fields, and the public names of each package."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from lorac_exporters.tflite.rules import RULES
from lorac_runtime import manifest
from lorac_runtime.tasks import Output, Target, Task

SECTIONS = (
    manifest.Manifest,
    manifest.InputSpec,
    manifest.OutputSpec,
    Task,
    Target,
    Output,
    manifest.Adapter,
    manifest.Partial,
    manifest.Trainable,
    manifest.BatchNorm,
    manifest.Patch,
    manifest.ByteRange,
    manifest.Quantized,
    manifest.TfliteEntry,
    manifest.FileEntry,
    manifest.TrainingDefaults,
    manifest.EngineEntry,
)
MOST_NAMES = 15


def code_words(text: str) -> set[str]:
    """Everything that stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def promised(text: str, package: str) -> set[str]:
    """The names that the section ``## package`` of docs/api.md lists in the first column of its table."""
    _, _, rest = text.partition(f"## {package}\n")
    section = rest.split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)[^`]*` \|", section, re.MULTILINE))


@pytest.mark.parametrize("page", ["artifact.md", "specification.md"])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_the_artifacts_pages_name_every_manifest_field(section: type, page: str, root: Path) -> None:
    words = code_words((root / "docs" / page).read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(section)}
    assert fields - words == set()


def test_a_field_that_the_artifact_page_lacks_is_noticed(root: Path) -> None:
    assert "surprise" not in code_words((root / "docs" / "artifact.md").read_text(encoding="utf-8"))


def test_the_api_page_promises_something(root: Path) -> None:
    page = (root / "docs" / "api.md").read_text(encoding="utf-8")
    assert {"attach", "fuse", "export_training_artifact", "verify", "finetune"} <= promised(page, "lorac_deploy")
    assert {"finetune", "fuse"} <= promised(page, "lorac_runtime")


@pytest.mark.parametrize("package", ["lorac_runtime", "lorac_exporters", "lorac_exporters.tflite", "lorac_deploy"])
def test_public_names_are_those_promised(package: str, root: Path) -> None:
    module = importlib.import_module(package)
    names = promised((root / "docs" / "api.md").read_text(encoding="utf-8"), package)
    assert names == set(getattr(module, "__all__", ()))
    assert len(names) <= MOST_NAMES
    assert all(hasattr(module, name) for name in names)


def operators(page: str) -> list[str]:
    """The operators in the first column of the table under ``## Operators``."""
    _, _, rest = page.partition("## Operators\n")
    rows = re.findall(r"^\| (`.*?) \|", rest.split("\n## ")[0], re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_the_tflite_page_lists_every_operator_once(root: Path) -> None:
    found = operators((root / "docs" / "tflite.md").read_text(encoding="utf-8"))
    assert sorted(found) == sorted(RULES)


def test_an_operator_is_looked_for_in_the_table_only() -> None:
    assert operators("`Add`\n## Operators\n| ONNX | |\n|---|---|\n| `Mul` `Div` | `Sub` |\n\n`Neg`\n") == ["Mul", "Div"]
