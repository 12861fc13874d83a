"""Streaming calibration: samples through the float model once, statistics of the tapped tensors out (L5).

The taps become outputs of a session at the runtime's full optimisation: measured on EfficientNet-Lite0 that is twice
as fast as with its layouts off and moves values by 2e-5 of their range, 1/250 of an 8-bit step. Taps that together pass
a byte budget are split among sessions that stay open side by side: fetching a part of one session's outputs would not
do, since the runtime keeps them all until the run ends (measured), and a pass over the data per session would read
every sample again, which for images costs as much as running it. The statistics of one slice are computed while the
next one runs, since the runtime gives up Python's lock; each Stats is touched by one thread at a time and in the order
of the samples, so the result does not depend on the threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from edgeq.analyse.cost import inferred_shapes
from edgeq.analyse.stats import HISTOGRAM_ELEMENTS, RESERVOIR, Arrays, Stats
from edgeq.analyse.store import Store, key_of
from edgeq.errors import ModelError, SampleError, did_you_mean
from edgeq.ir import io, query
from edgeq.report.progress import Progress, Silent
from edgeq.report.record import Notice
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import open_session, run_session

VERSION = 1  # raised when the same data would give other statistics: stored ones are then not found
BYTE_BUDGET = 256 << 20
CHECKPOINT_S = 10.0
PADDING_MASK = "attention_mask"

_CHANNELS_AT_1 = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization"})
_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


class Observation(dict[str, Stats]):
    """Statistics by tap, with what a report says of the pass.

    ``ran``: samples that went through the model now; the rest came from the store. ``reused``: taps found there.
    ``seconds``: of "read", "run" and "statistics", the last overlapping the others.
    """

    def __init__(self, stats: Mapping[str, Stats]) -> None:
        super().__init__(stats)
        self.notices: tuple[Notice, ...] = ()
        self.ran = 0
        self.reused = 0
        self.seconds: dict[str, float] = {"read": 0.0, "run": 0.0, "statistics": 0.0}

    @property
    def settled(self) -> int:
        """The number of samples after which no tap's range grew by 1 % or more at a time."""
        return max((stats.settled for stats in self.values()), default=0)


def observe(
    model: ir.Model,
    taps: Sequence[str],
    samples: Samples,
    *,
    threads: int,
    byte_budget: int = BYTE_BUDGET,
    histogram_elements: int = HISTOGRAM_ELEMENTS,
    masks: Mapping[str, str] | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Observation:
    """Statistics of the values named ``taps`` over all ``samples``; one pass, memory independent of their number.

    At most ``byte_budget`` bytes of tapped tensors are alive at a time (a single larger tensor excepted). Tensors above
    ``histogram_elements`` enter the histogram in strides; extremes and sums stay exact. ``masks`` names for a tap
    [b, s, …] the input [b, s] whose zeros are padding, to be left out; None looks for ``attention_mask`` at every tap.
    With a ``store``, stored taps are not observed again and an interrupted pass goes on where it stopped.
    Raises ModelError for a tap that doesn't exist or isn't real, SampleError without samples.
    """
    values = _tapped(model, taps)
    if samples.count == 0:
        raise SampleError(f"no samples in {samples.origin}", hint="calibration needs at least one")
    keys = _keys(model, values, samples, histogram_elements, masks) if store is not None else {}
    found = _load(store, keys)
    missing = {tap: value for tap, value in values.items() if tap not in found}
    ran = Observation({})
    notices: list[Notice] = []
    if missing:
        job = _Job(model, missing, samples, threads, byte_budget, masks)
        checkpoint = _Checkpoint(store, key_of(keys[tap] for tap in missing) if store else "", missing)
        ran = _pass(job, checkpoint, histogram_elements, progress or Silent())
        if store is not None and not _keep(store, keys, ran, checkpoint):
            notices.append(Notice("warning", "store", f"statistics can't be kept in {store.folder}"))
    result = Observation({tap: found[tap] if tap in found else ran[tap] for tap in values})
    result.ran, result.reused, result.seconds = ran.ran, len(found), ran.seconds
    result.notices = (*notices, *(notice for tap, stats in result.items() for notice in _notices(tap, stats)))
    return result


def _tapped(model: ir.Model, taps: Sequence[str]) -> dict[str, ir.Value]:
    """Tap -> value of the main graph. Raises ModelError for a name that is none, a constant or not real."""
    known = {str(value.name): value for value in model.graph.inputs}
    known.update({str(value.name): value for node in model.graph for value in node.outputs})
    values: dict[str, ir.Value] = {}
    for tap in taps:
        value = known.get(tap)
        if value is None:
            constant = tap in model.graph.initializers
            raise ModelError(
                f"can't observe {tap!r}: " + ("a constant" if constant else "no such value in the main graph"),
                hint="its values are in the model" if constant else did_you_mean(tap, list(known)),
            )
        if value.dtype is not None and not query.is_float(value):
            raise _not_real(tap, str(value.dtype).lower())
        values[tap] = value
    return values


def _not_real(tap: str, dtype: str) -> ModelError:
    return ModelError(f"can't observe {tap!r}: it is {dtype}, expected a float type", hint="tap real values only")


# --- the pass --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What is observed on what, within which limits. Half the threads run the model, half count: both sides take
    about as long (measured on an image model); with a single thread they take turns."""

    model: ir.Model
    values: Mapping[str, ir.Value]
    samples: Samples
    threads: int
    byte_budget: int
    masks: Mapping[str, str] | None

    @property
    def counters(self) -> int:
        return self.threads // 2

    @property
    def slice_bytes(self) -> int:
        """Of tapped tensors in one run: while one slice is counted the next one is produced."""
        return self.byte_budget // 2 if self.counters else self.byte_budget


def _pass(job: _Job, checkpoint: _Checkpoint, elements: int, progress: Progress) -> Observation:
    """Run every sample not yet counted. An interruption between two samples loses none of them."""
    stats, done = checkpoint.read()
    for tap in job.values:
        stats.setdefault(tap, Stats(elements))
    result, slices, whole = Observation(stats), _Slices(job), True
    with _Counter(job, result) as counter, progress.stage("observe", job.samples.count):
        progress.advance(done)
        try:
            for index in range(done, job.samples.count):
                feed = _read(job.samples, index, result)
                for session, names in slices.of(feed):
                    outputs = _run(session, feed, names, result)
                    slices.learn(outputs)
                    whole = False
                    counter.submit(outputs, feed, index)
                done, whole = index + 1, True
                result.ran += 1
                progress.advance()
                if checkpoint.due():
                    counter.wait()
                    checkpoint.write(result, done)
            counter.wait()
        except BaseException:  # Ctrl-C too: what is counted is kept, then it goes on its way
            if whole and counter.drained():
                checkpoint.write(result, done)
            raise
    return result


def _read(samples: Samples, index: int, result: Observation) -> Feed:
    start = time.perf_counter()
    feed = samples.read(index)
    result.seconds["read"] += time.perf_counter() - start
    return feed


def _run(
    session: onnxruntime.InferenceSession | None, feed: Feed, names: Sequence[str], result: Observation
) -> dict[str, Array]:
    """The tapped tensors, taps on inputs straight from the feed. Raises ModelError for one that isn't real."""
    start = time.perf_counter()
    computed = [name for name in names if name not in feed]
    outputs = run_session(session, feed, computed) if session is not None else {}
    outputs.update((name, feed[name]) for name in names if name in feed)
    for name, array in outputs.items():
        dtype = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
        if dtype not in _DTYPES:
            raise _not_real(name, dtype)
    result.seconds["run"] += time.perf_counter() - start
    return outputs


class _Slices:
    """Taps split so that no run's tapped tensors pass the budget, a session a slice.

    Sizes are inferred for the first feed, then learnt from what comes out; for a larger feed they are taken to grow
    in proportion. Splitting again opens sessions again, so it then leaves room for twice the size.
    """

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.sizes: dict[str, int] = {}
        self.feed_bytes = 0  # of the largest feed the sizes stand for
        self.slices: list[tuple[onnxruntime.InferenceSession | None, list[str]]] = []

    def of(self, feed: Feed) -> list[tuple[onnxruntime.InferenceSession | None, list[str]]]:
        """The slices for this feed: session (None when all taps are inputs) and names."""
        size = sum(array.nbytes for array in feed.values())
        if not self.slices:
            self.sizes, self.feed_bytes = self._inferred(feed), size
            self._split()
        elif size > self.feed_bytes:
            self.sizes = {name: bytes_ * size // max(self.feed_bytes, 1) for name, bytes_ in self.sizes.items()}
            self.feed_bytes = size
        if any(len(names) > 1 and self._bytes(names) > self.job.slice_bytes for _, names in self.slices):
            self.sizes = {name: 2 * bytes_ for name, bytes_ in self.sizes.items()}
            self._split()
        return self.slices

    def learn(self, outputs: Mapping[str, Array]) -> None:
        """Correct what was inferred by what came out of a feed; sizes only grow."""
        for name, array in outputs.items():
            self.sizes[name] = max(self.sizes[name], array.nbytes)

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(self.sizes[name] for name in names)

    def _inferred(self, feed: Feed) -> dict[str, int]:
        """Bytes a tap; one of unknown shape is taken to be as large as the largest known."""
        shapes = inferred_shapes(self.job.model, feed)
        known = {name: 4 * math.prod(shapes[name]) for name in self.job.values if name in shapes}
        return {name: known.get(name, max(known.values(), default=0)) for name in self.job.values}

    def _split(self) -> None:
        self.slices = []  # closes the old sessions before new ones take memory
        names: list[str] = []
        groups = [names]
        for name in self.job.values:
            if names and self._bytes([*names, name]) > self.job.slice_bytes:
                names = []
                groups.append(names)
            names.append(name)
        self.slices = [(_tapped_session(self.job, names), names) for names in groups]


def _tapped_session(job: _Job, names: Sequence[str]) -> onnxruntime.InferenceSession | None:
    """A session of the model whose outputs are these values alone."""
    clone = job.model.clone()
    outputs = {value.name: value for node in clone.graph for value in node.outputs}
    wanted = [outputs[name] for name in names if name in outputs]
    if not wanted:
        return None
    for value in wanted:
        value.shape = None  # the runtime infers it; a declared one may be wrong for this feed
    clone.graph.outputs[:] = wanted
    # Threads waiting in a spin would take the cores the statistics need.
    return open_session(
        clone, threads=max(job.threads - job.counters, 1), config={"session.intra_op.allow_spinning": "0"}
    )


class _Counter:
    """Adds outputs to the statistics, on threads of its own when there are any, a tap always on one at a time."""

    def __init__(self, job: _Job, result: Observation) -> None:
        self.job, self.result = job, result
        self.pool = ThreadPoolExecutor(job.counters) if job.counters else None
        self.pending: list[Future[float]] = []

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def submit(self, outputs: dict[str, Array], feed: Feed, index: int) -> None:
        """Count ``outputs`` of sample ``index`` once the ones before are counted; empties ``outputs``."""
        self.wait()
        heaviest_first = sorted(outputs, key=lambda name: -outputs[name].nbytes)
        shares = [heaviest_first[start :: self.job.counters or 1] for start in range(self.job.counters or 1)]
        for share in shares:
            arrays = [(name, outputs.pop(name)) for name in share]
            if self.pool is None:
                self.result.seconds["statistics"] += self._count(arrays, feed, index)
            else:
                self.pending.append(self.pool.submit(self._count, arrays, feed, index))

    def wait(self) -> None:
        """Until all that was submitted is counted; raises what a counting thread raised."""
        pending, self.pending = self.pending, []
        try:
            self.result.seconds["statistics"] += sum(future.result() for future in pending)
        except BaseException:
            self.pending = pending  # for ``drained`` to see
            raise

    def drained(self) -> bool:
        """Wait; whether everything submitted was counted without an error."""
        wait(self.pending)
        return all(future.exception() is None for future in self.pending)

    def _count(self, arrays: list[tuple[str, Array]], feed: Feed, index: int) -> float:
        """Seconds spent. Takes arrays off the list as it goes, so that each is freed once counted."""
        start = time.perf_counter()
        while arrays:
            name, array = arrays.pop()
            axis, mask = _channel_axis(self.job.values[name], array.ndim), self._mask(name, array, feed)
            if mask is not None:
                array, axis = array[mask], axis if axis == -1 else None
            self.result[name].add(array, index, axis)
        return time.perf_counter() - start

    def _mask(self, name: str, array: Array, feed: Feed) -> NDArray[np.bool_] | None:
        """bool[b, s] of the positions that aren't padding, when the tap is [b, s, …] and something is padding."""
        masks = self.job.masks
        source = (PADDING_MASK if masks is None else masks.get(name)) or ""
        mask = feed.get(source)
        if mask is None or array.ndim < mask.ndim or array.shape[: mask.ndim] != mask.shape or name == source:
            return None
        if masks is None and (mask.dtype.kind == "f" or _fixed(self.job, name, source)):
            return None  # a mask of floats may be one that is added: 0 where a token is
        keep = mask.astype(np.bool_)
        return None if keep.all() else keep


def _fixed(job: _Job, name: str, source: str) -> bool:
    """Whether the tap's second axis is fixed where the mask's is the sequence: equal by accident (heads, channels)."""
    tap, mask = query.dims(job.values[name]), next((v for v in job.model.graph.inputs if v.name == source), None)
    sequence = query.dims(mask)
    return bool(tap and sequence and len(tap) > 1 and len(sequence) > 1 and tap[1] is not None and sequence[1] is None)


def _channel_axis(value: ir.Value, rank: int) -> int | None:
    """The axis of channels counted from the end: 1 of images and beside a convolution, else the last."""
    if rank < 2:
        return None
    beside = {node.op_type for node in (value.producer(), *query.users(value)) if node is not None}
    return 1 - rank if rank >= 4 or (rank == 3 and beside & _CHANNELS_AT_1) else -1


# --- what is kept ----------------------------------------------------------------------------------------------------


def _keys(
    model: ir.Model,
    taps: Mapping[str, ir.Value],
    samples: Samples,
    elements: int,
    masks: Mapping[str, str] | None,
) -> dict[str, str]:
    """Tap -> key of its statistics: one a tap, so that a recipe with more taps observes only those."""
    common = (VERSION, onnxruntime.__version__, io.digest(model), samples.digest, samples.count, elements, RESERVOIR)
    return {tap: key_of((*common, tap, PADDING_MASK if masks is None else masks.get(tap, ""))) for tap in taps}


def _load(store: Store | None, keys: Mapping[str, str]) -> dict[str, Stats]:
    found = {}
    for tap, key in keys.items() if store is not None else ():
        stats = _stats_of(store.load(key)) if store is not None else None
        if stats is not None:
            found[tap] = stats
    return found


def _stats_of(arrays: Arrays | None) -> Stats | None:
    """None for what isn't there or was written by something else."""
    try:
        return None if arrays is None else Stats.from_arrays(arrays)
    except (KeyError, ValueError, TypeError, IndexError):
        return None


def _keep(store: Store, keys: Mapping[str, str], observed: Mapping[str, Stats], checkpoint: _Checkpoint) -> bool:
    """Store every tap's statistics in place of the checkpoint. False when the folder can't be written."""
    kept = all(store.save(keys[tap], stats.to_arrays()) for tap, stats in observed.items())
    if kept:
        checkpoint.drop()
    store.evict()
    return kept


@dataclass
class _Checkpoint:
    """The state of an unfinished pass: statistics of every tap and the number of samples in them."""

    store: Store | None
    key: str
    taps: Collection[str]
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return self.store is not None and time.monotonic() - self.last > CHECKPOINT_S

    def write(self, stats: Mapping[str, Stats], done: int) -> None:
        """Keep the state after ``done`` samples; a folder that can't be written is told of at the end."""
        if self.store is None or done == 0:
            return
        arrays: Arrays = {"done": np.array(done)}
        for place, tap in enumerate(self.taps):
            arrays.update((f"{place}.{name}", array) for name, array in stats[tap].to_arrays().items())
        self.store.save(self.key, arrays)
        self.last = time.monotonic()

    def read(self) -> tuple[dict[str, Stats], int]:
        """Statistics by tap and the number of samples in them: nothing and 0 without a whole checkpoint."""
        arrays = (self.store.load(self.key) if self.store is not None else None) or {}
        parts: list[Arrays] = [{} for _ in self.taps]
        for name, array in arrays.items():
            place, _, rest = name.partition(".")
            if rest and int(place) < len(parts):
                parts[int(place)][rest] = array
        stats = {tap: found for tap, part in zip(self.taps, parts, strict=True) if (found := _stats_of(part))}
        return (stats, int(arrays["done"])) if len(stats) == len(parts) and "done" in arrays else ({}, 0)

    def drop(self) -> None:
        if self.store is not None:
            self.store.drop(self.key)


def _notices(tap: str, stats: Stats) -> Iterator[Notice]:
    if stats.nan_count:
        text = f"the float model makes {stats.nan_count} NaN in {tap!r}; left out of its range"
        yield Notice("warning", "nan", text, tap)
    if stats.inf_count:
        text = f"the float model makes {stats.inf_count} values beyond 1e30 in {tap!r}; left out of its range"
        yield Notice("warning", "inf", text, tap)
    if stats.mask_count:
        text = (
            f"{stats.mask_count} mask constants in {tap!r} left out of its range, which integers can't hold with them"
        )
        yield Notice("info", "mask-constant", text, tap)
    if not stats.count:
        yield Notice("warning", "empty", f"no sample gave a value of {tap!r}", tap)
