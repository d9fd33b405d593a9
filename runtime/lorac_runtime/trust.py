"""Signed artifacts: manifest.sig is an Ed25519 signature of manifest.json, which holds the hashes of all files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorac_runtime.errors import ArtifactError
from lorac_runtime.files import size_of
from lorac_runtime.manifest import FILE_NAME, MAX_BYTES

SIGNATURE = "manifest.sig"
EXTRA = "lorac-runtime[trust]"
_NBYTES = 64
_KEY_BYTES = 1 << 16


def require_signed(folder: Path, key: Path) -> None:
    """Make sure that the artifact in ``folder`` was signed with the private half of the public ``key`` (a PEM file).

    Raises ArtifactError if it was not, was altered since, or if the key cannot be used.
    """
    public = _public_key(key)
    signature = _content(folder / SIGNATURE, _NBYTES, f"{folder} is not signed; sign it: lorac-deploy sign")
    manifest = _content(folder / FILE_NAME, MAX_BYTES, f"{folder} is not a training artifact folder")
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, manifest)
    except InvalidSignature as err:
        raise ArtifactError(
            f"{folder} was not signed with the private key of {key}, or its {FILE_NAME} was altered since; "
            "do not use it, or sign it again: lorac-deploy sign"
        ) from err


def _public_key(path: Path) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as err:
        raise ArtifactError(f"--trust needs a package that is not installed here: pip install {EXTRA}") from err
    content = _content(path, _KEY_BYTES, f"give the public key as a PEM file, as {path}")
    try:
        found = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise ArtifactError(f"{path} is not a public key in PEM form ({err})") from err
    if not isinstance(found, Ed25519PublicKey):
        raise ArtifactError(f"{path} is a {type(found).__name__}, expected an Ed25519 public key")
    return found


def _content(path: Path, most: int, missing: str) -> bytes:
    try:
        size_of(path, most)
        return path.read_bytes()
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} not found: {missing}") from err
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read: {err.strerror or err}") from err
