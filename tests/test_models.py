"""Networks by name: classes, stems, heads, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorac_deploy import _torchvision
from lorac_deploy.models import MODELS, ModelSpec, build, replace_head

STEMS = [name for name, architecture in MODELS.items() if architecture.small_stem]
OTHERS = [name for name in MODELS if name not in STEMS]
IMAGES = [name for name, architecture in MODELS.items() if architecture.axes == 3]
SMALL = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "resnet20"]


def input_of(net: nn.Module, layer: str, size: int = 32) -> Tensor:
    """What a layer receives when the network is given one image."""
    seen: list[Tensor] = []
    net.get_submodule(layer).register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    net.eval()(torch.zeros(1, 3, size, size))
    return seen[0]


@pytest.mark.parametrize("name", IMAGES)
def test_every_network_gives_logits_for_its_classes_and_channels(name: str) -> None:
    with torch.device("meta"):
        task = "segmentation" if MODELS[name].dense else "classification"
        net = build(ModelSpec(name, classes=7, channels=1, task=task)).eval()
        assert net(torch.zeros(2, 1, 64, 64)).shape == ((2, 7, 64, 64) if MODELS[name].dense else (2, 7))


@pytest.mark.parametrize(
    ("name", "task"), [("resnet18", "segmentation"), ("unet_small", "regression"), ("mlp", "pose")]
)
def test_a_network_of_another_task_is_refused(name: str, task: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is no network for {task}; choose one of|task 'pose' is not one of"):
        ModelSpec(name, classes=3, task=task)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "squeezenet1_0"])
def test_without_options_a_network_is_torchvisions_own(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build(ModelSpec(name, classes=1000)), _torchvision.models.get_model(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "behind", "plain", "small"),
    [
        ("resnet18", "layer1", 8, 32),
        ("resnet50", "layer1", 8, 32),
        ("densenet121", "features.denseblock1", 8, 32),
        ("mobilenet_v2", "features.1", 16, 32),
        ("mobilenet_v3_small", "features.1", 16, 32),
    ],
)
def test_the_cifar_stem_keeps_the_resolution(name: str, behind: str, plain: int, small: int) -> None:
    for cifar_stem, size in ((False, plain), (True, small)):
        with torch.device("meta"):
            net = build(ModelSpec(name, classes=3, cifar_stem=cifar_stem))
            assert input_of(net, behind).shape[2:] == (size, size)


def test_the_cifar_stem_of_a_resnet_is_a_3x3_convolution_without_pooling() -> None:
    net: Any = build(ModelSpec("resnet18", classes=3, cifar_stem=True))
    conv = net.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(net.maxpool, nn.Identity)
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # Kaiming, fan out


@pytest.mark.parametrize("name", STEMS)
def test_the_cifar_stem_changes_the_stem_and_no_other_tensor(name: str) -> None:
    with torch.device("meta"):
        plain, small = (build(ModelSpec(name, 3, cifar_stem=choice)).state_dict() for choice in (False, True))
    assert list(plain) == list(small)
    assert len([key for key in plain if plain[key].shape != small[key].shape]) <= 1


@pytest.mark.parametrize("name", OTHERS)
def test_networks_without_a_cifar_stem_refuse_it_and_say_which_have_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has no CIFAR stem.*choose one of resnet18"):
        ModelSpec(name, classes=10, cifar_stem=True)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"name": "resnet19", "classes": 2}, "model 'resnet19' is not known; choose one of resnet18"),
        ({"name": "resnet18", "classes": 0}, "at least one class and one input channel, got 0 and 3"),
        ({"name": "resnet18", "classes": 2, "channels": 0}, "got 2 and 0"),
    ],
)
def test_specs_that_cannot_be_built_are_refused(spec: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelSpec(**spec)


@pytest.mark.parametrize("cifar_stem", [False, True])
def test_the_seed_decides_all_numbers_and_the_global_state_stays(cifar_stem: bool) -> None:
    spec = ModelSpec("resnet18", classes=3, cifar_stem=cifar_stem, channels=1)
    torch.manual_seed(1)
    first = build(spec).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    again, other = build(spec).state_dict(), build(spec, seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["layer1.0.conv1.weight"], other["layer1.0.conv1.weight"])


@pytest.mark.parametrize("name", SMALL)
def test_a_new_head_has_its_classes_and_leaves_the_rest_alone(name: str) -> None:
    net = build(ModelSpec(name, classes=10)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    head = replace_head(net, 4)
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{head}.weight", f"{head}.bias"}


def test_a_new_head_follows_its_seed_type_and_bias() -> None:
    heads = []
    for seed in (0, 0, 1):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2, bias=False)).double()
        replace_head(net, 3, seed=seed)
        assert net[1].bias is None
        assert net[1].weight.dtype == torch.float64
        heads.append(net[1].weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_can_be_named_and_needs_a_class() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 2))
    assert replace_head(net, 5, head="1") == "1"
    assert net[1].out_features == 5
    with pytest.raises(ValueError, match="at least one class, got 0"):
        replace_head(net, 0)
