"""Statistics kept on disk by what they were computed from, so that a second recipe pays nothing (L5).

A key is the sha256 of everything a result depends on, and a file holds the arrays of one result. Nothing is ever
updated in place: a file is written beside and renamed, a damaged one counts as absent, and the least recently used
go when the folder passes its cap. A folder that can't be written costs time, never an export.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.analyse.stats import Arrays, Stats
from edgeq.target.cache import cache_folder

CAP_BYTES = 1 << 30
CHECKPOINT_S = 10.0
STALE_S = 3600.0  # a partial file older than this belongs to nobody any more


def key_of(parts: Iterable[object]) -> str:
    """sha256 over the texts of ``parts``, in order, each told apart from its neighbours."""
    hasher = hashlib.sha256()
    for part in parts:
        text = str(part).encode()
        hasher.update(len(text).to_bytes(8, "little") + text)
    return hasher.hexdigest()


class Store:
    """Arrays by key under ``folder`` (None: ``stats`` in edgeq's cache), ``cap_bytes`` at most on disk."""

    def __init__(self, folder: Path | None = None, cap_bytes: int = CAP_BYTES) -> None:
        self.folder = cache_folder() / "stats" if folder is None else folder
        self.cap_bytes = cap_bytes

    def path(self, key: str) -> Path:
        """Where the arrays of ``key`` lie, or would."""
        return self.folder / key[:2] / f"{key}.npz"

    def load(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays saved under ``key``; None when there are none or the file is damaged."""
        path = self.path(key)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None
        with suppress(OSError):
            os.utime(path)  # the time of last use decides what goes first
        return arrays

    def save(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Write ``arrays`` whole or not at all. False when the folder can't take them."""
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
                try:
                    np.savez(partial, **dict(arrays))  # type: ignore[arg-type]  # its stub mistakes names for flags
                except BaseException:
                    Path(partial.name).unlink(missing_ok=True)
                    raise
            Path(partial.name).replace(path)
        except OSError:
            return False
        return True

    def drop(self, key: str) -> None:
        """Forget ``key``."""
        with suppress(OSError):
            self.path(key).unlink(missing_ok=True)

    def evict(self) -> int:
        """Delete the least recently used files until the folder is within its cap. Returns how many went."""
        files = []
        with suppress(OSError):  # another process may evict at the same time
            for path in self.folder.rglob("*.*"):
                status = path.stat()
                stale = path.suffix == ".partial" and time.time() - status.st_mtime > STALE_S
                files.append((0.0 if stale else status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.cap_bytes
        gone = 0
        for used, size, path in sorted(files):
            if excess <= 0 and used > 0.0:
                break
            with suppress(OSError):
                path.unlink()
                gone += 1
            excess -= size
        return gone


def load_stats(store: Store, key: str) -> Stats | None:
    """The statistics saved under ``key``; None for what isn't there or was written by something else."""
    arrays = store.load(key)
    return None if arrays is None else _stats_of(arrays)


def _stats_of(arrays: Arrays) -> Stats | None:
    try:
        return Stats.from_arrays(arrays)
    except (KeyError, ValueError, TypeError, IndexError):
        return None


@dataclass
class Checkpoint:
    """The state of an unfinished pass: statistics of every tap and the number of samples in them."""

    store: Store
    key: str
    taps: Collection[str]
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether the last state kept is ``CHECKPOINT_S`` old."""
        return time.monotonic() - self.last > CHECKPOINT_S

    def write(self, stats: Mapping[str, Stats], done: int) -> None:
        """Keep the state after ``done`` samples; a folder that can't be written is told of at the end."""
        if done == 0:
            return
        arrays: Arrays = {"done": np.array(done)}
        for place, tap in enumerate(self.taps):
            arrays.update((f"{place}.{name}", array) for name, array in stats[tap].to_arrays().items())
        self.store.save(self.key, arrays)
        self.last = time.monotonic()

    def read(self) -> tuple[dict[str, Stats], int]:
        """Statistics by tap and the number of samples in them: nothing and 0 without a whole checkpoint."""
        arrays = self.store.load(self.key) or {}
        parts: list[Arrays] = [{} for _ in self.taps]
        for name, array in arrays.items():
            place, _, rest = name.partition(".")
            if rest and int(place) < len(parts):
                parts[int(place)][rest] = array
        stats = {tap: found for tap, part in zip(self.taps, parts, strict=True) if (found := _stats_of(part))}
        return (stats, int(arrays["done"])) if len(stats) == len(parts) and "done" in arrays else ({}, 0)

    def drop(self) -> None:
        """Forget the state; the pass is finished."""
        self.store.drop(self.key)
