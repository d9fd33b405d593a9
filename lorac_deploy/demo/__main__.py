"""`python -m lorac_deploy.demo`: train, export, drift, fine-tune without PyTorch, fuse, verify, evaluate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lorac_deploy.commands._common import guarded
from lorac_deploy.demo.device import Device
from lorac_deploy.demo.loop import prepare, run_loop
from lorac_deploy.demo.results import broken_promises, plot, table


def parser() -> argparse.ArgumentParser:
    """The demo's options."""
    p = argparse.ArgumentParser(prog="python -m lorac_deploy.demo", description=__doc__)
    p.add_argument(
        "--device-python",
        type=Path,
        default=Path(".envs/device/bin/python"),
        help="Python of the environment with onnxruntime and without PyTorch (default: %(default)s)",
    )
    p.add_argument(
        "--training-python",
        type=Path,
        default=Path(".envs/device-training/bin/python"),
        help="the same with onnxruntime-training (default: %(default)s)",
    )
    p.add_argument("--out", type=Path, default=Path("demo"), help="where to write (default: %(default)s)")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; exit status 1 if a promise was not kept."""
    args = parser().parse_args(argv)
    console = Console()
    devices = (
        Device("onnxruntime", args.device_python, "adapted", "onnx,tflite"),
        Device("onnxruntime-training", args.training_python, "adapted_training"),
    )
    prepare(args.out, devices)
    results = run_loop(args.out, devices, console)
    (args.out / "summary.json").write_text(results.to_json(), encoding="utf-8")
    plot(results, args.out / "plot.png")
    console.print(table(results))
    console.print(f"{args.out}/summary.json and {args.out}/plot.png written, {results.seconds:.0f} s in all")
    broken = broken_promises(results)
    for promise in broken:
        console.print(f"[bold red]not kept:[/] {promise}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
