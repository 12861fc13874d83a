"""A torch module or exported program -> Model, proven against torch on two shapes (L3).

``torch.onnx.export(dynamo=True)`` can freeze an axis it was asked to keep dynamic, without an error (measured with a
bidirectional LSTM), so each dynamic axis is run at a second size and compared. Exported at opset 22 at most: from 23 on
attention comes out as one op that no integer kernel takes.
"""

from __future__ import annotations

import contextlib
import inspect
import io as text_io
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ModelError, RuntimeUnavailableError, UsageError
from edgeq.ir import io
from edgeq.source import import_path

if TYPE_CHECKING:
    import torch

Kind = Literal["torch", "exported-program"]
Feed = dict[str, "torch.Tensor"]

OPSETS = (18, 22)
"""The exporter's lowest opset, and the last one before attention becomes one op."""

AGREES = 1e-3
"""Largest difference to torch, as a part of the output's peak. Folding and another order of sums leave about 1e-5 in a
deep float32 network; a frozen axis or a wrong op leaves 0.1 and more. Half precision is allowed 20 times this."""


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
    feed = {name: _resized(tensor, pins.get(name)) for name, tensor in _named(inputs, names, origin).items()}
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


def _resized(tensor: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    """``tensor`` repeated or cut along each axis to ``shape``, so that its values stay ones the model knows."""
    import torch

    if shape is None or len(shape) != tensor.dim():
        return tensor
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor


def _export_program(path: str, opset: int) -> tuple[ir.Model, Subject]:
    import torch

    if not Path(path).is_file():
        raise ModelError(f"no model file {path!r}", hint="check the path")
    try:
        with _quiet():
            program = torch.export.load(path)
    except (RuntimeError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path!r} can't be loaded as an exported program: {_first_line(error)}",
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
    for what in differences(model, subject):
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
        name: _resized(tensor, (batch, *tensor.shape[1:])) if tensor.dim() else tensor
        for name, tensor in subject.feed.items()
    }
    return replace(subject, feed=feed)


def _batch_axes(feed: Feed) -> dict[str, Any]:
    import torch

    batch = torch.export.Dim("batch")
    return {name: {0: batch} if tensor.dim() else None for name, tensor in feed.items()}


def _checked(subject: Subject, dynamic: Any, opset: int) -> ir.Model:
    model = _run_exporter(subject, dynamic, opset)
    wrong = made_static(model, dynamic, subject.feed) or next(iter(differences(model, subject)), "")
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
        with _quiet() as said:
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
            f"torch can't export {subject.origin!r}: {_first_line(error.__cause__ or error)}",
            hint=_last_line(said.getvalue()) or "see torch.export's documentation on what can be traced",
        ) from error
    model: ir.Model = program.model
    for key in [key for key in model.metadata_props if key.startswith("pkg.torch")]:
        del model.metadata_props[key]
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[text_io.StringIO]:
    """Catch what torch prints, warns and logs: stdout belongs to the report."""
    said, disabled = text_io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.disable(disabled)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def differences(model: ir.Model, subject: Subject) -> Iterator[str]:
    """Where the exported model isn't torch's: on the example, then with each dynamic axis at another size. Output
    sizes that move although the exporter declared them static are made dynamic on the way, in place."""
    session = _session(model)
    found, different = _compare(session, subject.module, subject.feed)
    if different:
        yield different
        return
    for symbol, axes in _symbols(model, subject.feed).items():
        name, axis = axes[0]
        size = subject.feed[name].shape[axis]
        for other in (size + 1, 2 * size, max(1, size - 1)):
            feed = _with_size(subject.feed, axes, other)
            if not _torch_takes(subject.module, feed):
                continue
            found, different = _compare(session, subject.module, feed)
            if different:
                yield f"axis {axis} of {name!r} ({symbol}) was frozen at {size}: with {other}, {different}"
            else:
                _free_outputs(model, found)
            break


def _free_outputs(model: ir.Model, found: list[NDArray[Any]]) -> None:
    for value, array in zip(model.graph.outputs, found, strict=True):
        if value.shape is not None and len(value.shape) == array.ndim:
            pairs = enumerate(zip(value.shape, array.shape, strict=True))
            moved = {axis for axis, (dim, size) in pairs if isinstance(dim, int) and dim != size}
            value.shape = ir.Shape(
                [f"{value.name}_axis{axis}" if axis in moved else dim for axis, dim in enumerate(value.shape)]
            )


def _symbols(model: ir.Model, feed: Feed) -> dict[str, list[tuple[str, int]]]:
    """Dynamic size's name -> the (input, axis) it stands at. Derived sizes are left out."""
    found: dict[str, list[tuple[str, int]]] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if symbol is not None and symbol.isidentifier() and value.name in feed:
                found.setdefault(symbol, []).append((value.name, axis))
    return found


def _with_size(feed: Feed, axes: list[tuple[str, int]], size: int) -> Feed:
    changed = dict(feed)
    for name, axis in axes:
        shape = list(changed[name].shape)
        shape[axis] = size
        changed[name] = _resized(changed[name], tuple(shape))
    return changed


def _torch_takes(module: Any, feed: Feed) -> bool:
    try:
        _torch_outputs(module, feed)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True


def _torch_outputs(module: Any, feed: Feed) -> list[NDArray[Any]]:
    import torch
    from torch.utils import _pytree as pytree

    with torch.no_grad(), _quiet():
        leaves = pytree.tree_leaves(module(**feed))
    return [
        leaf.detach().float().numpy() if leaf.dtype == torch.bfloat16 else leaf.detach().numpy()
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
    ]


def _session(model: ir.Model) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        io.write(model, path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _compare(session: Any, module: Any, feed: Feed) -> tuple[list[NDArray[Any]], str]:
    """The runtime's outputs for ``feed``, and how they differ from torch's; empty when they agree."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    expected = _torch_outputs(module, feed)
    taken = {item.name for item in session.get_inputs()}
    try:
        found = session.run(None, {name: tensor.numpy() for name, tensor in feed.items() if name in taken})
    except (state.Fail, state.InvalidArgument, state.RuntimeException) as error:
        return [], f"the runtime fails: {_first_line(error)}"
    if len(found) != len(expected):
        return found, f"{len(found)} outputs instead of {len(expected)}"
    for item, a, b in zip(session.get_outputs(), expected, found, strict=True):
        if a.shape != b.shape:
            return found, f"output {item.name!r} has shape {list(b.shape)} instead of {list(a.shape)}"
        if a.size and not _agree(a, b):
            return found, f"output {item.name!r} is off by {np.abs(a.astype(np.float64) - b).max():.3g}"
    return found, ""


def _agree(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if not np.issubdtype(a.dtype, np.floating):
        return bool(np.mean(a != b) <= 0.01)  # an index may flip between equals
    limit = AGREES * (20 if a.dtype == np.float16 else 1)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return False
    peak = float(np.abs(a[finite]).max(initial=0.0))
    difference = np.abs(a[finite].astype(np.float64) - b[finite]).max(initial=0.0)
    return bool(difference <= limit * max(peak, 1e-6))
