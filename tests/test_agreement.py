"""One network, three routes: PyTorch, the artifact's eval graph, and the fused ONNX file. One answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from networks import NAMES, SPEC, touch_adapters, trained
from shared_export import export_graph

from lorac_deploy.lora import adapter_tensors, attach
from lorac_exporters.artifact import ArtifactConfig, adapter_metadata, write_artifact
from lorac_exporters.plan import LoraConfig
from lorac_exporters.verify import random_inputs, run_onnx, verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import AdapterFile, check_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.delta import LAYOUTS, Layout
from lorac_runtime.engines import open_engine
from lorac_runtime.patch import batchnorm_tensors, fuse

# Both layouts of a network with dense and of one with depthwise convolutions; one with BN that cannot be folded.
MODELS: list[tuple[str, tuple[Layout, ...]]] = [
    ("resnet18", LAYOUTS),
    ("mobilenet_v2", LAYOUTS),
    ("densenet121", ("paper",)),
]
MORE: list[tuple[str, tuple[Layout, ...]]] = [
    ("resnet34", LAYOUTS),
    ("resnet50", LAYOUTS),
    ("densenet121", ("spatial",)),
]


def largest(values: np.ndarray) -> float:
    return max(1.0, float(np.abs(values).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layouts"), [*MODELS, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]
)
def test_pytorch_the_eval_graph_and_the_fused_file_agree(
    name: str, layouts: tuple[Layout, ...], tmp_path: Path
) -> None:
    net = trained(name)
    graph = export_graph(net, SPEC.shape)
    images = random_inputs(SPEC, 4, seed=0)
    with torch.no_grad():
        plain = net(torch.from_numpy(images)).numpy()
    unadapted = export(graph, tmp_path / "head", ArtifactConfig(method="head", engine="both"))
    # eval graphs take weights as inputs, and then other kernels run than in base.onnx: compare like with like
    base = eval_logits(unadapted, images, None)
    assert np.abs(base - run_onnx(unadapted / mf.BASE, images)).max() <= 1e-4 * largest(plain)
    bound = 1e-4 * largest(plain)
    for layout in layouts:
        folder = export(graph, tmp_path / layout, ArtifactConfig(lora=LoraConfig(layout=layout), engine="both"))
        assert np.abs(eval_logits(folder, images, None) - base).max() <= 1e-6 * largest(plain)
        untouched = eval_logits(folder, images, None, engine="onnxruntime")  # its sums are fused in another order
        assert np.abs(untouched - eval_logits(unadapted, images, None, engine="onnxruntime")).max() <= bound
        check_one(net, folder, layout, images, plain, tmp_path / f"{layout}-fused.onnx")


def export(graph: ir.Model, folder: Path, config: ArtifactConfig) -> Path:
    write_artifact(graph, folder, name="net", spec=SPEC, class_names=NAMES, config=config)
    return folder


def check_one(
    net: torch.nn.Module, folder: Path, layout: Layout, images: np.ndarray, plain: np.ndarray, target: Path
) -> None:
    from copy import deepcopy

    adapted = deepcopy(net)
    attach(adapted, LoraConfig(layout=layout))
    with torch.no_grad():
        untouched = adapted(torch.from_numpy(images)).numpy()
        touch_adapters(adapted)
        expected = adapted(torch.from_numpy(images)).numpy()
    assert np.abs(untouched - plain).max() <= 1e-6 * largest(plain)
    assert np.abs(expected - plain).max() > 1e-2 * largest(plain)
    manifest = mf.load(folder)
    tensors = {k: v.numpy() for k, v in adapter_tensors(adapted).items()}
    file = AdapterFile(tensors, adapter_metadata(manifest) | {"coordinates": "unfolded", "base_sha256": ""})
    check_adapter(manifest, file)
    state = to_manifest_coordinates(manifest, batchnorm_tensors(folder, manifest), file)
    fuse(folder, target, state)
    save_adapter(target.with_suffix(".safetensors"), state, adapter_metadata(manifest))
    bound = 1e-4 * largest(expected)
    for engine in ("onnxruntime", "onnxruntime-training"):
        assert np.abs(eval_logits(folder, images, state, engine=engine) - expected).max() <= bound
    assert np.abs(run_onnx(target, images) - expected).max() <= bound
    report = verify(folder / mf.BASE, target, adapter=target.with_suffix(".safetensors"))
    assert report.ok
    assert {check.verdict for check in report.checks} == {"pass"}


def eval_logits(
    folder: Path, images: np.ndarray, state: dict[str, np.ndarray] | None, *, engine: str = "onnxruntime-training"
) -> np.ndarray:
    opened = open_engine(folder, mf.load(folder), engine=engine)
    if state is not None:
        opened.load_state(state)
    _, logits = opened.eval_step(images, np.zeros(len(images), np.int64))
    return logits
