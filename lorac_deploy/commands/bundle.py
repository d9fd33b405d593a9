"""`lorac-deploy bundle ARTIFACT --out FILE.pyz`: the runtime and an artifact in one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lorac_deploy.commands._common import guarded


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy bundle",
        description="Pack the runtime and a training artifact into one file, which a device runs with "
        "`python3 FILE --data DATA --out STATE`. It needs Python, numpy, safetensors and onnxruntime there, and takes "
        "the options of ort_finetune.py, which `python3 FILE --help` lists.",
    )
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    p.add_argument("--out", type=Path, required=True, help="the file to write, usually NAME.pyz")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    from lorac_deploy.bundle import write_bundle

    nbytes = write_bundle(args.artifact, args.out)
    print(f"{args.out}: {nbytes / 1e6:.1f} MB; on the device: python3 {args.out.name} --data DATA --out STATE")
    return 0
