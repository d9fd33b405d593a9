"""Damaged artifacts: the reader of the specification, the JSON Schema and the runtime refuse the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import spec_reader
from small_artifacts import LORA, export
from spec_reader import Json, RefusedError

from lorac_runtime.adapter import check_adapter, load_adapter, save_adapter
from lorac_runtime.errors import AdapterError, ArtifactError
from lorac_runtime.manifest import Manifest, load, parse, verify_files
from lorac_runtime.schema import decode

IMAGES = np.random.default_rng(5).integers(0, 256, (12, 10, 10, 3)).astype(np.uint8)
WRONG = (5, 1.5, "x", True, {}, [], None)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with adapters, a frozen-in batch normalisation and an int8 base.tflite. Read only."""
    folder = tmp_path_factory.mktemp("artifact") / "a"
    export(folder, tflite="int8", calibration=IMAGES, lora=dataclasses.replace(LORA, biases="all"))
    return folder


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Json:
    found: Json = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def validator(root: Path) -> jsonschema.Draft202012Validator:
    schema = json.loads((root / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def entry(m: Json, file: str, tensor: str) -> Json:
    found: Json = next(p for p in m["patches"] if (p["file"], p["tensor"]) == (file, tensor))
    return found


def tflite_weight(m: Json) -> Json:
    return entry(m, "base.tflite", m["adapters"][0]["weight"])


DAMAGES: dict[str, Callable[[Json], object]] = {
    "version": lambda m: m.update(schema_version=2),
    "a name out of the folder": lambda m: m["files"].update({"../x": m["files"]["base.onnx"]}),
    "no base": lambda m: m["files"].pop("base.onnx"),
    "a file of an engine": lambda m: m["engines"]["onnxruntime"]["files"].append("other.onnx"),
    "class names": lambda m: m["class_names"].pop(),
    "trainables twice": lambda m: m["trainables"].append(m["trainables"][0]),
    "patches twice": lambda m: m["patches"].append(m["patches"][0]),
    "a factor's shape": lambda m: m["adapters"][0].update(rank=m["adapters"][0]["rank"] + 1),
    "a factor that does not train": lambda m: m["adapters"][0].update(lora_b="other"),
    "pairs": lambda m: m["adapters"][0].update(pairs=3),
    "bytes and shape": lambda m: m["patches"][0].update(nbytes=m["patches"][0]["nbytes"] - 4),
    "bytes outside": lambda m: tflite_weight(m).update(offset=m["files"]["base.tflite"]["nbytes"] - 4),
    "overlap": lambda m: tflite_weight(m).update(offset=tflite_weight(m)["quantization"]["scales"]["offset"]),
    "order of axes": lambda m: tflite_weight(m).update(permute=[0, 1, 2, 2]),
    "a view of base.onnx": lambda m: m["patches"][0].update(view=m["patches"][0]["shape"]),
    "no quantization": lambda m: tflite_weight(m).update(quantization=None),
    "partners": lambda m: tflite_weight(m)["quantization"].update(input_scale=7.0),
    "no numbers to start from": lambda m: m["patches"].remove(entry(m, "base.onnx", m["adapters"][0]["weight"])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_reader_and_the_runtime_refuse_what_the_specification_says(
    damage: str, artifact: Path, manifest: Json, tmp_path: Path
) -> None:
    spec_reader.read(artifact)
    damaged = copy.deepcopy(manifest)
    DAMAGES[damage](damaged)
    folder = shutil.copytree(artifact, tmp_path / "a")
    (folder / "manifest.json").write_text(json.dumps(damaged), encoding="utf-8")
    with pytest.raises(RefusedError):
        spec_reader.read(folder)
    with pytest.raises(ArtifactError):
        load(folder)


@pytest.mark.parametrize("name", ["base.onnx", "base.tflite", "train_step.onnx", "adapter.safetensors"])
def test_an_altered_file_is_refused(name: str, artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact, tmp_path / "a")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(RefusedError, match=f"^{name} was altered$"):
        spec_reader.read(folder)
    with pytest.raises(ArtifactError, match=f"{name} was altered"):
        verify_files(folder, load(folder))


ADAPTERS: dict[str, Callable[[dict[str, np.ndarray], dict[str, str]], object]] = {
    "another base": lambda t, meta: meta.update(base_sha256="0" * 64),
    "another policy": lambda t, meta: meta.update(bn_policy="batch"),
    "missing": lambda t, meta: t.pop(next(iter(t))),
    "unexpected": lambda t, meta: t.update(other=np.zeros(1, np.float32)),
    "not finite": lambda t, meta: t.update({n: v * np.float32("nan") for n, v in t.items()}),
    "another shape": lambda t, meta: t.update({n: v[..., None] for n, v in t.items()}),
}


@pytest.mark.parametrize("damage", ADAPTERS)
def test_adapters_that_do_not_fit_are_refused(damage: str, artifact: Path, manifest: Json, tmp_path: Path) -> None:
    file = load_adapter(artifact / "adapter.safetensors")
    tensors, metadata = dict(file.tensors), dict(file.metadata)
    ADAPTERS[damage](tensors, metadata)
    save_adapter(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(RefusedError):
        spec_reader.adapter(manifest, (tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(AdapterError):
        check_adapter(load(artifact), load_adapter(tmp_path / "x.safetensors"))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """A path to everything in a JSON value; of a list's entries to the first only."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(manifest: Json, path: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Json:
    """A copy in which ``change(container, key)`` was done."""
    result = copy.deepcopy(manifest)
    inside: Any = result
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return result


def variants(manifest: Json) -> Iterator[Json]:
    """The manifest with one value of another type, one key gone, or one key more, everywhere."""
    for path in filter(None, places(manifest)):
        for wrong in WRONG:
            yield changed(manifest, path, lambda inside, key, wrong=wrong: inside.__setitem__(key, wrong))
        if isinstance(path[-1], str):
            yield changed(manifest, path, lambda inside, key: inside.pop(key))
            yield changed(manifest, path, lambda inside, key: inside.update(surprise=1))


def refused(manifest: Json) -> str:
    """Why the runtime does not take it."""
    try:
        parse(json.dumps(manifest))
    except ArtifactError as err:
        return str(err)
    return ""


def test_the_schema_takes_what_the_runtime_takes_and_nothing_else(
    manifest: Json, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(manifest)
    verdicts, unnoticed = {True: 0, False: 0}, []
    for variant in variants(manifest):
        problems: list[str] = []
        decode(Manifest, variant, "", problems)
        fits = validator.is_valid(variant)
        verdicts[fits] += 1
        if problems:
            assert not fits, problems
        elif not fits and refused(variant) == "":
            unnoticed += [error.json_path for error in validator.iter_errors(variant)]
    # The runtime takes any text for a hash, and then no file has it.
    assert {path.rpartition(".")[2] for path in unnoticed} == {"sha256"}
    assert verdicts[True] > 20
    assert verdicts[False] > 1000


def test_the_schema_is_what_make_docs_writes(root: Path) -> None:
    made = runpy.run_path(str(root / "docs" / "generate_schema.py"))["text"]()
    assert (root / "docs" / "manifest.schema.json").read_text(encoding="utf-8") == made, "run `make docs`"
