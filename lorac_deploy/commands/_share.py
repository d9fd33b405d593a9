"""Files for other libraries: the part of `lorac-deploy export` that writes adapters instead of networks."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lorac_deploy.commands._tables import standard_output

if TYPE_CHECKING:
    from lorac_deploy.interchange.exporting import ShareConfig
    from lorac_deploy.interchange.folders import Shared
    from lorac_deploy.interchange.hub import Repository

FOLDERS = ("peft", "onnx_adapter", "adapter")
SHARED = (*FOLDERS, "state-dict")


def add_options(p: argparse.ArgumentParser) -> None:
    """Options that only these formats have."""
    g = p.add_argument_group("for other libraries (--to peft, onnx_adapter, adapter or state-dict)")
    g.add_argument(
        "--rank", type=int, help="with peft: most channels of adapted layers' factors (default: those that are exact)"
    )
    g.add_argument("--name", help="with onnx_adapter: what the file is called, NAME.onnx_adapter (default: adapter)")
    g.add_argument(
        "--hub",
        metavar="ORG/NAME",
        help="write a revision of this repository in the local cache of a model hub, not --out",
    )
    g.add_argument(
        "--hub-cache", type=Path, help="the cache's folder (default: where Hugging Face's tools keep theirs)"
    )


def problem(args: argparse.Namespace) -> str:
    """Options that are missing, or would change nothing; empty if there are none."""
    if args.hub_cache is not None and args.hub is None:
        return "--hub-cache is for --hub"
    if (args.out is None) == (args.hub is None):
        return "give one of --out and --hub" if args.to in FOLDERS else "--out is required"
    return _beyond_sharing(args) if args.to not in SHARED else _of_sharing(args)


def _beyond_sharing(args: argparse.Namespace) -> str:
    for option in ("rank", "name", "hub"):
        if getattr(args, option) is not None:
            return f"--{option} is not for --to {args.to}"
    return ""


def _of_sharing(args: argparse.Namespace) -> str:
    if args.adapter is None:
        return f"--to {args.to} writes an adapter: give one (--adapter)"
    for option, target in (("rank", "peft"), ("name", "onnx_adapter")):
        if getattr(args, option) is not None and args.to != target:
            return f"--{option} is for --to {target}"
    if args.hub is not None and args.to not in FOLDERS:
        return f"--hub is for folders: {', '.join(FOLDERS)}"
    return f"--data is not for --to {args.to}" if args.data is not None else ""


def config_of(args: argparse.Namespace) -> tuple[ShareConfig | None, Path | Repository]:
    """Settings (None for a state dict) and where to write. Raises ValueError."""
    from lorac_deploy.interchange.exporting import ShareConfig
    from lorac_deploy.interchange.hub import Repository

    config = None
    if args.to in FOLDERS:
        config = ShareConfig(args.to, rank=args.rank, **({} if args.name is None else {"name": args.name}))
    return config, args.out if args.hub is None else Repository(args.hub, cache=args.hub_cache)


def share(args: argparse.Namespace, config: ShareConfig | None, out: Path | Repository) -> int:
    """Write and report; returns the exit status."""
    from lorac_deploy.interchange.exporting import export_folder, export_state_dict

    if config is None:
        found = export_state_dict(args.artifact, args.adapter, args.out)
    else:
        found = export_folder(args.artifact, args.adapter, out, config)
    if args.json:
        print(json.dumps({**dataclasses.asdict(found), "path": str(found.path)}, indent=1))
    else:
        _show(found)
    return 0


def _show(found: Shared) -> None:
    console = standard_output()
    if found.fits:
        table = Table("layer", "rank", "error of the change", title=str(found.path))
        for fit in found.fits:
            table.add_row(fit.layer, str(fit.rank), f"{fit.error:.2e}")
        console.print(table)
    files = Table("file", "sha256", title=str(found.path.parent if found.path.is_file() else found.path))
    for name, digest in found.files.items():
        files.add_row(name, digest)
    console.print(files)
