"""Golden runs on disk: ``golden.bin`` holds each distinct array once, little-endian, and the manifest says where (L8).

Plain bytes instead of ``.npz``, because apps in C++, JavaScript, Kotlin and Swift read them too and none of these has a
zip reader of its own. A reference is ``{"dtype", "shape", "offset", "bytes"}``; text is stored as a JSON list.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.packaging.record import Golden
from edgeq.run.record import Array, Feed

GOLDEN = "golden.bin"
TEXT = "str"
ALIGNMENT = 16  # so that any element type can be read in place


class GoldenWriter:
    """Arrays -> references into one growing file; equal bytes are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.write_bytes(b"")
        self.places: dict[str, int] = {}

    def add(self, golden: Golden) -> dict[str, Any]:
        """Golden -> what the manifest says of it: ``runs`` and ``tolerances``. Uncompared outputs stay out."""
        runs = [
            {
                "inputs": {name: self._reference(array) for name, array in feed.items()},
                "outputs": {name: self._reference(results[name]) for name in golden.compared},
            }
            for feed, results in zip(golden.inputs, golden.outputs, strict=True)
        ]
        return {"runs": runs, "tolerances": golden.compared}

    def _reference(self, array: Array) -> dict[str, Any]:
        data, dtype = _packed(array)
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.places:
            with self.path.open("ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                self.places[digest] = file.tell()
                file.write(data)
        return {"dtype": dtype, "shape": list(array.shape), "offset": self.places[digest], "bytes": len(data)}


def _packed(array: Array) -> tuple[bytes, str]:
    if array.dtype.kind in "OU":
        return json.dumps([str(word) for word in array.ravel()], ensure_ascii=False).encode(), TEXT
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.tobytes(), array.dtype.name


def read_golden(path: Path, facts: dict[str, Any]) -> Golden:
    """What ``GoldenWriter.add`` told -> Golden. ValueError when the file is too short for it."""
    data = path.read_bytes()
    inputs, outputs = (tuple(_feed(data, run[kind], path) for run in facts["runs"]) for kind in ("inputs", "outputs"))
    return Golden(inputs, outputs, facts["tolerances"])


def _feed(data: bytes, references: dict[str, Any], path: Path) -> Feed:
    return {name: unpacked(data, reference, path) for name, reference in references.items()}


def unpacked(data: bytes, reference: dict[str, Any], path: Path) -> Array:
    """The array a reference means; text comes as objects, as sessions take it."""
    start, size = reference["offset"], reference["bytes"]
    if start + size > len(data):
        raise ValueError(f"{path} ends at byte {len(data)}, a golden array needs {start + size}")
    shape = tuple(reference["shape"])
    if reference["dtype"] == TEXT:
        return np.array(json.loads(data[start : start + size]), object).reshape(shape)
    return np.frombuffer(data[start : start + size], np.dtype(reference["dtype"]).newbyteorder("<")).reshape(shape)
