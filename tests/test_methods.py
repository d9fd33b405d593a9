"""What every method says of itself: BN policies, loss, and its place in docs/methods.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorac_deploy.train_config import DEFAULTS
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.manifest import BN_POLICIES, LOSSES, TrainingDefaults

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def rows() -> dict[str, list[str]]:
    """Cells of the page's table, by method."""
    lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text(encoding="utf-8").splitlines())
    return {c[0].strip("`"): c for c in lines if len(c) == 5 and re.fullmatch(r"`[a-z-]+`", c[0])}


def test_every_method_has_a_row_and_a_section() -> None:
    sections = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert list(rows()) == list(METHODS)
    assert sorted(title for title in sections if title in METHODS) == sorted(METHODS)


def test_the_page_says_which_methods_need_blocks_or_no_labels_and_which_add_operators() -> None:
    for name, (_, _, _, needs, drop_in) in rows().items():
        assert ("no labels" in needs) == (METHODS[name].loss == "entropy"), name
        assert ("--blocks" in needs) == (name == "blocks")
        assert drop_in in ("yes", "no")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_its_first_policy_and_its_loss_unless_told(name: str) -> None:
    method = METHODS[name]
    assert method.policy() == method.bn_policies[0]
    assert method.loss_of() == (method.loss or "cross_entropy")
    training = TrainingDefaults(loss=method.loss_of())
    assert ArtifactConfig(method=name, training=training).policy == method.bn_policies[0]
    for policy in BN_POLICIES:
        if policy in method.bn_policies:
            assert ArtifactConfig(method=name, training=training, bn_policy=policy).policy == policy
            continue
        with pytest.raises(ValueError, match=f"method {name} does not go with BN policy '{policy}': choose "):
            ArtifactConfig(method=name, training=training, bn_policy=policy)
    for loss in LOSSES if method.loss else ():
        if loss != method.loss:
            with pytest.raises(ValueError, match=f"method {name} does not go with loss '{loss}': choose {method.loss}"):
                ArtifactConfig(method=name, training=TrainingDefaults(loss=loss))


def test_a_method_has_a_learning_rate_of_its_own_here_and_on_a_device() -> None:
    own = {"head": 0.03, "skip": 0.03, "bias": 0.01, "bn": 0.01, "attention": 0.01}
    for name, method in METHODS.items():
        rate = own.get(name, 0.001)
        assert ArtifactConfig(method=name).settings.lr == rate
        assert DEFAULTS[name].peak_lr == rate
        assert method.training(lr=0.5, epochs=2) == TrainingDefaults(lr=0.5, epochs=2, loss=method.loss_of())


@pytest.mark.parametrize("name", METHODS)
def test_a_form_is_refused_where_there_are_no_adapters(name: str) -> None:
    method = METHODS[name]
    assert method.adapts == name.startswith("lora-")
    if method.adapts:
        assert ArtifactConfig(method=name, form="weight").form == "weight"
        return
    with pytest.raises(ValueError, match=f"form 'weight' is one of adapters, and method {name} has none: leave it out"):
        ArtifactConfig(method=name, form="weight")


def test_every_option_that_a_method_heeds_is_a_setting() -> None:
    fields = set(LoraConfig.__dataclass_fields__) - {"seed"}
    assert all(method.options <= fields for method in METHODS.values())
    assert set().union(*(method.options for method in METHODS.values())) == fields
