"""Kernel-wise LoRA (the ablation of LoRA-C): plans, steps against PyTorch autograd, engines, fused files, counts."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from adapted_steps import SGD, Sample, artifact, batches, check_steps, compare, device, sample
from exporter_graphs import image, outputs
from networks import touch_adapters
from step_runs import Case, Outcome, in_pytorch
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, fuse, select_trainable
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import Layer, Network
from lorac_runtime.delta import LAYOUTS, adapter_shapes, delta
from lorac_runtime.errors import ConversionError
from lorac_runtime.fused import fused_channels
from lorac_runtime.fused_files import write_fused
from lorac_runtime.manifest import Adapter
from lorac_runtime.manifest_checks import contradictions


@functools.cache
def small() -> Sample:
    """Stride, dilation, groups, depthwise, non-square and pointwise kernels, with and without BN and bias."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Tanh()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.Tanh()),
        *(nn.Conv2d(8, 12, (5, 3), padding=(2, 0), dilation=(1, 2)), nn.Tanh()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Tanh(), nn.Conv2d(12, 10, 1), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
    )
    return sample(net, (3, 12, 12), 4)


@functools.cache
def signal() -> Sample:
    """1-D kernels count as k_h = 1, so no adapter is smaller than its weight."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv1d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv1d(6, 8, 4, stride=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(48, 3)),
    )
    return sample(net, (2, 14), 3)


def kernel_wise(**settings: object) -> Case:
    return Case(SGD, lora=LoraConfig(**({"rank": 2} | settings)), method="lora-kernel")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("more", [{}, {"learnable_alpha": True, "freeze_a": True, "small_layers": "adapter"}])
def test_losses_gradients_and_weights_are_those_of_pytorch(layout: str, more: dict[str, object]) -> None:
    plan = check_steps(small(), kernel_wise(layout=layout, **more)).plan
    layers = ["3", "6", "8", "10"] if more else ["3", "6"]
    assert [a.layer for a in plan.adapters] == layers
    assert all(a.pairs == a.weight_shape[0] for a in plan.adapters)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_dimensional_kernels_are_stepped_too(layout: str) -> None:
    check_steps(signal(), kernel_wise(layout=layout, small_layers="adapter"))


def test_under_batch_statistics_too() -> None:
    check_steps(small(), Case(SGD, policy="batch", lora=LoraConfig(rank=1), method="lora-kernel"))


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-training"])
def test_both_engines_step_as_pytorch_and_give_the_file_that_fusing_in_pytorch_gives(
    engine: str, tmp_path: Path
) -> None:
    given, case = small(), kernel_wise(learnable_alpha=True)
    runner = device(given, case, tmp_path, engine)  # type: ignore[arg-type]
    start, fed = dict(runner.state()), batches(given)
    losses = [runner.train_step(images, labels, lr) for images, labels, lr in fed]
    state = dict(runner.state())
    folded = fold_batchnorm(given.net)
    select_trainable(folded, case.method, case.lora)
    folded.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in start.items()}, strict=False)
    exact = in_pytorch(folded.train(), case, fed, torch.float64)
    compare(Outcome(losses, [], {n: np.asarray(v, np.float64) for n, v in state.items()}), exact, start)
    folded.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in state.items()}, strict=False)
    write_fused(tmp_path / "artifact", tmp_path, state, ["onnx"])
    x = image(5, *given.shape)
    with torch.no_grad():
        wanted = fuse(folded)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(outputs(onnx.load(tmp_path / "fused.onnx"), x), wanted, atol=1e-5)
    assert np.abs(outputs(onnx.load(tmp_path / "artifact/base.onnx"), x) - wanted).max() > 1e-3


def test_an_adapter_of_the_unfolded_network_goes_to_the_device_and_comes_back(tmp_path: Path) -> None:
    given, lora = small(), LoraConfig(rank=4, small_layers="adapter", layout="paper")
    net = copy.deepcopy(given.net)
    report = select_trainable(net, "lora-kernel", lora)
    touch_adapters(net, size=0.05)
    save_module_adapter(tmp_path / "from_torch", net, model="net")
    manifest = artifact(given, Case(SGD, lora=lora, method="lora-kernel"), tmp_path, adapter=tmp_path / "from_torch")
    assert manifest.adapters == report.adapters
    x = torch.from_numpy(image(4, *given.shape))
    for module in (copy.deepcopy(given.net), fold_batchnorm(given.net)):
        attach_adapter(tmp_path / "artifact/adapter.safetensors", module)
        with torch.no_grad():
            torch.testing.assert_close(module.eval()(x), net.eval()(x), atol=1e-5, rtol=1e-4)


def test_a_branch_is_refused_by_name(tmp_path: Path) -> None:
    config = ArtifactConfig(lora=LoraConfig(rank=2), method="lora-kernel", form="branch", engine="onnxruntime")
    with pytest.raises(ConversionError, match=r"form branch: 3 has an adapter of 8 pairs of factors \(kernel-wise\)"):
        write_artifact(
            small().graph, tmp_path / "a", name="net", spec=small().spec, class_names=tuple("abcd"), config=config
        )
    assert not (tmp_path / "a").exists()


def resnet(**sizes: tuple[int, ...]) -> Network:
    convs = tuple(Layer(name, f"{name}.weight", f"{name}.bias", shape) for name, shape in sizes.items())
    return Network(convs, ("fc.weight", (10, 64)), ("fc.bias", (10,)), 10**9)


BODY = resnet(stem=(64, 3, 3, 3), body=(128, 64, 3, 3), wide=(32, 128, 5, 5), down=(128, 64, 1, 1))


@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_number_of_parameters_is_the_papers_and_exceeds_the_weight_from_r_equal_k_on(r: int) -> None:
    plan = METHODS["lora-kernel"](BODY, LoraConfig(rank=r, small_layers="adapter"))
    wanted = {"body": (128, 64, 3), "wide": (32, 128, 5), "down": (128, 64, 1)}
    found = {
        a.layer: sum(t.shape[0] * t.shape[1] for t in plan.trainables if t.name.startswith(a.layer))
        for a in plan.adapters
    }
    assert found == {name: c_out * (c_in * r * k + r * k) for name, (c_out, c_in, k) in wanted.items()}
    smaller = METHODS["lora-kernel"](BODY, LoraConfig(rank=r))
    assert [a.layer for a in smaller.adapters] == [name for name, (_, _, k) in wanted.items() if r < k]
    full = METHODS["lora-kernel"](BODY, LoraConfig(rank=r, small_layers="full"))
    assert "down.weight" in [t.name for t in full.trainables]


def test_a_rank_that_suits_no_layer_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"rank 5 gives no layer a kernel-wise adapter \(body, wide, down\).*lower"):
        METHODS["lora-kernel"](BODY, LoraConfig(rank=5))
    linear = Network((), ("fc.weight", (10, 64)), None, 100, linears=(Layer("one", "one.weight", None, (64, 64)),))
    with pytest.raises(ValueError, match="gives no layer a kernel-wise adapter"):
        METHODS["lora-kernel"](linear, LoraConfig(rank=1))
    assert METHODS["lora-kernel"](BODY, LoraConfig(rank=5, blocks=("fc",))).adapters == ()


def test_lora_a_starts_within_kaimings_bound_and_lora_b_at_zero() -> None:
    net = copy.deepcopy(small().net)
    select_trainable(net, "lora-kernel", LoraConfig(rank=2))
    layer = net[6]
    bound = 1 / (8 * 3) ** 0.5
    assert layer.lora_a.shape == (12 * 2, 8 * 3)
    assert 0.9 * bound < layer.lora_a.abs().max() <= bound
    assert not layer.lora_b.any()
    assert "pairs=12" in repr(layer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", [1, 2, 7, 14])
@pytest.mark.parametrize("shape", [(14, 300, 3, 5), (14, 6, 3), (14, 5)])
def test_blocks_of_channels_are_fused_to_the_same_bits_as_the_whole(
    shape: tuple[int, ...], pairs: int, layout: str
) -> None:
    adapter = Adapter("body", "w", "a", "b", shape, 1, 4, 40, 2.0, layout, None, pairs)
    manifest = SimpleNamespace(adapters=(adapter,), partials=(), trainables=(), refolded=(), live_batchnorm=False)
    rng = np.random.default_rng(0)
    size_a, size_b = adapter_shapes(shape, adapter.rank, pairs)
    a, b, w = (rng.standard_normal(size).astype(np.float32) for size in (size_a, size_b, shape))
    channels = fused_channels(manifest, {"w": w}, {"a": a, "b": b}, {})["w"]  # type: ignore[arg-type]
    whole = channels.whole().copy()
    wanted = w + delta(*(v.astype(np.float64) for v in (a, b)), shape, 0.5, adapter.arrangement, pairs=pairs)
    np.testing.assert_allclose(whole, wanted, atol=1e-4)
    for elements in (1, 4000, 1 << 30):
        assert np.array_equal(np.concatenate([block.copy() for block in channels.blocks(elements)]), whole)


@pytest.mark.parametrize("pairs", [0, 3])
def test_a_manifest_whose_pairs_cannot_share_the_channels_is_refused(pairs: int, tmp_path: Path) -> None:
    manifest = artifact(small(), kernel_wise(), tmp_path)
    first = dataclasses.replace(manifest.adapters[0], pairs=pairs)
    changed = dataclasses.replace(manifest, adapters=(first, *manifest.adapters[1:]))
    assert contradictions(manifest) == []
    assert contradictions(changed) == [f"adapters.3.pairs: {pairs} pairs cannot share 8 output channels"]
    whole = dataclasses.replace(manifest, adapters=(dataclasses.replace(first, pairs=4), *manifest.adapters[1:]))
    assert contradictions(whole) == ["adapters.3: 3.lora_a has shape (16, 12), expected (8, 12)"]
