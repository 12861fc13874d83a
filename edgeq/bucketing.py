"""Shape buckets as the user gives them: read, held against model and samples, run as one file (L9).

A model of changing sizes is quantized once, with those sizes open, and pinned to each bucket's afterwards, instead of
quantized at each: codes and scales are the same in all files, so a package stores them once. Each sample is padded to
the smallest bucket that holds it, for calibration and for the judge, who compares what is cut off again with the float
model on the sample as it is: what padding costs is in every figure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from edgeq.analyse.follow import OutputShapes, Sizes, rules
from edgeq.errors import ModelError, SampleError, UsageError, did_you_mean
from edgeq.packaging import BUCKETED
from edgeq.report.record import Check
from edgeq.report.recorder import Recorder
from edgeq.run.arrays import sha256_of
from edgeq.run.buckets import Bucketed, Buckets, bucket_files, fitting, padded
from edgeq.run.record import Feed, Samples
from edgeq.run.samples import subset
from edgeq.run.session import Session, TensorSpec, input_specs, open_session, run_session
from edgeq.target.isolated import IsolatedSession
from edgeq.target.record import Target

Opener: TypeAlias = Callable[..., Session]
PARTS, STEP = 3, 32  # buckets that are suggested, and what their sizes are multiples of: strides are, mostly
SEEN = 16  # sizes of samples, spread over all, at which the rules of the outputs are proven


def check_buckets(texts: Sequence[str], pads: Sequence[str], form: str, *, pixels: bool) -> None:
    """UsageError for buckets with what has none."""
    if pads and not texts:
        raise UsageError("padding is given without buckets", hint="add --bucket, or leave out --pad")
    if texts and pixels:
        raise UsageError("--pixels takes pictures of one size", hint="leave out --bucket or --pixels")
    if texts and form not in BUCKETED:
        raise UsageError(f"the loader of the form {form!r} knows no buckets", hint=f"choose {', '.join(BUCKETED)}")


def bucketed(
    model: ir.Model, texts: Sequence[str], pads: Sequence[str], calibration: Samples, evaluation: Samples,
    target: Target, recorder: Recorder,
) -> tuple[Buckets | None, Samples, Samples]:  # fmt: skip
    """The buckets, calibration samples as they have them, evaluation samples that fit; all as it was without texts."""
    if not texts:
        return None, calibration, evaluation
    with recorder.step("buckets"):
        how = buckets_of(model, texts, pads, (calibration, evaluation))
    pad = ", ".join(f"{name!r} with {value:g}" for name, value in how["pad"].items() if any(how["open"][name]))
    rules = "; ".join(map(_told_cut, how["cuts"])) or "no output follows a size"
    recorder.info("padding", f"inputs are padded at the end of their axes, {pad}; {rules}")
    if not target.static:
        text = f"target {target.name!r} takes any shape: latency is the largest bucket's, of the float files too"
        recorder.warn("padded-latency", f"{text}; without --bucket nothing is padded")
    calibration = fitted(calibration, how, "calibration", recorder)
    return how, filled(calibration, how), fitted(evaluation, how, "evaluation", recorder)


def buckets_of(model: ir.Model, texts: Sequence[str], pads: Sequence[str], samples: Sequence[Samples]) -> Buckets:
    """``x=1,3,48,160`` or ``width=160``, several inputs or dimensions separated by spaces, a text a bucket; ``x=-1``
    a padding value -> what ``run.buckets`` needs. Raises UsageError, and ModelError where outputs can't be cut."""
    specs = input_specs(model)
    fed = [_dims(specs, feed) for one in samples for feed in one]
    open_dims = dict.fromkeys(dim for spec in specs for dim in spec.shape if isinstance(dim, str))
    if not open_dims:
        raise UsageError("buckets are for sizes that change, and all of this model's are fixed",
                         hint="leave out --bucket, and --input where it pins them")  # fmt: skip
    fixed = {dim: sizes for dim in open_dims if len(sizes := {sample[dim] for sample in fed if dim in sample}) == 1}
    chosen = [_sizes(text, specs, fixed) for text in texts]
    shapes = sorted((_shapes(specs, sizes) for sizes in chosen), key=_elements)
    for one, other in pairwise(shapes):
        if one == other:
            raise UsageError(f"two buckets are the same: {_told(one)}", hint="give each once")
    how = {
        "shapes": [{name: list(shape) for name, shape in one.items()} for one in shapes],
        "open": {spec.name: [dim if isinstance(dim, str) else None for dim in spec.shape] for spec in specs},
        "pad": _pads(specs, pads),
    }
    return {**how, "cuts": _cuts(model, specs, chosen, fed)}


def suggested(model: ir.Model, samples: Samples) -> list[str]:
    """Buckets for these samples, as ``buckets_of`` reads them: up to what a third, two thirds and all of them need."""
    specs = input_specs(model)
    fed = [_dims(specs, feed) for feed in samples]
    sizes = {dim: sorted(one[dim] for one in fed) for dim in fed[0]}
    found = []
    for part in range(1, PARTS + 1):
        at = {dim: some[-(-len(some) * part // PARTS) - 1] for dim, some in sizes.items()}
        wide = {dim: at[dim] if some[0] == some[-1] else -(-at[dim] // STEP) * STEP for dim, some in sizes.items()}
        if len(specs) == 1:
            found.append(_told(_shapes(specs, wide)))
        else:
            found.append(" ".join(f"{dim}={wide[dim]}" for dim, some in sizes.items() if some[0] != some[-1]))
    return list(dict.fromkeys(found))


def _dims(specs: Sequence[TensorSpec], feed: Feed) -> dict[str, int]:
    """Open dimension -> its size in a sample."""
    pairs = ((dim, size) for spec in specs for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True))
    return {dim: size for dim, size in pairs if isinstance(dim, str)}


def _sizes(text: str, specs: Sequence[TensorSpec], fixed: Mapping[str, set[int]]) -> dict[str, int]:
    """One bucket: open dimension -> size. What it leaves out is what all samples have."""
    inputs = {spec.name: spec for spec in specs}
    dims = [dim for spec in specs for dim in spec.shape if isinstance(dim, str)]
    found: dict[str, int] = {}
    for word in text.split():
        name, _, said = word.partition("=")
        numbers = [int(one) for one in said.split(",")] if all(one.isdigit() for one in said.split(",")) else []
        if not numbers or 0 in numbers:
            raise UsageError(f"can't read bucket {text!r}", hint="write NAME=1,3,48,320, or DIMENSION=320")
        if name in inputs:
            pairs = _against(inputs[name], numbers, text)
        elif name in dims and len(numbers) == 1:
            pairs = [(name, numbers[0])]
        else:
            known = [*inputs, *dict.fromkeys(dims)]
            raise UsageError(f"bucket {text!r}: no input or open dimension {name!r}",
                             hint=did_you_mean(name, known, f"there are {', '.join(known)}"))  # fmt: skip
        for dim, size in pairs:
            if found.setdefault(dim, size) != size:
                raise UsageError(f"bucket {text!r} gives dimension {dim!r} two sizes, {found[dim]} and {size}")
    for dim in dims:
        if dim not in found and dim not in fixed:
            spec = next(spec for spec in specs if dim in spec.shape)
            raise UsageError(
                f"bucket {text!r} leaves axis {spec.shape.index(dim)} of input {spec.name!r} open, and samples differ",
                hint=f"add {dim}=SIZE to it, or the shape of {spec.name!r}",
            )
    return {dim: found[dim] if dim in found else min(fixed[dim]) for dim in dict.fromkeys(dims)}


def _against(spec: TensorSpec, numbers: Sequence[int], text: str) -> list[tuple[str, int]]:
    """Sizes of an input's open dimensions, from its whole shape."""
    wrong = len(numbers) != len(spec.shape) or any(
        isinstance(dim, int) and dim != size for dim, size in zip(spec.shape, numbers, strict=True)
    )
    if wrong:
        raise UsageError(f"bucket {text!r} doesn't fit input {spec}", hint="fixed sizes stay, open ones are yours")
    return [(dim, size) for dim, size in zip(spec.shape, numbers, strict=True) if isinstance(dim, str)]


def _shapes(specs: Sequence[TensorSpec], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {spec.name: tuple(sizes[dim] if isinstance(dim, str) else dim or 1 for dim in spec.shape) for spec in specs}


def _elements(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _pads(specs: Sequence[TensorSpec], texts: Sequence[str]) -> dict[str, float]:
    pads = {spec.name: 0.0 for spec in specs}
    for text in texts:
        name, _, said = text.partition("=")
        try:
            value = float(said)
        except ValueError:
            raise UsageError(f"can't read padding {text!r}", hint="write NAME=0") from None
        if name not in pads:
            raise UsageError(f"padding {text!r}: no input {name!r}", hint=did_you_mean(name, list(pads)))
        pads[name] = value
    return pads


def _cuts(
    model: ir.Model, specs: Sequence[TensorSpec], chosen: Sequence[Sizes], fed: Sequence[Sizes]
) -> list[dict[str, Any]]:
    """Rows of ``cuts``, from runs of the float model on zeros."""
    session, largest = open_session(model), {dim: max(one[dim] for one in chosen) for dim in chosen[0]}

    def run(sizes: Sizes) -> OutputShapes | None:
        shapes = _shapes(specs, sizes)
        try:
            outputs = run_session(session, {spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in specs})
        except ModelError:
            return None
        return {name: array.shape for name, array in outputs.items()}

    for sizes in chosen:
        if run(sizes) is None:
            raise ModelError(f"the float model doesn't run in the bucket {_told(_shapes(specs, sizes))}",
                             hint="its sizes may have to be multiples of 8, 16 or 32")  # fmt: skip
    places = {dim: (spec.name, axis) for spec in reversed(specs) for axis, dim in enumerate(spec.shape)}
    known = [*chosen, *fed[:: -(-len(fed) // SEEN)]]
    inside = [one for one in known if all(size <= largest[dim] for dim, size in one.items())]
    found = rules(run, largest, inside)
    return [_of_input(row, *places[row.pop("dim")]) for row in found]


def _of_input(row: dict[str, Any], name: str, axis: int) -> dict[str, Any]:
    return {**row, "input": name, "of": axis}


def _told(shapes: Mapping[str, Sequence[int]]) -> str:
    return " ".join(f"{name}={','.join(map(str, shape))}" for name, shape in shapes.items())


def fitted(samples: Samples, how: Buckets, what: str, recorder: Recorder) -> Samples:
    """The samples a bucket holds, and a notice of how many each has, and of those that none has. SampleError when there
    is none."""
    counts, kept, refused = Counter[int](), list[int](), ""
    for index, feed in enumerate(samples):
        try:
            counts[fitting(how, feed)] += 1
            kept.append(index)
        except ValueError as error:
            refused = str(error)
    if not kept:
        raise SampleError(f"no {what} sample fits a bucket: {refused}")
    told = "; ".join(f"{_named(how, index)}: {counts[index]}" for index in range(len(how["shapes"])))
    recorder.info("buckets", f"{what} samples by the bucket they are padded to: {told}")
    if len(kept) < len(samples):
        left = len(samples) - len(kept)
        recorder.warn("beyond-buckets", f"{left} of {len(samples)} {what} samples are left out: {refused}")
    for index in range(len(how["shapes"])):
        if what == "evaluation" and not counts[index]:
            recorder.warn("unproven-bucket", f"no evaluation sample is run in the bucket {_named(how, index)}")
    return subset(samples, kept)


def filled(samples: Samples, how: Buckets) -> Samples:
    """The samples as their buckets have them."""

    def read(index: int) -> Feed:
        feed = samples.read(index)
        return padded(how, feed, fitting(how, feed))

    return replace(samples, read=read, digest=sha256_of(samples.digest, str(how)))


def namer(how: Buckets | None) -> Callable[[Feed], str] | None:
    """What the bucket is called that a sample is padded to."""
    return (lambda feed: f"bucket {_named(how, fitting(how, feed))}") if how else None


def _named(how: Buckets, index: int) -> str:
    """A bucket by the shape of its first input that changes."""
    name = next(name for name, dims in how["open"].items() if any(dims))
    return f"{name}={','.join(map(str, how['shapes'][index][name]))}"


def placement_told(session: Session, how: Buckets | None, recorder: Recorder) -> None:
    """A warning for each bucket of which the CPU gets other nodes than of the largest, whose coverage is reported."""
    sessions = session.sessions if isinstance(session, Bucketed) else ()
    left = [one.on_cpu for one in sessions if isinstance(one, IsolatedSession)]
    for index, found in enumerate(left):
        if how and found != left[-1]:
            words = f"bucket {_named(how, index)} leaves {found or 'nothing'} to the CPU, the largest {left[-1]}"
            recorder.warn("bucket-placement", words)


def one_each(samples: Samples, how: Buckets) -> Samples:
    """The first sample of each bucket that has one."""
    first: dict[int, int] = {}
    for index, feed in enumerate(samples):
        first.setdefault(fitting(how, feed), index)
    return subset(samples, [first[bucket] for bucket in sorted(first)])


def at_largest(feed: Feed, how: Buckets | None) -> Feed:
    """A sample at the shapes of the largest bucket, for what asks for shapes and times: padded, and cut where another
    bucket is longer. As it is without buckets."""
    if not how:
        return feed
    shapes = how["shapes"][-1]
    return padded(how, {name: array[tuple(map(slice, shapes[name]))] for name, array in feed.items()}, -1)


def opener(how: Buckets | None) -> Opener:
    """``open_session``, of all files of a model where it has buckets."""
    if not how:
        return open_session

    def opened(model: Path, **settings: Any) -> Bucketed:
        return Bucketed(how, [open_session(file, **settings) for file in bucket_files(model, len(how["shapes"]))])

    return opened


def padding_told(checks: Sequence[Check], missed: str, recorder: Recorder) -> None:
    """A notice of what padding alone does to the float model: a warning where that ``missed`` a limit."""
    seen = ", ".join(f"{check.name} {check.value:.4g}" for check in checks)
    if missed:
        text = f"padding alone misses the limits ({missed}), before anything is quantized: {seen}"
        recorder.warn("padding-differs", f"{text}; more buckets pad less, another --pad may disturb less")
    else:
        recorder.info("padding-alone", f"the float model in its buckets: {seen}")


def _told_cut(row: Mapping[str, Any]) -> str:
    size = f"(s + {row['plus']})" if row["plus"] else "s"
    size = size if row["per"] == 1 else f"{size} // {row['per']}"
    size = (f"{row['times']} * " if row["times"] != 1 else "") + size + (f" + {row['offset']}" if row["offset"] else "")
    return f"axis {row['axis']} of {row['output']!r} is cut to {size}, s being axis {row['of']} of {row['input']!r}"
