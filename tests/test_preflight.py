"""What an engine can train through is known before any work; the table is held against the engine itself."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from exporter_graphs import constants, from_text, numbers
from operator_bodies import DIFFERENTIABLE, REFUSED, REWRITTEN, operator_model

from lorac_exporters.canonical import canonicalize
from lorac_exporters.preflight import ENGINES, Problem, require_none, untrainable
from lorac_exporters.shapes import settle_shapes
from lorac_runtime.errors import ConversionError

ENGINE = "onnxruntime-training"
WRONG = ["Conv, SAME padding", "Conv 1-D grouped, smaller"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operators_with_a_gradient_pass(name: str) -> None:
    model = operator_model(DIFFERENTIABLE[name])
    settle_shapes(model)
    assert untrainable(model, ["w"], engine=ENGINE) == ()


@pytest.mark.parametrize("name", REFUSED)
def test_operators_without_a_gradient_are_named(name: str) -> None:
    model = canonicalize(operator_model(REFUSED[name])).model
    (problem,) = untrainable(model, ["w"], engine=ENGINE)
    assert problem.operator == name.split(",")[0].split(" ")[0]
    with pytest.raises(ConversionError, match=f"{problem.operator} '"):
        require_none(untrainable(model, ["w"], engine=ENGINE), engine=ENGINE)


def test_the_table_holds_what_was_measured_here() -> None:
    measured = {name.split(" ")[0] for name in DIFFERENTIABLE}
    assert ENGINES[ENGINE].operators == measured | {"BatchNormalization"}


BODY = """
    a = Conv (x, stem.weight)  b = Floor (a)  c = Conv (b, mid.weight)  d = Round (c)  side = Sign (x)
    e = Add (d, side)  g = GlobalAveragePool (e)  f = Flatten (g)  y = Gemm <transB = 1> (f, fc.weight, fc.bias)
"""
WEIGHTS = numbers(stem_weight=(3, 3, 1, 1), mid_weight=(3, 3, 1, 1), fc_weight=(5, 3), fc_bias=(5,))
PATHS = {
    ("stem.weight",): ["Floor", "Round"],
    ("mid.weight",): ["Round"],
    ("fc.weight", "fc.bias"): [],
    ("fc.weight", "mid.weight", "stem.weight"): ["Floor", "Round"],
}


@pytest.mark.parametrize("names", PATHS)
def test_only_nodes_between_what_trains_and_the_output_count(names: tuple[str, ...]) -> None:
    model = from_text(BODY, weights=WEIGHTS)
    assert [p.operator for p in untrainable(model, names, engine=ENGINE)] == PATHS[names]


def test_all_nodes_in_the_way_come_in_one_message_with_what_to_do() -> None:
    model = from_text(BODY, weights=WEIGHTS)
    for node, name in zip(model.graph, "abcdefghi", strict=False):
        node.name = f"/layer/{name}"
    with pytest.raises(ConversionError) as caught:
        require_none(untrainable(model, ["stem.weight"], engine=ENGINE), engine=ENGINE)
    head, *lines = str(caught.value).splitlines()
    assert lines == ["  - Floor '/layer/b': Floor has no gradient", "  - Round '/layer/d': Round has no gradient"]
    assert "method head" in head
    require_none(untrainable(model, ["fc.weight"], engine=ENGINE), engine=ENGINE)


def test_a_node_beside_the_output_does_not_matter() -> None:
    body = "a = Conv (x, stem.weight) b = Floor (a) c = Neg (b) g = GlobalAveragePool (a) f = Flatten (g) "
    model = from_text(body + "y = Gemm <transB = 1> (f, fc.weight, fc.bias)", weights=WEIGHTS)
    assert untrainable(model, ["stem.weight"], engine=ENGINE) == ()


def test_sizes_and_masks_end_a_gradient_path() -> None:
    body = "a = Conv (x, stem.weight) s = Shape (a) r = Reshape (a, s) m = Greater (r, zero) "
    body += "w = Where (m, r, zero) g = GlobalAveragePool (w) f = Flatten (g) "
    body += "y = Gemm <transB = 1> (f, fc.weight, fc.bias)"
    model = canonicalize(from_text(body, weights=WEIGHTS | constants(zero=0.0))).model
    assert untrainable(model, ["stem.weight"], engine=ENGINE) == ()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('y = Pad <mode = "reflect"> (c, pads)', "this pads by reflect"),
        ('y = Conv <auto_pad = "SAME_UPPER"> (c, k)', "wrong with auto_pad SAME_UPPER"),
        ("y = AveragePool <kernel_shape = [2, 2]> (c)", "ends the process"),
    ],
)
def test_conditions_say_what_is_wrong(body: str, text: str) -> None:
    (problem,) = untrainable(operator_model(body), ["w"], engine=ENGINE)
    assert text in problem.reason
    assert isinstance(problem, Problem)


def test_an_operator_of_a_vendor_is_named_with_its_domain() -> None:
    model = operator_model("y = Relu (c)")
    model.graph[1].domain = "com.microsoft"
    (problem,) = untrainable(model, ["w"], engine=ENGINE)
    assert "com.microsoft.Relu" in problem.reason


def test_unknown_engines_and_tensors_are_mistakes_of_the_caller() -> None:
    model = operator_model("y = Relu (c)")
    with pytest.raises(ValueError, match="'tflite' is not one of onnxruntime-training"):
        untrainable(model, ["w"], engine="tflite")
    with pytest.raises(ValueError, match=r"layer9\.weight"):
        untrainable(model, ["w", "layer9.weight"], engine=ENGINE)


def probe(root, names, raw=()) -> subprocess.CompletedProcess[str]:
    """Run `gradient_probe` on these operators; ``raw`` ones are not written out before."""
    program = root / "tests" / "gradient_probe.py"
    command = [sys.executable, str(program), "|".join(names), *(["|".join(raw)] if raw else [])]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def results(process: subprocess.CompletedProcess[str]) -> dict[str, dict]:
    assert process.returncode == 0, process.stderr
    return {line["name"]: line for line in map(json.loads, process.stdout.splitlines())}


@pytest.mark.slow
def test_the_engine_differentiates_every_operator_of_the_table_and_every_written_out_one(root) -> None:
    found = results(probe(root, DIFFERENTIABLE | REWRITTEN))
    assert found.keys() == (DIFFERENTIABLE | REWRITTEN).keys()
    wrong = {
        name: line
        for name, line in found.items()
        if line["error"] or not np.isclose(line["engine"], line["differences"], rtol=0.03, atol=1e-3)
    }
    assert wrong == {}
    assert sum(abs(line["differences"]) > 5e-3 for line in found.values()) > 0.9 * len(found)


@pytest.mark.slow
def test_the_engine_refuses_what_the_table_does_not_hold(root) -> None:
    raw = [name for name in REWRITTEN if not name.startswith("AveragePool")]
    refused = [name for name in REFUSED if name not in WRONG]
    found = results(probe(root, [*refused, *raw], raw))
    assert [name for name, line in found.items() if line["error"] is None] == []


@pytest.mark.slow
def test_average_pooling_ends_the_process(root) -> None:
    """A fault of onnxruntime-training 1.19.2 that writing the operator out avoids."""
    assert probe(root, ["AveragePool"], ["AveragePool"]).returncode == -signal.SIGFPE


@pytest.mark.slow
def test_some_convolutions_get_wrong_gradients_without_a_word(root) -> None:
    """Faults of onnxruntime-training 1.19.2; canonical padding avoids one, the preflight refuses the other."""
    for line in results(probe(root, WRONG)).values():
        assert line["error"] is None
        assert abs(line["engine"] - line["differences"]) > 0.05 * abs(line["differences"])
