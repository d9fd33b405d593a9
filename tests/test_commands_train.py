"""`lorac-deploy train`, run in this process on small files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
from cifar_files import cifar10_files
from training_cases import dataset, equal, state_of

from lorac_deploy.checkpoint import Checkpoint, load_checkpoint
from lorac_deploy.commands import train as command
from lorac_deploy.commands.train import main
from lorac_deploy.models import ModelSpec, build
from lorac_runtime.adapter import load_adapter

DATA = dataset(36)
QUICK = ["--model", "resnet20", "--epochs", "1", "--batch-size", "16"]


@pytest.fixture(autouse=True, scope="module")
def _no_plots() -> Iterator[None]:
    """As where matplotlib is not installed: drawing takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "local.npz"
    np.savez(path, images=DATA.images, labels=DATA.labels)
    return path


@pytest.fixture(scope="module")
def base(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    assert main(["--data", str(npz), "--class-names", "red,green,blue", "--out", str(folder), *QUICK]) == 0
    return folder


def train(npz: Path, out: Path, *options: str) -> Checkpoint:
    """Train a new network and return the checkpoint."""
    assert main(["--data", str(npz), "--out", str(out), *QUICK, *options]) == 0
    return load_checkpoint(out)


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a wrong command line is answered, after usage."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2].strip()


def test_full_training_leaves_a_checkpoint_and_says_so(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load_checkpoint(base)
    assert (found.spec, found.class_names) == (ModelSpec("resnet20", 3), ("red", "green", "blue"))
    assert found.input.shape == (3, 8, 8)
    names = {p.name for p in base.iterdir()}
    assert names >= {"model.safetensors", "config.json", "report.json"}
    assert "training_state.safetensors" not in names


def test_progress_goes_to_stderr_as_lines(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(npz, tmp_path, "--epochs", "2")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 1/2  loss" in shown.err
    assert "epoch 2/2  loss" in shown.err
    assert "before," in shown.err
    assert "Traceback" not in shown.err


def test_lora_c_from_a_checkpoint_leaves_an_adapter(npz: Path, base: Path, tmp_path: Path) -> None:
    options = ["--method", "lora-c", "--rank", "2", "--layout", "paper", "--bn", "batch", "--epochs", "1"]
    assert main(["--data", str(npz), "--base", str(base), "--out", str(tmp_path), *options]) == 0
    file = load_adapter(tmp_path / "adapter.safetensors")
    wanted = {"method": "lora-c", "layout": "paper", "r": "2", "bn_policy": "batch", "model": "resnet20"}
    assert {key: file.metadata[key] for key in wanted} == wanted
    assert not (tmp_path / "base").exists()
    assert report(tmp_path)["config"]["lora_rank"] == 2


def test_parts_of_a_network_and_of_its_adapters_train_as_asked(npz: Path, base: Path, tmp_path: Path) -> None:
    argv = ["--data", str(npz), "--base", str(base), "--epochs", "1"]
    lora = ["--method", "lora-c", "--rank", "1", "--freeze-a", "--blocks", "layer3.2,conv1,head"]
    assert main([*argv, "--out", str(tmp_path / "lora"), *lora]) == 0
    found = report(tmp_path / "lora")
    assert found["trained_parameters"] == 2 * 64 * 3 * 3 + 16 * 27 + 64 * 3  # two lora_b, stem, head
    assert (found["config"]["lora_freeze_a"], found["config"]["lora_blocks"]) == (True, ["layer3.2", "conv1", "head"])
    assert "layer3.2.conv1.lora_a" in load_adapter(tmp_path / "lora" / "adapter.safetensors").tensors
    assert main([*argv, "--out", str(tmp_path / "full"), "--blocks", "layer3", "--bn", "frozen"]) == 0
    before, after = (load_checkpoint(folder).module.state_dict() for folder in (base, tmp_path / "full"))
    changed = {name.split(".")[0] for name, value in before.items() if not equal({"": value}, {"": after[name]})}
    assert changed == {"layer3"}
    assert report(tmp_path / "full")["config"]["lora_blocks"] == ["layer3"]


@pytest.mark.parametrize(("word", "layers"), [("front", {"conv1", "layer1"}), ("rear", {"layer3", "linear"})])
def test_blocks_are_named_by_words_too(npz: Path, base: Path, tmp_path: Path, word: str, layers: set[str]) -> None:
    argv = ["--data", str(npz), "--base", str(base), "--epochs", "1", "--method", "blocks", "--blocks", word]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    before, after = (load_checkpoint(folder).module.state_dict() for folder in (base, tmp_path / "out"))
    changed = {name.split(".")[0] for name, value in before.items() if not equal({"": value}, {"": after[name]})}
    assert changed == layers
    assert report(tmp_path / "out")["config"]["lora_blocks"] == [word]


def test_a_fresh_head_outside_of_the_blocks_is_refused(
    npz: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(npz), "--base", str(base), "--new-head", "--epochs", "1", "--method", "blocks", "--blocks"]
    with pytest.raises(SystemExit):
        main([*argv, "front", "--out", str(tmp_path / "out")])
    assert "method blocks in blocks front would leave it at them: add head to" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main([*argv, "front,head", "--out", str(tmp_path / "out")]) == 0


def test_lora_c_from_weights_leaves_the_base_too(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build(ModelSpec("resnet20", 10), seed=9)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    options = ["--weights", str(tmp_path / "w.safetensors"), "--method", "lora-c"]
    assert main(["--data", str(npz), "--out", str(tmp_path / "out"), *QUICK, *options]) == 0
    assert "these tensors start fresh: linear.weight, linear.bias" in " ".join(capsys.readouterr().err.split())
    kept = load_checkpoint(tmp_path / "out" / "base")
    np.testing.assert_array_equal(kept.module.conv1.weight.detach(), source.conv1.weight.detach())
    assert kept.input.mean == (0.485, 0.456, 0.406)


def test_a_base_goes_on_with_its_own_classes_and_input(npz: Path, base: Path, tmp_path: Path) -> None:
    rgb = PIL.Image.fromarray(DATA.images[0]).resize((20, 20))
    for name in ("blue", "red"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            rgb.save(tmp_path / "photos" / name / f"{i}.png")
    argv = ["--data", str(tmp_path / "photos"), "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*argv, "--method", "head", "--epochs", "1", "--val-fraction", "0.3"]) == 0
    found = load_checkpoint(tmp_path / "out")
    assert (found.class_names, found.input) == (("red", "green", "blue"), load_checkpoint(base).input)


def test_a_new_head_takes_the_datas_classes(base: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=DATA.images, labels=DATA.labels % 2)
    argv = ["--data", str(tmp_path / "d.npz"), "--class-names", "even,odd", "--base", str(base)]
    assert main([*argv, "--new-head", "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    assert load_checkpoint(tmp_path / "out").class_names == ("even", "odd")


def test_classes_that_the_base_does_not_know_are_named(
    base: Path, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(npz), "--class-names", "red,green,pink", "--base", str(base), "--out", str(tmp_path)]
    assert main(argv) == 1
    assert "classes pink are none of the network's: red, green, blue" in capsys.readouterr().err


def test_digits_report_their_test_accuracy(tmp_path: Path) -> None:
    argv = ["--data", "digits", "--size", "8", "--channels", "1", "--out", str(tmp_path), *QUICK]
    assert main([*argv, "--batch-size", "256"]) == 0
    found = report(tmp_path)
    assert found["train_images"] + found["val_images"] == 1258
    assert 0 < found["test_accuracy"] < 1
    assert load_checkpoint(tmp_path).input.shape == (1, 8, 8)


FLIPS = {
    "--size": ["--size", "10,12"],
    "--channels": ["--channels", "1"],
    "--class-names": ["--class-names", "a,b,c"],
    "--normalize": ["--normalize", "imagenet"],
    "--model": ["--model", "resnet32"],
    "--cifar-stem": ["--model", "squeezenet1_1"],
    "--seed": ["--seed", "1"],
}


@pytest.mark.parametrize("option", sorted(set(FLIPS) - {"--cifar-stem"}))
def test_each_option_of_data_and_network_changes_the_checkpoint(
    npz: Path, tmp_path: Path, base: Path, option: str
) -> None:
    default = load_checkpoint(base)
    found = train(npz, tmp_path, *FLIPS[option])
    facts = [(c.spec, c.input, c.class_names) for c in (default, found)]
    assert facts[0] != facts[1] if option != "--seed" else not equal(state_of(default.module), state_of(found.module))


def test_the_cifar_stem_changes_the_network(npz: Path, tmp_path: Path) -> None:
    found = train(npz, tmp_path, "--model", "mobilenet_v3_small", "--cifar-stem", "--size", "16")
    assert found.spec.cifar_stem
    assert found.module.features[0][0].stride == (1, 1)


def interrupted(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    """Run until the second epoch's first step, then press Ctrl-C."""

    def show(self: object, p: command.Progress) -> None:
        if p.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.Display, "show", show)
        return main(argv)


def test_an_interrupted_command_goes_on_when_given_again(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(npz), *QUICK, "--epochs", "3", "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    assert interrupted(monkeypatch, [*argv, str(tmp_path / "out")]) == 130
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"training_state.safetensors"}
    error = capsys.readouterr().err
    assert "the same command (without --restart) goes on after the last whole epoch" in error
    assert error.endswith("error: interrupted\n")
    assert main([*argv, str(tmp_path / "out")]) == 0
    assert "epoch 1/3" not in capsys.readouterr().err
    whole, resumed = (load_checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert equal(state_of(whole.module), state_of(resumed.module))
    assert not (tmp_path / "out" / "training_state.safetensors").exists()


def test_other_settings_need_restart(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(npz), *QUICK, "--epochs", "3", "--out", str(tmp_path)]
    interrupted(monkeypatch, argv)
    assert main([*argv, "--seed", "1"]) == 1
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert main([*argv, "--seed", "1", "--restart"]) == 0
    assert "epoch 1/3" in capsys.readouterr().err


def test_an_earlier_checkpoint_stays_whole_when_training_fails(npz: Path, base: Path, tmp_path: Path) -> None:
    first = train(npz, tmp_path)
    bad = ["--data", str(npz), *QUICK, "--optimizer", "sgd", "--lr", "1e30", "--clip-norm", "0", "--warmup", "0"]
    assert main([*bad, "--out", str(tmp_path)]) == 1
    assert equal(state_of(load_checkpoint(tmp_path).module), state_of(first.module))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--base", "b", "--model", "resnet20"], "--model says what the checkpoint of --base says itself"),
        (["--base", "b", "--cifar-stem"], "--cifar-stem says what the checkpoint"),
        (["--base", "b", "--weights", "w"], "--weights says what the checkpoint"),
        (["--base", "b", "--size", "8"], "--size says what the checkpoint"),
        (["--base", "b", "--channels", "1"], "--channels says what the checkpoint"),
        (["--base", "b", "--normalize", "data"], "--normalize says what the checkpoint"),
        (["--new-head"], "--new-head goes with --base"),
        (["--method", "lora-c"], "--method lora-c fine-tunes a trained network: give --base or --weights"),
        (["--method", "head"], "--method head fine-tunes a trained network"),
        (["--rank", "8"], "--rank goes with --method lora-c"),
        (["--learnable-alpha"], "--learnable-alpha goes with --method lora-c"),
        (["--freeze-a"], "--freeze-a goes with --method lora-c"),
        (["--method", "head", "--base", "b", "--blocks", "x"], "--blocks goes with --method lora-c"),
        ([*QUICK, "--blocks", "layer9"], "'layer9' holds no layer that could train: there are conv1, layer1, layer2"),
        (["--blocks", "layer1,"], "blocks must be a tuple of layer names"),
        (["--download"], "--download goes with cifar10 and cifar100"),
        (["--data-root", "x"], "--data-root goes with cifar10 and cifar100"),
        (["--epochs", "0"], "epochs is 0, expected at least 1"),
        (["--method", "lora-c", "--base", "b", "--rank", "0"], "rank must be at least 1, got 0"),
        (["--model", "resnet19"], "model 'resnet19' is not known; choose one of"),
        (["--model", "squeezenet1_1", "--cifar-stem"], "squeezenet1_1 has no CIFAR stem"),
        (["--normalize", "imagenet", "--channels", "1"], "does not serve images of 1 channels"),
        (["--class-names", "a,b"], "have 3 classes, which need as many different names"),
        (["--batch-size", "1"], "leave one image alone"),
    ],
)
def test_wrong_command_lines_are_explained(
    npz: Path, tmp_path: Path, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(capsys, "--data", npz, "--out", tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--data", "nowhere"], "no data 'nowhere'"),
        (["--base", "nowhere"], "config.json not found"),
        (["--weights", "nowhere.pth"], "nowhere.pth not found"),
        (["--data", "cifar10"], "say which folder holds it"),
        (["--val-fraction", "0.001"], "too few to hold out"),
    ],
)
def test_what_cannot_be_read_is_one_message(
    npz: Path, tmp_path: Path, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(npz), "--out", str(tmp_path), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert text in error


def test_an_unwritable_output_folder_is_found_before_training(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--data", str(npz), "--out", str(tmp_path / "file" / "out"), *QUICK]) == 1
    error = capsys.readouterr().err
    assert "cannot write" in error
    assert "epoch" not in error


def test_cifar_is_normalised_by_its_known_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10_files(tmp_path, monkeypatch)
    argv = ["--data", "cifar10", "--data-root", str(tmp_path), "--out", str(tmp_path / "out"), *QUICK]
    assert main([*argv, "--val-fraction", "0.3"]) == 0
    found = load_checkpoint(tmp_path / "out")
    assert found.input.mean == (0.4914, 0.4822, 0.4465)
    assert found.class_names == tuple("abcdefghij")
    assert report(tmp_path / "out")["test_accuracy"] is not None
