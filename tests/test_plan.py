"""The plan of what trains, from plain facts."""

import math

import pytest

from lorac_exporters.methods import METHODS
from lorac_exporters.plan import Layer, LoraConfig, Network
from lorac_runtime.manifest import Trainable


def conv(name: str, *shape: int, groups: int = 1, obstacle: str | None = None) -> Layer:
    return Layer(name, f"{name}.weight", f"{name}.bias", shape, groups, obstacle)


def network(*convs: Layer, backbone: int = 1000) -> Network:
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
    "bad",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"layout": "x"},
        {"rank_mode": "x"},
        {"biases": "x"},
        {"blocks": "layer4"},
        {"blocks": ("layer4", "")},
        {"blocks": ("layer3,layer4",)},
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoraConfig(**bad)  # type: ignore[arg-type]


BODIES = (STEM, conv("part.0.a", 64, 64, 3, 3), conv("part.1.a", 64, 32, 3, 3), conv("party", 32, 64, 3, 3))


def trained(method: str, **settings: object) -> list[str]:
    plan = METHODS[method](network(*BODIES), LoraConfig(**settings))  # type: ignore[arg-type]
    return [t.name for t in plan.trainables]


def test_a_frozen_a_belongs_to_the_adapter_but_is_not_counted() -> None:
    plan = METHODS["lora-c"](network(STEM, BODY), LoraConfig(rank=4, freeze_a=True, learnable_alpha=True))
    assert [t.name for t in plan.trainables] == ["stem.weight", "body.lora_b", "body.lora_alpha", "fc.weight"]
    assert plan.fixed == {"body.lora_a": (12, 64 * 3)}
    assert plan.trained_parameters == 64 * 27 + 64 * 3 * 12 + 1 + 640
    assert METHODS["lora-c"](network(STEM, BODY), LoraConfig(rank=4)).fixed == {}


def test_freezing_a_changes_neither_adapters_nor_frozen_layers() -> None:
    plain, frozen = (METHODS["lora-c"](network(*BODIES, DEPTHWISE), LoraConfig(freeze_a=f)) for f in (False, True))
    assert plain.adapters == frozen.adapters
    assert plain.frozen == frozen.frozen
    assert {t.name for t in plain.trainables} == {t.name for t in frozen.trainables} | frozen.fixed.keys()


@pytest.mark.parametrize(
    ("blocks", "layers"),
    [
        (("part",), ["part.0.a", "part.1.a"]),
        (("part.1",), ["part.1.a"]),
        (("part.1.a",), ["part.1.a"]),
        (("party", "part.0"), ["part.0.a", "party"]),
        (("part", "part.0", "party"), ["part.0.a", "part.1.a", "party"]),
    ],
)
@pytest.mark.parametrize("head", [(), ("fc",), ("head",)])
def test_blocks_adapt_the_layers_of_these_names_and_below_and_nothing_else(
    blocks: tuple[str, ...], layers: list[str], head: tuple[str, ...]
) -> None:
    plan = METHODS["lora-c"](network(*BODIES), LoraConfig(rank=1, blocks=(*blocks, *head), biases="all"))
    tensors = [f"{layer}.lora_{leaf}" for layer in layers for leaf in "ab"]
    biases = [f"{layer}.bias" for layer in layers]
    classifier = ["fc.weight", "fc.bias"] if head else []
    assert [t.name for t in plan.trainables] == [*tensors, *biases, *classifier]
    outside = [c.name for c in BODIES if c.name not in layers] + ([] if head else ["fc"])
    assert plan.frozen == tuple((name, "outside of the trained blocks") for name in outside)


def test_the_stem_trains_in_full_where_a_block_names_it_and_is_the_only_one_that_does() -> None:
    assert trained("lora-c", blocks=("stem",)) == ["stem.weight"]
    shifted = METHODS["lora-c"](network(*BODIES), LoraConfig(rank=1, blocks=("part",)))
    assert [a.layer for a in shifted.adapters] == ["part.0.a", "part.1.a"]


@pytest.mark.parametrize("method", ["full", "blocks"])
def test_full_training_of_blocks_changes_their_weights_biases_and_norms_and_nothing_else(method: str) -> None:
    others = (Trainable("part.norm.weight", (64,), "weight"), Trainable("mix.weight", (64, 64), "weight"))
    facts = Network(
        (*BODIES, conv("part.2.a", 8, 8, 3, 3, obstacle="shared")),
        ("fc.weight", (10, 64)),
        ("fc.bias", (10,)),
        1000,
        (("part.0.bn.weight", "part.0.bn.bias", 64), ("bn.weight", "bn.bias", 64)),
        others,
    )
    plan = METHODS[method](facts, LoraConfig(blocks=("part",)))
    convs = ["part.0.a.weight", "part.1.a.weight", "part.0.a.bias", "part.1.a.bias"]
    rest = ["part.norm.weight", "part.0.bn.weight", "part.0.bn.bias"]
    assert [t.name for t in plan.trainables] == convs + rest
    outside = "outside of the trained blocks"
    frozen = {"stem": outside, "party": outside, "part.2.a": "shared", "mix": outside, "fc": outside}
    assert plan.frozen == tuple(frozen.items())
    assert METHODS[method](facts, LoraConfig(blocks=("bn",))).trained_parameters == 2 * 64
    assert METHODS[method](facts, LoraConfig(blocks=("bn", "head"))).trained_parameters == 2 * 64 + 640 + 10


def test_a_block_that_holds_nothing_is_named_with_what_there_is() -> None:
    settings = LoraConfig(blocks=("part.0", "layer4", "part.7"))
    for method in ("lora-c", "full"):
        with pytest.raises(ValueError, match="blocks:") as error:
            METHODS[method](Network(BODIES, ("fc.weight", (10, 64)), None, 1000), settings)
        assert str(error.value) == (
            "blocks: 'layer4' holds no layer that could train: there are stem, part, party, fc; "
            "'part.7' holds no layer that could train: there are part.0, part.1"
        )


def test_a_long_list_of_layers_is_shortened() -> None:
    many = [conv(f"body.{i}", 64, 64, 3, 3) for i in range(20)]
    with pytest.raises(ValueError, match=r"body.0, body.1, .*, body.7, \.\.\.$"):
        METHODS["lora-c"](network(*many), LoraConfig(blocks=("body.99",)))


def test_norms_are_no_blocks_where_they_do_not_train() -> None:
    with pytest.raises(ValueError, match="'bn' holds no layer"):
        METHODS["lora-c"](network(*BODIES), LoraConfig(blocks=("bn",)))
    assert "bn.weight" in trained("full", blocks=("bn",))


def test_blocks_in_which_nothing_could_train_are_refused_with_the_reason() -> None:
    facts = network(STEM, DEPTHWISE, BODY)
    with pytest.raises(
        ValueError, match=r"lora-c would train nothing in blocks dw \(dw: its adapter would not be smal"
    ):
        METHODS["lora-c"](facts, LoraConfig(blocks=("dw",)))
    assert METHODS["lora-c"](facts, LoraConfig(blocks=("dw", "body"))).adapters


def test_method_blocks_needs_blocks() -> None:
    with pytest.raises(ValueError, match="none was given: choose of front, middle, rear, head and names of layers"):
        METHODS["blocks"](network(*BODIES), LoraConfig())


def test_the_head_alone_has_no_blocks() -> None:
    with pytest.raises(ValueError, match="blocks part: method head trains the head alone; leave them out"):
        METHODS["head"](network(*BODIES), LoraConfig(blocks=("part",)))
