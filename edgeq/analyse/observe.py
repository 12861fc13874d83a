"""Streaming calibration: samples through the float model once, statistics of the tapped tensors out (L5).

Every sample is read once and run through the sessions of ``slices``, which return the taps and nothing else, instead
of a pass over the data a group of taps: reading an image costs as much as running it. Statistics are computed while
the next slice runs, since the runtime gives up Python's lock; each Stats is touched by one thread at a time and in the
order of the samples, so the result does not depend on the threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from edgeq.analyse.slices import Slices
from edgeq.analyse.stats import HISTOGRAM_ELEMENTS, RESERVOIR, Stats
from edgeq.analyse.store import Checkpoint, Store, key_of, load_stats
from edgeq.errors import ModelError, SampleError, did_you_mean
from edgeq.ir import io, query
from edgeq.report.progress import Progress, Silent
from edgeq.report.record import Notice
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import run_session

VERSION = 3  # raised when the same data would give other statistics: stored ones are then not found
BYTE_BUDGET = 256 << 20
PADDING_MASK = "attention_mask"

_CHANNELS_AT_1 = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization"})
_CHANNELS_LAST = frozenset({"MatMul", "Gemm", "LayerNormalization"})
_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


class Observation(dict[str, Stats]):
    """Statistics by tap, with what a report says of the pass.

    ``ran``: samples that went through the model now; the rest came from the store. ``reused``: taps found there.
    ``seconds``: of "read", "run" and "statistics", which overlap.
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
    ``histogram_elements`` enter the histogram in strides; extremes and means stay exact. ``masks`` names for a tap
    [b, s, …] the input [b, s] whose zeros are padding, to be left out; None looks for ``attention_mask`` at every tap.
    With a ``store``, stored taps are not observed again and an interrupted pass goes on where it stopped.
    Raises ModelError for a tap that doesn't exist or isn't real, SampleError without samples.
    """
    values = _tapped(model, taps)
    if samples.count == 0:
        raise SampleError(f"no samples in {samples.origin}", hint="calibration needs at least one")
    keys = _keys(model, values, samples, histogram_elements, masks) if store is not None else {}
    found = {tap: stats for tap, key in keys.items() if store and (stats := load_stats(store, key))}
    missing = {tap: value for tap, value in values.items() if tap not in found}
    ran = Observation({})
    notices: list[Notice] = []
    if missing:
        job = _Job(model, missing, samples, threads, byte_budget, masks)
        checkpoint = Checkpoint(store, key_of(keys[tap] for tap in missing), missing) if store else None
        ran = _pass(job, checkpoint, histogram_elements, progress or Silent())
        if store and checkpoint and not _keep(store, keys, ran, checkpoint):
            notices.append(Notice("warning", "store", f"statistics can't be kept in {store.folder}"))
    result = Observation({tap: found[tap] if tap in found else ran[tap] for tap in values})
    result.ran, result.reused, result.seconds = ran.ran, len(found), ran.seconds
    result.notices = (*notices, *(notice for tap, stats in result.items() for notice in notices_of(tap, stats)))
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
    """What is observed on what, within which limits. Half of the threads count while the others run the model on the
    next slice, and one reads ahead: counting takes about as long as the tapped run, and a run that shares its cores
    waits at every node for the slower one (EfficientNet-Lite0, 2 cores: 20 ms a photo; 29 with both cores running and
    one counting). With a single thread running and counting take turns."""

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
    def runners(self) -> int:
        return self.threads - self.counters

    @property
    def slice_bytes(self) -> int:
        """Of tapped tensors in one run: while one slice is counted the next one is produced."""
        return self.byte_budget // 2 if self.counters else self.byte_budget


def _pass(job: _Job, checkpoint: Checkpoint | None, elements: int, progress: Progress) -> Observation:
    """Run every sample not yet counted. An interruption between two samples loses none of them."""
    stats, done = checkpoint.read() if checkpoint else ({}, 0)
    for tap in job.values:
        stats.setdefault(tap, Stats(elements))
    slices = Slices(job.model, list(job.values), job.slice_bytes, job.runners)
    result, whole = Observation(stats), True
    with _Counter(job, result) as counter, _Reader(job, result) as reader, progress.stage("observe", job.samples.count):
        progress.advance(done)
        try:
            for index in range(done, job.samples.count):
                feed = reader.read(index)
                for session, names in slices.of(feed):
                    outputs = _run(session, feed, names, result)
                    slices.learn(outputs)
                    whole = False
                    counter.submit(outputs, feed, index)
                done, whole = index + 1, True
                result.ran += 1
                progress.advance()
                if checkpoint and checkpoint.due():
                    counter.wait()
                    checkpoint.write(result, done)
            counter.wait()
        except BaseException:  # Ctrl-C too: what is counted is kept, then it goes on its way
            if checkpoint and whole and counter.drained():
                checkpoint.write(result, done)
            raise
    return result


class _Reader:
    """Reads samples, one ahead on a thread of its own when there is more than one."""

    def __init__(self, job: _Job, result: Observation) -> None:
        self.samples, self.result = job.samples, result
        self.pool = ThreadPoolExecutor(1) if job.threads > 1 else None
        self.ahead: tuple[int, Future[Feed]] | None = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def read(self, index: int) -> Feed:
        """Sample ``index``; raises what reading it raised."""
        if self.pool is None:
            return self._read(index)
        known = self.ahead[1] if self.ahead is not None and self.ahead[0] == index else None
        feed = (known or self.pool.submit(self._read, index)).result()
        following = index + 1
        self.ahead = (following, self.pool.submit(self._read, following)) if following < self.samples.count else None
        return feed

    def _read(self, index: int) -> Feed:
        start = time.perf_counter()
        feed = self.samples.read(index)
        self.result.seconds["read"] += time.perf_counter() - start
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
            axis, mask = channel_axis(self.job.values[name], array.ndim), self._mask(name, array, feed)
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
        if masks is None and (mask.dtype.kind == "f" or fixed(self.job.model, self.job.values[name], source)):
            return None  # a mask of floats may be one that is added: 0 where a token is
        keep = mask.astype(np.bool_)
        return None if keep.all() else keep


def fixed(model: ir.Model, tapped: ir.Value, source: str) -> bool:
    """Whether a tap's second axis is fixed where the mask's is the sequence: equal by accident (heads, channels)."""
    tap, mask = query.dims(tapped), next((value for value in model.graph.inputs if value.name == source), None)
    sequence = query.dims(mask)
    return bool(tap and sequence and len(tap) > 1 and len(sequence) > 1 and tap[1] is not None and sequence[1] is None)


def channel_axis(value: ir.Value, rank: int) -> int | None:
    """The axis of channels counted from the end: 1 beside a convolution and of images, else the last."""
    if rank < 2:
        return None
    beside = {node.op_type for node in (value.producer(), *query.users(value)) if node is not None}
    at_1 = beside & _CHANNELS_AT_1 or (rank >= 4 and not beside & _CHANNELS_LAST)
    return 1 - rank if at_1 and rank >= 3 else -1


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


def _keep(store: Store, keys: Mapping[str, str], observed: Mapping[str, Stats], checkpoint: Checkpoint) -> bool:
    """Store every tap's statistics in place of the checkpoint. False when the folder can't be written."""
    kept = all(store.save(keys[tap], stats.to_arrays()) for tap, stats in observed.items())
    if kept:
        checkpoint.drop()
    store.evict()
    return kept


def notices_of(tap: str, stats: Stats) -> Iterator[Notice]:
    """What a report says of one tap."""
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
