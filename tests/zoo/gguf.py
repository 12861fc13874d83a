"""The parts of GGUF (version 3, little-endian) that the zoo needs: metadata, and weights as float32.

After ``docs/gguf.md`` of ggml: a header, key-value pairs, tensor descriptions, then data aligned to 32 bytes. Of the
dozens of block formats those are known that SmolLM2's file has; each holds 32 weights a block along the last axis.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, ALIGNMENT, BLOCK = 8, 9, 32, 32


@dataclass(frozen=True)
class Tensor:
    """Where a weight lies: its shape in numpy's order, number of its block format, first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class File:
    """A GGUF file: ``metadata`` by key, ``tensors`` by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def weight(self, name: str) -> F32:
        """The tensor ``name`` decoded. Raises KeyError where there is none, or none of a format known here."""
        tensor = self.tensors[name]
        size, decode = FORMATS[tensor.kind]
        count = int(np.prod(tensor.shape)) // BLOCK
        blocks = np.fromfile(self.path, np.uint8, count * size, offset=tensor.offset).reshape(count, size)
        return decode(blocks).reshape(tensor.shape)


def read(path: Path) -> File:
    """The file's head; weights are read when they are asked for. Raises ValueError for what is no GGUF version 3."""
    with path.open("rb") as data:
        magic, version, tensors, pairs = struct.unpack("<4sIQQ", data.read(24))
        if (magic, version) != (b"GGUF", 3):
            raise ValueError(f"{path} starts with {magic!r}, version {version}: expected b'GGUF', version 3")
        metadata = {_value(data, STRING): _value(data, *_numbers(data, "I")) for _ in range(pairs)}
        found = [(_value(data, STRING), _description(data)) for _ in range(tensors)]
        start = -(-data.tell() // ALIGNMENT) * ALIGNMENT
    return File(path, metadata, {name: Tensor(shape, kind, start + offset) for name, (shape, kind, offset) in found})


def _numbers(data: Any, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", data.read(struct.calcsize(f"<{form}")))


def _value(data: Any, kind: int) -> Any:
    if kind == STRING:
        (size,) = _numbers(data, "Q")
        return data.read(size).decode()
    if kind == ARRAY:
        kind, count = _numbers(data, "IQ")
        return [_value(data, kind) for _ in range(count)]
    return _numbers(data, SCALARS[kind])[0]


def _description(data: Any) -> tuple[tuple[int, ...], int, int]:
    """Shape, format and offset behind the aligned start. The file names the fastest axis first."""
    (rank,) = _numbers(data, "I")
    sizes = _numbers(data, "Q" * rank)
    kind, offset = _numbers(data, "IQ")
    return sizes[::-1], kind, offset


def _float32(blocks: NDArray[np.uint8]) -> F32:
    return blocks.view(np.float32)


def _q4_1(blocks: NDArray[np.uint8]) -> F32:
    """Scale and minimum f16, then 16 bytes: the first 16 weights in their low halves, the others in the high ones."""
    scale, least = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return codes * scale + least


def _q8_0(blocks: NDArray[np.uint8]) -> F32:
    """Scale f16, then 32 signed bytes."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return np.asarray(blocks[:, 2:].view(np.int8) * scale, np.float32)


FORMATS: dict[int, tuple[int, Callable[[NDArray[np.uint8]], F32]]] = {  # bytes a block, decoder
    0: (4 * BLOCK, _float32),
    3: (4 + BLOCK // 2, _q4_1),
    8: (2 + BLOCK, _q8_0),
}
