"""What all commands share: errors become one message and an exit status, bugs stay bugs."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import pytest

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_runtime.errors import CheckpointError, DataError, LoracDeployError


def raising(error: BaseException) -> object:
    @guarded
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (LoracDeployError("no such model"), 1, "error: no such model\n"),
        (DataError("two\n  - lines"), 1, "error: two\n  - lines\n"),
        (CheckpointError("x"), 1, "error: x\n"),
        (PermissionError(13, "Permission denied", "/f"), 1, "error: [Errno 13] Permission denied: '/f'\n"),
        (MemoryError("9 GiB"), 1, "error: out of memory; try a smaller --batch-size or less data (9 GiB)\n"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            1,
            "error: out of memory; try a smaller --batch-size or less data "
            "(CUDA out of memory. Tried to allocate 2 GiB)\n",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            1,
            "error: out of memory; try a smaller --batch-size or less data "
            "(DefaultCPUAllocator: can't allocate memory: 8 bytes)\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_goes_wrong_for_users_is_one_message_on_stderr(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error)([]) == status
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", text)


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), AssertionError("bug")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="bug"):
        raising(error)([])


def test_a_status_and_the_arguments_pass_through() -> None:
    @guarded
    def main(argv: Sequence[str] | None = None) -> int:
        """Documented."""
        return 5 if argv is None else len(argv)

    assert (main(), main(["a"])) == (5, 1)
    assert main.__doc__ == "Documented."


def test_a_reader_that_left_is_no_error_worth_words() -> None:
    code = (
        "from lorac_deploy.commands._common import guarded\n@guarded\ndef main(argv=None):\n"
        "    for _ in range(100000): print('x' * 100)\n    return 0\nimport sys; sys.exit(main())"
    )
    command = f'{sys.executable} -c "$CODE" | head -1; exit ${{PIPESTATUS[0]}}'
    variables = {"CODE": code, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=variables, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_settings_that_do_not_fit_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="planted")
    with pytest.raises(SystemExit) as stop, usage_errors(parser):
        raise ValueError("rank must be at least 1")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("planted: error: rank must be at least 1\n")
    with usage_errors(parser):
        pass
