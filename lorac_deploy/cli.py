"""`lorac-deploy`: one command, one module per sub-command. A sub-command's imports happen when it is chosen."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lorac_runtime.version import __version__


@dataclass(frozen=True)
class Command:
    """A sub-command: a module with ``main(argv) -> int``, and one line about it."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "train": Command("lorac_deploy.commands.train", "train or fine-tune a CNN in PyTorch, by any of the methods"),
    "export-training-artifact": Command(
        "lorac_deploy.commands.export_training_artifact", "write the folder that a device trains with"
    ),
    "export": Command(
        "lorac_deploy.commands.export", "write an artifact's network as a TFLite or ONNX file, an adapter fused into it"
    ),
    "bundle": Command("lorac_deploy.commands.bundle", "pack the runtime and an artifact into one file for a device"),
    "web": Command("lorac_deploy.commands.web", "write a static page that adapts the model in a browser"),
    "sign": Command("lorac_deploy.commands.sign", "sign an artifact, for devices that take no others"),
    "import": Command("lorac_deploy.commands.import_adapter", "make an adapter of PEFT, loralib or others one of ours"),
    "plan": Command("lorac_deploy.commands.plan", "say what a device with little memory can train"),
    "advise": Command("lorac_deploy.commands.advise", "choose method and block for the drift in local data"),
    "study": Command("lorac_deploy.commands.study", "compare methods over drifts, sizes and seeds"),
    "federate": Command("lorac_deploy.commands.federate", "train one adapter on many devices, simulated or real"),
    "verify": Command("lorac_deploy.commands.verify", "check that a fused file is a drop-in for its base"),
    "bench": Command("lorac_deploy.commands.bench", "measure whether a fused file is as fast as its base, here"),
    "certify": Command(
        "lorac_deploy.commands.certify", "compare the answers of PyTorch, ONNX and TFLite on real images"
    ),
}


def parser() -> argparse.ArgumentParser:
    """The options before the sub-command's name; the rest is left to the sub-command.

    >>> parser().parse_args(["train", "--data", "digits"]).arguments
    ['--data', 'digits']
    """
    lines = [f"  {name:26}{command.summary}" for name, command in COMMANDS.items()]
    p = argparse.ArgumentParser(
        prog="lorac-deploy",
        description="LoRA-C for CNNs: train in PyTorch, export a training artifact, check the fused result.",
        epilog="\n".join(["commands:", *lines, "", "`lorac-deploy COMMAND --help` lists a command's options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"lorac-deploy {__version__}", help="show the version")
    p.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND", help="one of the commands below")
    p.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own options")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns its exit status (0 done, 1 failed, 2 wrong command line)."""
    args = parser().parse_args(argv)
    module = importlib.import_module(COMMANDS[args.command].module)
    status: int = module.main(args.arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
