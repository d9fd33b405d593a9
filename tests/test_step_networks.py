"""Ten steps of the step graph against ten of PyTorch: losses, gradient norms, every tensor, the optimizer's state.

On smooth copies (no Relu, no max-pooling) float32 results must agree. On the real networks a Relu near zero flips now
and then, and all steps after it differ: float64 PyTorch is the truth there, and float32 PyTorch the yardstick.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from step_networks import batches, prepared, step_graph
from step_runs import (
    Case,
    Outcome,
    changes,
    distances,
    in_graph,
    in_pytorch,
    in_pytorch_kernels,
    starting,
    trained_only,
)

from lorac_exporters.branches import FORMS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.delta import LAYOUTS, Layout
from lorac_runtime.manifest import BnPolicy, TrainingDefaults

TOLERANCE = 1e-4
YARDSTICK = 3.0  # times the error of float32 PyTorch
FLOOR = 1e-5  # where neither side met a flip, a tenth of what smooth copies may differ by
SGD = TrainingDefaults(optimizer="sgd", momentum=0.9, clip_norm=0.0, label_smoothing=0.1)
ADAMW = TrainingDefaults(weight_decay=0.01, clip_norm=1.0)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}
RATES = {"sgd": 0.1, "adamw": 3e-3}  # of the small networks
DEEP_RATES = {"sgd": 2e-3, "adamw": 2e-4}  # small enough that ten steps do not multiply rounding errors
POLICIES: tuple[BnPolicy, ...] = ("frozen", "batch")
# Images of a batch of the real network: so many that hardly a run is without a flip.
DEEP = {"resnet18": 6, "resnet50": 4, "mobilenet_v2": 4, "mobilenet_v3_small": 16, "densenet121": 4}
UNETS = ("unet_transposed", "unet_bilinear")

# Every pair of optimizer, policy and layout in four runs instead of eight; the small network does all eight.
PAIRS: list[tuple[str, BnPolicy, Layout]] = [
    ("sgd", "frozen", "spatial"),
    ("sgd", "batch", "paper"),
    ("adamw", "frozen", "paper"),
    ("adamw", "batch", "spatial"),
]
Pair = tuple[str, BnPolicy, Layout]
# As smooth copies, ResNet-18 does all pairs, the MobileNets fold their BN once and keep it once, and those that take
# longest keep it. The others are `long`.
OF = {"resnet50": PAIRS[3:], "mobilenet_v2": PAIRS[::3], "mobilenet_v3_small": PAIRS[1:3], "densenet121": PAIRS[3:]}
SMOOTH = [
    pytest.param(name, pair, marks=() if pair in OF.get(name, PAIRS) else pytest.mark.long)
    for name in DEEP
    for pair in PAIRS
]


def case_of(pair: Pair) -> Case:
    optimizer, policy, layout = pair
    return Case(OPTIMIZERS[optimizer], policy, LoraConfig(rank=2, layout=layout))


def worst(found: dict[str, float]) -> tuple[float, str]:
    return max((distance, name) for name, distance in found.items())


def check(name: str, case: Case, lr: float, dtype: torch.dtype = torch.float64, size: int = 6) -> Outcome:
    """Ten steps of a smooth network in both; returns those of the graph."""
    net = prepared(name, case, smooth=True)
    start, given = starting(net, case), batches(name, lr=lr, size=size)
    found = in_graph(step_graph(name, case, start, smooth=True), start, given)
    expected = in_pytorch(net, case, given, dtype)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert worst(distances(found, expected)) <= (TOLERANCE, "")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_are_pytorchs(optimizer: str, policy: BnPolicy, layout: Layout) -> None:
    check_movement("small", case_of((optimizer, policy, layout)), RATES[optimizer])


def check_movement(name: str, case: Case, lr: float) -> None:
    """`check`, and that the tensors moved, and moved alike."""
    net = prepared(name, case, smooth=True)
    start, given = starting(net, case), batches(name, lr=lr)
    found, expected = check(name, case, lr), in_pytorch(net, case, given, torch.float64)
    assert worst(changes(found, expected, start)) <= (TOLERANCE, "")
    untouched = Outcome([], [], start)
    assert float(np.median(list(changes(untouched, expected, start).values()))) > 0.1


VARIANTS = {
    "nesterov, weight decay, clipped": Case(
        TrainingDefaults(optimizer="sgd", momentum=0.8, nesterov=True, weight_decay=0.05, clip_norm=0.3)
    ),
    "dampening": Case(TrainingDefaults(optimizer="sgd", momentum=0.9, dampening=0.5, clip_norm=0.0)),
    "amsgrad, not clipped": Case(TrainingDefaults(amsgrad=True, betas=(0.6, 0.7), clip_norm=0.0)),
    "learned alpha": Case(ADAMW, lora=LoraConfig(rank=2, learnable_alpha=True)),
    "learned alpha, batch": Case(SGD, "batch", LoraConfig(rank=2, learnable_alpha=True, layout="paper")),
    "factors a frozen": Case(SGD, lora=LoraConfig(rank=2, freeze_a=True)),
    "factors a frozen, paper": Case(ADAMW, "batch", LoraConfig(rank=2, freeze_a=True, layout="paper")),
    "all biases": Case(SGD, lora=LoraConfig(rank=2, biases="all", small_layers="full")),
    "full": Case(SGD, method="full"),
    "full, batch": Case(SGD, "batch", method="full"),
    "head": Case(ADAMW, method="head"),
    "the last block": Case(SGD, lora=LoraConfig(rank=2, blocks=("conv4",))),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_are_pytorchs_whatever_trains_and_however(variant: str) -> None:
    case = VARIANTS[variant]
    check_movement("small", case, RATES[case.training.optimizer])


@pytest.mark.parametrize(("layout", "policy"), list(itertools.product(LAYOUTS, POLICIES)))
def test_both_forms_of_an_adapter_take_the_same_steps(layout: Layout, policy: BnPolicy) -> None:
    case = case_of(("sgd", policy, layout))
    branch, weight = (check("small", dataclasses.replace(case, form=form), RATES["sgd"]) for form in FORMS)
    assert branch.losses == pytest.approx(weight.losses, rel=1e-6)
    assert worst(distances(branch, weight)) <= (1e-5, "")


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_ten_steps_of_a_unet_with_a_class_for_each_pixel_are_pytorchs(name: str, pair: Pair) -> None:
    check(name, case_of(pair), RATES[pair[0]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pair"), SMOOTH, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_ten_steps_of_the_smooth_copy_of_a_network_are_pytorchs(name: str, pair: Pair) -> None:
    check(name, case_of(pair), DEEP_RATES[pair[0]], torch.float32, size=4)


def clipped(case: Case) -> Case:
    """Without clipping, gradients of real networks at random labels (norm 1600 in ResNet-50) end in chaos for all."""
    return dataclasses.replace(case, training=dataclasses.replace(case.training, clip_norm=1.0))


def check_yardstick(name: str, pair: Pair, rates: dict[str, float], *, size: int, seeds: int) -> None:
    """Whether a run meets a flip, and how soon, is luck: on either side the worst of several runs counts."""
    case = clipped(case_of(pair))
    net = prepared(name, case, smooth=False)
    start = starting(net, case)
    graph = step_graph(name, case, start, smooth=False)
    ours, theirs = [], []
    for seed in range(seeds):
        given = batches(name, lr=rates[pair[0]], size=size, seed=seed)
        found, exact = in_graph(graph, start, given), in_pytorch(net, case, given, torch.float64)
        assert found.losses[0] == pytest.approx(exact.losses[0], rel=1e-4)
        ours.append(worst(trained_only(distances(found, exact))))
        singles = in_pytorch_kernels(net, case, given)
        theirs += [worst(trained_only(distances(single, exact))) for single in singles]
    assert max(ours)[0] <= max(YARDSTICK * max(theirs)[0], FLOOR), (ours, theirs)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_real_unets_are_as_near_to_float64_as_pytorch_float32_is(name: str, pair: Pair) -> None:
    check_yardstick(name, pair, RATES, size=6, seeds=2)


# The other pairs run as smooth copies.
REAL = [("resnet18", PAIRS[1], 1), ("mobilenet_v2", PAIRS[2], 1), ("mobilenet_v3_small", PAIRS[2], 1)]
MORE = [("resnet18", PAIRS[1], 3), *((name, PAIRS[2], 3) for name in DEEP)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pair", "seeds"), [*REAL, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]
)
def test_real_networks_are_as_near_to_float64_as_pytorch_float32_is(name: str, pair: Pair, seeds: int) -> None:
    check_yardstick(name, pair, DEEP_RATES, size=DEEP[name], seeds=seeds)
