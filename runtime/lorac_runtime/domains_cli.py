"""The command line of a store of domains: ``python runtime/ort_domains.py`` or ``lorac-domains``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorac_runtime import domains as ds
from lorac_runtime.cli_parts import add_version
from lorac_runtime.config import FORMATS
from lorac_runtime.domain_record import Current
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.report import FusedFile
from lorac_runtime.switching import check_formats, fuse_domain, switch

PROG = "lorac-domains"
DESCRIPTION = (
    "Keep several adapters for one base, such as day and night or one for each camera, and put the files of one of "
    "them where the app takes them from. STORE is a folder that `create` makes; everything else works on it."
)
FAILED, INTERRUPTED = 1, 130  # 2 is argparse's own, for a wrong command line


def parser() -> argparse.ArgumentParser:
    """The command line: a store, what to do with it, and the options of that."""
    made = argparse.ArgumentParser(prog=PROG, description=DESCRIPTION)
    add_version(made)
    made.add_argument("store", type=Path, help="folder of the store")
    actions = made.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, fill in _ACTIONS.items():
        text = (fill.__doc__ or "").strip()
        fill(actions.add_parser(name, help=text, description=text))
    return made


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each action, by what a user types.

    >>> list(parsers())
    ['create', 'list', 'add', 'switch', 'fuse', 'delete']
    """
    found = {}
    for name, fill in _ACTIONS.items():
        text = (fill.__doc__ or "").strip()
        found[name] = argparse.ArgumentParser(prog=f"{PROG} STORE {name}", description=text)
        fill(found[name])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 wrong command line, 130 interrupted."""
    p = parser()
    args = p.parse_args(argv)
    try:
        _check(args)
    except ValueError as err:
        p.error(str(err))
    try:
        with _warnings_shown():
            text = _RUN[args.action](args)
    except LoracDeployError as err:
        print(f"error: {err}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the store can be used as it is, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print(text, end="")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for a name or formats that mean nothing."""
    if args.action == "add":
        ds.check_name(args.name)
    elif args.action in ("switch", "fuse"):
        check_formats(args.to)


def _add_create(p: argparse.ArgumentParser) -> None:
    """Make the store, or tell one that is there where its artifact lies now."""
    p.add_argument("--artifact", type=Path, required=True, help="folder that export-training-artifact wrote")


def _add_list(p: argparse.ArgumentParser) -> None:
    """Show every domain: the size of its adapter file, its method, and which one is in use."""
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_add(p: argparse.ArgumentParser) -> None:
    """Keep a copy of an adapter file as a domain, if it fits the artifact."""
    p.add_argument("name", help="letters, digits, '-', '_' and '.'; base is the model without adapter")
    p.add_argument("--adapter", type=Path, required=True, help="adapter.safetensors of a fine-tuning run")
    p.add_argument("--replace", action="store_true", help="take the place of the adapter that the domain has")


def _add_switch(p: argparse.ArgumentParser) -> None:
    """Put the files of a domain into a folder in place of another's, all at once, and remember it as the one in use."""
    _add_fuse_options(p)


def _add_fuse(p: argparse.ArgumentParser) -> None:
    """Make the files of a domain in a folder; the one in use stays."""
    _add_fuse_options(p)


def _add_delete(p: argparse.ArgumentParser) -> None:
    """Remove a domain from the store."""
    p.add_argument("name", help="the domain")
    p.add_argument("--force", action="store_true", help="also if it is the one in use; the files made from it stay")


def _add_fuse_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", help="the domain; base: the model without adapter")
    p.add_argument("--out", type=Path, required=True, help="folder for the files; created where it is missing")
    p.add_argument(
        "--to",
        type=_names,
        default=("onnx",),
        metavar="FORMATS",
        help=f"of {', '.join(FORMATS)}, or both (default: onnx)",
    )


_ACTIONS = {
    "create": _add_create,
    "list": _add_list,
    "add": _add_add,
    "switch": _add_switch,
    "fuse": _add_fuse,
    "delete": _add_delete,
}


def _create(args: argparse.Namespace) -> str:
    store = ds.create(args.store, args.artifact)
    return f"{store.folder} is a store for the base of {store.artifact}, model {store.manifest.model}\n"


def _list(args: argparse.Namespace) -> str:
    store = ds.open_store(args.store)
    found, current = ds.domains(store), store.record.current
    if not args.json:
        return table(found, current)
    content = {
        "artifact": str(store.artifact),
        "base_sha256": store.record.base_sha256,
        "current": None if current is None else dataclasses.asdict(current),
        "domains": [dataclasses.asdict(domain) for domain in found],
    }
    return json.dumps(content, indent=1) + "\n"


def _add(args: argparse.Namespace) -> str:
    added = ds.add(ds.open_store(args.store), args.name, args.adapter, replace=args.replace)
    return f"{added.name}: {added.nbytes:,} bytes, {added.parameters:,} trained parameters\n" + _advice(added)


def _switch(args: argparse.Namespace) -> str:
    _, made = switch(ds.open_store(args.store), args.name, args.out, args.to)
    return f"{args.name} is in use; " + _written(args.out, made)


def _fuse(args: argparse.Namespace) -> str:
    return _written(args.out, fuse_domain(ds.open_store(args.store), args.name, args.out, args.to))


def _delete(args: argparse.Namespace) -> str:
    ds.delete(ds.open_store(args.store), args.name, force=args.force)
    return f"{args.name} is deleted\n"


_RUN = {"create": _create, "list": _list, "add": _add, "switch": _switch, "fuse": _fuse, "delete": _delete}


def table(found: Sequence[ds.Domain], current: Current | None) -> str:
    """The domains for a person, a line each; the one in use has a star."""
    width = max(len(domain.name) for domain in found)
    lines = [
        f"{'*' if d.current else ' '} {d.name:{width}} {d.nbytes:>12,} bytes  {d.parameters:>10,} parameters  "
        f"{d.method}{'  replaced since: switch again' if d.outdated else ''}{_problem(d)}".rstrip()
        for d in found
    ]
    return "\n".join([*lines, _in_use(current)]) + "\n"


def _problem(domain: ds.Domain) -> str:
    return f"  cannot be used: {domain.problem.splitlines()[0]}" if domain.problem else ""


def _in_use(current: Current | None) -> str:
    if current is None:
        return "none is in use"
    if not current.complete:
        return f"a switch to {current.name} in {current.out} was cut off: switch again"
    return f"in use: {current.name}, in {current.out} ({', '.join(current.to)})"


def _advice(added: ds.Domain) -> str:
    return "it is in use: switch to it again for its new files\n" if added.outdated else ""


def _written(out: Path, made: Sequence[FusedFile]) -> str:
    return "written: " + ", ".join(str(out / file.name) for file in made) + "\n"


def _names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in text.split(","))


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show what the library warns of."""
    log, handler = logging.getLogger("lorac_runtime"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
