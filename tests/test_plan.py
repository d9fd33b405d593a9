"""The plan of what trains, from plain facts."""

import math

import pytest

from lorac_exporters.plan import METHODS, ConvLayer, LoraConfig, Network


def conv(name: str, *shape: int, groups: int = 1, obstacle: str | None = None) -> ConvLayer:
    return ConvLayer(name, f"{name}.weight", f"{name}.bias", shape, groups, obstacle)


def network(*convs: ConvLayer, backbone: int = 1000) -> Network:
    return Network(convs, ("fc.weight", (10, 64)), ("fc.bias", (10,)), backbone, (("bn.weight", "bn.bias", 64),))


STEM, BODY, DEPTHWISE = conv("stem", 64, 3, 3, 3), conv("body", 64, 64, 3, 3), conv("dw", 64, 1, 3, 3, groups=64)


def test_lora_c_adapts_all_but_the_first_convolution_and_trains_stem_and_head_weights_in_full() -> None:
    plan = METHODS["lora-c"](network(STEM, BODY), LoraConfig(rank=4))
    assert [t.name for t in plan.trainables] == ["stem.weight", "body.lora_a", "body.lora_b", "fc.weight"]
    assert plan.trained_parameters == 64 * 27 + (64 + 64) * 12 * 3 + 640
    assert plan.adapters[0].alpha == 8


def test_a_layer_whose_adapter_would_not_be_smaller_stays_frozen_and_is_named() -> None:
    plan = METHODS["lora-c"](network(STEM, DEPTHWISE), LoraConfig())
    assert [name for name, _ in plan.frozen] == ["dw"]
    full = METHODS["lora-c"](network(STEM, DEPTHWISE), LoraConfig(small_layers="full"))
    assert "dw.weight" in [t.name for t in full.trainables]
    assert full.frozen == ()


def test_a_layer_with_an_obstacle_stays_frozen_even_as_the_stem() -> None:
    shared = conv("stem", 64, 3, 3, 3, obstacle="shared")
    for method in ("lora-c", "full"):
        plan = METHODS[method](network(shared, BODY), LoraConfig(small_layers="full"))
        assert ("stem", "shared") in plan.frozen
        assert not [t for t in plan.trainables if t.name.startswith("stem")]


@pytest.mark.parametrize(
    ("biases", "expected"), [("none", []), ("head", ["fc.bias"]), ("all", ["stem.bias", "body.bias", "fc.bias"])]
)
def test_biases_train_as_asked(biases: str, expected: list[str]) -> None:
    plan = METHODS["lora-c"](network(STEM, BODY), LoraConfig(biases=biases))  # type: ignore[arg-type]
    assert [t.name for t in plan.trainables if t.role == "bias"] == expected


def test_learnable_alpha_adds_one_number_per_adapter() -> None:
    fixed = METHODS["lora-c"](network(STEM, BODY), LoraConfig())
    learned = METHODS["lora-c"](network(STEM, BODY), LoraConfig(learnable_alpha=True))
    assert learned.trained_parameters == fixed.trained_parameters + 1
    assert learned.adapters[0].lora_alpha == "body.lora_alpha"


def test_rank_mode_auto_follows_the_backbone_size() -> None:
    small = METHODS["lora-c"](network(STEM, BODY, backbone=11_000_000), LoraConfig())
    large = METHODS["lora-c"](network(STEM, BODY, backbone=23_500_000), LoraConfig())
    assert (small.adapters[0].rank, large.adapters[0].rank) == (12, 4)


def test_head_trains_only_the_classifier_and_full_trains_everything_that_can() -> None:
    head = METHODS["head"](network(STEM, BODY), LoraConfig())
    assert [t.name for t in head.trainables] == ["fc.weight", "fc.bias"]
    full = METHODS["full"](network(STEM, BODY), LoraConfig())
    expected = 64 * 27 + 64 * 64 * 9 + 64 + 64 + 2 * 64 + 640 + 10
    assert sum(math.prod(t.shape) for t in full.trainables) == expected


def test_a_convolution_that_is_the_head_gets_no_adapter() -> None:
    facts = Network((STEM, conv("classifier", 10, 64, 1, 1)), ("classifier.weight", (10, 64, 1, 1)), None, 1000)
    plan = METHODS["lora-c"](facts, LoraConfig())
    assert [t.name for t in plan.trainables] == ["stem.weight", "classifier.weight"]


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.nan}, {"layout": "x"}, {"rank_mode": "x"}, {"biases": "x"}]
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoraConfig(**bad)  # type: ignore[arg-type]
