"""`lorac-deploy sign ARTIFACT --key KEY.pem`: so that devices can tell who made it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lorac_deploy.commands._common import guarded
from lorac_runtime.errors import LoracDeployError

EXTRA = "lorac-deploy[trust]"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy sign",
        description="Sign a training artifact with Ed25519: writes manifest.sig into its folder. A device that is "
        "given the public key (--trust KEY.pub) refuses artifacts that are not signed, or were altered since.",
    )
    p.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    p.add_argument("--key", type=Path, required=True, help="the private key, a PEM file without a password")
    p.add_argument("--make-key", action="store_true", help="make a new key first: KEY, and KEY.pub for devices")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        import cryptography  # noqa: F401
    except ImportError as err:
        raise LoracDeployError(f"signing needs a package that is not installed here: pip install '{EXTRA}'") from err
    from lorac_deploy.signing import make_key, sign

    if args.make_key:
        print(f"{make_key(args.key)}: the public key, for devices (--trust); keep {args.key} to yourself")
    print(f"{sign(args.artifact, args.key)} written")
    return 0
