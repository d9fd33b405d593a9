"""What is released: two wheels and two sdists hold the right files and nothing else, and build the same anywhere."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lorac_runtime import __version__

SOURCE = {"lorac-deploy": ".", "lorac-runtime": "runtime"}  # folder in the checkout


@pytest.fixture(scope="module")
def tracked(root: Path) -> list[str]:
    """Files of the checkout that belong to it, by their paths."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("tells sources from other files by git, and this is no checkout")
    return [name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def copied(root: Path, tracked: list[str], target: Path) -> Path:
    """The checkout without what lies about; every file is as old as its copy."""
    for name in tracked:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, target / name)
    return target


def build(module: str, options: list[str], project: Path, **environment: str) -> None:
    """Build with this environment's tools, without a network."""
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(
        command, cwd=project, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(root: Path, tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both sdists, and both wheels made of them."""
    target, copy = tmp_path_factory.mktemp("dist"), copied(root, tracked, tmp_path_factory.mktemp("checkout"))
    for folder in SOURCE.values():
        build("build", ["--no-isolation", "--outdir", str(target)], copy / folder)
    return target


@pytest.fixture(scope="module")
def wheels(built: Path) -> dict[str, zipfile.ZipFile]:
    """Both wheels."""
    return {name: zipfile.ZipFile(next(built.glob(f"{name.replace('-', '_')}-*.whl"))) for name in SOURCE}


@pytest.fixture(scope="module")
def sdists(built: Path) -> dict[str, dict[str, bytes]]:
    """Both sdists: every file by its path below the folder that they unpack to."""
    return {name: contents(next(built.glob(f"{name.replace('-', '_')}-*.tar.gz"))) for name in SOURCE}


def contents(path: Path) -> dict[str, bytes]:
    """All members, which must be files."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None, member.name
            found[member.name.partition("/")[2]] = stream.read()
    return found


def packages(wheel: zipfile.ZipFile) -> set[str]:
    """Top-level packages of a wheel, its metadata left out."""
    tops = {name.split("/")[0] for name in wheel.namelist()}
    return {top for top in tops if not top.endswith(".dist-info")}


def metadata(wheel: zipfile.ZipFile) -> Message:
    """The METADATA file of a wheel."""
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def requirements(wheel: zipfile.ZipFile) -> list[str]:
    """What a wheel requires without any extra."""
    return [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]


def test_each_wheel_holds_its_packages_and_nothing_else(wheels: dict[str, zipfile.ZipFile]) -> None:
    assert packages(wheels["lorac-runtime"]) == {"lorac_runtime"}
    assert packages(wheels["lorac-deploy"]) == {"lorac_deploy", "lorac_exporters"}


@pytest.mark.parametrize(
    ("distribution", "package", "folder"),
    [
        ("lorac-runtime", "lorac_runtime", "runtime/lorac_runtime"),
        ("lorac-deploy", "lorac_exporters", "exporters/lorac_exporters"),
        ("lorac-deploy", "lorac_deploy", "lorac_deploy"),
    ],
)
def test_every_module_and_the_type_marker_is_packed(
    wheels: dict[str, zipfile.ZipFile], root: Path, distribution: str, package: str, folder: str
) -> None:
    page = [path for path in (root / folder / "web" / "static").rglob("*") if path.is_file()]
    sources = {*(root / folder).rglob("*.py"), root / folder / "py.typed", *page}
    assert bool(page) == (package == "lorac_deploy")
    expected = {f"{package}/{path.relative_to(root / folder).as_posix()}" for path in sources}
    assert expected == {n for n in wheels[distribution].namelist() if n.startswith(f"{package}/")}


def test_a_device_installs_only_numpy_and_safetensors(wheels: dict[str, zipfile.ZipFile]) -> None:
    names = {re.split(r"[<>=! ]", line)[0] for line in requirements(wheels["lorac-runtime"])}
    assert names == {"numpy", "safetensors"}
    assert len(requirements(wheels["lorac-deploy"])) > 2  # the same reading finds more where there is more


def extra(wheel: zipfile.ZipFile, name: str) -> Requirement:
    """The one requirement of an extra."""
    lines = [line for line in metadata(wheel).get_all("Requires-Dist", []) if f"extra == '{name}'" in line]
    (line,) = lines
    return Requirement(line)


def applies(requirement: Requirement, extra: str, python: str, machine: str) -> bool:
    """Whether pip installs a requirement there."""
    assert requirement.marker is not None
    return requirement.marker.evaluate({"extra": extra, "python_version": python, "platform_machine": machine})


def test_the_engine_onnxruntime_is_one_package_for_every_python_and_processor(
    wheels: dict[str, zipfile.ZipFile],
) -> None:
    found = extra(wheels["lorac-runtime"], "onnxruntime")
    assert found.name == "onnxruntime"
    for python in ("3.10", "3.13"):
        for machine in ("x86_64", "aarch64"):
            assert applies(found, "onnxruntime", python, machine)
    versions = ("1.16.3", "1.17.0", "1.19.2", "1.21.0", "1.31.1")
    assert [found.specifier.contains(version) for version in versions] == [False, True, True, False, True]


def test_the_training_build_is_an_extra_of_its_own_where_it_has_wheels(wheels: dict[str, zipfile.ZipFile]) -> None:
    found = extra(wheels["lorac-runtime"], "onnxruntime-training")
    assert (found.name, str(found.specifier)) == ("onnxruntime-training-cpu", "==1.19.2")
    supported = [applies(found, "onnxruntime-training", python, "x86_64") for python in ("3.10", "3.12", "3.13")]
    assert supported == [True, True, False]


def test_versions_are_equal_and_pinned_to_each_other(wheels: dict[str, zipfile.ZipFile]) -> None:
    version = metadata(wheels["lorac-runtime"])["Version"]
    assert metadata(wheels["lorac-deploy"])["Version"] == version == __version__
    assert f"lorac-runtime=={version}" in requirements(wheels["lorac-deploy"])


@pytest.mark.parametrize("distribution", ["lorac-deploy", "lorac-runtime"])
def test_both_wheels_carry_the_licence(wheels: dict[str, zipfile.ZipFile], root: Path, distribution: str) -> None:
    (name,) = [n for n in wheels[distribution].namelist() if n.endswith("/LICENSE")]
    assert wheels[distribution].read(name) == (root / "LICENSE").read_bytes()
    assert metadata(wheels[distribution])["License-Expression"] == "Apache-2.0"


def test_an_sdist_of_the_whole_is_the_checkout(sdists: dict[str, dict[str, bytes]], tracked: list[str]) -> None:
    assert {*sdists["lorac-deploy"]} == {*tracked, "PKG-INFO"}


def test_an_sdist_of_the_runtime_holds_its_sources_and_no_more(
    sdists: dict[str, dict[str, bytes]], tracked: list[str]
) -> None:
    own = {name.removeprefix("runtime/") for name in tracked if name.startswith("runtime/")}
    assert {*sdists["lorac-runtime"]} == {*own, "PKG-INFO", ".gitignore"}
    assert {"LICENSE", "README.md", "ort_finetune.py", "lorac_runtime/py.typed"} < own


def test_builds_elsewhere_and_at_another_time_give_the_same_bytes(
    built: Path, root: Path, tracked: list[str], tmp_path: Path
) -> None:
    copy = copied(root, tracked, tmp_path / "other" / "place")
    for path in copy.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (10**9, 10**9))
    for folder in SOURCE.values():  # a wheel of the checkout itself too, not of the sdist
        build("hatchling", ["build", "-d", str(tmp_path / "dist")], copy / folder, TZ="Asia/Tokyo", PYTHONHASHSEED="7")
    assert {p.name: p.read_bytes() for p in (tmp_path / "dist").iterdir()} == {
        p.name: p.read_bytes() for p in built.iterdir()
    }
    assert len([*built.iterdir()]) == 4


def test_an_index_takes_them(built: Path) -> None:
    build("twine", ["check", "--strict", *map(str, built.iterdir())], built)


@pytest.mark.parametrize("distribution", SOURCE)
def test_the_description_has_no_link_that_leads_nowhere(
    wheels: dict[str, zipfile.ZipFile], root: Path, distribution: str
) -> None:
    text = str(metadata(wheels[distribution]).get_payload())
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert [link for link in links if not link.startswith("https://")] == []
    readme = (root / SOURCE[distribution] / "README.md").read_text(encoding="utf-8")
    assert "docs/device.md" in text or "docs/" not in readme  # the words of a link stay
    assert len(text) > 0.8 * len(readme)


@pytest.mark.parametrize("distribution", SOURCE)
def test_both_say_what_they_are_typed_for_and_where_they_run(
    wheels: dict[str, zipfile.ZipFile], distribution: str
) -> None:
    found = metadata(wheels[distribution])
    classifiers = found.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    named = {c.rpartition(" ")[2] for c in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c)}
    allowed = SpecifierSet(found["Requires-Python"])
    assert named == {f"3.{minor}" for minor in range(8, 20) if allowed.contains(f"3.{minor}")}
