"""attach, detach and fuse on whole networks."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from networks import touch_adapters, trained
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy.lora import (
    METHODS,
    AttachReport,
    LoraConfig,
    LoraConv1d,
    LoraConv2d,
    adapter_tensors,
    attach,
    detach,
    fuse,
    load_adapter_tensors,
    report_of,
    select_trainable,
)
from lorac_deploy.models import ModelSpec, build
from lorac_runtime.delta import LAYOUTS, Layout
from lorac_runtime.errors import AdapterError

# methods.md, section 1: millions of trainable parameters for r = 1, 2, 4, 8, 16, 32, 64
PUBLISHED = {
    ("resnet18", "rk"): (0.073, 0.140, 0.273, 0.538, 1.070, 2.133, 4.258),
    ("resnet18", "r"): (0.030, 0.053, 0.099, 0.191, 0.375, 0.744, 1.481),
    ("resnet34", "rk"): (0.140, 0.273, 0.540, 1.073, 2.139, 4.271, 8.535),
    ("resnet50", "r"): (0.086, 0.150, 0.279, 0.535, 1.048, 2.074, 4.126),
    ("resnet101", "r"): (0.156, 0.290, 0.557, 1.092, 2.162, 4.303, 8.583),
}
MODEL_MILLIONS = {"resnet18": 11.17, "resnet34": 21.28, "resnet50": 23.52, "resnet101": 42.51}
SMALL = LoraConfig(rank=1)  # for `tiny`, where adapters of a higher rank would not be smaller than the weights
CASES = [(name, mode, 2**i, m) for (name, mode), row in PUBLISHED.items() for i, m in enumerate(row)]


def tiny(seed: int = 0) -> nn.Sequential:
    """Stem, BN, a plain, a depthwise and a 1x1 convolution, head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def images(n: int = 4, size: int = 12) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def step(net: nn.Module, *, lr: float = 0.1) -> None:
    """One SGD step on everything that trains."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    functional.cross_entropy(net(images()), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same_state(net: nn.Module, expected: dict[str, Tensor]) -> None:
    state = net.state_dict()
    assert list(state) == list(expected)
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def formula(name: str, rank_mode: str, r: int) -> int:
    """(c_out + c_in) * k * rank over all convolutions but the stem, plus stem and head: the paper's own count."""
    with torch.device("meta"):
        net: Any = build(ModelSpec(name, classes=10, cifar_stem=True))
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m is not net.conv1]
    k_times_rank = [(m, m.kernel_size[0], r * m.kernel_size[0] if rank_mode == "rk" else r) for m in convs]
    adapters = sum((m.in_channels + m.out_channels) * k * rank for m, k, rank in k_times_rank)
    return adapters + 64 * 3 * 3 * 3 + net.fc.in_features * 10


@pytest.mark.parametrize(("name", "mode", "r", "millions"), CASES)
def test_trained_parameters_equal_the_published_count(name: str, mode: Any, r: int, millions: float) -> None:
    with torch.device("meta"):
        net = build(ModelSpec(name, classes=10, cifar_stem=True))
        report = attach(net, LoraConfig(rank=r, rank_mode=mode, small_layers="adapter"))
    assert report.trained_parameters == formula(name, mode, r)
    assert report.trained_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert report.trained_parameters / 1e6 == pytest.approx(millions, abs=5.01e-4)
    assert report.model_parameters / 1e6 == pytest.approx(MODEL_MILLIONS[name], abs=5e-3)
    assert report.frozen == ()


@pytest.mark.parametrize(("name", "mode", "r", "millions"), [c for c in CASES if c[2] <= 16])
def test_the_default_gives_the_published_count_where_every_adapter_is_smaller(
    name: str, mode: Any, r: int, millions: float
) -> None:
    with torch.device("meta"):
        net = build(ModelSpec(name, classes=10, cifar_stem=True))
        assert attach(net, LoraConfig(rank=r)).trained_parameters == formula(name, report_of(net).rank_mode, r)


@pytest.mark.parametrize(
    ("name", "mode"), [("resnet18", "rk"), ("resnet34", "rk"), ("resnet50", "r"), ("mobilenet_v2", "rk")]
)
def test_rank_mode_auto_follows_the_size_of_the_backbone(name: str, mode: str) -> None:
    with torch.device("meta"):
        net = build(ModelSpec(name, classes=10, cifar_stem=True))
        assert attach(net, LoraConfig()).rank_mode == mode


def test_at_r_64_layers_whose_adapter_is_not_smaller_stay_frozen_and_are_named() -> None:
    with torch.device("meta"):
        report = attach(build(ModelSpec("resnet18", classes=10, cifar_stem=True)), LoraConfig(rank=64))
    assert [name for name, _ in report.frozen] == [
        *(f"layer1.{b}.conv{c}" for b in (0, 1) for c in (1, 2)),
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer2.0.downsample.0",
        "layer2.1.conv1",
        "layer2.1.conv2",
    ]


def test_everything_but_stem_adapters_and_head_weight_stops_training() -> None:
    net = tiny()
    report = attach(net, SMALL)
    learning = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learning == ["0.weight", "2.lora_a", "2.lora_b", "5.lora_a", "5.lora_b", "8.weight"]
    assert sorted(learning) == sorted(t.name for t in report.trainables)
    assert [a.layer for a in report.adapters] == ["2", "5"]
    assert report.full == ("0.weight", "8.weight")
    assert [name for name, _ in report.frozen] == ["4"]
    assert type(net[2]) is LoraConv2d
    assert type(net[4]) is nn.Conv2d


def test_one_step_moves_exactly_the_trainable_tensors() -> None:
    net = tiny()
    report = attach(net, SMALL)
    touch_adapters(net)
    before = snapshot(net)
    step(net.train())
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {t.name for t in report.trainables}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_fresh_adapter_changes_no_bit_of_a_networks_output(name: str) -> None:
    net = trained(name) if name != "squeezenet1_1" else build(ModelSpec(name, 10)).eval()
    expected = net(images(2, 64))
    attach(net, LoraConfig())
    assert torch.equal(net(images(2, 64)), expected)
    touch_adapters(net)
    assert not torch.allclose(net(images(2, 64)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_fused_network_is_plain_and_gives_the_adapted_outputs(name: str, layout: Layout) -> None:
    net = trained(name)
    plain = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    kinds = [type(part) for part in net.modules()]
    attach(net, LoraConfig(layout=layout, small_layers="full"))
    touch_adapters(net)
    before, x = snapshot(net), images(2, 32)
    fused = fuse(net)
    assert {key: tuple(value.shape) for key, value in fused.state_dict().items()} == plain
    assert [type(part) for part in fused.modules()] == kinds
    assert torch.equal(fused(x), net.eval()(x))
    assert_same_state(net, before)
    with torch.no_grad():
        next(fused.parameters()).zero_()
    assert_same_state(net, before)


def test_layouts_give_different_networks_from_the_same_factors() -> None:
    outputs = []
    for layout in LAYOUTS:
        net = tiny()
        attach(net, LoraConfig(rank=1, layout=layout))
        touch_adapters(net, size=0.5)
        outputs.append(net.eval()(images()))
    assert not torch.allclose(*outputs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_detach_restores_the_network_to_the_bit_after_training(method: str, policy: Any) -> None:
    net = tiny()
    net[2].bias.requires_grad_(False)
    before, kinds = snapshot(net), [type(m) for m in net.modules()]
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    attributes = {name: set(vars(m)) for name, m in net.named_modules()}
    select_trainable(net, method, SMALL, bn_policy=policy)
    step(net.train())
    tensors = adapter_tensors(net)
    detached = detach(net)
    assert all(torch.equal(detached[name], value) for name, value in tensors.items())
    assert_same_state(net, before)
    assert [type(m) for m in net.modules()] == kinds
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert {name: set(vars(m)) for name, m in net.named_modules()} == attributes


def test_detached_tensors_loaded_into_a_fresh_adapter_give_the_same_network() -> None:
    net = tiny()
    attach(net, LoraConfig(rank=1, learnable_alpha=True))
    touch_adapters(net)
    expected = net.eval()(images())
    tensors = detach(net)
    attach(net, LoraConfig(rank=1, learnable_alpha=True, seed=9))
    assert not torch.equal(net.eval()(images()), expected)
    load_adapter_tensors(net, tensors)
    assert torch.equal(net(images()), expected)


def test_adapter_tensors_are_copies() -> None:
    net = tiny()
    attach(net, SMALL)
    tensors = adapter_tensors(net)
    touch_adapters(net)
    assert not any(torch.equal(value, net.get_parameter(name)) for name, value in tensors.items())


def test_all_mismatches_of_loaded_tensors_are_listed_and_nothing_changes() -> None:
    net = tiny()
    attach(net, SMALL)
    tensors, before = adapter_tensors(net), snapshot(net)
    del tensors["2.lora_a"]
    tensors |= {"9.lora_a": torch.ones(1), "2.lora_b": torch.ones(3, 3), "5.lora_b": torch.full((16, 1), torch.nan)}
    with pytest.raises(AdapterError) as error:
        load_adapter_tensors(net, tensors)
    assert str(error.value).splitlines()[1:] == [
        "  - 2.lora_a is missing",
        "  - 2.lora_b has shape (3, 3), expected (24, 3)",
        "  - 5.lora_b holds NaN or infinite values",
        "  - 9.lora_a is not trained in this network",
    ]
    assert_same_state(net, before)


@pytest.mark.parametrize(
    ("biases", "expected"), [("none", []), ("head", ["8.bias"]), ("all", ["2.bias", "4.bias", "8.bias"])]
)
def test_biases_that_exist_train_as_asked(biases: Any, expected: list[str]) -> None:
    net = tiny()
    attach(net, LoraConfig(rank=1, biases=biases))
    assert [n for n, p in net.named_parameters() if p.requires_grad and n.endswith("bias")] == expected


def test_small_layers_are_frozen_trained_in_full_or_adapted_as_asked() -> None:
    trains = {}
    for choice in ("frozen", "full", "adapter"):
        net = tiny()
        attach(net, LoraConfig(rank=1, small_layers=choice))  # type: ignore[arg-type]
        trains[choice] = [n for n, p in net.named_parameters() if p.requires_grad and n.startswith("4.")]
    assert trains == {"frozen": [], "full": ["4.weight"], "adapter": ["4.lora_a", "4.lora_b"]}


def test_rank_alpha_and_seed_reach_the_layers() -> None:
    net = tiny()
    attach(net, LoraConfig(rank=2, alpha=3.0, rank_mode="r", seed=1))
    layer = net[2]
    assert (tuple(layer.lora_a.shape), tuple(layer.lora_b.shape), layer.scale) == ((2, 24), (24, 2), 1.5)
    others = [tiny(), tiny()]
    for other, seed in zip(others, (1, 2), strict=True):
        attach(other, LoraConfig(rank=2, rank_mode="r", seed=seed))
    assert torch.equal(layer.lora_a, others[0][2].lora_a)
    assert not torch.equal(layer.lora_a, others[1][2].lora_a)


def test_attaching_draws_no_global_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    net = tiny()
    torch.manual_seed(5)
    attach(net, SMALL)
    assert torch.equal(torch.rand(1), expected)


def test_one_dimensional_convolutions_are_adapted() -> None:
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 8, 3))
    report = attach(net, SMALL)
    assert type(net[1]) is LoraConv1d
    assert report.adapters[0].weight_shape == (8, 8, 3)
    touch_adapters(net)
    x = torch.randn(2, 2, 12)
    assert torch.equal(fuse(net)(x), net(x))


def test_a_convolutional_head_trains_in_full() -> None:
    net = build(ModelSpec("squeezenet1_1", classes=10))
    report = attach(net, LoraConfig(biases="head"))
    assert report.head == "classifier.1"
    assert report.full == ("features.0.weight", "classifier.1.weight", "classifier.1.bias")
    assert type(net.get_submodule("classifier.1")) is nn.Conv2d


def test_stem_and_head_can_be_named() -> None:
    net = tiny()
    report = attach(net, SMALL, stem="2", head="5")
    assert report.full == ("2.weight", "5.weight")
    assert [a.layer for a in report.adapters] == ["0"]
    assert report.frozen[-1] == ("8", "not trained by lora-c")


def test_shared_and_transposed_convolutions_stay_frozen_with_the_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Linear(8, 2)
    )
    net[2].weight = net[1].weight
    assert attach(net, SMALL).frozen == (
        ("1", "its weight is shared with 2"),
        ("2", "its weight is shared with 1"),
        ("3", "transposed convolutions take no adapter"),
    )
    assert not net[1].weight.requires_grad
    assert not net[3].weight.requires_grad


class ListedTwice(nn.Module):
    """Holds its second convolution in a plain list besides, as some detection networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.reversed = [self.body, self.stem]

    def forward(self, x: Tensor) -> Tensor:
        for conv in reversed(self.reversed):
            x = conv(x)
        return self.fc(x.mean((2, 3)))


def test_a_layer_that_is_reached_by_another_reference_is_adapted_too() -> None:
    net = ListedTwice()
    expected = net(images())
    attach(net, SMALL)
    with torch.no_grad():
        net.body.lora_b.fill_(0.1)
    assert not torch.allclose(net(images()), expected)
    assert torch.equal(fuse(net)(images()), net(images()))


def test_attaching_twice_is_refused_with_what_to_do() -> None:
    net = tiny()
    attach(net, SMALL)
    for again in (net, nn.Sequential(net)):
        with pytest.raises(ValueError, match=r"already prepared for training.*detach\(module\) first"):
            attach(again, SMALL)
    detach(net)
    attach(net, SMALL)


@pytest.mark.parametrize("call", [detach, fuse, adapter_tensors, report_of])
def test_a_network_without_adapters_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"not prepared for training: call attach\(module"):
        call(tiny())


def test_a_network_that_cannot_be_attached_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="1 keeps no running statistics"):
        attach(net, SMALL)
    assert all(p.requires_grad for p in net.parameters())
    attach(net, SMALL, bn_policy="batch")


def test_unknown_methods_and_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="method 'lora' is not one of lora-c, head, full"):
        select_trainable(tiny(), "lora", SMALL)
    with pytest.raises(ValueError, match="BN policy 'none' is not one of frozen, batch, recalibrate"):
        attach(tiny(), SMALL, bn_policy="none")  # type: ignore[arg-type]


def trained_by(method: str, policy: Any, net: nn.Module) -> tuple[AttachReport, set[str]]:
    report = select_trainable(net, method, SMALL, bn_policy=policy)
    learning = {n for n, p in net.named_parameters() if p.requires_grad}
    assert learning == {t.name for t in report.trainables}
    return report, learning


def test_method_head_trains_weight_and_bias_of_the_head() -> None:
    report, learning = trained_by("head", "frozen", tiny())
    assert learning == {"8.weight", "8.bias"}
    assert (report.trained_parameters, report.adapters) == (85, ())
    assert [name for name, _ in report.frozen] == ["0", "2", "4", "5"]


def test_method_full_trains_everything_and_the_affine_part_of_bn_only_under_batch() -> None:
    everything = {name for name, _ in build(ModelSpec("mobilenet_v3_small", 10)).named_parameters()}
    _, learning = trained_by("full", "batch", build(ModelSpec("mobilenet_v3_small", 10)))
    assert learning == everything
    net = build(ModelSpec("mobilenet_v3_small", 10))
    affine = {
        f"{n}.{leaf}" for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) for leaf in ("weight", "bias")
    }
    _, learning = trained_by("full", "frozen", net)
    assert learning == everything - affine


@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_bn_follows_the_policy_while_attached_and_is_ordinary_afterwards(policy: Any) -> None:
    net = tiny()
    attach(net, SMALL, bn_policy=policy)
    assert net.train()[1].training is (policy == "batch")
    assert fuse(net).train()[1].training
    detach(net)
    assert net.train()[1].training


def test_train_and_eval_of_an_attached_network_touch_no_tensor() -> None:
    net = tiny()
    attach(net, SMALL, bn_policy="batch")
    before = snapshot(net)
    net.eval().train().eval()
    assert_same_state(net, before)


def test_copies_and_pickles_of_an_attached_network_compute_the_same_and_detach_by_themselves() -> None:
    net = tiny()
    plain = snapshot(net)
    attach(net, SMALL)
    touch_adapters(net)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(net), torch.load(stream, weights_only=False)):
        assert torch.equal(twin.eval()(images()), net.eval()(images()))
        assert detach(twin).keys() == adapter_tensors(net).keys()
        assert_same_state(twin, plain)
    assert isinstance(net[2], LoraConv2d)


def test_an_attached_network_can_change_its_type_and_be_exported() -> None:
    net = tiny()
    attach(net, SMALL)
    touch_adapters(net)
    net.eval()
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(7)), net(images(7)))
    expected = net(images())
    torch.testing.assert_close(net.double()(images().double()).float(), expected)
    detach(net)
    assert all(value.dtype == torch.float64 for value in net.state_dict().values() if value.is_floating_point())


def test_the_report_says_in_one_line_what_trains() -> None:
    report = attach(tiny(), SMALL)
    assert str(report) == (
        "lora-c: 464 trained of 1,109 parameters (41.84 %); 2 adapted layers, 2 tensors in full, 1 layers frozen"
    )
