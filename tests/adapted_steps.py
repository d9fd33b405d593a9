"""Small networks with adapters of any kind, stepped in PyTorch and by the exported graphs and engines."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from exporter_graphs import randomize
from networks import touch_adapters
from shared_export import export_graph
from step_runs import Arrays, Batch, Case, Outcome, changes, in_graph, in_pytorch, session, starting, step_config
from torch import nn

from lorac_deploy.adapter_files import save_module_adapter
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import select_trainable
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.engine_files import EngineChoice
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.training_step import train_step
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.manifest import InputSpec, Manifest, TrainingDefaults, load

SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.0)
TOLERANCE = 1e-4  # of how far a tensor moves
MODEL = "net"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A network in evaluation mode, the shape of what it takes, and its number of classes."""

    net: nn.Module
    shape: tuple[int, ...]
    classes: int

    @functools.cached_property
    def graph(self) -> ir.Model:
        """Its raw export; not to be changed."""
        return export_graph(self.net, self.shape)

    @property
    def spec(self) -> InputSpec:
        """How images are fed."""
        channels = self.shape[0]
        return InputSpec("input", self.shape, 1 / 255, (0.5,) * channels, (0.25,) * channels)  # type: ignore[arg-type]


def sample(net: nn.Module, shape: tuple[int, ...], classes: int) -> Sample:
    """With BN statistics and affine numbers away from their start."""
    return Sample(randomize(net), shape, classes)


def prepared(given: Sample, case: Case) -> nn.Module:
    """The PyTorch side: every trainable tensor away from its start."""
    net = fold_batchnorm(given.net) if case.policy == "frozen" else copy.deepcopy(given.net)
    select_trainable(net, case.method, case.lora, bn_policy=case.policy)
    touch_adapters(net, size=0.05)
    return net.train()


def graphs_of(given: Sample | ir.Model, case: Case, *, spec: InputSpec, classes: int) -> Graphs:
    """The exporter's side."""
    model = given.graph if isinstance(given, Sample) else given
    settings = {"spec": spec, "classes": classes, "new_head": False, "method": case.method, "lora": case.lora}
    return build_graphs(model, policy=case.policy, **settings)  # type: ignore[arg-type]


def batches(given: Sample, *, steps: int = 3, lr: float = 0.1) -> list[Batch]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((steps, 6, *given.shape)).astype(np.float32)
    return [(x, rng.integers(0, given.classes, 6), lr) for x in images]


def check_steps(given: Sample, case: Case, *, graphs: Graphs | None = None) -> Graphs:
    """Losses, the gradient of every tensor, and every tensor after three steps are PyTorch's, in float64.

    Returns the exporter's graphs; ``graphs``: those of an ONNX file of the same network, instead of its own export.
    """
    net = prepared(given, case)
    graphs = graphs or graphs_of(given, case, spec=given.spec, classes=given.classes)
    start = starting(net, case)
    assert {t.name: t.shape for t in graphs.plan.trainables} == {
        name: tuple(p.shape) for name, p in net.named_parameters() if p.requires_grad
    }
    step = session(train_step(graphs, start, step_config(case)))
    for fed in (batches(given, steps=1, lr=1.0), batches(given)):
        compare(in_graph(step, start, fed), in_pytorch(net, case, fed, torch.float64), start)
    return graphs


def compare(found: Outcome, exact: Outcome, start: Arrays) -> None:
    np.testing.assert_allclose(found.losses, exact.losses, rtol=1e-5)
    trained = {name for name in exact.tensors if name in start}
    apart = changes(found, exact, start)
    assert apart.keys() == trained
    assert max(apart.values()) <= TOLERANCE, max(apart.items(), key=lambda item: item[1])
    assert all(np.linalg.norm(exact.tensors[name] - start[name]) > 1e-9 for name in trained)


def artifact(
    given: Sample, case: Case, folder: Path, *, engine: EngineChoice = "auto", adapter: Path | None = None
) -> Manifest:
    """A training artifact in ``folder``/artifact."""
    config = ArtifactConfig(
        lora=case.lora, method=case.method, bn_policy=case.policy, engine=engine, training=case.training, form=case.form
    )
    names = tuple(f"c{k}" for k in range(given.classes))
    out = folder / "artifact"
    write_artifact(given.graph, out, name=MODEL, spec=given.spec, class_names=names, config=config, adapter=adapter)
    return load(out)


def device(given: Sample, case: Case, folder: Path, engine: EngineChoice) -> Engine:
    """An engine that starts from an adapter that was saved in PyTorch."""
    net = prepared(given, case)
    save_module_adapter(folder / "adapter.safetensors", net, model=MODEL)
    manifest = artifact(given, case, folder, engine=engine, adapter=folder / "adapter.safetensors")
    return open_engine(folder / "artifact", manifest, threads=1)


@functools.cache
def fan(*, norm: bool = False, width: int = 96) -> Sample:
    """256-96-96-3, as of the cooling-fan data; perhaps with BN behind the hidden layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for features in (256, width):
        layers += [nn.Linear(features, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh()]
    return sample(nn.Sequential(*layers, nn.Linear(width, 3)), (1, 16, 16), 3)


@functools.cache
def vgg() -> Sample:
    """Convolutions, two hidden fully connected layers, one of them without a bias, and a head."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 12, 3, stride=2), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 20, bias=False), nn.Tanh(), nn.Linear(20, 4)),
    )
    return sample(net, (3, 10, 10), 4)
