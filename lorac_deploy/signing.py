"""Signing artifacts with Ed25519, for devices that take no others (``--trust``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError, OutputError
from lorac_runtime.files import atomic_write, staged
from lorac_runtime.trust import SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def sign(artifact: Path, key: Path) -> Path:
    """Write ``artifact``/manifest.sig with the private ``key`` (a PEM file without a password); returns its path.

    Raises ArtifactError for a damaged artifact or a key that is none, OutputError if the file cannot be written.
    """
    mf.verify_files(artifact, mf.load(artifact))
    signature = _private_key(key).sign((artifact / mf.FILE_NAME).read_bytes())
    atomic_write(artifact / SIGNATURE, signature)
    return artifact / SIGNATURE


def make_key(key: Path) -> Path:
    """Write a new private key to ``key``, for its owner alone to read, and the public one beside it as ``.pub``.

    Returns the path of the public key. Raises OutputError if one of them exists, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = key.with_suffix(".pub")
    for path in (key, public):
        if path.exists():
            raise OutputError(f"{path} exists; a key is never replaced: choose another name")
    made = Ed25519PrivateKey.generate()
    private = made.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    with staged(key) as part:
        part.touch(mode=0o600)
        part.write_bytes(private)
    atomic_write(public, made.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return public


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise ArtifactError(f"{path} is not a private key in PEM form without a password ({err})") from err
    if not isinstance(found, Ed25519PrivateKey):
        raise ArtifactError(f"{path} is a {type(found).__name__}, expected an Ed25519 private key")
    return found
