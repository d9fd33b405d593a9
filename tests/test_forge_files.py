"""What the forge reads: workflows and forms are well-formed, and the workflow runs what anybody runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
}


def workflow(root: Path, name: str) -> dict[Any, Any]:
    """A workflow as a dictionary; YAML takes its key ``on`` for True."""
    found: dict[Any, Any] = yaml.safe_load((root / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    return found


def steps(found: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in found["jobs"].values() for step in job["steps"]]


def pythons(root: Path) -> list[str]:
    """The versions that `make test-runtime` tests."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    return re.findall(r"[\d.]+", re.findall(r"^RUNTIME_PYTHONS := (.*)$", makefile, re.MULTILINE)[0])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_forge_understands_them(schema: str, root: Path) -> None:
    files = sorted(root.glob(SCHEMAS[schema]))
    assert files
    done = check(schema, *files)
    assert done.returncode == 0, done.stdout


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_mistake_in_a_workflow_is_noticed(root: Path, tmp_path: Path) -> None:
    text = (root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (tmp_path / "ci.yml").write_text(text.replace("runs-on:", "run-on:"), encoding="utf-8")
    assert check("github-workflows", tmp_path / "ci.yml").returncode == 1


def test_continuous_integration_is_the_script_on_every_python(root: Path) -> None:
    job = workflow(root, "ci")["jobs"]["all"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (setup,) = (step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
    assert sorted(setup["python-version"].split()) == sorted(pythons(root))
    assert setup["python-version"].split()[-1] == "3.11"  # the last one is `python`


def test_each_python_of_the_runtime_is_tested_on_arm(root: Path) -> None:
    job = workflow(root, "ci")["jobs"]["runtime-arm"]
    assert job["strategy"]["matrix"]["python"] == pythons(root)


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_may_little_and_end(name: str, root: Path) -> None:
    found = workflow(root, name)
    assert found["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 60 for job in found["jobs"].values())
    assert "group" in found["concurrency"]
    for step in steps(found):
        assert re.search(r"@[0-9a-f]{40}$", step.get("uses", "@" + "0" * 40)), "a tag may be moved: name the commit"
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", "")  # names of branches are not commands


def test_a_release_is_what_make_dist_builds(root: Path) -> None:
    found = workflow(root, "release")
    assert "make dist" in [step.get("run") for step in found["jobs"]["build"]["steps"]]
    assert found["jobs"]["publish"]["needs"] == "build"
    assert not re.search(r"secrets\.", (root / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_pages_name_files_and_targets_that_exist(page: str, root: Path) -> None:
    text = (root / page).read_text(encoding="utf-8")
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    assert {name for name in re.findall(r"`make ([a-z-]+)", text) if f"\n{name}:" not in makefile} == set()
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    paths = re.findall(r"`((?:\.ci|tests|docs|runtime|exporters|lorac_deploy)/[\w./-]*)`", text)
    assert {path for path in (*links, *paths) if not (root / path).exists()} == set()


def test_a_report_of_a_bug_asks_for_versions_and_the_report(root: Path) -> None:
    form = yaml.safe_load((root / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    assert "lorac-finetune --version" in fields["versions"]["attributes"]["description"]
    assert fields["versions"]["validations"]["required"]
    assert fields["report"]["attributes"]["label"] == "report.json"
