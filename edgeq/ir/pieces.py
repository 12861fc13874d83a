"""A model cut at tensors: the nodes between cuts, and the model that computes all pieces from given tensors (L2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import edit, query
from edgeq.ir.part import reads

Arrays = Mapping[str, NDArray[np.generic]]


class Pieces:
    """A model and the names of its cuts. The piece of a cut is all that computes it from the cuts before."""

    def __init__(self, model: ir.Model, cuts: Iterable[str]) -> None:
        self.model = model
        self.cuts = set(cuts)
        self._values = values_of(model)

    def nodes(self, name: str) -> list[ir.Node]:
        """The nodes of the piece that computes the cut ``name``, its last one first."""
        found: dict[ir.Node, None] = {}
        waiting = [self._values[name].producer()]
        while waiting:
            node = waiting.pop(0)
            if node is not None and node not in found:
                found[node] = None
                waiting += [value.producer() for value in reads(node) if value.name not in self.cuts]
        return list(found)

    def read(self, name: str) -> set[str]:
        """The cuts that the piece of ``name`` reads."""
        return {str(value.name) for node in self.nodes(name) for value in reads(node) if value.name in self.cuts}

    def constants(self, name: str) -> dict[str, NDArray[np.generic]]:
        """The constants of a piece by name."""
        found = (value for node in self.nodes(name) for value in reads(node))
        return {str(value.name): array for value in found if (array := query.constant(value)) is not None}

    def apart(self, names: Sequence[str], feeds: Sequence[Arrays]) -> tuple[ir.Model, dict[str, str]]:
        """The model that computes the cuts ``names``, each from the cuts it reads as inputs, and what it calls each.

        Inputs have the types and the shapes of ``feeds``, with a gap where these differ; weights are shared."""
        clone = self.model.clone()
        graph, fresh, values = clone.graph, edit.Names(clone), values_of(clone)
        graph.outputs.clear()
        fed = []
        for name in (name for name in values if name in self.cuts):
            value = values[name]
            given = ir.Value(name=name, shape=value.shape, type=value.type)
            if name in feeds[0]:
                given.shape = _shape([feed[name].shape for feed in feeds])
                given.type = ir.TensorType(ir.DataType.from_numpy(feeds[0][name].dtype))
            value.replace_all_uses_with(given)
            value.name, value.shape = fresh.fresh(f"{name}_own"), None
            fed.append(given)
        graph.outputs.extend(values[name] for name in names)
        edit.drop_dead(clone)
        graph.inputs[:] = [value for value in (*graph.inputs, *fed) if value.uses()]
        return clone, {name: str(values[name].name) for name in names}


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    """What the nodes of the main graph write, by name, in order."""
    return {str(value.name): value for node in model.graph for value in node.outputs if value.name}


def shown(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """The model with the values ``names`` as its outputs instead of its own; all else is dropped."""
    clone = model.clone()
    values = values_of(clone)
    clone.graph.outputs[:] = [values[name] for name in names]
    for name in names:
        values[name].shape = None  # the runtime infers it; a declared one may be wrong for this feed
    edit.drop_dead(clone)
    return clone


def chunks(names: Sequence[str], sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """``names`` in order, as many at a time as have ``most`` bytes together; a larger one alone."""
    chunk: list[str] = []
    held = 0
    for name in names:
        if chunk and held + sizes[name] > most:
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += sizes[name]
    if chunk:
        yield chunk


def _shape(shapes: Sequence[tuple[int, ...]]) -> ir.Shape | None:
    if len({len(shape) for shape in shapes}) != 1:
        return None
    return ir.Shape([dims[0] if len(set(dims)) == 1 else None for dims in zip(*shapes, strict=True)])
