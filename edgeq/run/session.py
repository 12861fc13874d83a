"""ONNX Runtime sessions: open one, describe it, run it (L4).

One place sets session options and turns the runtime's exceptions into ``EdgeqError``, instead of each caller doing so,
because the same model must load the same way when it is calibrated, validated and timed. Sessions on the CPU live in
this process, those on other providers in the one of ``target.isolated``. Warnings of the runtime are silenced (severity
3): what they say about placement is read from the optimised graph by ``analyse.coverage``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from edgeq.errors import ModelError, SampleError
from edgeq.run.buckets import Bucketed
from edgeq.run.record import Array, Feed, Timing
from edgeq.target.context import check_context
from edgeq.target.isolated import Argument, IsolatedSession
from edgeq.target.provider import RefusedError, check_taken, first_line, open_on, runtime_errors
from edgeq.target.record import CPU, Provider

if TYPE_CHECKING:  # onnx_ir takes half a second to import, which a measuring process never needs
    import onnx_ir

Level = Literal["all", "extended", "basic", "none"]

LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(bool)": np.dtype(np.bool_),
    **{f"tensor({sign}int{bits})": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

RUNTIME_ERRORS = runtime_errors()
Session: TypeAlias = onnxruntime.InferenceSession | IsolatedSession | Bucketed


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a model's input or output. A dynamic dimension is its name, or None without one."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name} {self.dtype}[{dims}]"


def open_session(
    model: Path | bytes | onnx_ir.Model,
    *,
    threads: int = 1,
    level: Level = "all",
    provider: Provider = CPU,
    config: Mapping[str, str] | None = None,
    optimized_path: Path | None = None,
    profile_prefix: Path | None = None,
    shared_pool: bool = False,
    isolated: bool = True,
) -> Session:
    """Load ``model`` (file, serialised bytes or IR) and return a session ready to run.

    ``config`` holds session config entries besides the provider's. ``shared_pool`` uses the process-wide thread pool,
    whose size ``onnxruntime.set_global_thread_pool_sizes`` sets before the first session; ``threads`` then counts for
    providers with a pool of their own only. ``isolated`` is False in a process that may die, and where the profiler is
    read. Raises ModelError when the runtime refuses the model, RuntimeUnavailableError when ``provider`` isn't here or
    takes no node of it.
    """
    settings = _settings(threads, level, shared_pool)
    own_pool = {provider.threads_option: str(threads)} if provider.threads_option else {}
    provider = replace(
        provider, session={**provider.session, **(config or {})}, options={**provider.options, **own_pool}
    )
    if optimized_path is not None:
        settings["optimized_model_filepath"] = str(optimized_path)
    if profile_prefix is not None:
        settings |= {"enable_profiling": True, "profile_file_prefix": str(profile_prefix)}
    if isinstance(model, Path | bytes):
        return _load(model, provider, settings, isolated)
    from edgeq.ir import io

    if io.weight_bytes(model) <= io.INLINE_BYTES:
        return _load(io.to_bytes(model), provider, settings, isolated)
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        io.write(model, path)
        if optimized_path is not None:
            apart = {"session.optimized_model_external_initializers_file_name": optimized_path.name + ".data"}
            provider = replace(provider, session={**provider.session, **apart})
        return _load(path, provider, settings, isolated)


def _settings(threads: int, level: Level, shared_pool: bool) -> dict[str, Any]:
    """Attributes of SessionOptions."""
    pool = {} if shared_pool else {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    return {"graph_optimization_level": LEVELS[level], "use_per_session_threads": not shared_pool, **pool}


def _load(model: Path | bytes, provider: Provider, settings: Mapping[str, Any], isolated: bool) -> Session:
    where = "the model in memory" if isinstance(model, bytes) else str(model)
    if isinstance(model, Path) and not model.is_file():
        raise ModelError(f"{where}: no such file", hint="give the path of an .onnx file")
    if provider.library and isinstance(model, Path):
        check_context(model, provider)
    try:
        if isolated and provider.name != CPU.name:
            return IsolatedSession(model, provider, settings)
        session = open_on(model, provider, settings)
        check_taken(session, provider)
        return session
    except RUNTIME_ERRORS as error:
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} can't load {where}: {first_line(error)}",
            hint="check the file with `edgeq inspect`; an opset or op newer than the runtime needs a newer onnxruntime",
        ) from error


def input_specs(model: Session | onnx_ir.Model) -> tuple[TensorSpec, ...]:
    """The inputs a caller must feed, in order; initializers listed as inputs are left out."""
    if isinstance(model, Session):
        return tuple(_node_arg_spec(arg) for arg in model.get_inputs())
    weights = model.graph.initializers
    return tuple(_value_spec(value) for value in model.graph.inputs if value.name not in weights)


def output_specs(model: Session | onnx_ir.Model) -> tuple[TensorSpec, ...]:
    """The outputs a run returns, in order."""
    if isinstance(model, Session):
        return tuple(_node_arg_spec(arg) for arg in model.get_outputs())
    return tuple(_value_spec(value) for value in model.graph.outputs)


def _value_spec(value: onnx_ir.Value) -> TensorSpec:
    import onnx_ir

    if value.dtype is None or value.dtype == onnx_ir.DataType.STRING:
        raise ModelError(f"{value.name!r} has type {value.dtype}, expected a tensor of numbers")
    dims = () if value.shape is None else value.shape.dims
    shape = tuple(dim if isinstance(dim, int) else dim.value for dim in dims)
    return TensorSpec(str(value.name), np.dtype(value.dtype.numpy()), shape)


def _node_arg_spec(arg: onnxruntime.NodeArg | Argument) -> TensorSpec:
    if arg.type not in DTYPES:
        raise ModelError(f"{arg.name!r} has type {arg.type}, expected a tensor of numbers")
    return TensorSpec(arg.name, DTYPES[arg.type], tuple(arg.shape))


def feeds_like(session: Session, seed: int = 0, dims: Mapping[str, int] | None = None) -> Feed:
    """``random_feed`` for the inputs of ``session``."""
    return random_feed(input_specs(session), seed, dims)


def random_feed(specs: Sequence[TensorSpec], seed: int = 0, dims: Mapping[str, int] | None = None) -> Feed:
    """Random inputs of the right names, dtypes and shapes: for smoke runs and probes, never for a claim on accuracy.

    A dynamic dimension is ``dims[its name]``, else 1. Floats are N(0, 1); integers are 0 or 1, which any vocabulary
    holds; an attention mask is all ones.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: _random(spec, rng, dims or {}) for spec in specs}


def _random(spec: TensorSpec, rng: np.random.Generator, dims: Mapping[str, int]) -> Array:
    shape = tuple(dim if isinstance(dim, int) else dims.get(dim or "", 1) for dim in spec.shape)
    if "mask" in spec.name:
        return np.ones(shape, spec.dtype)
    if spec.dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)


def run_session(session: Session, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
    """One run. Raises SampleError when the feed doesn't fit the inputs, ModelError when a node fails."""
    names = [arg.name for arg in session.get_outputs()] if outputs is None else list(outputs)
    if not names:
        return {}  # the runtime reads an empty list as all outputs
    try:
        return dict(zip(names, session.run(names, dict(feed)), strict=True))
    except (ValueError, ort_state.InvalidArgument) as error:  # a missing input; a wrong name, dtype or shape
        raise _unfit(session, error) from error
    except RUNTIME_ERRORS as error:
        if isinstance(error, RefusedError) and error.argument:
            raise _unfit(session, error) from error
        raise ModelError(f"the model fails while running: {first_line(error)}") from error


def _unfit(session: Session, error: Exception) -> SampleError:
    expected = "; ".join(map(str, input_specs(session)))
    return SampleError(f"a sample doesn't fit the model: {first_line(error)}", hint=f"the inputs are: {expected}")


def timing_of(
    laps_ms: Sequence[float],
    *,
    threads: int,
    warmup: int,
    first_ms: float = 0.0,
    load_ms: float = 0.0,
    peak_bytes: int = 0,
    laps_per_turn: int = 1,
) -> Timing:
    """Timing from raw laps in milliseconds (at least one)."""
    low, median, high, p90, p99 = np.percentile(laps_ms, [25, 50, 75, 90, 99]).tolist()
    return Timing(
        median, p90, p99, high - low, tuple(laps_ms), threads, warmup, first_ms, load_ms, peak_bytes, laps_per_turn
    )
