"""The two wheels: they build, hold the right packages and nothing else, and agree on the version."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
SOURCES = ("lorac_deploy", "exporters", "runtime", "tests", "benchmarks")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def build(project: Path, target: Path) -> zipfile.ZipFile:
    """Build the wheel of ``project`` with the setuptools of this environment."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(target), str(project)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """Both wheels, built from a copy, because a build writes into its sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copytree(root / name, copy / name, ignore=NOT_SOURCE)
    for name in FILES:
        shutil.copy(root / name, copy / name)
    return {
        "lorac-deploy": build(copy, tmp_path_factory.mktemp("deploy")),
        "lorac-runtime": build(copy / "runtime", tmp_path_factory.mktemp("runtime")),
    }


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
    lines = [line for line in metadata(wheel).get_all("Requires-Dist", []) if f'extra == "{name}"' in line]
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
    assert metadata(wheels["lorac-deploy"])["Version"] == version
    assert f"lorac-runtime=={version}" in requirements(wheels["lorac-deploy"])


@pytest.mark.parametrize("distribution", ["lorac-deploy", "lorac-runtime"])
def test_both_wheels_carry_the_licence(wheels: dict[str, zipfile.ZipFile], root: Path, distribution: str) -> None:
    (name,) = [n for n in wheels[distribution].namelist() if n.endswith("/LICENSE")]
    assert wheels[distribution].read(name) == (root / "LICENSE").read_bytes()
    assert metadata(wheels[distribution])["License-Expression"] == "Apache-2.0"
