"""How much memory and disk a model needs in every number format, before anything is built (L10)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeq.analyse import footprint as bytes_of
from edgeq.analyse.footprint import Decoder, Row
from edgeq.analyse.peak import LIBRARY_BYTES, SESSION_BYTES, Peak, predict
from edgeq.errors import SampleError, UsageError, did_you_mean
from edgeq.facts import environment, samples_facts, source_facts, target_facts
from edgeq.given import model_file, pins_of
from edgeq.ir import io
from edgeq.num.quant import parse_quant
from edgeq.report.record import Check, Notice, Report
from edgeq.report.rows import decimal
from edgeq.run.executed import executed
from edgeq.run.record import Feed
from edgeq.run.samples import load_samples
from edgeq.run.session import TensorSpec, input_specs, random_feed
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.record import Target

FORMULA = "weights: bytes = number × bits / 8, bits = code + (scale + zero point) / weights that share them; GB = 10^9"
KV_FORMULA = "KV cache: bytes = 2 × layers × kv heads × (head width × code + scale) bits / 8 × context"


UNIT = "B"  # shown in powers of ten, as memory and disks are sold

Pins = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Asked:
    """What a model is held to. ``room``: bytes of memory; ``format``: a name of FORMATS; both may be left open."""

    target: Target
    room: int | None
    format: str | None
    decoder: Decoder | None
    contexts: tuple[int, ...]
    batch: int


def footprint(
    model: str | Path | ir.Model | None = None,
    *,
    params: str | int | None = None,
    target: str = "local",
    inputs: Sequence[str] = (),
    calibration: str | None = None,
    memory: str | int | None = None,
    weights: str | None = None,
    layers: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    context: Sequence[int] = (),
    batch: int = 1,
) -> Report:
    """Bytes of weights by format, of the KV cache by context length, and of a model file its predicted peak memory.

    ``model`` is what ``export`` takes, a package, or a Hugging Face folder or config; or ``params`` a number of
    parameters such as ``10B``. A model file is held to ``memory`` (the target's unless given) as it is, the others with
    ``weights`` in a format, the smallest unless given, and the KV cache of the longest ``context`` given, in f16.
    Nothing is written.
    """
    chosen = load_target(target)
    room = chosen.memory_bytes if memory is None else bytes_of.parse_bytes(str(memory))
    decoder = _decoder(layers, kv_heads, head_dim)
    form = None if weights is None else _format(weights)
    asked = _Asked(chosen, room, form, decoder, tuple(sorted(context)), batch)
    if (model is None) == (params is None):
        raise UsageError("expected either a model or a number of parameters", hint="give MODEL, or --params 10B")
    if model is None:
        return _of_count(bytes_of.parse_count(str(params)), f"{params} parameters", "given", asked)
    path = Path(model) if isinstance(model, str | Path) else None
    if path is not None and (path.suffix == ".json" or (path / "config.json").is_file()):
        count, found, where = bytes_of.from_config(path)
        return _of_count(count, str(path), where, replace(asked, decoder=decoder or found))
    if form is not None:
        raise UsageError(
            f"--weights {weights} goes with --params or a config: a model file's memory is predicted as it is",
            hint="leave --weights out, the table has every format; or give the file in that format",
        )
    return _of_model(model, pins_of(inputs), calibration, asked)


def _decoder(layers: int | None, kv_heads: int | None, head_dim: int | None) -> Decoder | None:
    options = {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}
    missing = [name for name, value in options.items() if value is None]
    if len(missing) == 3:
        return None
    if layers is None or kv_heads is None or head_dim is None:
        raise UsageError(
            f"a KV cache needs {', '.join(missing)} too", hint="give --layers, --kv-heads and --head-dim together"
        )
    return Decoder(layers, kv_heads, head_dim)


def _format(name: str) -> str:
    """The name in FORMATS of what the user calls it: that name, its first word (the first such) or a text form."""
    known: dict[str, str] = {}
    for full, text in bytes_of.FORMATS.items():
        for word in (full, full.partition(",")[0], text, str(parse_quant(text))):
            known.setdefault(word.lower(), full)
    if name.lower() not in known:
        raise UsageError(f"unknown format {name!r}", hint=did_you_mean(name.lower(), list(known)))
    return known[name.lower()]


def _of_count(count: int, origin: str, where: str, asked: _Asked) -> Report:
    """Of ``count`` parameters without a graph: weights and KV cache alone."""
    rows = bytes_of.table(bytes_of.parameters(count))
    caches = _caches(asked.decoder, asked)
    beside = caches[-1]["f16"] if caches and asked.contexts else 0
    what = f" with {decimal(beside)} of KV cache at {asked.contexts[-1]:,} positions" if beside else ""
    held = min(rows, key=lambda row: row.bytes) if asked.format is None else _named(rows, asked.format)
    check, notices = _fits("weights_bytes", held.bytes + beside, f"{held.name}{what}", asked.room)
    return Report(
        source={"origin": origin, "parameters": count, "parameters_from": where}, target=target_facts(asked.target),
        recipe="footprint", checks=(check,), notices=notices, environment=environment(),
        footprint=_facts(rows, caches, asked.room, beside),
    )  # fmt: skip


def _caches(decoder: Decoder | None, asked: _Asked) -> list[dict[str, Any]]:
    """Rows of the KV cache, at usual context lengths where none were asked for."""
    return [] if decoder is None else bytes_of.kv_cache(decoder, asked.contexts or bytes_of.CONTEXTS, asked.batch)


def _named(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def _fits(name: str, needed: int, note: str, room: int | None) -> tuple[Check, tuple[Notice, ...]]:
    """The check on memory, and in words how far off it is."""
    if room is None:
        return Check(name, needed, UNIT, note=note), ()
    check = Check(name, needed, UNIT, limit=room, passed=needed <= room, note=note)
    if check.passed:
        return check, (Notice("info", "fits", f"fits: needs {decimal(needed)} of {decimal(room)} ({note})"),)
    short = f"doesn't fit: needs {decimal(needed)} ({note}), has {decimal(room)}: {decimal(needed - room)} too much"
    return check, (Notice("warning", "too-large", short),)


def _facts(
    rows: Sequence[Row], caches: Sequence[dict[str, Any]], room: int | None, beside: int, peak: Peak | None = None
) -> dict[str, Any]:
    """The report's ``footprint``. A row ``fits`` when what is stored and ``beside`` do: a KV cache, or the runtime and
    the activations of a model file."""
    formats = [asdict(row) | ({} if room is None else {"fits": row.bytes + beside <= room}) for row in rows]
    facts: dict[str, Any] = {"formula": FORMULA + ("\n" + KV_FORMULA if caches else ""), "formats": formats}
    if caches:
        facts["kv_cache"] = list(caches)
    if peak is not None:
        facts["memory"] = asdict(peak) | {"runtime": LIBRARY_BYTES}
    return facts


def _of_model(model: Any, pins: Pins, calibration: str | None, asked: _Asked) -> Report:
    """Of a model: weights, download size, KV cache, and the peak of loading and running it."""
    tidy, info = read_model(_readable(model), opset=asked.target.opset, pins={} if _is_file(model) else pins)
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        path = _file(model, tidy, Path(folder))
        raw = io.read(path)
        feed, samples = _feed(input_specs(raw), pins, calibration)
        ran, optimised = executed(path, feed, provider=asked.target.simulation)
        peak = predict(raw, path.stat().st_size, optimised, ran)
        size = io.size_bytes(path)
        download = bytes_of.compressed_bytes(bytes_of.read_chunks(_files(path, raw)))
    caches = _caches(asked.decoder or bytes_of.decoder_of(tidy), asked)
    least = LIBRARY_BYTES + SESSION_BYTES + peak.pattern
    check, notices = _fits("predicted_peak_bytes", peak.total, "this file, one sample at a time", asked.room)
    sizes = (
        Check("size_bytes", size, UNIT),
        Check("download_bytes", download, UNIT, note=f"compressed by zlib at level {bytes_of.LEVEL}"),
    )
    return Report(
        source=source_facts(info, tidy), target=target_facts(asked.target), recipe="footprint",
        checks=(check, *sizes), notices=notices, environment=environment(), samples=samples,
        footprint=_facts(_rows(tidy, size), caches, asked.room, least, peak),
    )  # fmt: skip


def _rows(model: ir.Model, size: int) -> list[Row]:
    """Weights by format, compressed; what else a file of ``size`` bytes stores is kept."""
    weights = bytes_of.weights_of(model)
    counted = {str(weight.value.name) for weight in weights if weight.value is not None}
    tensors = {
        str(value.name): value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    }
    kept = size - sum(weight.stored for weight in weights)
    floats = sum(t.nbytes for name, t in tensors.items() if name not in counted and t.dtype == ir.DataType.FLOAT)
    return [
        replace(row, compressed=bytes_of.compressed_share(weights, parse_quant(bytes_of.FORMATS[row.name])))
        for row in bytes_of.table(weights, max(kept, 0), floats)
    ]


def _is_file(model: Any) -> bool:
    """Whether a model is an ONNX file or a package, which is looked at as it is."""
    path = Path(model) if isinstance(model, str | Path) else None
    return path is not None and path.suffix != ".pt2" and (path.exists() or ":" not in str(model))


def _readable(model: Any) -> Any:
    return model_file(Path(model)) if _is_file(model) else model


def _file(model: Any, tidy: ir.Model, folder: Path) -> Path:
    """The file to load: the user's own, or ``tidy`` written to ``folder``."""
    if _is_file(model):
        return model_file(Path(model))
    io.write(tidy, folder / "model.onnx")
    return folder / "model.onnx"


def _files(path: Path, model: ir.Model) -> list[Path]:
    """A model file and its external data."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    beside = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [path, *(path.parent / name for name in sorted(beside))]


def _feed(specs: Sequence[TensorSpec], pins: Pins, calibration: str | None) -> tuple[Feed, dict[str, Any]]:
    """One sample, and what the report says of it: real, or random in the shapes that were given."""
    if calibration is not None:
        samples = load_samples(calibration, specs, limit=1)
        return next(iter(samples)), {"calibration": samples_facts(samples)}
    known = {spec.name: spec for spec in specs}
    for name, shape in pins.items():
        if name not in known or len(shape) != len(known[name].shape):
            expected = "; ".join(map(str, specs))
            raise UsageError(f"--input {name}={','.join(map(str, shape))} fits no input", hint=f"they are: {expected}")
    dims = {
        dim: size
        for name, shape in pins.items()
        for dim, size in zip(known[name].shape, shape, strict=True)
        if isinstance(dim, str)
    }
    pinned = [replace(spec, shape=_concrete(spec, pins, dims)) for spec in specs]
    return random_feed(pinned), {"calibration": "random, shapes only"}


def _concrete(spec: TensorSpec, pins: Pins, dims: dict[str, int]) -> tuple[int, ...]:
    """The shape to run an input at. A first axis that nobody gave is a batch of 1."""
    if spec.name in pins:
        return pins[spec.name]
    shape = [dims.get(dim) if isinstance(dim, str) else dim for dim in spec.shape]
    shape[:1] = [1 if dim is None else dim for dim in shape[:1]]
    if None in shape:
        asked = ",".join("?" if dim is None else str(dim) for dim in shape)
        raise SampleError(
            f"input {str(spec)!r} has dynamic axes, and activations can't be counted without their sizes",
            hint=f"give --input {spec.name}={asked} with numbers, or samples with -c",
        )
    return tuple(dim for dim in shape if dim is not None)
