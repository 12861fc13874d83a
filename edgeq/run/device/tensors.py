"""Arrays as one file of raw bytes and an index in JSON, which C++ and JavaScript read as easily as Python (L4).

The index holds, a list a sample, each array's name, numpy dtype (``<f4``), shape and offset in bytes; data are in C
order, little-endian, and start at multiples of 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import SampleError
from edgeq.run.record import Feed

Index = list[list[dict[str, Any]]]


def pack(feeds: Iterable[Feed], path: Path) -> Index:
    """Write ``feeds`` and return their index. SampleError for an array of text or objects."""
    index: Index = []
    with path.open("wb") as file:
        for feed in feeds:
            index.append([])
            for name, array in feed.items():
                if array.dtype.kind not in "fiub":
                    raise SampleError(
                        f"input {name!r} holds {array.dtype}, which can't be sent to a device",
                        hint="devices take arrays of numbers; bfloat16 and text run on this machine only",
                    )
                data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                file.write(b"\0" * (-file.tell() % 8))
                index[-1].append(
                    {"name": name, "dtype": data.dtype.str, "shape": list(array.shape), "offset": file.tell()}
                )
                file.write(data.tobytes())
    return index


def unpack(path: Path, index: Index) -> Iterator[Feed]:
    """The arrays of each sample, in order."""
    data = path.read_bytes()
    for row in index:
        yield {one["name"]: _array(data, one) for one in row}


def _array(data: bytes, one: dict[str, Any]) -> np.ndarray[Any, Any]:
    count = int(np.prod(one["shape"], dtype=np.int64))
    return np.frombuffer(data, np.dtype(one["dtype"]), count, one["offset"]).reshape(one["shape"])
