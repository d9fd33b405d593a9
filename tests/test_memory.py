"""The memory of a step graph: exact bytes by hand, the order of onnxruntime itself, and measured peaks."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from networks import SPEC, trained
from shared_export import export_graph

from lorac_exporters.branches import form_of
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import to_bytes
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.inject import starting_values
from lorac_exporters.memory import MIB, OPENING, PER_NODE, PROCESS, SESSION, Peak, peak, saved_activations
from lorac_exporters.memory_order import buffers, byte_size, constant_values, execution_order, highest
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.prefix import PREFIX
from lorac_exporters.training_step import StepConfig, gradient_step, optimizer_step, train_step, write
from lorac_runtime.manifest import BASE, TrainingDefaults

FLOAT, BATCH = 4, 3
PROBE = Path(__file__).with_name("memory_probe.py")
LAST = {"resnet18": ("layer4",), "mobilenet_v2": ("features.16", "features.17", "features.18")}


def tiny() -> ir.Model:
    """y = relu(x W), loss = mean(y); p.next = p + sum over the batch of mask(y) W^T."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="tiny"), ir_version=9)
    tape = Tape(model.graph)
    x, p = tape.input("x", ("batch", 8)), tape.input("p", (8,))
    w = tape.constant(np.ones((8, 10), np.float32), "w")
    hidden = tape.op("MatMul", x, w, shape=("batch", 10), name="hidden")
    y = tape.op("Relu", hidden, like=hidden, name="y")
    loss = tape.op("ReduceMean", y, tape.ints(0, 1), shape=(), attributes={"keepdims": 0}, name="loss")
    mask = tape.op("Greater", y, 0.0, like=y, dtype=ir.DataType.BOOL, name="mask")
    step = tape.op("Cast", mask, like=y, attributes={"to": 1}, name="cast", dtype=ir.DataType.FLOAT)
    turned = tape.op("Transpose", w, shape=(10, 8), attributes={"perm": [1, 0]}, name="turned")
    grad = tape.op("MatMul", step, turned, shape=("batch", 8), name="grad")
    total = tape.op("ReduceSum", grad, tape.ints(0), shape=(8,), attributes={"keepdims": 0}, name="total")
    after = tape.op("Add", p, total, like=p, name="p.next")
    model.graph.outputs[:] = [loss, after]
    return model


def test_the_peak_of_a_tiny_step_is_what_a_person_counts() -> None:
    made = peak(tiny(), BATCH)
    y, mask, grad = BATCH * 10 * FLOAT, BATCH * 10, BATCH * 8 * FLOAT
    alive = max(y + mask + y, y + y + grad)  # y, until the loss; mask and its cast; cast and grad
    axes_and_zero = 2 * 8 + 8 + FLOAT
    assert made == Peak(
        process=PROCESS,
        session=SESSION + 8 * PER_NODE,
        weights=8 * 10 * FLOAT + axes_and_zero,
        derived=8 * 10 * FLOAT,
        state=BATCH * 8 * FLOAT + 2 * 8 * FLOAT,
        saved=y,
        working=round(1.2 * alive) - y,
        opening=round(OPENING * (2 * 8 * 10 * FLOAT + axes_and_zero)),
    )
    assert made.held == made.process + made.session + made.weights + made.derived
    assert made.step == made.held + made.state + made.saved + made.working
    assert (
        made.total
        == max(made.step, made.held + made.opening)
        == made.step + max(0, made.opening - made.state - made.saved - made.working)
    )


def test_buffers_grow_with_the_batch_and_weights_do_not() -> None:
    one, four = peak(tiny(), 1), peak(tiny(), 4)
    assert four.saved == 4 * one.saved
    assert (four.weights, four.derived, four.session) == (one.weights, one.derived, one.session)


def test_a_constant_computed_from_constants_is_no_buffer_and_runs_at_no_step() -> None:
    graph = tiny().graph
    assert {value.name for value in constant_values(graph)} >= {"w", "turned"}
    assert "turned" not in [node.outputs[0].name for node in execution_order(graph)]


def test_a_result_takes_the_place_of_an_input_that_nothing_reads_later() -> None:
    found = buffers(tiny().graph, BATCH)
    named = {value.name: root.name for value, root in found.root.items()}
    assert named["y"] == "hidden"
    assert named["cast"] == "cast"  # a mask is smaller
    assert "loss" not in named
    assert "p.next" not in named


def test_an_input_that_is_read_again_keeps_its_place() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="twice"), ir_version=9)
    tape = Tape(model.graph)
    x = tape.input("x", ("batch", 8))
    first = tape.op("Exp", x, like=x, name="first")
    second = tape.op("Exp", first, like=x, name="second")
    view = tape.op("Reshape", second, tape.ints(-1), shape=(None,), name="view")
    model.graph.outputs[:] = [
        tape.op("MatMul", view, tape.op("Reshape", first, tape.ints(-1), shape=(None,)), shape=())
    ]
    found = buffers(model.graph, BATCH)
    assert {value.name: root.name for value, root in found.root.items() if value.name in ("second", "view")} == {
        "second": "second",
        "view": "second",
    }
    assert highest(found) == 2 * BATCH * 8 * FLOAT


def test_a_size_that_the_graph_does_not_tell_is_an_error_naming_it() -> None:
    value = ir.Value(name="odd", shape=ir.Shape(["other", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    with pytest.raises(ValueError, match="size of 'odd'"):
        byte_size(value, 2)
    with pytest.raises(ValueError, match="element type of 'untyped'"):
        byte_size(ir.Value(name="untyped", shape=ir.Shape([3])), 2)


def pooled() -> torch.nn.Module:
    """A network with every way to find the largest cells again: overlapping, padded, small and large windows."""
    pools = [torch.nn.MaxPool2d(2), torch.nn.MaxPool2d(3, 2, 1), torch.nn.MaxPool2d(2, padding=1)]
    layers = [layer for pool in pools for layer in (torch.nn.Conv2d(3, 3, 3, padding=1), pool)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()


@functools.cache
def network(name: str) -> Graphs:
    net = pooled() if name == "pooled" else trained(name, cifar_stem=name == "resnet18")
    net(torch.zeros(1, *SPEC.shape))  # lazy layers learn their size
    return build_graphs(
        export_graph(net, SPEC.shape),
        spec=SPEC,
        classes=10,
        new_head=False,
        method="head",
        lora=LoraConfig(),
        policy="frozen",
    )


def planned(name: str, method: str, lora: LoraConfig) -> tuple[Graphs, dict[str, np.ndarray]]:
    graphs = network(name)
    graphs = dataclasses.replace(graphs, plan=METHODS[method](graphs.network, lora))
    return graphs, starting_values(graphs.plan, graphs.trained.values, seed=0)


CONFIG = StepConfig(TrainingDefaults(), form_of("auto"))
CHOICES = {
    "full": ("full", {}),
    "lora-c": ("lora-c", {}),
    "frozen a": ("lora-c", {"freeze_a": True}),
    "last stage": ("lora-c", {"freeze_a": True, "blocks": True}),
    "head": ("head", {}),
}


def chosen(name: str, choice: str) -> tuple[Graphs, dict[str, np.ndarray]]:
    method, settings = CHOICES[choice]
    blocks = LAST[name] if settings.get("blocks") else ()
    return planned(name, method, LoraConfig(rank=4, freeze_a=bool(settings.get("freeze_a")), blocks=blocks))


def test_the_order_is_onnxruntime_s_own(tmp_path: Path) -> None:
    model = gradient_step(*chosen("resnet18", "last stage"), CONFIG)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {
        v.name: np.zeros([d if isinstance(d, int) else 1 for d in v.shape], kinds[v.type]) for v in session.get_inputs()
    }
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]
    # It runs Shape, whose result is a few bytes, ahead of time, and without optimization constants too
    ours = [node.name for node in execution_order(model.graph) if node.op_type != "Shape"]
    assert len(ours) > 100
    assert [name for name in ran if name in set(ours)] == ours


def test_a_trained_tensor_that_is_called_like_a_feature_is_no_activation() -> None:
    model = tiny()
    next(value for value in model.graph.inputs if value.name == "p").name = "features.17.conv.weight"
    assert saved_activations(model, BATCH) == saved_activations(tiny(), BATCH) == BATCH * 10 * FLOAT


@pytest.mark.parametrize("batch", [1, 32])
def test_the_last_stage_with_frozen_a_saves_a_tenth_of_what_full_fine_tuning_saves(batch: int) -> None:
    full, last = (train_step(*chosen("resnet18", choice), CONFIG) for choice in ("full", "last stage"))
    assert 0 < saved_activations(last, batch) <= saved_activations(full, batch) / 10


def test_the_head_alone_saves_only_its_input_and_the_logits() -> None:
    model = train_step(*chosen("resnet18", "head"), CONFIG)
    features, logits = 512 * FLOAT, 10 * FLOAT  # the features come from the frozen front
    assert features <= saved_activations(model, 8) / 8 <= features + 4 * logits


def test_micro_batches_need_less_and_carry_gradients_besides() -> None:
    graphs, start = chosen("resnet18", "lora-c")
    whole = peak(train_step(graphs, start, CONFIG), 32)
    optimizer = optimizer_step(graphs, CONFIG)
    parts = peak(gradient_step(graphs, start, CONFIG), 8, optimizer=optimizer)
    images, labels, share = 24 * 3 * 32 * 32 * FLOAT, 24 * 8, FLOAT
    assert parts.state == whole.state - images - labels + share + 2 * FLOAT * graphs.plan.trained_parameters
    assert parts.saved * 3 < whole.saved
    assert parts.total < whole.total


@pytest.mark.parametrize(("name", "choice"), [("resnet18", "last stage"), ("pooled", "full")])
def test_saved_values_have_the_sizes_that_onnxruntime_gives_them(name: str, choice: str) -> None:
    model = gradient_step(*chosen(name, choice), CONFIG)
    taken = sum(byte_size(v, BATCH) for v in model.graph.inputs if str(v.name).startswith("features."))
    computed = saved_activations(model, BATCH) - taken
    found = buffers(model.graph, BATCH)
    sizes = {root.name: size for root, size in found.size.items()}
    model.graph.outputs.extend(root for root in found.size if not root.is_graph_output())
    session = onnxruntime.InferenceSession(to_bytes(model), providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {
        v.name: np.zeros([d if isinstance(d, int) else BATCH for d in v.shape], kinds[v.type])
        for v in session.get_inputs()
    }
    given = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    assert {name: given[name].nbytes for name in sizes} == sizes
    assert 0 < computed < sum(sizes.values())


@functools.cache
def measured(folder: Path, batch: int) -> dict[str, float]:
    """A process of its own trains a few steps."""
    command = [sys.executable, str(PROBE), str(folder / "train_step.onnx"), str(batch), "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A folder with the step graphs of a choice."""

    @functools.cache
    def made(name: str, choice: str) -> Path:
        folder = tmp_path_factory.mktemp("steps")
        graphs, start = chosen(name, choice)
        ir.save(graphs.base.model, folder / BASE)
        write(graphs, folder, start=start, config=CONFIG)
        return folder

    return made


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.long), 64])
@pytest.mark.parametrize(
    "choice", ["full", "lora-c", pytest.param("frozen a", marks=pytest.mark.long), "last stage", "head"]
)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_computed_peak_is_near_the_measured_one(name: str, choice: str, batch: int, files: object) -> None:
    folder = files(name, choice)  # type: ignore[operator]
    front = ir.load(folder / PREFIX) if (folder / PREFIX).exists() else None
    computed = peak(ir.load(folder / "train_step.onnx"), batch, front=front).total
    found = measured(folder, batch)
    assert np.isfinite(found["loss"])
    assert abs(computed - found["peak"]) <= max(0.15 * found["peak"], 20 * MIB), (computed / MIB, found["peak"] / MIB)


@pytest.mark.slow
def test_measured_growth_beyond_the_forward_pass_is_a_tenth_for_the_last_stage(files: object) -> None:
    """Growth of the peak with the batch, less that of a step of the head alone, which saves nothing."""

    def growth(choice: str) -> float:
        small, large = (measured(files("resnet18", choice), batch)["stepped"] for batch in (1, 64))  # type: ignore[operator]
        return large - small

    forward = growth("head")
    assert growth("last stage") - forward <= (growth("full") - forward) / 10
