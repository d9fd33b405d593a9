"""Weights outside the graph: in base.onnx where they are the same, in weights.bin where not, each once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from gradient_cases import graph_of, normal

from lorac_exporters.external import WEIGHTS, externalize
from lorac_exporters.graph_tools import save, set_array
from lorac_exporters.patch_table import initializer_offsets
from lorac_runtime.errors import OutputError

X, V, W = normal(2, 4), normal(4, 3, seed=1), normal(3, 5, seed=2)
NAMES = ("v", "w")


def network() -> ir.Model:
    return graph_of("h = MatMul (x, v)  y = MatMul (h, w)", {"x": X, "v": V, "w": W}, fixed=NAMES)


def base_in(folder: Path) -> Path:
    save(network(), folder / "base.onnx")
    return folder / "base.onnx"


def places(path: Path) -> dict[str, tuple[str, int, int]]:
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            found[tensor.name] = (entry["location"], int(entry["offset"]), int(entry["length"]))
    return found


def result(path: Path) -> np.ndarray:
    """What plain onnxruntime computes from the file."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


def test_weights_that_the_base_holds_stay_there(tmp_path: Path) -> None:
    base, model = base_in(tmp_path), network()
    content = base.read_bytes()
    assert externalize({"step.onnx": model}, base, NAMES) == ()
    save(model, tmp_path / "step.onnx")
    where = initializer_offsets(base)
    assert places(tmp_path / "step.onnx") == {name: ("base.onnx", *where[name]) for name in NAMES}
    assert (tmp_path / "step.onnx").stat().st_size < len(content)
    np.testing.assert_allclose(result(tmp_path / "step.onnx"), X @ V @ W, rtol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"base.onnx", "step.onnx"}
    assert base.read_bytes() == content


@pytest.mark.parametrize("change", ["one number", "a sign of zero", "absent from the base"])
def test_weights_that_differ_go_to_a_file_of_their_own(tmp_path: Path, change: str) -> None:
    base, model = base_in(tmp_path), network()
    value = model.graph.initializers["v"]
    other = V.copy()
    other[1, 2] = {"one number": np.nextafter(V[1, 2], 9), "a sign of zero": 0.0}.get(change, V[1, 2])
    if change == "a sign of zero":
        set_array(value, other)
        save(model, base)
        other = other.copy()
        other[1, 2] = -0.0
    set_array(value, other)
    if change == "absent from the base":
        value.name = "u"
    assert externalize({"step.onnx": model}, base, ("u", *NAMES)) == (WEIGHTS,)
    save(model, tmp_path / "step.onnx")
    found = places(tmp_path / "step.onnx")
    assert found[value.name] == (WEIGHTS, 0, V.nbytes)
    assert found["w"][0] == "base.onnx"
    assert (tmp_path / WEIGHTS).read_bytes() == other.tobytes()
    np.testing.assert_allclose(result(tmp_path / "step.onnx"), X @ other @ W, rtol=1e-5)


def test_a_weight_of_several_graphs_is_written_once(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    models = {"train_step.onnx": network(), "eval_step.onnx": network()}
    for model in models.values():
        set_array(model.graph.initializers["v"], -V)
        set_array(model.graph.initializers["w"], -W)
    assert externalize(models, base, NAMES) == (WEIGHTS,)
    assert (tmp_path / WEIGHTS).read_bytes() == (-V).tobytes() + (-W).tobytes()
    for name, model in models.items():
        save(model, tmp_path / name)
        assert places(tmp_path / name) == {"v": (WEIGHTS, 0, V.nbytes), "w": (WEIGHTS, V.nbytes, W.nbytes)}
        np.testing.assert_allclose(result(tmp_path / name), X @ V @ W, rtol=1e-5)


def test_other_tensors_scalars_and_integers_stay_in_the_graph(tmp_path: Path) -> None:
    body = "h = MatMul (x, v)  s = Mul (h, scale)  y = Reshape (s, size)"
    inputs = {"x": X, "v": V, "scale": np.array(2, np.float32), "size": np.array([2, 3])}
    model = graph_of(body, inputs, fixed=("v", "scale", "size"))
    save(model, tmp_path / "base.onnx")
    assert externalize({"step.onnx": model}, tmp_path / "base.onnx", ("scale", "size")) == ()
    save(model, tmp_path / "step.onnx")
    assert places(tmp_path / "step.onnx") == {}
    np.testing.assert_allclose(result(tmp_path / "step.onnx"), 2 * X @ V, rtol=1e-5)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    base, model = base_in(tmp_path), network()
    set_array(model.graph.initializers["v"], -V)
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(OutputError, match=rf"{WEIGHTS} cannot be written"):
        externalize({"step.onnx": model}, base, NAMES)
