"""Graphs that clip, pack and update, ready to run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime

from lorac_exporters.gradients.optimizers import append_updates, groups, pack, state_names
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import to_bytes
from lorac_runtime.manifest import TrainingDefaults

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
