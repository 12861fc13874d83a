"""Arrays of samples: rows read from ``.npz``/``.npy`` files, and fitted to what a model's input takes (L4).

Rows are read by file offset instead of loading or memory-mapping the array: peak memory then doesn't grow with the
number of samples (mapped pages count as resident). Compressed or Fortran-ordered arrays are unpacked to a temporary
folder once.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgeq.errors import SampleError, did_you_mean
from edgeq.run.record import Array, Feed
from edgeq.run.session import TensorSpec

LABEL_KEYS = ("label", "labels")
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Rows:
    """An array in C order at ``offset`` of ``path``. ``spool`` keeps the temporary folder it may live in."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    spool: tempfile.TemporaryDirectory[str]

    def read(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` of the first axis."""
        row = math.prod(self.shape[1:])
        count, skip = (stop - start) * row, self.offset + start * row * self.dtype.itemsize
        flat = np.fromfile(self.path, self.dtype, count, offset=skip)
        if flat.size != count:
            raise SampleError(f"{str(self.path)!r} ends before row {stop}", hint="the file is cut off; write it again")
        return flat.reshape(stop - start, *self.shape[1:])

    def read_all(self) -> Array:
        """The whole array, of any rank."""
        return (
            self.read(0, self.shape[0]) if self.shape else np.fromfile(self.path, self.dtype, 1, offset=self.offset)[0]
        )


def open_rows(path: Path) -> dict[str, Rows]:
    """``.npz`` -> Rows per key; ``.npy`` -> Rows under the key "". SampleError on a damaged file or object arrays."""
    spool = tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True)
    try:
        if path.suffix == ".npy":
            return {"": _npy_rows(path, spool)}
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): _member_rows(path, archive, member, spool)
                for member in archive.infolist()
            }
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        raise SampleError(f"can't read samples {str(path)!r}: {error}", hint="write it with numpy.savez") from error


def _npy_rows(path: Path, spool: tempfile.TemporaryDirectory[str]) -> Rows:
    with path.open("rb") as file:
        shape, fortran, dtype = _header(file)
        offset = file.tell()
    if not fortran:
        return Rows(path, offset, dtype, shape, spool)
    copy = Path(spool.name) / f"{path.stem}.rows.npy"
    np.save(copy, np.ascontiguousarray(np.load(path)))
    return _npy_rows(copy, spool)


def _member_rows(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, spool: tempfile.TemporaryDirectory[str]
) -> Rows:
    with archive.open(member) as file:
        shape, fortran, dtype = _header(file)
        within = file.tell()
    if member.compress_type == zipfile.ZIP_STORED and not fortran:
        # A zip's local header is 30 bytes, then name and extra field with their lengths at byte 26 (APPNOTE 4.3.7).
        with path.open("rb") as raw:
            raw.seek(member.header_offset + 26)
            lengths = np.frombuffer(raw.read(4), "<u2")
        return Rows(path, member.header_offset + 30 + int(lengths.sum()) + within, dtype, shape, spool)
    copy = Path(spool.name) / Path(member.filename).name
    with archive.open(member) as packed, copy.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    return _npy_rows(copy, spool)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    shape, fortran, dtype = _READ_HEADER[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or dtype.names:
        raise ValueError(f"it holds {dtype}, expected numbers or strings")
    return shape, fortran, dtype


def check_keys(found: Sequence[str], specs: Sequence[TensorSpec], where: str) -> None:
    """SampleError unless the keys, label keys apart, are exactly the model's inputs."""
    names = [spec.name for spec in specs]
    extra = [key for key in found if key not in names and key not in LABEL_KEYS]
    missing = [name for name in names if name not in found]
    has, wants = ", ".join(map(repr, found)) or "nothing", ", ".join(map(repr, names))
    if missing:
        hint = did_you_mean(missing[0], extra, "rename or add the key")
        raise SampleError(f"{where}: no key {missing[0]!r}; it has {has}, the model's inputs are {wants}", hint=hint)
    if extra:
        raise SampleError(
            f"{where}: key {extra[0]!r} is no input of the model; its inputs are {wants}",
            hint=did_you_mean(extra[0], [*names, *LABEL_KEYS], "drop the key"),
        )


def fit_feed(arrays: Mapping[str, Array], specs: Sequence[TensorSpec], where: str) -> Feed:
    """Arrays of one sample -> a feed of the model's dtypes with the batch axis. SampleError names input and sample."""
    return {spec.name: _fit(np.asarray(arrays[spec.name]), spec, f"{where}, input {spec.name!r}") for spec in specs}


def _fit(array: Array, spec: TensorSpec, where: str) -> Array:
    rank = len(spec.shape)
    shaped = array[None] if array.ndim == rank - 1 else array
    if shaped.ndim != rank or not all(
        isinstance(want, str | None) or have == want or (axis == 0 and have == 1)
        for axis, (have, want) in enumerate(zip(shaped.shape, spec.shape, strict=True))
    ):
        raise SampleError(
            f"{where} has shape {list(array.shape)}, the model takes {spec}",
            hint="one sample is the shape without, or with, a batch axis of 1",
        )
    if 0 in shaped.shape:
        raise SampleError(f"{where} is empty: shape {list(array.shape)}", hint="leave that sample out")
    values = cast(shaped, spec.dtype, where)
    _refuse_non_finite(values, where)
    return values


def cast(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    """``array`` as ``dtype``. Only what loses nothing is allowed, but for rounding of floats to a narrower float."""
    if array.dtype == dtype:
        return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes [] into [1]
    if array.dtype.kind not in "iubfV":
        raise SampleError(f"{where} holds {array.dtype}, the model takes {dtype}", hint="store numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        values = array.astype(dtype)
        exact = array.dtype.kind in "fV" and dtype.kind in "fV"
        if not exact and not np.array_equal(values.astype(array.dtype), array):
            found = array.reshape(-1)[(values.astype(array.dtype) != array).reshape(-1)][0]
            raise SampleError(
                f"{where} holds {array.dtype}, the model takes {dtype}, and {found} can't be stored in it",
                hint=f"convert the data to {dtype}",
            )
    return values


def _refuse_non_finite(array: Array, where: str) -> None:
    if array.dtype.kind not in "fV":
        return
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(index) for index in np.argwhere(bad)[0])
        raise SampleError(
            f"{where} holds {array[first]} at {list(first)} ({int(bad.sum())} of {array.size} values aren't finite)",
            hint="clean the data: NaN and Inf would spoil every statistic",
        )


def label_of(value: Any) -> Any:
    """A label as plain Python where it is one number or word, else an array."""
    array = np.asarray(value)
    return array.reshape(-1)[0].item() if array.size == 1 else array


def sha256_of(*words: str) -> str:
    """sha256 over words, each closed by a zero byte so that their borders count."""
    hasher = hashlib.sha256()
    for word in words:
        hasher.update(word.encode() + b"\0")
    return hasher.hexdigest()


def files_digest(folder: Path, files: Sequence[Path]) -> str:
    """sha256 over the contents of ``files`` and, of more than one, their names below ``folder``."""
    words = []
    for path in files:
        with path.open("rb") as file:
            words += [path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()]
    return sha256_of(*(words[1:] if len(files) == 1 else words))
