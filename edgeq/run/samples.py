"""Calibration and evaluation data from one word: a path, ``pkg.module:callable`` or ``synthetic:N`` (L4).

Every form becomes the same re-iterable ``Samples`` that reads one sample at a time, instead of lists of arrays, so that
no later stage's memory depends on their number. What doesn't fit the model is found here, where the file and the
sample can still be named, and not deep inside the runtime.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir
import onnxruntime

from edgeq.errors import SampleError, did_you_mean
from edgeq.run.arrays import LABEL_KEYS, check_keys, fit_feed, label_of, sha256_of
from edgeq.run.folders import FORMS, KINDS, find_tokenizer, open_folder, open_lines, open_rows_file
from edgeq.run.preprocess import Preprocessing
from edgeq.run.record import Feed, Samples
from edgeq.run.session import TensorSpec, input_specs, random_feed
from edgeq.source.import_path import load

Signature: TypeAlias = Sequence[TensorSpec] | onnxruntime.InferenceSession | onnx_ir.Model

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
SPOOL_BYTES, SPOOL_COUNT = 8 << 30, 1 << 16  # what a callable may yield before it is taken for endless


def load_samples(
    spec: str,
    signature: Signature,
    *,
    preprocessing: Preprocessing | Path | None = None,
    tokenizer: Path | None = None,
    model_folder: Path | None = None,
    limit: int | None = None,
) -> Samples:
    """Open the data ``spec`` names for a model with this signature.

    ``preprocessing`` and ``tokenizer`` are looked for in the data's folder, then in ``model_folder``, when not given.
    ``limit`` keeps that many, evenly spread (of a callable: the first). The first sample is read at once, so a wrong
    key, shape or dtype is found here; NaN and Inf are found when a sample is read. Raises SampleError.
    """
    specs: tuple[TensorSpec, ...] = tuple(signature) if isinstance(signature, Sequence) else input_specs(signature)
    samples = _open(spec, specs, preprocessing, tokenizer, model_folder, limit)
    samples = samples if limit is None else take(samples, limit)
    return _batched(samples, specs)


def _open(
    spec: str,
    specs: tuple[TensorSpec, ...],
    preprocessing: Preprocessing | Path | None,
    tokenizer: Path | None,
    model_folder: Path | None,
    limit: int | None,
) -> Samples:
    path = Path(spec)
    folders = [path if path.is_dir() else path.parent, *([model_folder] if model_folder else [])]
    if spec.startswith("synthetic:"):
        return _synthetic(spec, specs)
    if path.suffix in KINDS["arrays"] and path.is_file():
        return open_rows_file(path, specs)
    if path.suffix in KINDS["texts"] and path.is_file():
        return open_lines(path, specs, find_tokenizer(tokenizer, folders))
    if path.is_dir():
        return open_folder(path, specs, preprocessing, tokenizer, folders, limit)
    if not path.exists() and IMPORT_PATH.fullmatch(spec):
        return _yielded(spec, specs, limit)
    if path.exists():
        raise SampleError(f"can't use {spec!r} as samples: {path.suffix or 'no'} suffix", hint=f"use {FORMS}")
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise SampleError(
        f"no samples at {spec!r}: no such file or folder", hint=did_you_mean(path.name, near, f"use {FORMS}")
    )


def take(samples: Samples, count: int) -> Samples:
    """At most ``count`` samples, evenly spread over all: data is often stored class by class."""
    if count < 1:
        raise SampleError(f"{count} samples asked for, expected at least 1")
    if count >= len(samples):
        return samples
    return subset(samples, [index * len(samples) // count for index in range(count)])


def split(samples: Samples, *, fraction: float = 0.5, seed: int = 0) -> tuple[Samples, Samples]:
    """(calibration, held out) without overlap; ``fraction`` is held out. The same seed gives the same parts."""
    if len(samples) < 2:
        raise SampleError(
            f"{samples.origin}: {len(samples)} sample can't be split into calibration and evaluation",
            hint="give more samples, or evaluation data of its own with -e",
        )
    held_out = min(max(round(len(samples) * fraction), 1), len(samples) - 1)
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    return subset(samples, sorted(order[held_out:])), subset(samples, sorted(order[:held_out]))


def subset(samples: Samples, indices: list[int]) -> Samples:
    """The samples at these indices, in this order."""
    return replace(
        samples,
        count=len(indices),
        digest=sha256_of(samples.digest, *map(str, indices)),
        read=lambda index: samples.read(indices[index]),
        labels=None if samples.labels is None else tuple(samples.labels[index] for index in indices),
    )


def _batched(samples: Samples, specs: tuple[TensorSpec, ...]) -> Samples:
    """Samples of batch 1 -> groups of B where the model fixes its first dimension to B; labels become tuples of B."""
    first = samples.read(0)
    sizes = {
        spec.shape[0]
        for spec in specs
        if spec.shape and isinstance(spec.shape[0], int) and first[spec.name].shape[0] != spec.shape[0]
    }
    if not sizes:
        return samples
    size = max(dim for dim in sizes if isinstance(dim, int))
    if len(samples) < size:
        raise SampleError(f"{samples.origin}: {len(samples)} samples don't fill the model's batch of {size}")
    count, labels = len(samples) // size, samples.labels

    def read(index: int) -> Feed:
        feeds = [samples.read(size * index + offset) for offset in range(size)]
        try:
            return {spec.name: np.concatenate([feed[spec.name] for feed in feeds]) for spec in specs}
        except ValueError as error:
            raise SampleError(f"{samples.origin}: samples of batch {index} differ in shape: {error}") from error

    grouped = None if labels is None else tuple(labels[size * i : size * (i + 1)] for i in range(count))
    return replace(samples, count=count, digest=sha256_of(samples.digest, str(size)), read=read, labels=grouped)


def _synthetic(spec: str, specs: tuple[TensorSpec, ...]) -> Samples:
    """``synthetic:N[:seed]``: random data, only for what needs no truth."""
    words = spec.split(":")
    if len(words) not in (2, 3) or not all(word.isdigit() for word in words[1:]) or int(words[1]) < 1:
        raise SampleError(f"bad samples {spec!r}", hint="use synthetic:N or synthetic:N:seed, N at least 1")
    count, seed = int(words[1]), int(words[2]) if len(words) == 3 else 0
    digest = sha256_of(f"synthetic:{count}:{seed}", *map(str, specs))
    return Samples(spec, count, digest, lambda index: random_feed(specs, seed * SPOOL_COUNT + index), synthetic=True)


def _yielded(spec: str, specs: tuple[TensorSpec, ...], limit: int | None) -> Samples:
    """Dicts a user's callable yields, spooled to a temporary folder so that they can be read again in any order."""
    produced = _callable(spec)()
    if isinstance(produced, Mapping) or not isinstance(produced, Iterable):
        raise SampleError(f"{spec} returned {type(produced).__name__}, expected an iterable of dicts")
    spool = tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True)
    digest, labels, used, count = hashlib.sha256(), [], 0, 0
    for item in produced:
        feed, label = _checked(item, specs, f"{spec}, sample {count}")
        used += sum(array.nbytes for array in feed.values())
        if used > SPOOL_BYTES or count >= SPOOL_COUNT:
            raise SampleError(f"{spec} yields more than {SPOOL_COUNT} samples or {SPOOL_BYTES} bytes", hint="limit it")
        for name, array in feed.items():
            digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
        # Numbered keys: input names may hold characters that no zip member should.
        np.savez(_spooled(spool, count), *feed.values())
        labels.append(label)
        count += 1
        if count == limit:
            break
    if count == 0:
        raise SampleError(f"{spec} yields no samples", hint="is it a generator that was used up?")
    known = None if any(label is None for label in labels) else tuple(labels)
    return Samples(spec, count, digest.hexdigest(), lambda index: _unspool(spool, index, specs), known)


def _callable(spec: str) -> Callable[[], Any]:
    found = load(spec)
    if not callable(found):
        raise SampleError(f"{spec} is {type(found).__name__}, expected a callable that yields dicts")
    return found  # type: ignore[no-any-return]


def _spooled(spool: tempfile.TemporaryDirectory[str], index: int) -> Path:
    return Path(spool.name) / f"{index:06}.npz"


def _unspool(spool: tempfile.TemporaryDirectory[str], index: int, specs: tuple[TensorSpec, ...]) -> Feed:
    with np.load(_spooled(spool, index)) as arrays:
        return {spec.name: arrays[f"arr_{position}"].astype(spec.dtype) for position, spec in enumerate(specs)}


def _checked(item: Any, specs: tuple[TensorSpec, ...], where: str) -> tuple[Feed, Any]:
    """One yielded dict -> (feed in the order of ``specs``, label or None)."""
    if not isinstance(item, Mapping):
        raise SampleError(f"{where} is {type(item).__name__}, expected a dict of input name -> array")
    check_keys(list(item), specs, where)
    keys = [key for key in LABEL_KEYS if key in item and key not in {spec.name for spec in specs}]
    return fit_feed(item, specs, where), label_of(item[keys[0]]) if keys else None
