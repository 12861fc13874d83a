"""Makes deltas: what a new package has that an old one hasn't, byte for byte (L8).

Not tensors by name but runs of equal bytes, in whatever files they lie, so that weights that moved, files that grew and
the plots' library in a page all cost nothing, and tensors that changed are all that is sent. Every stretch of ``block``
bytes of the old package is known by a hash; the same hash of each window of the new one, rolled by prefix sums, finds
where they may be equal, and the bytes decide.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import OutputError, PackageError
from edgeq.packaging import update
from edgeq.packaging.directory import read_manifest, verify_package
from edgeq.packaging.manifest import MANIFEST, SIGNATURE, SUM
from edgeq.packaging.place import check_writable, package_in

SMALLEST, BLOCKS = 64, 1 << 18  # bytes of a block; blocks to index: 16 MiB in the smallest, larger ones beyond
SEGMENT = 1 << 22  # bytes hashed at once: 32 MiB of hashes
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))

Bytes = NDArray[np.uint8]


class Index(NamedTuple):
    """Hashes of the old package's blocks, sorted, and where each lies: file and offset."""

    block: int
    hashes: NDArray[np.uint64]
    places: NDArray[np.int64]
    files: dict[str, Bytes]


def write_delta(old: Path, new: Path, out: Path) -> dict[str, int]:
    """A delta that makes ``old`` into ``new`` -> bytes of ``delta`` and of the ``package`` it stands for."""
    old, new = package_in(old), package_in(new)
    for folder in (old, new):
        read_manifest(folder)
    _check_out(out)
    index = _index({name: _bytes(old / name) for name in _names(old)})
    same = {hashlib.sha256(data.data).hexdigest(): name for name, data in index.files.items()}
    needed = {name: facts["needed"] for name, facts in read_manifest(new)["files"].items()}
    plan: dict[str, Any] = {"schema": 1, "old": _digest(old), "new": _digest(new), "files": {}}
    partial = out.with_name(f".{out.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            with archive.open(update.DATA, "w", force_zip64=True) as data:
                for name in _names(new):
                    content = _bytes(new / name)
                    digest = hashlib.sha256(content.data).hexdigest()
                    whole = same.get(digest)
                    parts = [(whole, 0, len(content))] if whole else [*_parts(content, index)]
                    for part in parts:
                        if isinstance(part, slice):
                            data.write(content[part].tobytes())
                    rows = [[p.stop - p.start] if isinstance(p, slice) else list(p) for p in parts]
                    plan["files"][name] = {"sha256": digest, "needed": needed.get(name, True), "parts": rows}
            archive.writestr(update.DELTA, json.dumps(plan))
            archive.writestr("__main__.py", inspect.getsource(update))
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"can't write {str(out)!r}: {error.strerror}", hint="choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)
    return {"delta": out.stat().st_size, "package": sum((new / name).stat().st_size for name in _names(new))}


def apply_delta(delta: Path, package: Path, *, trust: bytes = b"") -> bool:
    """Update ``package`` in place, or leave it as it is; False when it is the new one already. PackageError when the
    delta isn't for it or anything is altered, and when the new package isn't signed by ``trust``, where given."""
    package = package_in(package)
    read_manifest(package)
    try:
        return update.apply(delta, package, lambda folder: verify_package(folder, trust=trust))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PackageError(f"not updated: {error}", hint="make a delta from the package that is there") from error
    except OSError as error:
        raise OutputError(
            f"not updated, the package is as it was: {error.strerror or error}", hint="check the paths and free space"
        ) from error


def _check_out(out: Path) -> None:
    if out.exists() and not (out.is_file() and zipfile.is_zipfile(out)):
        raise OutputError(f"{str(out)!r} exists and is no delta", hint="choose another --out")
    check_writable(out)


def _names(folder: Path) -> list[str]:
    """The package's files; what else lies there is none of ours."""
    listed = [name for name in read_manifest(folder)["files"] if (folder / name).is_file()]
    return [*listed, MANIFEST, SUM, *([SIGNATURE] if (folder / SIGNATURE).is_file() else [])]


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _bytes(path: Path) -> Bytes:
    """A file mapped into memory, u8[bytes]."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "r")


def _index(files: dict[str, Bytes]) -> Index:
    total = sum(data.size for data in files.values())
    block = max(SMALLEST, 1 << (total // BLOCKS).bit_length())
    powers = _powers(BASE, block)
    hashes, places = [], []
    for number, data in enumerate(files.values()):
        count = data.size // block
        for start in range(0, count, SEGMENT // block):
            stop = min(start + SEGMENT // block, count)
            rows = data[start * block : stop * block].reshape(-1, block)
            hashes.append((rows * powers).sum(1, dtype=np.uint64))
            places.append(np.stack([np.full(stop - start, number), np.arange(start, stop) * block], 1))
    if not hashes:
        return Index(block, np.zeros(0, np.uint64), np.zeros((0, 2), np.int64), files)
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    return Index(block, unique, np.concatenate(places)[first], files)


def _powers(base: np.uint64, count: int) -> NDArray[np.uint64]:
    """1, base, base**2, … modulo 2**64."""
    found = np.full(count, base, np.uint64)
    found[:1] = 1
    return np.cumprod(found, dtype=np.uint64)


def _parts(data: Bytes, index: Index) -> Iterator[tuple[str, int, int] | slice]:
    """``data`` in order: (file, offset, length) of the old package, or a slice of ``data`` itself."""
    names, done = list(index.files), 0
    for position, row in _candidates(data, index):
        if position < done:
            continue
        number, offset = index.places[row]
        source = index.files[names[number]]
        back = _equal(data[done:position][::-1], source[:offset][::-1])
        length = _equal(data[position:], source[offset:])
        if length < index.block:  # the same hash, other bytes
            continue
        if done < position - back:
            yield slice(done, position - back)
        yield names[number], int(offset) - back, back + length
        done = position + length
    if done < data.size:
        yield slice(done, data.size)


def _candidates(data: Bytes, index: Index) -> Iterator[tuple[int, int]]:
    """Positions in ``data`` where a window has the hash of an old block, and that block's row in the index."""
    if data.size < index.block or not index.hashes.size:
        return
    longest = min(SEGMENT, data.size)
    powers, inverses = _powers(BASE, longest + index.block), _powers(INVERSE, longest)
    for start in range(0, data.size - index.block + 1, SEGMENT):
        part = data[start : start + SEGMENT + index.block - 1]
        sums = np.zeros(part.size + 1, np.uint64)
        np.cumsum(part * powers[: part.size], dtype=np.uint64, out=sums[1:])
        windows = (sums[index.block :] - sums[: -index.block]) * inverses[: part.size - index.block + 1]
        rows = np.minimum(np.searchsorted(index.hashes, windows), index.hashes.size - 1)
        for position in np.flatnonzero(index.hashes[rows] == windows):
            yield start + int(position), int(rows[position])


def _equal(one: Bytes, other: Bytes) -> int:
    """How many bytes two arrays share at their beginning."""
    most, done, step = min(one.size, other.size), 0, 256
    while done < most:
        stop = min(done + step, most)
        unequal = one[done:stop] != other[done:stop]
        if unequal.any():
            return done + int(unequal.argmax())
        done, step = stop, min(2 * step, 1 << 20)
    return most
