"""Updates written as ONNX nodes against torch.optim with the same numbers, and packing and clipping around them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from lorac_exporters.gradients.optimizers import (
    OPTIMIZERS,
    append_updates,
    clip_by_norm,
    groups,
    pack,
    state_names,
    unpack,
)
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import to_bytes
from lorac_runtime import manifest as mf
from lorac_runtime.manifest import TrainingDefaults
from lorac_runtime.manifest_checks import training_problems

Arrays = dict[str, np.ndarray]
SHAPES = {"conv": (4, 3, 3, 3), "scale": (), "fc": (40, 50), "bias": (5,)}
LARGE = 1000  # makes a group of its own of "fc"
CLOSE = 1e-6  # of the largest change of a tensor
LR = float(np.float32(0.02))


def value(name: str, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def blank(inputs: Sequence[ir.Value]) -> Tape:
    return Tape(ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="g"))


def compiled(tape: Tape, outputs: Mapping[str, ir.Value]) -> onnxruntime.InferenceSession:
    """A session whose outputs have the names given."""
    for name, output in outputs.items():
        output.name = name
    tape.graph.outputs.extend(outputs.values())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    content = to_bytes(ir.Model(tape.graph, ir_version=9))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def results(session: onnxruntime.InferenceSession, inputs: Arrays) -> Arrays:
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


class Ours:
    """The optimizer as a graph: gradients by name in, tensors and state carried from step to step."""

    def __init__(self, settings: TrainingDefaults, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
        members = groups(shapes, large=LARGE)
        parameters = {n: value(n, s) for n, s in shapes.items()}
        gradients = {n: value(f"{n}.grad", s) for n, s in shapes.items()}
        lr, step = value("lr", ()), value("step", (), ir.DataType.INT64)
        tape = blank([*parameters.values(), *gradients.values(), lr, step])
        packed = [pack(tape, [gradients[n] for n in group]) for group in members]
        lengths = [vector.shape or () for vector in packed]
        state = {f"{n}.{k}": value(f"{n}.{k}", s) for n in state_names(settings) for k, s in enumerate(lengths)}
        tape.graph.inputs.extend(state.values())
        done = append_updates(tape, members, parameters, packed, state, lr=lr, step=step, settings=settings)
        carried = {**done.parameters, **done.state, "step": done.step}
        outputs = {**{f"{n}.next": v for n, v in carried.items()}, "gradient_norm": done.gradient_norm}
        self.session, self.members, self.graph = compiled(tape, outputs), members, tape.graph
        self.values: Arrays = {n: np.zeros([int(d) for d in v.shape or ()], np.float32) for n, v in state.items()}
        self.values["step"] = np.zeros((), np.int64)

    def step(self, gradients: Arrays, lr: float = LR) -> float:
        """One step; returns the norm of the gradient."""
        fed = {f"{n}.grad": g for n, g in gradients.items()}
        found = results(self.session, {**self.values, **fed, "lr": np.array(lr, np.float32)})
        norm = found.pop("gradient_norm")
        self.values = {name.removesuffix(".next"): array for name, array in found.items()}
        return float(norm)

    def state(self, name: str) -> Arrays:
        """A kind of state by the tensors' names."""
        found = {}
        for k, group in enumerate(self.members):
            ends = np.cumsum([math.prod(SHAPES[n]) for n in group])
            for n, part in zip(group, np.split(self.values[f"{name}.{k}"], ends[:-1]), strict=True):
                found[n] = part.reshape(SHAPES[n])
        return found


class Torchs:
    """torch.optim with the same settings, float32, one tensor at a time."""

    def __init__(self, settings: TrainingDefaults, start: Arrays) -> None:
        self.tensors = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in start.items()}
        self.clip = settings.clip_norm
        self.optimizer = optimizer_of(settings, list(self.tensors.values()))

    def step(self, gradients: Arrays, lr: float = LR) -> float:
        for name, tensor in self.tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        norm = torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), self.clip or math.inf, foreach=False)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return float(norm)

    def state(self, name: str) -> Arrays:
        key = "momentum_buffer" if name == "momentum" else name
        return {n: self.optimizer.state[t][key].numpy() for n, t in self.tensors.items()}


def optimizer_of(settings: TrainingDefaults, tensors: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    s = settings
    common = {"lr": LR, "weight_decay": s.weight_decay, "foreach": False}
    if s.optimizer == "adamw":
        return torch.optim.AdamW(tensors, betas=s.betas, eps=s.eps, amsgrad=s.amsgrad, **common)
    return torch.optim.SGD(tensors, momentum=s.momentum, dampening=s.dampening, nesterov=s.nesterov, **common)


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    return {n: np.asarray(scale * normal(*s, seed=seed + i), np.float32) for i, (n, s) in enumerate(SHAPES.items())}


def assert_same_steps(settings: TrainingDefaults, steps: int, *, size: float = 1.0, slack: int = 1) -> None:
    """Tensors and state after every step; ``size`` is that of the gradients, which alternates by tens.

    ``slack`` widens the tolerance, for settings so extreme that roundings are not averaged out.
    """
    assert training_problems(settings) == []
    ours, start = Ours(settings), arrays(100, LR)  # as small as the updates: their errors are not lost in rounding
    ours.values.update(start)
    torchs = Torchs(settings, start)
    for step in range(steps):
        gradients, before = arrays(step, size * 10.0 ** (step % 2)), dict(ours.values)
        assert ours.step(gradients) == pytest.approx(torchs.step(gradients), rel=CLOSE)
        for name, tensor in torchs.tensors.items():
            assert_near(
                ours.values[name],
                tensor.detach().numpy(),
                tensor.detach().numpy() - before[name],
                slack * min(steps, 3),
            )
        for kind in state_names(settings):
            expected = torchs.state(kind)
            for name, found in ours.state(kind).items():
                assert_near(found, expected[name], expected[name], slack * min(steps, 3))
    assert ours.values["step"] == steps


def assert_near(found: np.ndarray, expected: np.ndarray, scale: np.ndarray, times: int) -> None:
    """Within `CLOSE` of ``scale`` and one rounding of the values themselves; their roundings add up over steps."""
    assert found.shape == expected.shape
    allowed = CLOSE * np.abs(scale).max() + float(np.spacing(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed * times)


def sgd_settings() -> Iterator[TrainingDefaults]:
    for decay, clip in itertools.product((0.0, 0.1), (0.0, 1.0)):
        base = TrainingDefaults(optimizer="sgd", weight_decay=decay, clip_norm=clip)
        yield base
        for momentum, dampening in itertools.product((0.5, 0.9), (0.0, 0.3)):
            yield dataclasses.replace(base, momentum=momentum, dampening=dampening)
        yield dataclasses.replace(base, momentum=0.9, nesterov=True)


def adamw_settings() -> Iterator[TrainingDefaults]:
    betas = ((0.9, 0.999), (0.3, 0.95), (0.0, 0.0), (0.5, 0.5))
    for decay, clip, amsgrad, pair in itertools.product((0.0, 0.1), (0.0, 1.0), (False, True), betas):
        yield TrainingDefaults(weight_decay=decay, clip_norm=clip, amsgrad=amsgrad, betas=pair, eps=1e-8)
    yield TrainingDefaults(eps=0.1)
    yield TrainingDefaults(eps=0.0)


def label(s: TrainingDefaults) -> str:
    default = TrainingDefaults()
    return " ".join(
        f"{f.name}={getattr(s, f.name)}"
        for f in dataclasses.fields(s)
        if getattr(s, f.name) != getattr(default, f.name)
    )


ALL = [*sgd_settings(), *adamw_settings()]


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_one_step_is_that_of_torch_optim(settings: TrainingDefaults) -> None:
    assert_same_steps(settings, 1)


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_ten_steps_are_those_of_torch_optim(settings: TrainingDefaults) -> None:
    assert_same_steps(settings, 10)


@given(
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-9, 1),
    decay=st.floats(0, 1),
    amsgrad=st.booleans(),
    exponent=st.integers(-4, 3),
)
@trials(max_examples=25, deadline=None, derandomize=True)
def test_adamw_agrees_for_any_settings_and_sizes_of_gradients(
    beta1: float, beta2: float, eps: float, decay: float, amsgrad: bool, exponent: int
) -> None:
    s = TrainingDefaults(betas=(beta1, beta2), eps=eps, weight_decay=decay, amsgrad=amsgrad, clip_norm=0.0)
    assert_same_steps(s, 3, size=10.0**exponent, slack=4)


@given(momentum=st.floats(0.01, 1), dampening=st.floats(-1, 1), decay=st.floats(0, 1), clip=st.floats(0.01, 100))
@trials(max_examples=25, deadline=None, derandomize=True)
def test_sgd_agrees_for_any_settings(momentum: float, dampening: float, decay: float, clip: float) -> None:
    s = TrainingDefaults(optimizer="sgd", momentum=momentum, dampening=dampening, weight_decay=decay, clip_norm=clip)
    assert_same_steps(s, 3)


@pytest.mark.parametrize("name", ["weight_decay", "clip_norm", "betas", "eps", "amsgrad"])
def test_every_setting_of_adamw_changes_the_second_step(name: str) -> None:
    other = {"weight_decay": 0.1, "clip_norm": 0.0, "betas": (0.8, 0.99), "eps": 0.1, "amsgrad": True}[name]
    assert_changes(TrainingDefaults(betas=(0.9, 0.9)), name, other)


@pytest.mark.parametrize("name", ["weight_decay", "clip_norm", "momentum", "dampening", "nesterov"])
def test_every_setting_of_sgd_changes_the_second_step(name: str) -> None:
    other = {"weight_decay": 0.1, "clip_norm": 0.0, "momentum": 0.8, "dampening": 0.5, "nesterov": True}[name]
    assert_changes(TrainingDefaults(optimizer="sgd", momentum=0.9), name, other)


def assert_changes(settings: TrainingDefaults, name: str, other: object) -> None:
    results = []
    for s in (settings, dataclasses.replace(settings, **{name: other})):  # type: ignore[arg-type]
        ours = Ours(s)
        ours.values.update(arrays(100))
        for size in (1.0, 0.003):  # a gradient that shrinks: amsgrad remembers the larger one
            ours.step(arrays(3, size))
        results.append(ours.values["fc"])
    assert np.abs(results[0] - results[1]).max() > 1e-5


def test_the_first_gradient_enters_the_momentum_undamped_and_the_second_damped() -> None:
    settings = TrainingDefaults(optimizer="sgd", momentum=0.5, dampening=0.75, clip_norm=0.0)
    ours = Ours(settings)
    ours.values.update(arrays(100))
    ours.step(arrays(0))
    np.testing.assert_array_equal(ours.values["momentum.1"], arrays(0)["fc"].ravel())
    ours.step(arrays(50))
    expected = 0.5 * arrays(0)["fc"] + 0.25 * arrays(50)["fc"]
    np.testing.assert_allclose(ours.values["momentum.1"], expected.ravel(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("taken", [0, 1, 9, 99, 999, 9999, 1_000_000])
def test_the_bias_corrections_hold_after_any_number_of_steps(taken: int) -> None:
    settings = TrainingDefaults(clip_norm=0.0, eps=1e-3)
    ours, start, gradients = Ours(settings), arrays(100, LR), arrays(0)
    torchs = Torchs(settings, start)
    torchs.step(gradients)
    for tensor in torchs.tensors.values():
        torchs.optimizer.state[tensor]["step"].fill_(taken)
    moments = {kind: torchs.state(kind) for kind in ("exp_avg", "exp_avg_sq")}
    middle = {n: t.detach().numpy().copy() for n, t in torchs.tensors.items()}
    ours.values.update(middle)
    for kind, k in itertools.product(moments, range(2)):
        ours.values[f"{kind}.{k}"] = np.concatenate([moments[kind][n].ravel() for n in ours.members[k]])
    ours.values["step"] = np.array(taken)
    ours.step(gradients)
    torchs.step(gradients)
    for name, tensor in torchs.tensors.items():
        expected = tensor.detach().numpy()
        assert_near(ours.values[name], expected, expected - middle[name], 1)
    assert ours.values["step"] == taken + 1


def test_the_learning_rate_is_that_of_each_step() -> None:
    settings = TrainingDefaults(weight_decay=0.1)
    ours, start = Ours(settings), arrays(100)
    ours.values.update(start)
    ours.step(arrays(0), lr=0.0)
    for name, array in start.items():
        np.testing.assert_array_equal(ours.values[name], array)
    assert np.abs(ours.state("exp_avg")["fc"]).max() > 0


def test_an_optimizer_for_every_name_that_settings_may_have() -> None:
    assert set(OPTIMIZERS) == set(mf.OPTIMIZERS)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (TrainingDefaults(), ("exp_avg", "exp_avg_sq")),
        (TrainingDefaults(amsgrad=True), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        (TrainingDefaults(optimizer="sgd"), ()),
        (TrainingDefaults(optimizer="sgd", momentum=0.9), ("momentum",)),
    ],
)
def test_state_is_named_as_torch_names_it(settings: TrainingDefaults, names: tuple[str, ...]) -> None:
    assert state_names(settings) == names
    assert set(Ours(settings).values) - {"step"} == {f"{name}.{k}" for name in names for k in (0, 1)}


# Clipping


def clipped(gradients: list[np.ndarray], max_norm: float) -> tuple[list[np.ndarray], float]:
    values = [value(f"g{i}", g.shape) for i, g in enumerate(gradients)]
    tape = blank(values)
    scaled, norm = clip_by_norm(tape, values, max_norm)
    outputs = [tape.op("Identity", v, like=v) for v in scaled]  # without a limit they are the inputs themselves
    session = compiled(tape, {**{f"c{i}": v for i, v in enumerate(outputs)}, "norm": norm})
    found = results(session, {f"g{i}": g for i, g in enumerate(gradients)})
    return [found[f"c{i}"] for i in range(len(gradients))], float(found["norm"])


def torch_clipped(gradients: list[np.ndarray], max_norm: float) -> tuple[list[np.ndarray], float]:
    tensors = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm, foreach=False)
    return [t.grad.numpy() for t in tensors], float(norm)  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 0.0])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 40.0])
def test_clipping_is_that_of_clip_grad_norm(count: int, size: float, max_norm: float) -> None:
    gradients = [size * normal(20, 30 + i, seed=i) for i in range(count)]
    found, norm = clipped(gradients, max_norm)
    expected, torch_norm = torch_clipped(gradients, max_norm)
    assert norm == pytest.approx(torch_norm, rel=CLOSE)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=CLOSE)
    assert (np.abs(found[0] - gradients[0]).max() > 0) == (norm + 1e-6 > max_norm)


def test_without_a_limit_gradients_are_unchanged_and_their_norm_is_known() -> None:
    gradients = [100 * normal(5, seed=1), 100 * normal(3, 4, seed=2)]
    found, norm = clipped(gradients, 0.0)
    for ours, given_ in zip(found, gradients, strict=True):
        np.testing.assert_array_equal(ours, given_)
    assert norm == pytest.approx(math.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients)), rel=CLOSE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_no_number_shows_in_the_norm(bad: float) -> None:
    gradients = [normal(5), np.array([1, bad], np.float32)]
    found, norm = clipped(gradients, 1.0)
    expected, torch_norm = torch_clipped(gradients, 1.0)
    np.testing.assert_equal(norm, torch_norm)
    np.testing.assert_equal(found[1][1], expected[1][1])


# Packing


@given(shapes=st.lists(st.lists(st.integers(1, 4), max_size=4).map(tuple), min_size=1, max_size=5))
@trials(max_examples=25, deadline=None, derandomize=True)
def test_packing_joins_in_order_and_unpacking_undoes_it(shapes: list[tuple[int, ...]]) -> None:
    values = [value(f"t{i}", s) for i, s in enumerate(shapes)]
    tape = blank(values)
    vector = pack(tape, values)
    assert vector.shape == ir.Shape([sum(math.prod(s) for s in shapes)])
    parts = unpack(tape, vector, values)
    assert [p.shape for p in parts] == [v.shape for v in values]
    wanted = {**{f"p{i}": part for i, part in enumerate(parts)}, "vector": vector}
    session = compiled(tape, {n: tape.op("Identity", v, like=v) for n, v in wanted.items()})
    inputs = {f"t{i}": normal(*s, seed=i) for i, s in enumerate(shapes)}
    found = results(session, {n: np.asarray(a, np.float32) for n, a in inputs.items()})
    np.testing.assert_array_equal(found["vector"], np.concatenate([np.ravel(a) for a in inputs.values()]))
    for i in range(len(shapes)):
        np.testing.assert_array_equal(found[f"p{i}"], inputs[f"t{i}"])


def test_small_tensors_share_the_first_group_and_large_ones_are_alone() -> None:
    shapes = {"big": (1 << 18,), "a": (3, 4), "huge": (1 << 10, 1 << 10), "b": ((1 << 18) - 1,)}
    assert groups(shapes) == [["a", "b"], ["big"], ["huge"]]
    assert groups({"big": (1 << 18,)}) == [["big"]]
    assert groups(shapes, large=1) == [["big"], ["a"], ["huge"], ["b"]]
    assert groups(shapes, large=1 << 30) == [list(shapes)]


def passes(settings: TrainingDefaults) -> int:
    """Nodes that compute a vector; views, joining and splitting do not count."""
    shapes: dict[str, tuple[int, ...]] = {"a": (8,), "b": (9,)}
    nodes = Ours(settings, shapes).graph
    done = [n for n in nodes if n.op_type not in ("Reshape", "Concat", "Split")]
    return sum(n.outputs[0].shape == ir.Shape([17]) for n in done)


def test_a_step_passes_over_a_vector_few_times() -> None:
    plain = TrainingDefaults(optimizer="sgd", clip_norm=0.0)
    assert passes(plain) == 2
    assert passes(dataclasses.replace(plain, momentum=0.9)) == 4
    assert passes(TrainingDefaults()) == 13
