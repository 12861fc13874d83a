"""The tapped model in slices: sessions whose outputs are the taps, within a budget of bytes (L5).

Sessions run at the runtime's full optimisation: measured on EfficientNet-Lite0 that is twice as fast as with its
layouts off and moves values by 2e-5 of their range, 1/250 of an 8-bit step. Slices are sessions open side by side,
instead of one session with all taps whose outputs are fetched in parts: the runtime keeps every output of a session
until its run ends, fetched or not (measured).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import onnxruntime

from edgeq.analyse.cost import inferred_shapes
from edgeq.run.record import Array, Feed
from edgeq.run.session import open_session


class Slices:
    """Taps split so that no run's tapped tensors pass the budget, a session a slice.

    Sizes are inferred for the first feed, then learnt from what comes out; for a larger feed they are taken to grow
    in proportion. Splitting again opens sessions again, so it then leaves room for twice the size.
    """

    def __init__(self, model: ir.Model, taps: Sequence[str], slice_bytes: int, threads: int) -> None:
        self.model, self.taps, self.slice_bytes, self.threads = model, taps, slice_bytes, threads
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
        if any(len(names) > 1 and self._bytes(names) > self.slice_bytes for _, names in self.slices):
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
        shapes = inferred_shapes(self.model, feed)
        known = {name: 4 * math.prod(shapes[name]) for name in self.taps if name in shapes}
        return {name: known.get(name, max(known.values(), default=0)) for name in self.taps}

    def _split(self) -> None:
        self.slices = []  # closes the old sessions before new ones take memory
        names: list[str] = []
        groups = [names]
        for name in self.taps:
            if names and self._bytes([*names, name]) > self.slice_bytes:
                names = []
                groups.append(names)
            names.append(name)
        self.slices = [(_session(self.model, names, self.threads), names) for names in groups]


def _session(model: ir.Model, names: Sequence[str], threads: int) -> onnxruntime.InferenceSession | None:
    """A session of the model whose outputs are these values alone."""
    clone = model.clone()
    outputs = {value.name: value for node in clone.graph for value in node.outputs}
    wanted = [outputs[name] for name in names if name in outputs]
    if not wanted:
        return None
    for value in wanted:
        value.shape = None  # the runtime infers it; a declared one may be wrong for this feed
    clone.graph.outputs[:] = wanted
    # Threads waiting in a spin would take the cores the statistics need.
    return open_session(clone, threads=threads, config={"session.intra_op.allow_spinning": "0"})
