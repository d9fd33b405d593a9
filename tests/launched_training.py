"""What each process does that `tests/test_acceleration.py` launches; OUT is the only argument."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
from acceleration_cases import CASES, fresh_images, plain_network, train_case
from training_cases import state_of

from lorac_deploy.acceleration import is_main, several
from lorac_deploy.commands.train import main
from lorac_deploy.training_report import Progress


def tried(out: Path) -> None:
    """All cases, a run that goes on, and what is refused; each process leaves its own files."""
    rank = os.environ["RANK"]
    for name in CASES:
        net, seen = plain_network(), []
        report = train_case(net, name, test=fresh_images(), on_progress=seen.append)
        safetensors.torch.save_file(state_of(net), out / f"{name}-{rank}.safetensors")
        content = dataclasses.asdict(report) | {"told": len(seen), "main": is_main(), "several": several()}
        content["types"] = sorted({type(part).__name__ for part in net.modules()})
        (out / f"{name}-{rank}.json").write_text(json.dumps(content))
    (out / f"refusal-{rank}.txt").write_text(refusal())
    resumed(out, rank)
    commanded(out, rank)


def commanded(out: Path, rank: str) -> None:
    """The command, and what it says; and that it does not download."""
    data = fresh_images()
    path = out / f"data-{rank}.npz"
    np.savez(path, images=data.images, labels=data.labels)
    options = ["--model", "resnet20", "--epochs", "1", "--batch-size", "64", "--out", str(out / "out")]
    cifar = ["--data", "cifar10", "--data-root", str(out), "--download"]
    for name, argv in (("download", [*cifar, *options]), ("command", ["--data", str(path), *options])):
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
            main(argv)
        (out / f"{name}-{rank}.txt").write_text(said.getvalue())


def refusal() -> str:
    """What a batch too small for two processes is answered."""
    try:
        train_case(plain_network(), "head", config=dataclasses.replace(CASES["head"][1], batch_size=1))
    except ValueError as err:
        return str(err)
    return "nothing"


def resumed(out: Path, rank: str) -> None:
    """The state that one process left is where two go on; afterwards nothing is left to do."""
    told: list[Progress] = []
    for name in ("resumed", "finished"):
        net = plain_network()
        train_case(net, "full", state=out / "state", on_progress=told.append)
        safetensors.torch.save_file(state_of(net), out / f"{name}-{rank}.safetensors")
    (out / f"resumed-{rank}.json").write_text(json.dumps([p.epoch for p in told]))


if __name__ == "__main__":
    warnings.simplefilter("error")
    tried(Path(sys.argv[1]))
