"""Which node computes otherwise elsewhere, given equal inputs: the first divergence, by tensors (L5).

Differences pile up from node to node, so the first tensor that differs says little. Instead the model is cut at every
tensor that the runtime's own graph still holds, and each piece gets this machine's tensors as its inputs, here and
there: what differs then is the piece's own doing. A piece is what becomes one kernel (DQ, Conv, Q), since the cuts are
read off the optimised graph. Pieces run together, ``CHUNK_BYTES`` of their outputs at a time.

Two models are compared in the same way where their tensors have the same names: the second one's pieces get the first
one's tensors, and constants of a piece that differ are named.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgeq.analyse.cost import inferred_shapes
from edgeq.analyse.coverage import QDQ
from edgeq.analyse.saturation import SUM_MAX, pair_bounds
from edgeq.errors import ModelError
from edgeq.ir import io, query
from edgeq.ir.pieces import Pieces, chunks, shown, values_of
from edgeq.num.differences import Difference, differ
from edgeq.report.record import Divergence
from edgeq.run.device import Device, measure
from edgeq.run.record import Feed
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig
from edgeq.target.record import CPU, Provider

CHUNK_BYTES = 32 << 20  # of a sample's tensors in one run; what they are computed from comes on top
SENT = "fiub"  # kinds of arrays that any device takes
LAYOUT = ("Transpose", "ReorderInput", "ReorderOutput")
VAGUE = ("precision", "unknown")  # what values tell where they show no pattern
HEADS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "LSTM", "GRU")

# A file, feeds and names of outputs -> the outputs of each feed, and the kernel that writes each where it is known.
Run = Callable[[Path, Sequence[Feed], Sequence[str]], tuple[list[Feed], dict[str, str]]]


@dataclass(frozen=True)
class Diverging:
    """``rows``: all that differs, in graph order; ``compared``: how many tensors were."""

    rows: tuple[Divergence, ...]
    compared: int

    @property
    def beyond(self) -> tuple[Divergence, ...]:
        """Rows that rounding doesn't explain; the first is where the two part."""
        return tuple(row for row in self.rows if row.cause != "rounding")


def here(provider: Provider = CPU) -> Run:
    """Runs on this machine."""

    def run(path: Path, feeds: Sequence[Feed], names: Sequence[str]) -> tuple[list[Feed], dict[str, str]]:
        graph = path.with_suffix(".graph")
        session = open_session(path, provider=provider, optimized_path=graph)
        return [run_session(session, feed, names) for feed in feeds], _kernels(graph, names)

    return run


def there(device: Device, provider: Provider = CPU) -> Run:
    """Runs on a device."""

    def run(path: Path, feeds: Sequence[Feed], names: Sequence[str]) -> tuple[list[Feed], dict[str, str]]:
        config = TimedConfig(path.stem, path, provider=provider)
        if not device.facts.shows_graph:
            return [found for _, found in measure.outputs(device, config, feeds, names)], {}
        graph = path.with_suffix(".graph")
        pairs = measure.graph(device, config, feeds, graph, names)
        return [found for _, found in pairs], _kernels(graph, names)

    return run


def divergence(
    first: ir.Model, second: ir.Model, feeds: Sequence[Feed], run: Run, *, provider: Provider = CPU,
    chunk_bytes: int = CHUNK_BYTES,
) -> Diverging:  # fmt: skip
    """Where ``second``, run by ``run``, computes otherwise than ``first`` here, on ``provider``, from its tensors.

    ModelError when the models have no tensor in common."""
    names = _cuts(first, second, provider)
    mine, theirs = Pieces(first, names), Pieces(second, names)
    rows: list[Divergence] = []
    compared = 0
    for chunk in chunks(names, _sizes(first, names, feeds[0]), chunk_bytes):
        wanted = sorted(set().union(*(pieces.read(name) for pieces in (mine, theirs) for name in chunk)))
        held = _tensors(first, wanted, feeds, provider)
        unsent = {name for name, array in held[0].items() if array.dtype.kind not in SENT}
        sent = [name for name in chunk if not unsent & (mine.read(name) | theirs.read(name))]
        expected, kernels = _computed(mine, sent, held, here(provider))
        found, others = _computed(theirs, sent, held, run)
        for name in sent:
            pairs = [(one[name], other[name]) for one, other in zip(expected, found, strict=True)]
            difference = differ(pairs)
            if difference.cause:
                rows.append(_row(name, difference, mine, theirs, kernels.get(name, ""), others.get(name, "")))
        compared += len(sent)
    return Diverging(tuple(rows), compared)


def _cuts(first: ir.Model, second: ir.Model, provider: Provider) -> list[str]:
    """Values of both models that the runtime's graph of the first still holds, in the first's order."""
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        path = Path(folder) / "graph.onnx"
        open_session(first, level="extended", provider=provider, optimized_path=path)
        kept = values_of(io.read(path)).keys() | {str(value.name) for value in first.graph.outputs}
    both = (values_of(model).items() for model in (first, second))
    mine, theirs = ({name for name, value in values if not query.is_constant(value)} for values in both)
    found = [name for name in values_of(first) if name in kept & mine & theirs]
    if not found:
        raise ModelError("the models share no tensor by name", hint="compare a model with a changed copy of it")
    return found


def _sizes(model: ir.Model, names: Sequence[str], feed: Feed) -> dict[str, int]:
    """Bytes a tensor, at four a value; one of unknown shape is taken to be as large as the largest known."""
    shapes = inferred_shapes(model, feed)
    known = {name: 4 * math.prod(shapes[name]) for name in names if name in shapes}
    return {name: known.get(name, max(known.values(), default=0)) for name in names}


def _tensors(model: ir.Model, names: Sequence[str], feeds: Sequence[Feed], provider: Provider) -> list[Feed]:
    """Each feed with the values ``names`` that the model computes from it."""
    if not names:
        return list(feeds)
    session = open_session(shown(model, names), provider=provider)
    inputs = {spec.name for spec in session.get_inputs()}
    own = [{name: array for name, array in feed.items() if name in inputs} for feed in feeds]
    return [{**feed, **run_session(session, one, names)} for feed, one in zip(feeds, own, strict=True)]


def _computed(
    pieces: Pieces, names: Sequence[str], held: Sequence[Feed], run: Run
) -> tuple[list[Feed], dict[str, str]]:
    """The cuts ``names``, each computed from the tensors in ``held``, and the kernel that wrote each."""
    if not names:
        return [{} for _ in held], {}
    part, own = pieces.apart(names, held)
    wanted = [str(value.name) for value in part.graph.inputs if value.name not in part.graph.initializers]
    given = [{name: feed[name] for name in wanted} for feed in held]
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        path = Path(folder) / "pieces.onnx"
        io.write(part, path)
        outputs, kernels = run(path, given, list(own.values()))
    found = [{name: one[other] for name, other in own.items()} for one in outputs]
    return found, {name: kernels.get(other, "") for name, other in own.items()}


def _kernels(graph: Path, names: Sequence[str]) -> dict[str, str]:
    """The kernel that writes each output of a runtime's graph, past changes of layout."""
    values = values_of(io.read(graph))
    found = {}
    for name in names:
        node = values[name].producer() if name in values else None
        while node is not None and node.op_type in LAYOUT and node.inputs and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        found[name] = "" if node is None else node.op_type
    return found


# --- what is said of a piece -----------------------------------------------------------------------------------------


def _row(name: str, difference: Difference, mine: Pieces, theirs: Pieces, kernel: str, other: str) -> Divergence:
    head = _head(mine.nodes(name))
    changed = () if mine.model is theirs.model else tuple(_changed(mine.constants(name), theirs.constants(name)))
    cause, why = difference.cause, difference.why
    if changed and cause in VAGUE:
        cause = "constants"
    elif cause in ("saturation", *VAGUE) and _pairs_saturate(head, difference):
        cause, why = "saturation", f"its pairs of products can leave 16 bits, as on x86 without VNNI; {why}"
    elif cause in VAGUE and other and kernel != other:
        cause, why = "fallback", f"{other} runs there in place of {kernel}; {why}"
    return Divergence(
        str(head.name), head.op_type, name, cause, why, difference.largest, difference.share, kernel, other, changed
    )


def _head(nodes: Sequence[ir.Node]) -> ir.Node:
    """The node a piece is named after: the one that multiplies, else the last that isn't Q or DQ."""
    computing = [node for node in nodes if node.op_type not in QDQ]
    return next((node for node in computing if node.op_type in HEADS), (computing or list(nodes))[0])


def _pairs_saturate(head: ir.Node, difference: Difference) -> bool:
    """Whether all that differs lies in rows whose pairs of products can leave 16 bits."""
    bounds = pair_bounds(head)
    if bounds is None or not difference.off:
        return False
    axis = 1 if head.op_type == "Conv" else max(difference.off)
    return all(index < len(bounds) and bounds[index] > SUM_MAX for index in difference.off.get(axis, ()))


def _changed(mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Constants of a piece that another model's has otherwise, in words."""
    for name, one in mine.items():
        other = theirs.get(name)
        if other is None or one.shape != other.shape:
            yield f"{name} is another"
        elif not np.array_equal(one, other):
            count = int(np.count_nonzero(one != other))
            yield f"{name} {one.item():.6g} → {other.item():.6g}" if one.size == 1 else f"{name}: {count} of {one.size}"
