"""The installed runtime, as the oracle uses it: what it makes of a model, and whether that computes the same (L3).

CPU sessions live in this process; other providers answer in the isolated one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.target.placement import Placement, placement
from edgeq.target.provider import RefusedError, first_line, open_on, runtime_errors, silent
from edgeq.target.record import CPU, Provider, Target

Feed = dict[str, NDArray[Any]]

SYMBOLIC_DIM = 2  # what a symbolic dimension becomes for a trial run
TRIAL_ELEMENTS = 1 << 21  # input elements above which a trial would cost more than it tells
RELATIVE_SLACK = 0.1  # of the largest output: far above rounding, far below a wrong kernel


def runtime_version() -> str:
    """Version of the installed ONNX Runtime."""
    import onnxruntime

    return str(onnxruntime.__version__)


def optimize(model: ir.Model, target: Target) -> ir.Model | str:
    """The graph the CPU's provider would execute for ``model``, or the first line of why it refuses to.

    Level "extended" holds every fusion of Q/DQ; "all" would only change layouts.
    """
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        asked, optimized = Path(folder, "asked.onnx"), Path(folder, "optimized.onnx")
        ir.save(model, asked)
        session = _session(asked, target.simulation, "EXTENDED", optimized)
        return session if isinstance(session, str) else ir.load(optimized)


def place(model: ir.Model, target: Target) -> tuple[Placement | str, str]:
    """Who runs what of ``model`` on the target's provider, or the first line of why it refuses to; and ``disagreement``
    of that run with one node by node on the CPU."""
    feed = _feed(model)
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        asked = Path(folder, "asked.onnx")
        ir.save(model, asked)
        settings = {"intra_op_num_threads": 1, "log_severity_level": 4}
        try:
            trial = silent(target.execution) or not _large(feed)
            found = placement(asked, target.execution, settings, feed if trial else None)
        except RefusedError as error:
            return str(error).replace(str(asked), "the micro-model"), ""
        if found.outputs == "":
            return found, ""
        return found, _wrong(model, _run(_session(asked, CPU, "DISABLE"), feed), found.outputs)


def disagreement(model: ir.Model, target: Target) -> str:
    """What is wrong when ``model`` runs with the CPU's fused kernels instead of node by node; "" when nothing is.

    Some fusions are made and then fail or compute something else (a batched weight with a scale a channel, for one).
    A model that can't run node by node on made-up inputs, or is large, tells nothing.
    """
    feed = _feed(model)
    if _large(feed):
        return ""
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        asked = Path(folder, "asked.onnx")
        ir.save(model, asked)
        plain, fused = (_run(_session(asked, target.simulation, level), feed) for level in ("DISABLE", "ALL"))
    return _wrong(model, plain, fused)


def _large(feed: Feed) -> bool:
    return sum(array.size for array in feed.values()) > TRIAL_ELEMENTS


def _wrong(model: ir.Model, plain: list[NDArray[Any]] | str, fused: list[NDArray[Any]] | str) -> str:
    """What is wrong with the outputs of a run, beside those of one node by node; either may be why there are none."""
    if isinstance(plain, str):
        return ""
    if isinstance(fused, str):
        return f"fails when it runs: {fused}"
    outputs = zip(model.graph.outputs, plain, fused, strict=True)
    far = [value.name for value, expected, found in outputs if not agrees(expected, found, _step(model, value))]
    return "computes other values than the float node" if far else ""


def _session(path: Path, provider: Provider, level: str, save_to: Path | None = None) -> Any:
    """A session on the CPU at a level of optimisation, or the first line of why there is none."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    settings = {
        "graph_optimization_level": levels.ORT_DISABLE_ALL
        if level == "DISABLE"
        else getattr(levels, f"ORT_ENABLE_{level}"),
        "intra_op_num_threads": 1,
        "log_severity_level": 4,
        **({} if save_to is None else {"optimized_model_filepath": str(save_to)}),
    }
    try:
        return open_on(path, provider, settings)
    except runtime_errors() as error:
        return first_line(error).replace(str(path), "the micro-model")


def _run(session: Any, feed: Feed) -> list[NDArray[Any]] | str:
    if isinstance(session, str):
        return session
    try:
        outputs: list[NDArray[Any]] = session.run(None, feed)
    except runtime_errors() as error:
        return first_line(error)
    return outputs


def _feed(model: ir.Model) -> Feed:
    """Reproducible inputs: floats from -3 to 5, indices 0, conditions of both kinds."""
    random = np.random.default_rng(0)
    feed = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else SYMBOLIC_DIM for dim in value.shape or ()]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        if dtype.kind == "b":
            feed[str(value.name)] = random.integers(0, 2, shape).astype(dtype)
        elif dtype.kind in "iu":
            feed[str(value.name)] = np.zeros(shape, dtype)
        else:
            feed[str(value.name)] = random.uniform(-3, 5, shape).astype(dtype)
    return feed


def _step(model: ir.Model, value: ir.Value) -> float:
    """Scale of a graph output that was quantized: its reals are whole steps of it. 0 for any other."""
    name = str(value.name).removesuffix("_out") + "_scale"
    scale = model.graph.initializers.get(name)
    return float(scale.const_value.numpy().max()) if scale is not None and scale.const_value is not None else 0.0


def agrees(expected: NDArray[Any], found: NDArray[Any], step: float) -> bool:
    """Within two steps of the output's scale, or a tenth of the largest value. Indices may differ where codes tie."""
    if expected.shape != found.shape:
        return False
    if expected.dtype.kind != "f" or not np.isfinite(expected).all() or not expected.size:
        return True
    slack = 2 * step + RELATIVE_SLACK * float(np.abs(expected).max())
    return bool(np.abs(expected - found).max() <= slack)
