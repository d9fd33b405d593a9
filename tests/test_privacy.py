"""Nothing of the local data leaves the device in what a run writes, and no connection is opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from artifacts import Tiny, build
from finetune_runs import in_new_python, write_data
from PIL import Image
from tiny_network import CLASSES, Recipe

from lorac_runtime import cli

NAME = "alice-at-home"
OPTIONS = ("--epochs", "4", "--lr", "0.01", "--threads", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    with np.load(write_data(tmp_path_factory.mktemp("data") / "local.npz", 300)) as file:
        return file["images"], file["labels"]


@pytest.fixture(scope="module")
def folder(tiny: Tiny, arrays: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pictures")
    for index, (image, label) in enumerate(zip(*arrays, strict=True)):
        place = home / tiny.manifest.class_names[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{NAME}-{index}.png")
    return home


def traces(content: bytes, images: np.ndarray, labels: np.ndarray) -> list[str]:
    """What of the data can be found in some bytes: names, pixels, labels in any integer type or as text."""
    found = ["name"] if NAME.encode() in content else []
    layouts = (images, images.transpose(0, 3, 1, 2))
    found += ["pixels"] if any(i.tobytes()[:48] in content for array in layouts for i in array) else []
    texts = [json.dumps(labels.tolist()), ",".join(map(str, labels)), "".join(map(str, labels))]
    kinds = [labels.astype(kind).tobytes() for kind in ("<i8", "<i4", "u1")] + [text.encode() for text in texts]
    cut = [kind[: len(kind) // 2] for kind in kinds] + [kind[len(kind) // 2 :] for kind in kinds]
    return found + (["labels"] if any(part in content for part in cut) else [])


def test_traces_are_found_where_there_are_some(arrays: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = arrays
    assert traces(f"read {NAME}-7.png".encode(), images, labels) == ["name"]
    assert traces(b"x" + images.tobytes(), images, labels) == ["pixels"]
    assert traces(b"x" + labels.tobytes(), images, labels) == ["labels"]
    assert traces(json.dumps({"labels": labels.tolist()}).encode(), images, labels) == ["labels"]


@pytest.mark.parametrize("keep", [(), ("--keep-if-better",)])
def test_files_and_log_hold_nothing_of_the_data(
    tiny: Tiny,
    folder: Path,
    arrays: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    keep: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was stopped in between included: its checkpoints."""
    out = tmp_path / "out"
    command = [str(tiny.folder), "--data", str(folder), "--out", str(out), *OPTIONS, *keep, "--events"]
    assert cli.main([*command, "--time-budget", "0.001s"]) == 75
    seen = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert any("checkpoint" in name for name in seen)
    assert cli.main(command) == 0
    seen |= {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    log = capsys.readouterr()
    seen |= {"stdout": log.out.encode(), "stderr": log.err.encode(), "names": "\n".join(seen).encode()}
    assert len(seen) > 6
    assert {name: found for name, content in seen.items() if (found := traces(content, *arrays))} == {}


def test_a_file_that_cannot_be_read_is_not_named_in_the_log(
    tiny: Tiny, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    (pictures / tiny.manifest.class_names[0] / f"{NAME}-0.png").write_bytes(b"no image")
    command = [str(tiny.folder), "--data", str(pictures), "--out", str(tmp_path / "out"), *OPTIONS]
    assert cli.main([*command, "--events"]) == 1
    assert NAME not in "".join(capsys.readouterr())
    assert cli.main(command) == 1
    assert f"{NAME}-0.png" in capsys.readouterr().err  # a person is told which one


def test_warnings_name_no_classes(
    tiny: Tiny, arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which classes a device saw is about its data too."""
    images, labels = arrays
    np.savez(tmp_path / "some.npz", images=images[labels != 1], labels=labels[labels != 1])
    command = [str(tiny.folder), "--data", str(tmp_path / "some.npz"), "--out", str(tmp_path / "out"), *OPTIONS]
    assert cli.main([*command, "--events"]) == 0
    texts = [json.loads(line).get("text", "") for line in capsys.readouterr().out.splitlines()]
    warned = [text for text in texts if "training on the others" in text]
    assert len(warned) == 1
    assert warned[0].startswith("... has no ... of 1 of the 3 classes (...)")
    assert tiny.manifest.class_names[1] not in "".join(texts)
    assert CLASSES == 3


WATCHED = """
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(event) if event.startswith("socket.") else None)
from lorac_runtime import cli
status = cli.main(sys.argv[1:])
import os
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
print("sockets", opened)
sys.exit(status)
"""


def test_no_connection_is_opened(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    done = in_new_python(WATCHED, tiny.folder, "--data", folder, "--out", tmp_path / "out", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "sockets []"


def _namespaces() -> bool:
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "-rn", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _namespaces(), reason="needs user and network namespaces")
def test_a_machine_without_a_network_is_enough(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    """Inside of the namespace there is not even a loopback device that is up."""
    words = [tiny.folder, "--data", folder, "--out", tmp_path / "out", *OPTIONS, "--keep-if-better"]
    code = "import sys\nfrom lorac_runtime import cli\nsys.exit(cli.main(sys.argv[1:]))"
    command = ["unshare", "-rn", sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accepted")
