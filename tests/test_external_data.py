"""Files that an ONNX file reads tensors from: wherever they are named, none but the artifact's own is opened."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from artifacts import build
from finetune_runs import write_data
from hand_steps import StepRecipe
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from step_artifacts import build_steps
from tiny_network import Recipe

from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError
from lorac_runtime.external_data import locations, require_own_data
from lorac_runtime.session import finetune


def external(place: str) -> TensorProto:
    """A tensor that lies in another file."""
    tensor = TensorProto(name=place, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(place: str) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    return onnx.SparseTensorProto(values=external(place), indices=indices, dims=[4])


def graph(*nodes: onnx.NodeProto, **more: list[object]) -> onnx.GraphProto:
    return onnx.GraphProto(name="g", node=list(nodes), **more)


def holding(**attributes: object) -> onnx.NodeProto:
    node = onnx.NodeProto(op_type="Constant", output=["y"])
    for name, value in attributes.items():
        attribute = node.attribute.add(name=name)
        field = getattr(attribute, name)
        if isinstance(value, list):
            field.extend(value)
        else:
            field.CopyFrom(value)
    return node


PLACES = {
    "initializer": onnx.ModelProto(graph=graph(initializer=[external("secret")])),
    "sparse initializer": onnx.ModelProto(graph=graph(sparse_initializer=[sparse("secret")])),
    "attribute": onnx.ModelProto(graph=graph(holding(t=external("secret")))),
    "attributes": onnx.ModelProto(graph=graph(holding(tensors=[external("secret")]))),
    "sparse attribute": onnx.ModelProto(graph=graph(holding(sparse_tensor=sparse("secret")))),
    "sparse attributes": onnx.ModelProto(graph=graph(holding(sparse_tensors=[sparse("secret")]))),
    "branch": onnx.ModelProto(graph=graph(holding(g=graph(initializer=[external("secret")])))),
    "branches": onnx.ModelProto(graph=graph(holding(graphs=[graph(holding(t=external("secret")))]))),
    "function": onnx.ModelProto(functions=[onnx.FunctionProto(node=[holding(t=external("secret"))])]),
    "training": onnx.ModelProto(
        training_info=[onnx.TrainingInfoProto(algorithm=graph(initializer=[external("secret")]))]
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_file_is_found_wherever_it_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(PLACES[place].SerializeToString())
    assert locations(tmp_path / "a.onnx") == ["secret"]


def test_every_message_that_leads_to_a_tensor_is_walked() -> None:
    """Against the definition of the format, so that a newer one is noticed."""
    seen, waiting, leading = set(), [onnx.ModelProto.DESCRIPTOR], dict[str, set[tuple[str, int]]]()
    while waiting:
        kind = waiting.pop()
        if kind.full_name in seen:
            continue
        seen.add(kind.full_name)
        for field in kind.fields:
            if field.message_type is not None:
                leading.setdefault(field.message_type.name, set()).add((kind.name, field.number))
                waiting.append(field.message_type)
    from lorac_runtime.external_data import _INNER

    reached, names = set[tuple[str, int]](), ["TensorProto"]
    for name in names:
        for parent, number in leading.get(name, ()):
            reached.add((parent, number))
            names += [parent] if parent not in names else []
    walked = {(f"{name}Proto", number) for name, fields in _INNER.items() for number in fields if name != "Tensor"}
    assert walked == reached


def test_real_files_read_what_the_manifest_names(tmp_path: Path) -> None:
    steps = build_steps(tmp_path / "steps", StepRecipe())
    require_own_data(steps.folder, steps.manifest)
    assert locations(steps.folder / "base.onnx") == []
    assert set(locations(steps.folder / "train_step.onnx")) <= set(steps.manifest.files)
    assert locations(steps.folder / "train_step.onnx")
    tiny = build(tmp_path / "tiny", Recipe())
    require_own_data(tiny.folder, tiny.manifest)


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/passwd", "secret.bin", ""])
def test_a_step_graph_that_reads_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    """All hashes are right: whoever made the artifact made them."""
    made = build_steps(tmp_path / "a", StepRecipe())
    path = made.folder / "train_step.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(e for t in model.graph.initializer for e in t.external_data if e.key == "location")
    entry.value = place
    path.write_bytes(model.SerializeToString())
    new = mf.FileEntry(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    manifest = dataclasses.replace(made.manifest, files={**made.manifest.files, path.name: new})
    (made.folder / mf.FILE_NAME).write_text(manifest.to_json())
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    with pytest.raises(ArtifactError, match=r"train_step\.onnx reads .*, which is no file of the artifact"):
        finetune(made.folder, write_data(tmp_path / "local.npz"), tmp_path / "out")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(PLACES[data.draw(st.sampled_from(sorted(PLACES)))].SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(content)
    try:
        found = locations(path)
    except ArtifactError:
        return
    assert all(isinstance(place, str) for place in found)


def test_helper_makes_what_onnx_makes() -> None:
    """The tensor of these tests is one that onnx takes for external."""
    assert onnx.external_data_helper.uses_external_data(external("x"))
    assert helper.make_tensor("x", TensorProto.FLOAT, [1], [0.0]).data_type == external("x").data_type
