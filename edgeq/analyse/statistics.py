"""Statistics of tensors as files of their own: what is taken where the data lies, merged, and used elsewhere (L5).

A file is an ``.npz``: for the tensor at place ``i`` of ``facts["tensors"]`` the arrays ``i.NAME`` of ``Stats``, less
the sample of raw values: what leaves the place of the data should tell of values together, not of single ones.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq import num
from edgeq.analyse import stats as counting
from edgeq.analyse.cost import inferred_shapes
from edgeq.analyse.observe import PADDING_MASK, VERSION, channel_axis, fixed
from edgeq.analyse.stats import Arrays, Stats, merge
from edgeq.errors import OutputError, SampleError, UsageError
from edgeq.ir import io, query
from edgeq.ir.pieces import chunks, shown, values_of
from edgeq.num import histogram
from edgeq.run.device import Device, measure
from edgeq.run.record import Array, Feed
from edgeq.run.session import input_specs, open_session, random_feed, run_session
from edgeq.run.timing import TimedConfig
from edgeq.target.record import Provider

# What counts on a device, by the file names it is imported by there; packages are empty.
EMPTY = Path(num.__file__)
COUNTING = {
    "edgeq/__init__.py": EMPTY, "edgeq/num/__init__.py": EMPTY, "edgeq/analyse/__init__.py": EMPTY,
    "edgeq/num/histogram.py": Path(histogram.__file__), "edgeq/analyse/stats.py": Path(counting.__file__),
}  # fmt: skip
OLDEST_PYTHON = (3, 9)  # what stats.py runs on
SLICE_BYTES = 64 << 20  # of a sample's tensors that a run on a device gives
RANKS = 8
ALIKE = 1e-3  # of a tensor's peak: rewrites move values by less, and scales that were moved by more
RAW = ("sample", "keys")  # of Stats: single values and what drew them


@dataclass(frozen=True)
class Statistics:
    """Statistics by tensor, from ``samples`` samples of the model with this digest. ``origins``: where they were."""

    tensors: Mapping[str, Stats]
    model: str
    samples: int
    origins: tuple[str, ...] = field(default=())


def taps(model: ir.Model) -> list[str]:
    """The tensors worth observing: of a quantized model what it quantizes, else all real ones, in graph order."""
    quantized = [
        str(node.inputs[0].name)
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and not query.is_constant(node.inputs[0])
    ]
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    real = [str(value.name) for value in values if query.is_float(value) and not query.is_constant(value)]
    weights = model.graph.initializers
    return list(dict.fromkeys(quantized or (name for name in real if name not in weights)))


def unrounded(model: ir.Model) -> ir.Model:
    """A quantized model whose activations are passed on as they are: what a quantizer cut off would be missing from
    every tensor behind it. Weights stay rounded; what is computed on codes by other nodes than Q and DQ stays too."""
    clone = model.clone()
    for node in clone.graph:
        source = node.inputs[0] if node.inputs else None
        writer = source.producer() if source is not None else None
        if node.op_type == "DequantizeLinear" and writer is not None and writer.op_type == "QuantizeLinear":
            for user, index in list(node.outputs[0].uses()):
                user.replace_input_with(index, writer.inputs[0])
    return clone


def on_device(
    model: ir.Model, device: Device, provider: Provider, data: str, limit: int | None = None
) -> tuple[dict[str, Stats], int]:
    """Statistics of ``taps`` of a model over samples at the path ``data`` of the device, which stay there, and how many
    samples those were. UsageError for a device that can't count."""
    version = tuple(int(word) for word in re.findall(r"\d+", device.facts.python)[:2])
    if version < OLDEST_PYTHON:
        found = f"Python {device.facts.python}" if device.facts.python else "no Python"
        raise UsageError(f"{device.address} has {found}, counting needs 3.9 or later", hint="name one: ?python=/path")
    names, whole = taps(model), unrounded(model)
    values = {str(value.name): value for value in (*whole.graph.inputs, *values_of(whole).values())}
    inputs = input_specs(model)
    fed = {spec.name for spec in inputs}
    shapes = inferred_shapes(whole, random_feed(inputs))
    sizes = {name: 4 * math.prod(shapes.get(name, (SLICE_BYTES // 4,))) for name in names}
    told = [_told(whole, values[name]) for name in names]
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        configs = []
        for place, chunk in enumerate(chunks([name for name in names if name not in fed], sizes, SLICE_BYTES)):
            path = Path(folder) / f"slice{place}.onnx"
            io.write(shown(whole, chunk), path)
            configs.append(TimedConfig(path.stem, path, provider=provider))
        rows = [{"name": spec.name, "rank": len(spec.shape), "dtype": spec.dtype.str} for spec in inputs]
        result = Path(folder) / "statistics"
        count = measure.observed(
            device, configs, data, result, COUNTING, module=counting.__name__, taps=told, inputs=rows,
            mask=PADDING_MASK, raw=list(RAW), limit=limit,
        )  # fmt: skip
        with np.load(result, allow_pickle=False) as file:
            return stats_of({name: file[name] for name in file.files}, names), count


def _told(model: ir.Model, value: ir.Value) -> dict[str, Any]:
    """How a tensor is counted: the axis of its channels by rank, and whether padding is left out."""
    axes = [channel_axis(value, rank) for rank in range(RANKS)]
    return {
        "name": value.name,
        "axes": axes,
        "masked": value.name != PADDING_MASK and not fixed(model, value, PADDING_MASK),
    }


def alike(first: ir.Model, second: ir.Model, names: Sequence[str], feed: Feed) -> list[str]:
    """Those of ``names`` whose values are the same in both models, one a rewritten form of the other, for this feed."""
    known = [
        {str(value.name) for value in (*model.graph.inputs, *values_of(model).values())} for model in (first, second)
    ]
    wanted = [name for name in names if name in known[0] & known[1]]
    sizes = {name: 4 * math.prod(shape) for name, shape in inferred_shapes(first, feed).items()}
    found = [name for name in wanted if name in feed]
    computed = [name for name in wanted if name not in feed]
    for chunk in chunks(computed, {name: sizes.get(name, SLICE_BYTES) for name in computed}, SLICE_BYTES):
        one, other = (_values(model, chunk, feed) for model in (first, second))
        found += [name for name in chunk if _near(one[name], other[name])]
    return found


def _values(model: ir.Model, names: Sequence[str], feed: Feed) -> Feed:
    session = open_session(shown(model, names), level="basic")
    inputs = {spec.name for spec in input_specs(session)}
    return run_session(session, {name: array for name, array in feed.items() if name in inputs}, names)


def _near(one: Array, other: Array) -> bool:
    peak = float(np.abs(one).max(initial=0.0))
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=0.0, atol=ALIKE * peak))


def arrays_of(tensors: Mapping[str, Stats]) -> Arrays:
    """Statistics as the arrays of a file, without raw values."""
    return {
        f"{place}.{name}": array
        for place, stats in enumerate(tensors.values())
        for name, array in stats.to_arrays().items()
        if name not in RAW
    }


def write(found: Statistics, path: Path) -> None:
    """OutputError when ``path`` can't be written."""
    facts = {"version": VERSION, "model": found.model, "samples": found.samples, "origins": list(found.origins),
             "tensors": list(found.tensors)}  # fmt: skip
    arrays = {"facts": np.array(json.dumps(facts)), **arrays_of(found.tensors)}
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub mistakes names for flags
    except OSError as error:
        raise OutputError(f"can't write {str(path)!r}: {error.strerror}", hint="choose another -o") from error


def read(path: Path) -> Statistics:
    """SampleError for a file that isn't one of statistics, or of another version's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts: dict[str, Any] = json.loads(str(arrays.pop("facts")))
        version, names = facts["version"], facts["tensors"]
        tensors = stats_of(arrays, names) if version == VERSION else {}
        found = Statistics(tensors, facts["model"], facts["samples"], tuple(facts["origins"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise SampleError(
            f"can't read statistics {str(path)!r}: {error}", hint="make them with edgeq observe"
        ) from error
    if version != VERSION:
        raise SampleError(f"{str(path)!r} holds statistics of version {version}, expected {VERSION}",
                          hint="observe again with this edgeq")  # fmt: skip
    return found


def stats_of(arrays: Mapping[str, np.ndarray[Any, Any]], names: Iterable[str]) -> dict[str, Stats]:
    """The inverse of ``arrays_of``."""
    nothing = dict.fromkeys(RAW, np.zeros(0, np.float32))
    parts: dict[str, Arrays] = {}
    for key, array in arrays.items():
        place, _, name = key.partition(".")
        parts.setdefault(place, {})[name] = array
    return {name: Stats.from_arrays(nothing | parts[str(place)]) for place, name in enumerate(names)}


def merged(parts: Iterable[Statistics]) -> Statistics:
    """What one pass over the data of all would have said. SampleError when they are of different models."""
    first, *others = parts
    for other in others:
        if other.model != first.model or other.tensors.keys() != first.tensors.keys():
            raise SampleError(
                f"statistics of {', '.join(first.origins)} and {', '.join(other.origins)} are of different models",
                hint="observe the same file everywhere",
            )
        tensors = {name: merge(stats, other.tensors[name]) for name, stats in first.tensors.items()}
        first = Statistics(tensors, first.model, first.samples + other.samples, (*first.origins, *other.origins))
    return first
