"""x86-64 CPUs this machine isn't, by QEMU: ``python tests/emulated.py FOLDER [LIBRARY]`` runs each NAME.onnx on its
NAME.npz.

``outputs(CPU, models, feeds)`` does so under ``qemu-x86_64 -cpu CPU`` (Debian package qemu-user) and gives the results
back; only onnxruntime and numpy are loaded there, since emulation is 10 to 50 times slower.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Feeds = Sequence[Mapping[str, NDArray[Any]]]
QEMU = "qemu-x86_64"


def needs_qemu() -> None:
    """Skip a test where there is no emulator; in CI, where there must be one, fail it."""
    import pytest  # not where this file is run: each import costs seconds there

    if shutil.which(QEMU) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{QEMU} is missing: make qemu")


def outputs(
    cpu: str, models: Mapping[str, Path], feeds: Mapping[str, Feeds], library: Path | None = None
) -> dict[str, list[list[NDArray[Any]]]]:
    """Name -> the outputs of each feed, in order. ``cpu``: a name of ``qemu-x86_64 -cpu help``, or "" for this one;
    ``library``: of custom operators."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, path in models.items():
            shutil.copy(path, folder / f"{key}.onnx")
            arrays = {f"{index}/{word}": array for index, feed in enumerate(feeds[key]) for word, array in feed.items()}
            np.savez(folder / f"{key}.npz", **arrays)
        words = [] if library is None else [str(library)]
        emulator = [QEMU, "-cpu", cpu] if cpu else []
        done = subprocess.run(
            [*emulator, sys.executable, __file__, name, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = {key: np.load(folder / f"{key}.out.npz") for key in models}
        return {key: _by_feed(file, len(feeds[key])) for key, file in found.items()}


def _by_feed(file: Mapping[str, NDArray[Any]], count: int) -> list[list[NDArray[Any]]]:
    return [[file[key] for key in file if key.startswith(f"{index}/")] for index in range(count)]


def _run(folder: Path, *libraries: str) -> None:
    """Write NAME.out.npz: ``FEED/OUTPUT`` -> array."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for library in libraries:
        options.register_custom_ops_library(library)
    for path in sorted(folder.glob("*.onnx")):
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds: dict[str, dict[str, NDArray[Any]]] = {}
        for key, array in np.load(path.with_suffix(".npz")).items():
            index, _, name = key.partition("/")
            feeds.setdefault(index, {})[name] = array
        wanted = [value.name for value in session.get_outputs()]
        results = {f"{index}/{name}": array for index, feed in feeds.items()
                   for name, array in zip(wanted, session.run(wanted, feed), strict=True)}  # fmt: skip
        np.savez(path.with_suffix(".out.npz"), **results)


if __name__ == "__main__":
    _run(Path(sys.argv[1]), *sys.argv[2:])
