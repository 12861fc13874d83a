"""Signatures: made with keys that stay private, refused when a byte, the key or the file is another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from edgeq.cli import main
from edgeq.errors import EdgeqError, OutputError, PackageError, UsageError
from edgeq.packaging import create_key, read_public, sign, verify_package, write_directory
from tests.packaged import classifier, files, reseal


@pytest.fixture
def key(tmp_path: Path) -> Path:
    create_key(tmp_path / "team.pem")
    return tmp_path / "team.pem"


def _public(key: Path) -> bytes:
    return read_public(key.with_name(key.name + ".pub"))


def test_keys_are_private_and_never_replaced(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(_public(key)) == 32
    with pytest.raises(OutputError, match=r"team\.pem' exists, and a key is never replaced"):
        create_key(key)
    key.unlink()
    with pytest.raises(OutputError, match=r"team\.pem\.pub' exists"):
        create_key(key)
    assert not key.exists()


def test_a_signature_is_one_of_the_manifest_by_any_implementation(key: Path, tmp_path: Path) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    sign(out, key)
    words = json.loads((out / "manifest.sig").read_text())
    assert (words["algorithm"], bytes.fromhex(words["key"])) == ("ed25519", _public(key))
    (tmp_path / "signature").write_bytes(bytes.fromhex(words["signature"]))
    checked = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", f"{key}.pub", "-rawin", "-in", str(out / "manifest.json"),
         "-sigfile", str(tmp_path / "signature")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Signature Verified Successfully" in checked.stdout + checked.stderr
    verify_package(out, trust=_public(key))
    verify_package(out)  # who trusts no key isn't asked for one


@pytest.mark.parametrize("victim", ["model.onnx", "golden.bin", "load.py", "manifest.json", "resealed", "manifest.sig"])
def test_tampering_is_refused(key: Path, tmp_path: Path, victim: str) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    sign(out, key)
    if victim == "resealed":  # the attacker renews every digest, but has no key
        reseal(out, lambda manifest: manifest["labels"].reverse())
    else:
        whole = (out / victim).read_bytes()
        at = whole.index(b'"signature": "') + 20 if victim == "manifest.sig" else len(whole) // 2
        changed = b"1" if whole[at : at + 1] != b"1" else b"2"
        (out / victim).write_bytes(whole[:at] + changed + whole[at + 1 :])
    with pytest.raises(PackageError, match=r"is altered|is no signature of manifest\.json by the trusted key"):
        verify_package(out, trust=_public(key))


def test_another_key_and_no_signature_are_refused(key: Path, tmp_path: Path) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    with pytest.raises(PackageError, match=r"isn't signed: no manifest\.sig"):
        verify_package(out, trust=_public(key))
    create_key(tmp_path / "other.pem")
    sign(out, tmp_path / "other.pem")
    with pytest.raises(PackageError, match="is no signature of"):
        verify_package(out, trust=_public(key))


def test_files_that_are_no_keys(key: Path, tmp_path: Path) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    rsa = generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(
        rsa.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "rsa.pem").chmod(0o600)
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    for path, message in (("rsa.pem", "holds no Ed25519 key"), ("text", "can't read"), ("none", "can't read")):
        with pytest.raises(UsageError, match=message):
            sign(out, tmp_path / path)
    with pytest.raises(UsageError, match="can't read a public key"):
        read_public(key)
    key.chmod(0o640)
    with pytest.raises(UsageError, match="can be read by others"):
        sign(out, key)
    assert not (out / "manifest.sig").exists()


def test_the_command_line_signs_and_trusts(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    assert main(["key", str(tmp_path / "second.pem")]) == 0
    assert "keep it where only you can read it" in capsys.readouterr().out
    assert main(["package", str(out), "--sign", str(key)]) == 0
    assert main(["package", str(out), "--trust", f"{key}.pub"]) == 0
    assert "the signature" in capsys.readouterr().out
    copy = tmp_path / "copy"
    assert main(["package", str(out), "-o", str(copy), "--sign", str(tmp_path / "second.pem")]) == 0
    assert files(copy).keys() == files(out).keys()
    capsys.readouterr()
    assert main(["package", str(copy), "--trust", f"{key}.pub", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "package"


def test_the_loader_alone_trusts_a_key(key: Path, tmp_path: Path) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    sign(out, key)
    raw = serialization.load_pem_public_key(Path(f"{key}.pub").read_bytes())
    assert isinstance(raw, Ed25519PublicKey)
    code = f"import load; load.load(trust=bytes.fromhex({raw.public_bytes_raw().hex()!r}))"
    run = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(out)!r}); {code}"]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 0
    reseal(out, lambda manifest: manifest["labels"].reverse())
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert "is no signature of manifest.json by the trusted key" in done.stderr


def test_without_the_library_signing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(EdgeqError, match=r"pip install 'edgeq\[sign\]'"):
        create_key(tmp_path / "team.pem")
