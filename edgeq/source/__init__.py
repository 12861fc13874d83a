"""Whatever a person has -> one tidy float Model at the target's opset (L3).

``read_model`` is a call a stage: read, inline, convert, tidy, pin, decide. Each stage says what it changed, so that the
report can tell what stands between the file a person gave and the model that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.ir import io, verify
from edgeq.source import opset as opsets
from edgeq.source import tidy
from edgeq.source.branches import specialise

if TYPE_CHECKING:
    import torch

__all__ = ["SourceInfo", "read_model", "specialise"]

Kind = Literal["onnx", "torch", "exported-program"]
Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class SourceInfo:
    """Where a model came from. ``opset`` and ``digest`` are those of the model as found, ``notes`` every change made
    since, in words. ``fixed`` holds the inputs whose value decided an ``If``: the model is right for these alone."""

    origin: str
    kind: Kind
    opset: int
    digest: str
    notes: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)


def read_model(
    model: str | Path | ir.Model | torch.nn.Module,
    *,
    opset: int,
    pins: Mapping[str, tuple[int, ...]] | None = None,
    example: Feed | None = None,
) -> tuple[ir.Model, SourceInfo]:
    """A file (``.onnx``, ``.pt2``), an import path ``pkg.module:callable``, a torch module or an IR model -> a new tidy
    Model at ``opset``.

    ``pins`` gives inputs static shapes. ``example`` holds values of inputs: scalars in it are taken as fixed when they
    decide an ``If``, and a torch module without example inputs of its own is traced with them.
    Raises ModelError for a model that can't be read or converted, UsageError for pins and paths that make no sense.
    """
    found, origin, kind, notes = _open(model, opset, pins or {}, example or {})
    digest, declared = io.digest(found), opsets.declared(found)
    tidied, changes = _tidy(found.clone(), opset, pins or {})
    scalars = {name: np.asarray(array) for name, array in (example or {}).items() if np.size(array) == 1}
    inputs = {value.name for value in tidied.graph.inputs}
    tidied, decided = specialise(tidied, {name: array for name, array in scalars.items() if name in inputs})
    tidied, wrong = tidy.settle_shapes(tidied)
    verify.verify(tidied, f"reading {origin}")
    info = SourceInfo(
        origin=origin,
        kind=kind,
        opset=declared,
        digest=digest,
        notes=(*notes, *changes, *((str(decided),) if decided.count else ()), *wrong),
        fixed={name: value.item() for name, value in decided.fixed.items()},
    )
    return tidied, info


def _tidy(model: ir.Model, opset: int, pins: Mapping[str, tuple[int, ...]]) -> tuple[ir.Model, tuple[str, ...]]:
    """The stages on a clone; returns it with what was changed."""
    tidy.settle_format(model)
    opsets.check_ops(model, opsets.declared(model))
    inlined = tidy.inline_functions(model)
    lifted = tidy.lift_constants(model)
    tidy.drop_metadata(model)
    tidy.name_all(model)
    tidy.free_dims(model)
    pinned = tidy.pin(model, pins)
    converted, moved = opsets.convert(model, opset)
    tidy.name_all(converted)
    return converted, (*inlined, *lifted, *pinned, *moved)


def _open(
    model: str | Path | ir.Model | torch.nn.Module,
    opset: int,
    pins: Mapping[str, tuple[int, ...]],
    example: Feed,
) -> tuple[ir.Model, str, Kind, tuple[str, ...]]:
    """The model as its source has it, its name, its kind and notes of the torch exporter."""
    if isinstance(model, ir.Model):
        return model, model.graph.name or "model", "onnx", ()
    path = Path(model) if isinstance(model, str | Path) else None
    if path is not None and path.is_dir():
        raise ModelError(f"{str(path)!r} is a folder, not a model", hint="name the .onnx or .pt2 file in it")
    if path is not None and path.suffix != ".pt2" and (path.is_file() or ":" not in str(model)):
        return io.read(path), str(path), "onnx", ()
    from edgeq.source import torch_export

    exported, subject = torch_export.export(model, opset, pins, example)
    return exported, subject.origin, subject.kind, subject.notes
