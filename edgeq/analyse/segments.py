"""The main graph cut into a few stretches at its narrow places (L5).

What is behind a change is run from the nearest cut before it, from values kept there. About sqrt(atoms) stretches make
what is run in vain small, and few values have to be kept. Cuts lie where few bytes are alive, never inside an atom,
and divide the work, not the nodes, evenly: half of a convolutional network's work is in its first fifth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.place import Atom, Shapes
from edgeq.ir.part import reads

F64 = NDArray[np.float64]
FED = frozenset(  # types a session takes and gives as numpy's own
    ir.DataType[name]
    for name in ("FLOAT", "FLOAT16", "DOUBLE", "BOOL", *(f"{s}INT{b}" for s in ("", "U") for b in (8, 16, 32, 64)))
)


@dataclass(frozen=True)
class Segment:
    """A stretch of nodes in graph order. ``reads``: values written before it that are read in or behind it, graph
    inputs apart; ``writes``: values it writes that are read behind it; ``outputs``: graph outputs it writes;
    ``atoms``: names of the atoms in it; ``live_bytes``: of ``reads`` at the shapes given."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    outputs: tuple[str, ...]
    atoms: frozenset[str]
    live_bytes: int


def segments(
    model: ir.Model, atoms: Sequence[Atom], shapes: Shapes, work: Mapping[str, float], count: int | None = None
) -> tuple[Segment, ...]:
    """At most ``count`` segments (None: sqrt of the number of atoms) in graph order. ``work``: atom -> time or work."""
    span = _Span(model, atoms, shapes)
    wanted = max(round(math.sqrt(len(atoms))), 1) if count is None else count
    borders = _borders(span.cut_bytes(), span.work(work), wanted)
    starts, stops = [0, *borders], [*borders, len(span.nodes)]
    return tuple(span.segment(start, stop) for start, stop in zip(starts, stops, strict=True))


class _Span:
    """Who writes and who reads last, by position in the graph."""

    def __init__(self, model: ir.Model, atoms: Sequence[Atom], shapes: Shapes) -> None:
        self.nodes, self.atoms, self.shapes = list(model.graph), atoms, shapes
        self.at = {str(node.name): position for position, node in enumerate(self.nodes)}
        self.last: dict[ir.Value, int] = {}
        self.written = {value: position for position, node in enumerate(self.nodes) for value in node.outputs}
        for position, node in enumerate(self.nodes):
            self.last.update((value, position) for value in reads(node) if value in self.written)
        self.outputs = {value for value in model.graph.outputs if value in self.written}

    def cut_bytes(self) -> F64:
        """Bytes f64[nodes] alive in front of each node; inf where no cut can be: inside an atom, or where something
        lives that can't be fed."""
        change, closed = np.zeros(len(self.nodes) + 1), np.zeros(len(self.nodes) + 1)
        for value, last in self.last.items():
            first, size = self.written[value] + 1, self._bytes(value)
            for line, amount in ((change, size or 0), (closed, float(size is None))):
                line[first] += amount
                line[last + 1] -= amount
        for atom in self.atoms:
            positions = [self.at[str(node.name)] for node in atom.nodes]
            closed[min(positions) + 1] += 1
            closed[max(positions) + 1] -= 1
        return np.where(np.cumsum(closed) > 0, np.inf, np.cumsum(change))[:-1]

    def work(self, work: Mapping[str, float]) -> F64:
        """Work f64[nodes] in front of each node."""
        own = np.array([work.get(str(node.name), 0.0) for node in self.nodes])
        return np.asarray(np.cumsum(own) - own, np.float64)

    def segment(self, start: int, stop: int) -> Segment:
        """The nodes from ``start`` up to ``stop``."""
        alive = [v for v, last in self.last.items() if self.written[v] < start <= last]
        written = [value for node in self.nodes[start:stop] for value in node.outputs]
        return Segment(
            tuple(str(value.name) for value in alive),
            tuple(str(value.name) for value in written if self.last.get(value, -1) >= stop),
            tuple(str(value.name) for value in written if value in self.outputs),
            frozenset(atom.name for atom in self.atoms if start <= self.at[atom.name] < stop),
            sum(self._bytes(value) or 0 for value in alive),
        )

    def _bytes(self, value: ir.Value) -> int | None:
        """None for what can't be fed: no tensor of numpy's types, or of unknown shape."""
        shape = self.shapes.get(str(value.name))
        if shape is None or value.dtype not in FED:
            return None
        return math.prod(shape) * value.dtype.bitwidth // 8


def _borders(cut_bytes: F64, before: F64, count: int) -> list[int]:
    """Positions of the first nodes behind the cuts: near each equal share of the work the narrowest place."""
    total, found = float(before[-1]) if before.size else 0.0, list[int]()
    for share in range(1, count):
        low, high = (int(np.searchsorted(before, total * (share + side) / count)) for side in (-0.5, 0.5))
        window = np.arange(max(low, found[-1] + 1 if found else 1), high)
        if window.size and np.isfinite(best := cut_bytes[window].min()):
            narrow = window[cut_bytes[window] <= best]
            found.append(int(narrow[np.abs(before[narrow] - total * share / count).argmin()]))
    return found
