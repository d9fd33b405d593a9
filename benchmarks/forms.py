"""Which form of an adapter costs less in a training step: thin branches, or an updated weight?

Measures single layers, forward and all gradients, in both forms, with the onnxruntime of another environment on one
thread; fits `lorac_exporters.form_costs.SECONDS` to two thirds of them and says on the rest how often the estimate
finds the cheaper form and what it loses. Layers of the networks that the project measures, and random ones.
Not counted: opening sessions, the first runs. Processor time, so that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from benchmarks.interpreters import ROOT, RUNTIME, parsed_interpreters, python
from lorac_deploy.bench.environment import environment
from lorac_exporters.branches import FORMS, Factors, Form, add_adapters, form_of
from lorac_exporters.form_costs import Work, branch_work, weight_work
from lorac_exporters.gradients.geometry import Geometry
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.tape import Attributes, Tape
from lorac_exporters.graph_tools import to_bytes
from lorac_runtime.delta import adapter_shapes
from lorac_runtime.manifest import Adapter

Floats = npt.NDArray[np.float64]
CHANNELS = (8, 16, 32, 64, 128, 256, 512)
SIZES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56)
LARGEST = 1.5e8  # multiply-adds of a random layer's forward pass: many layers rather than large ones


@dataclasses.dataclass(frozen=True)
class Layer:
    """An adapted convolution: square, padded by half its kernel."""

    c_in: int
    c_out: int
    size: int
    kernel: int
    stride: int
    groups: int
    rank: int
    layout: str
    batch: int

    @property
    def out_size(self) -> int:
        """Positions along an axis of the output."""
        return (self.size - 1) // self.stride + 1

    @property
    def multiplications(self) -> float:
        """Of the forward pass."""
        weights = self.c_out * self.c_in // self.groups * self.kernel**2
        return float(self.batch * self.out_size**2 * weights)

    @property
    def adapter(self) -> Adapter:
        """As a manifest describes it."""
        shape = (self.c_out, self.c_in // self.groups, self.kernel, self.kernel)
        return Adapter("layer", "weight", "a", "b", shape, self.groups, self.rank, self.rank, 1.0, self.layout)

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the graph of `step` takes."""
        a, b = adapter_shapes(self.adapter.weight_shape, self.rank)
        x = (self.batch, self.c_in, self.size, self.size)
        return {"x": x, "a": a, "b": b, "slope": (self.batch, self.c_out, self.out_size, self.out_size)}


def convolution(layer: Layer) -> ir.Node:
    """The plain layer, in a graph of its own with input x (batch, c_in, size, size)."""
    shape = ir.Shape(["batch", layer.c_in, layer.size, layer.size])
    x = ir.Value(name="x", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    tape = Tape(ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="layer"))
    numbers = np.random.default_rng(1).standard_normal(layer.adapter.weight_shape, dtype=np.float32)
    weight, bias = tape.constant(numbers, "weight"), tape.constant(np.zeros(layer.c_out, np.float32), "bias")
    half, both = layer.kernel // 2, [layer.stride] * 2
    size = ("batch", layer.c_out, layer.out_size, layer.out_size)
    how: Attributes = {"pads": [half] * 4, "strides": both, "group": layer.groups}
    y = tape.op("Conv", x, weight, bias, shape=size, attributes=how)
    tape.graph.outputs.append(y)
    node = y.producer()
    assert node is not None
    return node


def step(layer: Layer, form: Form) -> ir.Model:
    """Output, and gradients of input and adapter for a given ``slope`` of the output."""
    graph = convolution(layer).graph
    assert isinstance(graph, ir.Graph)
    tape, given = Tape(graph), layer.inputs()
    a, b = (tape.input(name, given[name]) for name in ("a", "b"))
    add_adapters(tape, {"weight": layer.adapter}, {"weight": Factors(a, b, 0.5)}, form_of(form))
    slope = tape.input("slope", ("batch", *given["slope"][1:]))
    y = graph.outputs[0]
    graph.outputs.extend(differentiate(tape, y, [graph.inputs[0], a, b], seed=slope))
    graph.sort()
    return ir.Model(graph, ir_version=9)


def network_layers() -> list[Layer]:
    """Those of ResNet-18 and ResNet-20 at 32 x 32 and the pointwise ones of MobileNetV2, at ranks 4 and 4 k."""
    levels = [(64, 32), (128, 16), (256, 8), (512, 4), (16, 32), (32, 16), (64, 8)]
    shapes = [(c, c, size, 3, 1) for c, size in levels]
    shapes += [(c, 2 * c, size, k, 2) for c, size in levels if c < 512 for k in (1, 3)]
    wide = [(16, 96, 16), (24, 144, 8), (32, 192, 4), (64, 384, 2), (96, 576, 2), (160, 960, 1)]
    shapes += [(*pair, size, 1, 1) for c, d, size in wide for pair in ((c, d), (d, c))]
    return [
        Layer(c_in, c_out, size, k, stride, 1, rank, layout, 32)
        for c_in, c_out, size, k, stride in shapes
        for rank in sorted({4, 4 * k})
        for layout in (("spatial", "paper") if k > 1 else ("spatial",))
    ]


def random_layer(rng: random.Random) -> Layer:
    """One of the grid, with every rank up to the weight's own and every kind of groups."""
    while True:
        kernel, stride, c_in = rng.choice((1, 3, 3, 5)), rng.choice((1, 1, 1, 2)), rng.choice(CHANNELS)
        groups = rng.choice((1, 1, 1, 2, 4, 8, c_in))
        c_out = c_in if groups == c_in else rng.choice([c for c in CHANNELS if c_in / 4 <= c <= c_in * 4])
        most = min(c_out * kernel, c_in // groups * kernel)
        rank = rng.choice((1, 2, 4, 4, 4 * kernel, 8, 8 * kernel, 16, 64, most))
        size, batch, layout = rng.choice(SIZES), rng.choice((1, 8, 32, 32)), rng.choice(("spatial", "paper"))
        layer = Layer(c_in, c_out, size, kernel, stride, groups, rank, layout, batch)
        if rank <= most and c_out % groups == 0 and layer.multiplications <= LARGEST:
            return layer


def measured(layers: Sequence[Layer], interpreter: Path, folder: Path, seconds: float) -> Iterator[Floats]:
    """For each layer the least processor time of a step in each form, seconds, (2,)."""
    requests = []
    for index, layer in enumerate(layers):
        files = [folder / f"{index}.{form}.onnx" for form in FORMS]
        for form, file in zip(FORMS, files, strict=True):
            file.write_bytes(to_bytes(step(layer, form)))
        requests.append({"files": [str(f) for f in files], "inputs": layer.inputs(), "seconds": seconds})
    file = folder / "requests.json"
    file.write_text(json.dumps(requests))
    command, alone = [str(interpreter), "-m", "benchmarks.forms_worker"], {**os.environ, "OMP_NUM_THREADS": "1"}
    with file.open() as given, subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, cwd=ROOT, env=alone) as p:
        assert p.stdout is not None
        yield from (np.array(json.loads(line)) for line in p.stdout)
    if p.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {p.returncode}; its message is above")


def works(layer: Layer) -> Floats:
    """Amounts of work, in the order of `Work`'s fields: (2, amounts)."""
    adapter, g = layer.adapter, Geometry.of(convolution(layer))
    return np.array([dataclasses.astuple(count(adapter, g, layer.batch)) for count in (branch_work, weight_work)])


def fit(amounts: Floats, seconds: Floats, sweeps: int = 20_000) -> Work:
    """Non-negative times that explain (layers, 2, amounts) best, errors counted relative to the time.

    Coordinate descent: each time in turn takes its best value, not below zero.
    """
    rows = (amounts / seconds[..., None]).reshape(-1, amounts.shape[-1])
    unit = np.maximum(np.linalg.norm(rows, axis=0), 1e-30)
    gram, aim = (rows / unit).T @ (rows / unit), (rows / unit).sum(axis=0)
    found = np.zeros(len(unit))
    for _ in range(sweeps):
        for k in range(len(found)):
            found[k] = max(0.0, found[k] + aim[k] - gram[k] @ found)
    return Work(*(found / unit).tolist())


def judged(amounts: Floats, seconds: Floats, each: Work) -> dict[str, float]:
    """How well the estimate chooses, and for comparison one form always."""
    estimate = amounts @ np.array(dataclasses.astuple(each))
    best = seconds.min(axis=1)

    def loss(chosen: Floats) -> Floats:
        return np.asarray(chosen / best - 1)

    chosen = np.where(estimate[:, 0] <= estimate[:, 1], seconds[:, 0], seconds[:, 1])
    return {
        "layers": len(best),
        "right": float(np.mean(chosen == best)),
        "mean_loss": float(loss(chosen).mean()),
        "loss_95": float(np.quantile(loss(chosen), 0.95)),
        "largest_loss": float(loss(chosen).max()),
        "loss_of_all_time": float(chosen.sum() / best.sum() - 1),
        **{f"mean_loss_always_{form}": float(loss(seconds[:, k]).mean()) for k, form in enumerate(FORMS)},
    }


def evaluate(layers: Sequence[Layer], seconds: Floats) -> dict[str, object]:
    """Fit to two thirds, judge on the rest; the recorded times come from all."""
    amounts = np.array([works(layer) for layer in layers])
    order = np.random.default_rng(0).permutation(len(layers))
    held, used = order[: len(layers) // 3], order[len(layers) // 3 :]
    each = fit(amounts[used], seconds[used])
    return {
        "held_out": judged(amounts[held], seconds[held], each),
        "fitted": judged(amounts[used], seconds[used], each),
        "seconds_each": dataclasses.asdict(fit(amounts, seconds)),
    }


def main(argv: list[str]) -> int:
    """Measure, fit, print, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks forms", description=__doc__)
    p.add_argument("--random", type=int, default=260, help="number of random layers; default: %(default)s")
    p.add_argument("--seed", type=int, default=7, help="of the random layers; default: %(default)s")
    p.add_argument("--seconds", type=float, default=0.12, help="for each layer; default: %(default)s")
    p.add_argument("--python", action="append", default=[], help="NAME=PATH, an interpreter to use for an environment")
    p.add_argument("--out", type=Path, help="JSON file")
    args = p.parse_args(argv)
    rng, interpreter = random.Random(args.seed), python(RUNTIME, parsed_interpreters(args.python))
    layers = [*network_layers(), *(random_layer(rng) for _ in range(args.random))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layer, seconds in zip(layers, measured(layers, interpreter, Path(folder), args.seconds), strict=True):
            rows.append(seconds)
            print(layer, *(f"{form} {1e3 * s:.3f} ms" for form, s in zip(FORMS, seconds, strict=True)), flush=True)
    report = evaluate(layers, np.array(rows))
    print(json.dumps(report, indent=1))
    if args.out:
        measurements = [
            {**dataclasses.asdict(layer), **dict(zip(FORMS, row.tolist(), strict=True))}
            for layer, row in zip(layers, rows, strict=True)
        ]
        args.out.write_text(
            json.dumps({"environment": environment(), **report, "layers": measurements}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
