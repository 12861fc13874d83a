"""Ahead-of-time compilation: one model, a file for each of several devices (L10)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime

from edgeq.errors import ModelError, OutputError, UsageError
from edgeq.given import pins_of
from edgeq.ir import io
from edgeq.num.metrics import cosine, max_abs, snr_db
from edgeq.packaging import read_directory
from edgeq.rewrite.canonicalize import canonicalize
from edgeq.run.buckets import fitting, padded
from edgeq.run.record import Feed
from edgeq.run.session import feeds_like, open_session, run_session
from edgeq.source import read_model, tidy
from edgeq.target.context import Compiled, compile_context
from edgeq.target.coreml import compile_coreml
from edgeq.target.detect import elsewhere
from edgeq.target.load import load_target
from edgeq.target.ort_format import write_ort
from edgeq.target.record import Target
from edgeq.target.rknn import compile_rknn

RUNS = 4  # that a compiled file repeats, where it is compared


@dataclass(frozen=True)
class Given:
    """What is compiled: the file or package as given; the model file, a copy where inputs are pinned to shapes; golden
    inputs of these shapes; what tells its file from that of the largest bucket."""

    source: Path
    model: Path
    feeds: tuple[Feed, ...] = ()
    tag: str = ""


def compile_for(
    model: str | Path, targets: Sequence[str], out: str | Path, *, inputs: Sequence[str] = (), force: bool = False
) -> list[Compiled]:
    """A file of ``model`` (a file or a package, with the shapes of ``inputs`` pinned) for each of ``targets``, in the
    folder ``out``: ``TARGET`` with the suffix of its kind, and what belongs to it; of a package with shape buckets one
    for each, ``TARGET.bucket0`` … and the largest as ``TARGET``. All of them or, on an error, none. Raises ModelError,
    TargetError, OutputError, and RuntimeUnavailableError where what compiles isn't here."""
    chosen = [load_target(name) for name in targets]
    if len({target.name for target in chosen}) != len(chosen) or not chosen:
        raise UsageError(f"targets must differ, found {list(targets)}", hint="name each once")
    compilers = [_compiler(target) for target in chosen]
    folder = Path(out)
    with tempfile.TemporaryDirectory(prefix="edgeq-") as aside:
        jobs = [
            (f"{target.name}{given.tag}{suffix}", compiler, given, target)
            for given in _given(Path(model), pins_of(inputs), Path(aside))
            for target, (suffix, compiler) in zip(chosen, compilers, strict=True)
        ]
        taken = [name for name, *_ in jobs if (folder / name).exists()]
        if taken and not force:
            raise OutputError(f"{folder / taken[0]} exists", hint="add --force to replace it, or choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".edgeq-", dir=folder) as place:
                made = [compiler(given, target, Path(place) / name) for name, compiler, given, target in jobs]
                for path in Path(place).iterdir():
                    _move(path, folder / path.name)
        except OSError as error:
            raise OutputError(f"can't write {str(folder)!r}: {error.strerror}", hint="choose another --out") from error
    return [replace(one, path=folder / one.path.name) for one in made]


def _given(source: Path, pins: Mapping[str, tuple[int, ...]], aside: Path) -> list[Given]:
    """A model file, or those of a package's first variant; copies in ``aside`` where inputs are pinned."""
    if not source.is_dir():
        return [_pinned(Given(source, source), pins, aside)]
    variant = read_directory(source).variants[0]
    how, golden = variant.buckets, variant.golden.inputs
    if not how:
        return [_pinned(Given(source, variant.model, golden), pins, aside)]
    found = []
    for index, file in enumerate(variant.files):
        feeds = tuple(padded(how, feed, index) for feed in golden if fitting(how, feed) == index)
        found.append(_pinned(Given(source, file, feeds, file.stem.removeprefix(variant.model.stem)), pins, aside))
    return found


def _pinned(given: Given, pins: Mapping[str, tuple[int, ...]], aside: Path) -> Given:
    if not pins:
        return given
    model, copy = io.read(given.model), aside / f"pinned{given.tag}.onnx"
    tidy.free_dims(model)
    tidy.pin(model, pins)
    io.write(tidy.settle_shapes(model)[0], copy)
    alike = (feed for feed in given.feeds if all(feed[name].shape == shape for name, shape in pins.items()))
    return replace(given, model=copy, feeds=tuple(alike))


def _move(path: Path, to: Path) -> None:
    """Some kinds of files are folders, which aren't moved over others."""
    if to.is_dir():
        shutil.rmtree(to)
    shutil.move(path, to)


def _compiler(target: Target) -> tuple[str, Callable[[Given, Target, Path], Compiled]]:
    if target.provider not in COMPILERS:
        raise ModelError(
            f"files for {target.provider} aren't compiled ahead of time", hint=f"targets of {', '.join(COMPILERS)} are"
        )
    return COMPILERS[target.provider]


def _context(given: Given, target: Target, path: Path) -> Compiled:
    return compile_context(given.model, target, path)


def _ort(given: Given, target: Target, path: Path) -> Compiled:
    if away := elsewhere(target):
        raise ModelError(
            f"the runtime's format holds the kernels of this machine: {away}", hint=f"run it on a {target.name}"
        )
    write_ort(given.model, target, path)
    runs, session = _runs(given), open_session(path, provider=target.execution)
    found = [run_session(session, feed) for feed, _ in runs]
    return Compiled(path, {"onnxruntime": onnxruntime.__version__}, fidelity=_fidelity(runs, found))


def _rknn(given: Given, target: Target, path: Path) -> Compiled:
    runs = _runs(given)
    (feed, expected) = runs[0]
    sdk, found = compile_rknn(given.model, target, path, list(feed), list(expected), [feed for feed, _ in runs])
    return Compiled(path, {"sdk": sdk, **target.options}, fidelity=_fidelity(runs, found))


def _coreml(given: Given, target: Target, path: Path) -> Compiled:
    """Its tools fold nothing and take no Constant nodes: they get the canonical form, in which Q/DQ stay."""
    model, _ = read_model(given.model, opset=target.opset)
    feed = feeds_like(open_session(model))
    return compile_coreml(canonicalize(model, feeds=[feed])[0], given.source, target, path)


# Provider -> suffix of its files, and what makes one from a model or package.
COMPILERS: dict[str, tuple[str, Callable[[Given, Target, Path], Compiled]]] = {
    "QNNExecutionProvider": (".onnx", _context),
    "RknpuExecutionProvider": (".rknn", _rknn),
    "CoreMLExecutionProvider": (".mlpackage", _coreml),
    "CPUExecutionProvider": (".ort", _ort),
}


def _runs(given: Given) -> list[tuple[Feed, Feed]]:
    """What the CPU computes of a package's golden samples, or of random inputs where there is none."""
    session = open_session(given.model)
    feeds = given.feeds[:RUNS] or [feeds_like(session, seed) for seed in range(RUNS)]
    return [(dict(feed), run_session(session, feed)) for feed in feeds]


def _fidelity(runs: Sequence[tuple[Feed, Feed]], found: Iterable[Feed]) -> dict[str, float]:
    """The worst of each metric over all outputs that are reals."""
    pairs = [
        (array, test[name])
        for (_, truth), test in zip(runs, found, strict=True)
        for name, array in truth.items()
        if array.dtype.kind == "f"
    ]
    if not pairs:
        return {}
    return {
        "snr_db": min(float(snr_db(*pair).min()) for pair in pairs),
        "cosine": min(float(cosine(*pair).min()) for pair in pairs),
        "max_abs": max(float(max_abs(*pair).max()) for pair in pairs),
    }
