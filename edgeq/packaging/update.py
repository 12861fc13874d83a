"""Brings a package up to date from a delta, all or nothing, with the standard library alone (L8, stands alone).

A delta is a zip with this file as its ``__main__.py``, so ``python net.delta PACKAGE`` applies it where edgeq isn't
installed. The new package is built beside the old one from what both share and what the delta brings, every digest is
checked, its own loader tries it, and only then do the two change places, in one step where the system can.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import runpy
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

DELTA, DATA = "delta.json", "data.bin"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
PIECE = 1 << 20


def apply(delta: Path, package: Path, check: Callable[[Path], Any]) -> bool:
    """Make ``package`` what the delta was made for; False when it is that already. ``check`` gets the new folder before
    it takes its place. ValueError when delta or package isn't the right one; then the package is as it was."""
    package = Path(package).resolve()
    with zipfile.ZipFile(delta) as archive, archive.open(DATA) as data:
        plan = json.loads(archive.read(DELTA))
        found = hashlib.sha256((package / "manifest.json").read_bytes()).hexdigest()
        if found == plan["new"]:  # perhaps by an update that was killed before it had tidied up
            _clear(package)
            return False
        if found != plan["old"]:
            raise ValueError(f"{delta} updates the package {plan['old'][:12]}…, {package} is {found[:12]}…")
        _clear(package)
        folder = Path(tempfile.mkdtemp(prefix=f".{package.name}.update.", dir=package.parent))
        held = _lock(folder)
        try:
            folder.chmod(0o755)
            for name, facts in plan["files"].items():
                _build(folder / name, facts, package, data)
            if hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() != plan["new"]:
                raise ValueError(f"{delta} is damaged: it makes another manifest than it says")
            check(folder)
            swap(folder, package)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)
    return True


def _clear(package: Path) -> None:
    """Remove what killed updates left: folders whose lock went with their process. Elsewhere than on POSIX systems
    nothing tells them from those of an update at work, and they stay."""
    if os.name != "posix":
        return
    for folder in package.parent.glob(f".{package.name}.update.*"):
        with contextlib.suppress(BlockingIOError):  # an update at work
            held = _lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder until it is closed or its process ends. BlockingIOError: another holds it."""
    if os.name != "posix":
        return os.open(os.devnull, os.O_RDONLY)
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _build(path: Path, facts: dict[str, Any], package: Path, data: IO[bytes]) -> None:
    """One file from parts: a length of the delta's data, or file, offset and length in the old package."""
    missing = [part[0] for part in facts["parts"] if len(part) == 3 and not (package / part[0]).is_file()]
    if missing and not facts["needed"]:  # an app may have left out what is for people
        for part in facts["parts"]:
            data.read(part[0] if len(part) == 1 else 0)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    hasher = hashlib.sha256()
    with path.open("xb") as out:
        for part in facts["parts"]:
            for piece in _pieces(data, part[0]) if len(part) == 1 else _copied(package / part[0], *part[1:]):
                hasher.update(piece)
                out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    if hasher.hexdigest() != facts["sha256"]:
        raise ValueError(f"{path.name} comes out wrong: the old package or the delta is altered; get them again")


def _copied(path: Path, offset: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        yield from _pieces(file, length)


def _pieces(file: IO[bytes], length: int) -> Iterator[bytes]:
    while length and (piece := file.read(min(length, PIECE))):
        yield piece
        length -= len(piece)


def swap(folder: Path, out: Path) -> None:
    """``folder`` becomes ``out``; what was there is removed afterwards."""
    if not out.exists():
        folder.rename(out)
    elif not _exchanged(folder, out):
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)) / "replaced"
        out.rename(aside)
        try:
            folder.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the names of two paths were exchanged in one step; False where system or file system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None or rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return rename is not None
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def try_loader(folder: Path) -> None:
    """The new package's own loader: digests, machine, golden runs."""
    runpy.run_path(str(folder / "load.py"))["load"](folder, fresh=True)


def main(words: list[str]) -> str:
    if len(words) != 2:
        return f"usage: python {words[0]} PACKAGE"
    try:
        apply(Path(words[0]), Path(words[1]), try_loader)
    except (ValueError, KeyError, RuntimeError, OSError, zipfile.BadZipFile) as error:
        return f"not updated, the old package is as it was: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main([str(Path(__file__).parent), *sys.argv[1:]]) or 0)
