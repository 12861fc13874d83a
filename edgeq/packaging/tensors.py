"""Weights that several models share, stored once: ``tensors.bin`` beside them (L8).

Content decides, not names: equal bytes of any variant lie in one place. Small tensors (scales, biases of a few
channels) stay in the models, where they cost less than a reference.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from edgeq.ir import io
from edgeq.packaging.manifest import TENSORS

SHARED_BYTES = 1024
ALIGNMENT = 64  # a cache line, what vector loads are fastest from


def write_sharing(models: Sequence[Path], files: Sequence[Path]) -> None:
    """Each of ``models`` to each of ``files``, which lie in one folder, with their large tensors in ``tensors.bin``."""
    store = files[0].parent / TENSORS
    store.write_bytes(b"")
    places: dict[str, int] = {}
    for source, file in zip(models, files, strict=True):
        model = io.read(source)
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None and value.const_value.nbytes >= SHARED_BYTES:
                    value.const_value = _stored(value.const_value, store, places)
        file.write_bytes(io.to_bytes(model))  # not io.write, which would move large weights to a file of their own


def sharing_bytes(models: Sequence[Path]) -> int:
    """What ``models`` take in one package."""
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        write_sharing(models, [Path(folder) / f"{index}.onnx" for index in range(len(models))])
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def _stored(tensor: ir.TensorProtocol, store: Path, places: dict[str, int]) -> ir.ExternalTensor:
    data = tensor.tobytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest not in places:
        with store.open("ab") as file:
            file.write(bytes(-file.tell() % ALIGNMENT))
            places[digest] = file.tell()
            file.write(data)
    shape, name = ir.Shape(list(tensor.numpy().shape)), tensor.name or ""
    return ir.ExternalTensor(
        TENSORS, places[digest], len(data), tensor.dtype, shape=shape, name=name, base_dir=store.parent
    )  # fmt: skip
