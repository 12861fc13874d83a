"""Exact two-label assignment by a minimum s-t cut (L5).

Placement is a cut problem: each atom pays one price as integer and another as float, and each tensor between the two
pays for its Q or DQ once. Such a sum is minimised exactly by one maximum flow (Kolmogorov and Zabih, "What energy
functions can be minimized via graph cuts?", PAMI 2004), so no heuristic order of decisions can trap us.
The flow is Dinic's: O(V^2 E) in theory, near linear on graphs as shallow as these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

INFINITE = float("inf")
_EPSILON = 1e-12


class Network:
    """A flow network under construction. Vertices are integers handed out by ``vertex``; 0 is source, 1 is sink."""

    SOURCE, SINK = 0, 1

    def __init__(self) -> None:
        self._edges: list[list[int]] = [[], []]  # vertex -> indices into the two lists below
        self._to: list[int] = []
        self._room: list[float] = []

    def vertex(self) -> int:
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, start: int, end: int, capacity: float) -> None:
        """Price paid when ``start`` lands on the source's side and ``end`` on the sink's."""
        if capacity <= 0:
            return
        for vertex, other, room in ((start, end, capacity), (end, start, 0.0)):
            self._edges[vertex].append(len(self._to))
            self._to.append(other)
            self._room.append(room)

    def entering(self, producer: int, readers: Sequence[int], price: float) -> None:
        """One price, however many ``readers`` are on the source's side, when ``producer`` is on the sink's."""
        if readers:
            border = self.vertex()
            self.edge(border, producer, price)
            for reader in readers:
                self.edge(reader, border, INFINITE)

    def leaving(self, producer: int, readers: Sequence[int], price: float) -> None:
        """One price, however many ``readers`` are on the sink's side, when ``producer`` is on the source's."""
        border = self.vertex()
        self.edge(producer, border, price)
        for reader in readers:
            self.edge(border, reader, INFINITE)

    def source_side(self) -> set[int]:
        """The vertices on the source's side of a minimum cut."""
        while (level := self._levels())[self.SINK] >= 0:
            self._saturate(level)
        return {vertex for vertex, depth in enumerate(level) if depth >= 0}

    def _levels(self) -> list[int]:
        level = [-1] * len(self._edges)
        level[self.SOURCE] = 0
        queue = deque([self.SOURCE])
        while queue:
            vertex = queue.popleft()
            for edge in self._edges[vertex]:
                end = self._to[edge]
                if self._room[edge] > _EPSILON and level[end] < 0:
                    level[end] = level[vertex] + 1
                    queue.append(end)
        return level

    def _saturate(self, level: list[int]) -> None:
        """Push flow along level-increasing paths until none is left; an explicit stack, since chains are long."""
        cursor = [0] * len(self._edges)
        path: list[int] = []
        vertex = self.SOURCE
        while True:
            if vertex == self.SINK:
                vertex = self._push(path)
                continue
            while cursor[vertex] < len(self._edges[vertex]):
                edge = self._edges[vertex][cursor[vertex]]
                if self._room[edge] > _EPSILON and level[self._to[edge]] == level[vertex] + 1:
                    break
                cursor[vertex] += 1
            else:
                if not path:
                    return
                vertex = self._to[path.pop() ^ 1]
                cursor[vertex] += 1
                continue
            path.append(edge)
            vertex = self._to[edge]

    def _push(self, path: list[int]) -> int:
        """Send what fits along ``path``, cut it before its first full edge, and return where to go on from."""
        amount = min(self._room[edge] for edge in path)
        first_full = len(path)
        for index, edge in reversed(list(enumerate(path))):
            self._room[edge] -= amount
            self._room[edge ^ 1] += amount
            if self._room[edge] <= _EPSILON:
                first_full = index
        start = self._to[path[first_full] ^ 1]
        del path[first_full:]
        return start
