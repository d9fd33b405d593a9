"""`lorac-deploy import SOURCE --base BASE --out FILE`: an adapter of another library as one of this project."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_deploy.commands._tables import standard_output

if TYPE_CHECKING:
    from lorac_deploy.interchange.importing import Imported

FORMATS = ("auto", "peft", "loralib", "lora-c", "safetensors", "adapter")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy import",
        description="Turn an adapter of another library into an adapter file for this project: a folder of PEFT's, a "
        "checkpoint of loralib or of the LoRA-C authors' code, or a fine-tuned network's own tensors. The change of "
        "every layer is computed exactly and then kept by factors of a rank, or whole. A folder with an adapter file "
        "of this project is checked and the file taken as it is.",
    )
    p.add_argument(
        "source",
        help="a folder (PEFT) or a file (.safetensors, .pt) with the adapter, or hub:ORG/NAME[@REVISION], which is "
        "looked for in the local cache of a model hub; nothing is fetched",
    )
    p.add_argument("--base", type=Path, required=True, help="checkpoint folder of the network that it belongs to")
    p.add_argument("--out", type=Path, required=True, help="the adapter file to write; an earlier one is replaced")
    p.add_argument(
        "--hub-cache", type=Path, help="the cache's folder (default: where Hugging Face's tools keep theirs)"
    )
    p.add_argument("--format", choices=FORMATS, default="auto", help="what the source is (default: %(default)s)")
    p.add_argument("--alpha", type=float, help="the alpha of a loralib or LoRA-C checkpoint, which does not say it")
    p.add_argument("--rank", type=int, help="rank of the factors (default: that which holds the change exactly)")
    p.add_argument(
        "--whole", action="store_true", help="keep whole weights of the layers that change instead of factors"
    )
    p.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    if args.whole and args.rank is not None:
        p.error("--whole keeps no factors, so --rank would change nothing: leave one of them out")
    if args.rank is not None and args.rank < 1:
        p.error(f"rank must be at least 1, got {args.rank}")
    from lorac_deploy.interchange import Source
    from lorac_deploy.interchange.hub import SCHEME, local_source
    from lorac_deploy.interchange.importing import import_adapter

    if args.hub_cache is not None and not args.source.startswith(SCHEME):
        p.error(f"--hub-cache is for sources that begin with {SCHEME}")
    with usage_errors(p):
        source = Source(local_source(args.source, args.hub_cache), args.format, args.alpha)
    found = import_adapter(source, args.base, args.out, rank=args.rank, kind="full" if args.whole else "lora-c")
    if args.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        standard_output().print(_table(found))
    return 0


def _table(found: Imported) -> Table:
    table = Table("layer", "rank", "error of the change", title=str(found.path))
    for fit in found.fits:
        table.add_row(fit.layer, "whole" if fit.rank is None else str(fit.rank), f"{fit.error:.2e}")
    table.add_section()
    for note in found.notes:
        table.add_row("found", "", note)
    table.add_row("outputs", "", f"differ from the exact change's by {found.output_error:.1e} at most (relative)")
    return table
