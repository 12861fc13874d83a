"""A torch module or exported program -> Model, proven against torch on two shapes (L3).

``torch.onnx.export(dynamo=True)`` can freeze an axis it was asked to keep dynamic, without an error (measured with a
bidirectional LSTM), so each dynamic axis is run at a second size and compared. Exported at opset 22 at most: from 23 on
attention comes out as one op that no integer kernel takes.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ModelError, RuntimeUnavailableError, UsageError
from edgeq.source import import_path
from edgeq.source.parity import Feed, differences, resized
from edgeq.source.quiet import first_line, last_line, quiet

if TYPE_CHECKING:
    import torch

Kind = Literal["torch", "exported-program"]
OPSETS = (18, 22)
"""The exporter's lowest opset, and the last one before attention becomes one op."""


@dataclass(frozen=True)
class Subject:
    """What is exported: ``program`` for the exporter, ``module`` to compare with, an example of each input, and the
    axes the author wants dynamic (None: not said)."""

    origin: str
    kind: Kind
    program: Any
    module: Any
    feed: Feed
    dynamic: Any = None
    notes: tuple[str, ...] = ()


def export(
    source: str | Path | torch.nn.Module,
    opset: int,
    pins: Mapping[str, tuple[int, ...]],
    example: Mapping[str, NDArray[Any]],
) -> tuple[ir.Model, Subject]:
    """``pkg.module:callable``, a ``.pt2`` file or a module in memory -> Model at ``opset`` or the nearest the exporter
    has. Raises UsageError for a path or inputs that make no sense, ModelError where torch can't export it or the result
    isn't torch's, RuntimeUnavailableError without torch."""
    _require_torch()
    if not isinstance(source, str | Path):
        return _export_module(_subject(source, type(source).__name__, None, None, pins, example), opset, pins)
    path = str(source)
    if path.endswith(".pt2"):
        return _export_program(path, opset)
    with contextlib.redirect_stdout(sys.stderr):  # what the author's code prints isn't the report
        module, inputs, dynamic = _called(import_path.load(path), path)
    return _export_module(_subject(module, path, inputs, dynamic, pins, example), opset, pins)


def _require_torch() -> None:
    try:
        import torch
        import torch.onnx
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"torch is needed to read a torch model: {error}", hint="pip install 'edgeq[torch]'"
        ) from error
    del torch


def _called(found: Any, path: str) -> tuple[Any, Any, Any]:
    """What a callable gives: a module, its example inputs and its dynamic shapes, None where not said."""
    import torch

    given = found
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise UsageError(
                f"{path!r} is a {type(found).__name__}", hint="name a function or class that makes a module"
            )
        try:
            inspect.signature(found).bind()
        except ValueError:  # written in C, says nothing of its arguments
            pass
        except TypeError as error:
            raise UsageError(
                f"{path!r} can't be called without arguments: {error}", hint="give them defaults"
            ) from error
        given = found()
    parts = given if isinstance(given, tuple) else (given,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], torch.nn.Module):
        raise UsageError(
            f"{path!r} returned {_kinds(given)}", hint="return a module, or (module, inputs[, dynamic_shapes])"
        )
    return parts[0], *parts[1:], *(None,) * (3 - len(parts))


def _kinds(given: Any) -> str:
    return str([type(part).__name__ for part in given]) if isinstance(given, tuple) else type(given).__name__


def _subject(
    module: torch.nn.Module,
    origin: str,
    inputs: Any,
    dynamic: Any,
    pins: Mapping[str, tuple[int, ...]],
    example: Mapping[str, NDArray[Any]],
) -> Subject:
    module = module.eval()
    parameters = inspect.signature(module.forward).parameters.values()
    names = [item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    inputs = getattr(module, "example_inputs", None) if inputs is None else inputs
    notes: tuple[str, ...] = ()
    if inputs is None:
        inputs = {name: array for name, array in example.items() if name in names}
        if not inputs:
            inputs, notes = _random(pins, names)
    if not len(inputs):
        raise UsageError(
            f"{origin!r} has no example inputs to trace it with",
            hint="return (module, inputs), set module.example_inputs, or give each input's shape",
        )
    dynamic = getattr(module, "dynamic_shapes", None) if dynamic is None else dynamic
    feed = {name: resized(tensor, pins.get(name)) for name, tensor in _named(inputs, names, origin).items()}
    return Subject(origin, "torch", module, module, feed, dynamic, notes)


def _named(inputs: Any, names: list[str], origin: str) -> Feed:
    """Example inputs by the names of forward's arguments."""
    import torch

    if isinstance(inputs, torch.Tensor | np.ndarray):
        inputs = (inputs,)
    pairs = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
    if not isinstance(inputs, Mapping) and len(inputs) > len(names):
        raise UsageError(f"{origin!r} was given {len(inputs)} example inputs, its forward takes {names}")
    unknown = [name for name in pairs if name not in names]
    if unknown:
        raise UsageError(f"{origin!r} was given input {unknown[0]!r}, its forward takes {names}")
    feed: Feed = {}
    for name, value in pairs.items():
        if not isinstance(value, torch.Tensor | np.ndarray | np.generic):
            raise UsageError(
                f"example input {name!r} of {origin!r} is a {type(value).__name__}",
                hint="inputs are tensors; wrap the module in one that takes tensors alone",
            )
        feed[name] = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
    return feed


def _random(pins: Mapping[str, tuple[int, ...]], names: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    feed = {name: torch.randn(shape, generator=generator) for name, shape in pins.items() if name in names}
    return feed, ("traced with random float32 inputs of the shapes given",) if feed else ()


def _export_program(path: str, opset: int) -> tuple[ir.Model, Subject]:
    import torch

    if not Path(path).is_file():
        raise ModelError(f"no model file {path!r}", hint="check the path")
    try:
        with quiet():
            program = torch.export.load(path)
    except (RuntimeError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path!r} can't be loaded as an exported program: {first_line(error)}",
            hint="write it with torch.export.save of the same torch version",
        ) from error
    args, kwargs = program.example_inputs or ((), {})
    names = [str(name) for name in program.graph_signature.user_inputs]
    feed = dict(zip(names, [*args, *kwargs.values()], strict=False))
    called = program.module()

    def module(**feed: torch.Tensor) -> Any:
        values = [feed[name] for name in names]
        return called(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    subject = Subject(path, "exported-program", program, module, feed)
    model = _run_exporter(subject, None, opset)
    if not feed:
        return model, replace(subject, notes=("it holds no example inputs: not compared with torch",))
    for what in differences(model, subject.module, subject.feed):
        raise ModelError(f"{path!r} exported to ONNX differs from torch: {what}", hint="export it with static shapes")
    return model, subject


def _export_module(subject: Subject, opset: int, pins: Mapping[str, tuple[int, ...]]) -> tuple[ir.Model, Subject]:
    """Dynamic as the author says; else with a dynamic batch where the model survives it, else static."""
    if subject.dynamic is not None:
        return _checked(subject, subject.dynamic, opset), subject
    if pins:
        return _checked(subject, None, opset), subject
    batched = _batched(subject)
    if batched is None:
        note = "static shapes: the inputs have no first axis in common"
    else:
        try:
            return _checked(batched, _batch_axes(batched.feed), opset), replace(
                subject, notes=(*subject.notes, "the first axis is dynamic")
            )
        except ModelError as error:
            note = f"static shapes, since a dynamic first axis failed: {error.message}"
    return _checked(subject, None, opset), replace(subject, notes=(*subject.notes, note))


def _batched(subject: Subject) -> Subject | None:
    """The subject with a batch of 2 at least (torch makes sizes 0 and 1 constants), None without a common batch."""
    sizes = {tensor.shape[0] for tensor in subject.feed.values() if tensor.dim()}
    if len(sizes) != 1:
        return None
    batch = max(2, sizes.pop())
    feed = {
        name: resized(tensor, (batch, *tensor.shape[1:])) if tensor.dim() else tensor
        for name, tensor in subject.feed.items()
    }
    return replace(subject, feed=feed)


def _batch_axes(feed: Feed) -> dict[str, Any]:
    import torch

    batch = torch.export.Dim("batch")
    return {name: {0: batch} if tensor.dim() else None for name, tensor in feed.items()}


def _checked(subject: Subject, dynamic: Any, opset: int) -> ir.Model:
    model = _run_exporter(subject, dynamic, opset)
    wrong = made_static(model, dynamic, subject.feed) or next(
        iter(differences(model, subject.module, subject.feed)), ""
    )
    if wrong:
        raise ModelError(
            f"{subject.origin!r} exported to ONNX differs from torch: {wrong}",
            hint="leave the axis out of dynamic_shapes, or rewrite the module so that it stays dynamic",
        )
    return model


def made_static(model: ir.Model, dynamic: Any, feed: Feed) -> str:
    """Which axis asked to be dynamic the exporter made static; empty when it obeyed."""
    inputs = {value.name: value for value in model.graph.inputs}
    for name, axis in _asked(dynamic, feed):
        shape = inputs[name].shape if name in inputs else None
        if shape is not None and isinstance(shape[axis], int):
            return f"torch froze axis {axis} of {name!r} at {shape[axis]}"
    return ""


def _asked(dynamic: Any, feed: Feed) -> list[tuple[str, int]]:
    """The (input, axis) pairs of ``dynamic_shapes``, in torch's forms (mappings or sequences)."""
    by_name = dynamic if isinstance(dynamic, Mapping) else dict(zip(feed, dynamic or (), strict=False))
    pairs = []
    for name, axes in by_name.items():
        listed = axes.items() if isinstance(axes, Mapping) else enumerate(axes or ())
        pairs += [(name, axis) for axis, size in listed if type(size).__name__ == "Dim" and name in feed]
    return pairs


def _run_exporter(subject: Subject, dynamic: Any, opset: int) -> ir.Model:
    import torch

    is_program = subject.kind == "exported-program"
    try:
        with quiet() as said:
            program = torch.onnx.export(
                subject.program,
                (),
                kwargs={} if is_program else subject.feed,
                dynamo=True,
                opset_version=min(max(opset, OPSETS[0]), OPSETS[1]),
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"torch can't export {subject.origin!r}: {first_line(error.__cause__ or error)}",
            hint=last_line(said.getvalue()) or "see torch.export's documentation on what can be traced",
        ) from error
    model: ir.Model = program.model
    for key in [key for key in model.metadata_props if key.startswith("pkg.torch")]:
        del model.metadata_props[key]
    return model
