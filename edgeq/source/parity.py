"""Whether an exported model computes what torch computes, at the example's shape and at others (L3)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import io
from edgeq.source.quiet import first_line, quiet

if TYPE_CHECKING:
    import torch

Feed = dict[str, "torch.Tensor"]

AGREES = 1e-3
"""Largest difference to torch, as a part of the output's peak. Folding and another order of sums leave about 1e-5 in a
deep float32 network; a frozen axis or a wrong op leaves 0.1 and more. Half precision is allowed 20 times this."""


def differences(model: ir.Model, module: Any, feed: Feed) -> Iterator[str]:
    """Where the exported model isn't torch's: on the example, then with each dynamic axis at another size. Output
    sizes that move although the exporter declared them static are made dynamic on the way, in place."""
    session = _session(model)
    found, different = _compare(session, module, feed)
    if different:
        yield different
        return
    for symbol, axes in _symbols(model, feed).items():
        name, axis = axes[0]
        size = feed[name].shape[axis]
        for other in (size + 1, 2 * size, max(1, size - 1)):
            other_feed = _with_size(feed, axes, other)
            if not _torch_takes(module, other_feed):
                continue
            found, different = _compare(session, module, other_feed)
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
        changed[name] = resized(changed[name], tuple(shape))
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

    with torch.no_grad(), quiet():
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
        return [], f"the runtime fails: {first_line(error)}"
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


def resized(tensor: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    """``tensor`` repeated or cut along each axis to ``shape``, so that its values stay ones the model knows."""
    import torch

    if shape is None or len(shape) != tensor.dim():
        return tensor
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor
