"""`lorac-deploy web ARTIFACT --out SITE`: a static page that adapts the model in a browser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lorac_deploy.commands._common import guarded

FORMATS = ("onnx", "tflite")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy web",
        description="Write a static page on which anybody labels images, adapts the artifact's model in the browser "
        "and downloads the adapter and the fused file. No image leaves the browser; any server for static files "
        "will do: python3 -m http.server --directory SITE. See docs/browser.md.",
    )
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    p.add_argument("--out", type=Path, required=True, help="the folder to write; an older page there is replaced")
    p.add_argument(
        "--to",
        type=_formats,
        default=("onnx",),
        metavar="FORMATS",
        help="formats of the fused file that the page offers: onnx, tflite or onnx,tflite (default: onnx)",
    )
    p.add_argument(
        "--webgpu",
        action="store_true",
        help="offer the graphics processor too, where browsers have WebGPU: 27 MB more, loaded only if chosen",
    )
    p.add_argument(
        "--onnxruntime-web",
        type=Path,
        metavar="FOLDER",
        help="the npm package onnxruntime-web, such as node_modules/onnxruntime-web (default: npm fetches it into "
        "~/.cache/lorac-deploy, once)",
    )
    return p


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r} is not onnx, tflite or onnx,tflite")
    return names


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    from lorac_deploy.web.site import write_site

    site = write_site(args.artifact, args.out, to=args.to, webgpu=args.webgpu, engine=args.onnxruntime_web)
    parts = f"onnxruntime-web {site.engine_nbytes / 1e6:.1f}, artifact {site.artifact_nbytes / 1e6:.1f}"
    print(f"{args.out}: {site.nbytes / 1e6:.1f} MB ({parts})")
    print(f"try it: python3 -m http.server --directory {args.out} 8000, and open http://localhost:8000/")
    return 0
