"""Advice: gradient norms against PyTorch, the choice among candidates, and a whole run on a small network."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_artifacts import SPEC, export
from torch import nn

from lorac_deploy.advise.advice import Advice, Option, advise, choose, export_choice
from lorac_deploy.advise.candidates import Candidate, candidates, export_candidate
from lorac_deploy.advise.sensitivity import block_scores, relative_gradients
from lorac_deploy.advise.trial import Score, Trial, better_half, run_trials
from lorac_deploy.commands.advise import main
from lorac_exporters.memory_plan import read_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.data import LocalData, preprocess
from lorac_runtime.errors import ConversionError, DataError, DivergenceError
from lorac_runtime.manifest import load

QUICK = Trial(steps=4, evidence=(10, 20))  # one split, then another


def net() -> nn.Sequential:
    """Three stages: 10, 5 and 3 pixels wide."""
    torch.manual_seed(1)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    later = [nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*first, *later, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def norm_net() -> nn.Sequential:
    """One that TENT can train."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def data(count: int, *, classes: int = 4) -> LocalData:
    """Images whose class shows in their colours."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    tints = np.array([[200, 20, 20], [20, 200, 20], [20, 20, 200], [200, 200, 20]])[labels]
    noise = rng.integers(-20, 20, (count, 10, 10, 3))
    return LocalData((tints[:, None, None, :] + noise).clip(0, 255).astype(np.uint8), labels.astype(np.int64))


def saved(folder: Path, found: LocalData) -> Path:
    path = folder / "local.npz"
    np.savez(path, images=found.images, labels=found.labels)
    return path


def test_relative_gradients_are_pytorchs(tmp_path: Path) -> None:
    module, local = net(), data(16)
    export(tmp_path / "full", module, method="full")
    found = relative_gradients(tmp_path / "full", local, batches=1)
    images = torch.from_numpy(preprocess(local.images, SPEC))  # a batch holds all of them, in whatever order
    nn.functional.cross_entropy(module(images), torch.from_numpy(local.labels)).backward()
    parameters = dict(module.named_parameters())
    assert found.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert found[name] == pytest.approx((parameter.grad.norm() / parameter.norm()).item(), rel=1e-4)


def test_several_batches_are_averaged(tmp_path: Path) -> None:
    export(tmp_path / "full", net(), method="full")
    one, many = (relative_gradients(tmp_path / "full", data(16), batches=b) for b in (1, 3))
    assert many == pytest.approx(one, rel=1e-4)  # each holds all images


def test_gradients_without_labels_are_refused(tmp_path: Path) -> None:
    export(tmp_path / "full", net(), method="full")
    with pytest.raises(ValueError, match="gradients need labels"):
        relative_gradients(tmp_path / "full", dataclasses.replace(data(4), labels=None))


def test_a_blocks_score_is_the_mean_over_its_weights() -> None:
    relative = {"a.weight": 1.0, "b.weight": 3.0, "c.weight": 8.0, "c.bias": 100.0}
    assert block_scores(relative, {"front": ("a", "b"), "rear": ("c",), "head": ("d",)}) == {
        "front": 0.25,
        "rear": 1.0,
        "head": 0.0,
    }


def test_candidates_are_every_block_in_full_and_adapters_on_the_best_one() -> None:
    scores = {"front": 0.2, "middle": 1.0, "rear": 0.5, "head": 0.9}
    found = candidates(("head", "blocks", "lora-c", "skip"), scores, LoraConfig(rank=2))
    labels = ["head", "blocks front", "blocks middle", "blocks rear", "lora-c", "lora-c middle", "skip"]
    assert [c.label for c in found] == labels
    assert found[5].options == ("--method", "lora-c", "--rank", "2", "--blocks", "middle")


def test_without_blocks_only_methods_of_the_whole_network_are_tried() -> None:
    found = candidates(("head", "blocks", "lora-c"), {}, LoraConfig())
    assert [c.label for c in found] == ["head", "lora-c"]


def option(label: str, *accuracies: float, work: int = 100, failed: str | None = None) -> Option:
    score = Score((0.1,) * len(accuracies), accuracies, (0.01,) * len(accuracies), failed)
    return Option(Candidate(label, None, LoraConfig()), 10, work, 10, 1.0, score)


def test_the_best_of_the_last_round_is_chosen() -> None:
    options = [option("a", 0.7, 0.9), option("b", 0.7, 0.8), option("c", 0.9)]
    assert choose(options)[0].candidate.method == "a"


def test_a_cheaper_one_within_a_point_is_chosen_instead() -> None:
    chosen, reason = choose([option("dear", 0.805), option("cheap", 0.8, work=10), option("bad", 0.7, work=1)])
    assert chosen.candidate.method == "cheap"
    assert "within 1 point of dear (80.5 %) at 0.10 of its work" in reason


def test_a_candidate_that_diverged_is_not_chosen() -> None:
    assert choose([option("a", 0.9, 0.9, failed="nan"), option("b", 0.2, 0.2)])[0].candidate.method == "b"
    assert choose([option("a", 0.9, 0.9, failed="nan"), option("b", 0.2)])[0].candidate.method == "b"


def test_where_everything_diverged_nothing_is_chosen() -> None:
    with pytest.raises(DivergenceError, match=r"no trial came to an end:\n  - a: the loss is nan\n  - b: it is inf"):
        choose([option("a", failed="the loss is nan"), option("b", 0.3, failed="it is inf")])


def test_scores_add_up_over_splits_and_the_better_half_goes_on(artifact: Path) -> None:
    manifest = load(artifact)
    graphs = read_graphs(artifact, manifest)
    folders = [artifact.parent / f"trial-{method}" for method in ("head", "full", "lora-c")]
    for folder, method in zip(folders, ("head", "full", "lora-c"), strict=True):
        export_candidate(graphs, manifest, Candidate(method, None, LoraConfig(rank=1)), folder)
    told: list[tuple[int, int]] = []
    first = run_trials(folders, data(48), Trial(steps=2, evidence=(10,)), on_progress=_ignore)
    found = run_trials(folders, data(48), Trial(steps=2, evidence=(10, 40)), on_progress=lambda *a: told.append(a))
    assert [s.after[:1] for s in found] == [s.after for s in first]
    kept = better_half(range(3), [s.accuracy for s in first])
    assert [len(s.after) for s in found] == [3 if i in kept else 1 for i in range(3)]
    assert told == [(1, 7), (2, 7), (3, 7), (5, 7), (7, 7)]


def _ignore(_done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advise") / "artifact"
    export(folder, net(), lora=LoraConfig(rank=1))
    return folder


@pytest.fixture(scope="module")
def advice(artifact: Path) -> Advice:
    return advise(artifact, saved(artifact.parent, data(48)), lora=LoraConfig(rank=1), trial=QUICK)


def test_everything_that_was_tried_is_told(advice: Advice) -> None:
    assert set(advice.scores) == {"front", "middle", "rear", "head"}
    assert max(advice.scores.values()) == 1.0
    assert advice.chosen in advice.options
    kept = [o for o in advice.options if len(o.score.after) == 2]
    assert len(kept) == (len(advice.options) + 1) // 2
    assert all(len(o.score.after) == len(o.score.before) >= 1 for o in advice.options)
    told = json.loads(advice.to_json())
    assert told["chosen"]["candidate"]["method"] == advice.chosen.candidate.method


def test_costs_follow_what_trains(advice: Advice) -> None:
    by_label = {o.candidate.label: o for o in advice.options}
    assert by_label["head"].work < by_label["blocks rear"].work < by_label["blocks front"].work
    assert by_label["head"].trained == 16 * 4 + 4


def test_the_choice_becomes_an_artifact_of_the_same_network(advice: Advice, artifact: Path, tmp_path: Path) -> None:
    export_choice(artifact, advice, tmp_path / "chosen")
    chosen, given = load(tmp_path / "chosen"), load(artifact)
    assert chosen.method == advice.chosen.candidate.method
    assert chosen.trained_parameters == advice.chosen.trained
    assert (chosen.model_parameters, chosen.class_names) == (given.model_parameters, given.class_names)
    assert chosen.training.epochs == given.training.epochs


@pytest.mark.parametrize(
    ("given", "lr"), [({}, {"head": 0.03, "lora-c": 0.001}), ({"lr": 0.2}, {"head": 0.2, "lora-c": 0.2})]
)
def test_a_candidate_has_its_own_learning_rate_unless_one_was_chosen(
    given: dict[str, float], lr: dict[str, float], tmp_path: Path
) -> None:
    export(tmp_path / "given", net(), method="bias", training=METHODS["bias"].training(epochs=3, **given))
    manifest = load(tmp_path / "given")
    graphs = read_graphs(tmp_path / "given", manifest)
    for method in lr:
        export_candidate(graphs, manifest, Candidate(method, None, LoraConfig(rank=1)), tmp_path / method)
    made = {method: load(tmp_path / method).training for method in lr}
    assert {method: settings.lr for method, settings in made.items()} == lr
    assert {settings.epochs for settings in made.values()} == {3}


def test_a_method_without_labels_leaves_its_loss_behind(tmp_path: Path) -> None:
    export(tmp_path / "tent", norm_net(), method="tent")
    manifest = load(tmp_path / "tent")
    graphs = read_graphs(tmp_path / "tent", manifest)
    export_candidate(graphs, manifest, Candidate("head", None, LoraConfig()), tmp_path / "head")
    assert (manifest.training.loss, load(tmp_path / "head").training.loss) == ("entropy", "cross_entropy")


def test_unlabelled_data_are_refused_with_what_can_be_done(artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "unlabelled.npz", images=data(8).images)
    with pytest.raises(DataError, match=r"labels"):
        advise(artifact, tmp_path / "unlabelled.npz")


def test_methods_that_do_not_fit_are_all_told(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="none of the methods fits"):
        advise(artifact, saved(tmp_path, data(8)), methods=("bn",), trial=QUICK)


def test_the_command_shows_the_choice_and_writes_it(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(artifact), "--data", str(saved(tmp_path, data(24))), "--methods", "head,blocks"]
    arguments += ["--trial-steps", "2", "--out"]
    assert main([*arguments, str(tmp_path / "chosen")]) == 0
    shown = capsys.readouterr().out
    assert "relative gradients of the blocks: front" in shown
    assert "chosen: " in shown
    assert load(tmp_path / "chosen").method in ("head", "blocks")
    assert json.loads((tmp_path / "chosen.json").read_text())["samples"] == 24


def test_a_trial_makes_the_steps_of_the_run_but_no_more_than_asked_for(artifact: Path) -> None:
    training = dataclasses.replace(load(artifact).training, epochs=10, batch_size=8)  # 24 samples: 30 steps
    assert Trial().epochs(24, training) == 10  # 17 samples train, in 3 batches
    assert Trial(steps=6).epochs(24, training) == 2
    assert Trial(steps=1).epochs(24, training) == 1


def test_no_steps_are_a_mistake_in_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--data", "x", "--trial-steps", "0"])
    assert "--trial-steps must be at least 1, got 0" in capsys.readouterr().err


def test_an_unknown_method_is_a_mistake_in_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--data", "x", "--methods", "magic"])
    assert "magic is not one of lora-c" in capsys.readouterr().err
