"""Signed artifacts: who is believed, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from artifacts import build
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from finetune_runs import write_data
from tiny_network import Recipe

from lorac_deploy.commands import sign as command
from lorac_deploy.signing import make_key, sign
from lorac_runtime import cli
from lorac_runtime.errors import ArtifactError, OutputError
from lorac_runtime.trust import require_signed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe()).folder


@pytest.fixture
def artifact(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "release.pem")
    return tmp_path / "release.pem"


def test_a_signed_artifact_is_believed(artifact: Path, key: Path) -> None:
    sign(artifact, key)
    require_signed(artifact, key.with_suffix(".pub"))
    public = form.load_pem_public_key(key.with_suffix(".pub").read_bytes())
    assert isinstance(public, ed25519.Ed25519PublicKey)
    public.verify((artifact / "manifest.sig").read_bytes(), (artifact / "manifest.json").read_bytes())  # raises
    assert key.stat().st_mode & 0o077 == 0


def test_an_unsigned_or_altered_one_is_not(artifact: Path, key: Path, tmp_path: Path) -> None:
    public = key.with_suffix(".pub")
    with pytest.raises(ArtifactError, match="is not signed; sign it: lorac-deploy sign"):
        require_signed(artifact, public)
    sign(artifact, key)
    make_key(tmp_path / "other.pem")
    with pytest.raises(ArtifactError, match="was not signed with the private key of"):
        require_signed(artifact, tmp_path / "other.pub")
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["training"]["lr"] = 0.5
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"or its manifest\.json was altered since"):
        require_signed(artifact, public)
    (artifact / "manifest.sig").write_bytes(b"\0" * 64)
    with pytest.raises(ArtifactError, match="was not signed"):
        require_signed(artifact, public)
    (artifact / "manifest.sig").write_bytes(b"\0" * 65)
    with pytest.raises(ArtifactError, match="at most 64 are expected"):
        require_signed(artifact, public)


def test_what_is_no_key_is_refused(artifact: Path, key: Path, tmp_path: Path) -> None:
    sign(artifact, key)
    other = tmp_path / "other.pub"
    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    other.write_bytes(curve.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ArtifactError, match="expected an Ed25519 public key"):
        require_signed(artifact, other)
    with pytest.raises(ArtifactError, match="is not a public key in PEM form"):
        require_signed(artifact, key)
    with pytest.raises(ArtifactError, match="not found: give the public key"):
        require_signed(artifact, tmp_path / "absent.pub")
    with pytest.raises(ArtifactError, match="is not a private key in PEM form"):
        sign(artifact, key.with_suffix(".pub"))


@pytest.mark.parametrize("keep", [(), ("--keep-if-better",)])
def test_a_device_with_a_key_takes_no_other_artifact(
    artifact: Path, key: Path, tmp_path: Path, keep: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "local.npz", 300)
    words = [str(artifact), "--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "4", "--lr", "0.01", *keep]
    trusting = [*words, "--trust", str(key.with_suffix(".pub"))]
    assert cli.main(trusting) == 1
    assert "is not signed" in capsys.readouterr().err
    assert not (tmp_path / "out/adapter.safetensors").exists()
    sign(artifact, key)
    assert cli.main(trusting) == 0
    (artifact / "base.onnx").write_bytes(b"other")
    assert cli.main([*trusting, "--restart"]) == 1
    assert "base.onnx has 5 bytes" in capsys.readouterr().err


def test_a_damaged_artifact_is_not_signed_and_a_key_is_never_replaced(artifact: Path, key: Path) -> None:
    (artifact / "base.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"base\.onnx has 5 bytes"):
        sign(artifact, key)
    assert not (artifact / "manifest.sig").exists()
    with pytest.raises(OutputError, match="a key is never replaced"):
        make_key(key)


def test_the_command_makes_key_and_signature(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "new.pem"
    assert command.main([str(artifact), "--key", str(key), "--make-key"]) == 0
    said = capsys.readouterr().out
    assert f"keep {key} to yourself" in said
    require_signed(artifact, tmp_path / "new.pub")
    assert command.main([str(artifact), "--key", str(key), "--make-key"]) == 1
