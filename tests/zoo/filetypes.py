"""Bytes of files with known types for Magika: a prepared set, or files of this Python installation by extension."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo.packages import package_file, wanted
from tests.zoo.score import only_output

SEED = 7
CALIBRATION = 128
BLOCK, KEPT, PADDING, SMALLEST = 4096, 1024, 256, 128  # bytes read at each end, bytes kept, padding token, least size
TYPES = {
    "c": "c", "cfg": "ini", "css": "css", "csv": "csv", "gif": "gif", "gz": "gzip", "h": "c|cpp|objectivec",
    "html": "html", "jpg": "jpeg", "js": "javascript", "json": "json", "md": "markdown", "npz": "zip", "png": "png",
    "py": "python", "pyc": "pythonbytecode", "rst": "rst", "sh": "shell", "so": "elf", "svg": "svg", "toml": "toml",
    "ttf": "ttf", "wav": "wav", "xml": "xml", "yaml": "yaml", "zip": "zip",
}  # fmt: skip
MOST_A_TYPE = 40

Sample = dict[str, Any]


def calibration(count: int | None = None) -> Iterator[Sample]:
    return (_sample(*pair) for pair in _labelled()[:CALIBRATION][: wanted(count, CALIBRATION, "CALIBRATION")])


def evaluation(count: int | None = None) -> Iterator[Sample]:
    return (_sample(*pair) for pair in _labelled()[CALIBRATION:][: wanted(count, 500, "EVALUATION")])


def accuracy(values: Mapping[str, NDArray[Any]], label: str) -> float:
    """1.0 where the best of f32[1, 214] is the type, or one of several ``|`` separates."""
    return float(_type_names()[int(only_output(values).argmax())] in str(label).split("|"))


def _sample(tokens: NDArray[np.int32], label: str) -> Sample:
    return {"bytes": tokens[None], "label": label}


@cache
def _type_names() -> tuple[str, ...]:
    config = json.loads(package_file("magika/models/standard_v3_3/config.min.json").read_text())
    return tuple(config["target_labels_space"])


@cache
def _labelled() -> tuple[tuple[NDArray[np.int32], str], ...]:
    """(tokens i32[2048], type) in a fixed shuffled order."""
    if prepared := os.environ.get("EDGEQ_MAGIKA_EVAL"):
        with np.load(prepared) as arrays:
            pairs = [(x.astype(np.int32), str(y)) for x, y in zip(arrays["x"], arrays["y"], strict=True)]
    else:
        pairs = [(_tokens(path), TYPES[path.suffix[1:]]) for path in _installed_files()]
    random.Random(SEED).shuffle(pairs)
    return tuple(pairs)


def _installed_files() -> list[Path]:
    """Up to ``MOST_A_TYPE`` files of each type below the standard library, in an order that no file system decides."""
    root = Path(sysconfig.get_path("stdlib"))
    by_type: dict[str, list[Path]] = defaultdict(list)
    for path in {*root.rglob("*.*"), *Path(sysconfig.get_path("purelib")).rglob("*.*")}:
        if path.suffix[1:] in TYPES and path.is_file() and path.stat().st_size >= SMALLEST:
            by_type[path.suffix[1:]].append(path)
    return [file for suffix in sorted(by_type) for file in sorted(by_type[suffix], key=_name_digest)[:MOST_A_TYPE]]


def _name_digest(path: Path) -> bytes:
    return hashlib.sha1("/".join(path.parts[-3:]).encode()).digest()


def _tokens(path: Path) -> NDArray[np.int32]:
    """The first and last 1024 bytes, outer white space cut, padded towards the middle -> i32[2048]."""
    content = path.read_bytes()
    head, tail = content[:BLOCK].lstrip()[:KEPT], content[-BLOCK:].rstrip()[-KEPT:]
    tokens = np.full(2 * KEPT, PADDING, np.int32)
    tokens[: len(head)] = np.frombuffer(head, np.uint8)
    tokens[2 * KEPT - len(tail) :] = np.frombuffer(tail, np.uint8)
    return tokens
