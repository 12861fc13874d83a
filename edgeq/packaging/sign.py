"""Ed25519 keys and signatures of packages, through the library ``cryptography`` (L8).

What is signed is ``manifest.json``, which holds the digest of every file; ``manifest.sig`` holds the signature and the
public key it is by, both in hexadecimal. Whoever verifies brings the key he trusts: the one in the file proves nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.errors import OutputError, RuntimeUnavailableError, UsageError
from edgeq.packaging.manifest import MANIFEST, SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OWNER_ONLY, FOR_ALL = 0o600, 0o644


def _need_library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError("signing needs cryptography", hint="pip install 'edgeq[sign]'") from error


def create_key(path: Path) -> Path:
    """A new private key at ``path``, which only its owner can read, and its public half beside it, whose place is
    returned. OutputError when either exists: a key is never replaced."""
    _need_library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, public = Ed25519PrivateKey.generate(), path.with_name(path.name + ".pub")
    private_text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_text = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for place in (path, public):
        if place.exists():
            raise OutputError(f"{str(place)!r} exists, and a key is never replaced", hint="choose another name")
    for place, text, mode in ((path, private_text, OWNER_ONLY), (public, public_text, FOR_ALL)):
        try:
            with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(f"can't write {str(place)!r}: {error.strerror}", hint="choose another place") from error
    return public


def read_private(path: Path) -> Ed25519PrivateKey:
    """A PEM file that only its owner can read. UsageError for another kind of file or key, or one that others read."""
    _need_library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise UsageError(f"key {str(path)!r} can be read by others", hint=f"chmod 600 {path}, and think who has it")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"can't read a private key from {str(path)!r}: {error}", hint="make one: edgeq key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{str(path)!r} holds no Ed25519 key, but {type(key).__name__}", hint="make one: edgeq key")
    return key


def read_public(path: Path | None) -> bytes:
    """A PEM file -> the 32 bytes of an Ed25519 public key; none for None. UsageError for another file or key."""
    if path is None:
        return b""
    _need_library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read a public key from {str(path)!r}: {error}", hint="give the .pub file") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{str(path)!r} holds no Ed25519 key, but {type(key).__name__}", hint="give the .pub file")
    return key.public_bytes_raw()


def sign(folder: Path, key: Path) -> None:
    """``manifest.sig`` for the package in ``folder``, in place of one that was there."""
    private = read_private(key)
    text = (folder / MANIFEST).read_bytes()
    words = {
        "algorithm": "ed25519",
        "key": private.public_key().public_bytes_raw().hex(),
        "signature": private.sign(text).hex(),
    }
    partial = folder / f".{SIGNATURE}.partial"
    try:
        partial.write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / SIGNATURE)
    except OSError as error:
        raise OutputError(f"can't sign {str(folder)!r}: {error.strerror}", hint="add -o to sign a copy") from error
