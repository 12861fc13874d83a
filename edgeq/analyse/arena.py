"""What allocators make of a sequence of allocations: the C heap, the runtime's arena, its memory planner (L5).

All three are best-fit with coalescing and differ in a rule or two, so one ``Space`` plays them: addresses are numbers,
nothing is allocated. Played are ONNX Runtime 1.32's CPU arena (``core/framework/bfc_arena.cc``, after TensorFlow's) and
glibc's malloc (``mallopt(3)``). Resident is what was written to, so a region counts up to the highest byte used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ALIGNMENT = 256  # bytes the arena and the planner round to (kMinAllocationSize, kAllocAlignment)
FIRST_REGION = 1 << 20  # bytes of the arena's first region; the next ones double (kNextPowerOfTwo)
LARGEST_REGION = 1 << 30  # where doubling ends
WHOLE = 2  # the arena hands out a chunk whole unless it is this many times what is asked for

MALLOC_ALIGNMENT = 16
SHIFT = 96  # bytes memalign asks for beside the block, to align it to 64
MMAP_THRESHOLD, MMAP_THRESHOLD_MAX = 128 << 10, 32 << 20  # bytes; grows to the largest mapped block ever freed
TOP_PAD = 128 << 10  # bytes left when the heap's end is given back


@dataclass(frozen=True)
class Block:
    """``size`` bytes at ``start``. ``region``: of the arena; -1 where the C heap mapped it on its own."""

    start: int
    size: int
    region: int = 0


@dataclass
class Space:
    """A range of addresses, without an end unless ``limit`` says so. ``whole``: 1 always splits a free chunk."""

    limit: int | None = None
    whole: int = 1
    end: int = 0  # of the last block in use
    free: dict[int, int] = field(default_factory=dict)  # start -> size of holes below ``end``

    def best(self, size: int) -> tuple[int, int] | None:
        """Size and start of the smallest free chunk that holds ``size`` bytes; the rest above ``end`` is one too."""
        chunks = [(length, start) for start, length in self.free.items() if length >= size]
        if self.limit is not None and self.limit - self.end >= size:
            chunks.append((self.limit - self.end, self.end))
        return min(chunks, default=None)

    def take(self, size: int) -> tuple[int, int]:
        """Start and size of a block: of the smallest hole that holds it, else at the end."""
        found = self.best(size)
        if found is None:
            self.end += size
            return self.end - size, size
        length, start = found
        size = length if length < self.whole * size else size
        if start == self.end:
            self.end += size
            return start, size
        del self.free[start]
        if length > size:
            self.free[start + size] = length - size
        return start, size

    def give(self, start: int, size: int) -> None:
        """Free a block; holes that touch become one, and one that reaches the end lowers it."""
        for other, length in list(self.free.items()):
            if other + length == start or start + size == other:
                del self.free[other]
                start, size = min(start, other), size + length
        if start + size == self.end:
            self.end = start
        else:
            self.free[start] = size


@dataclass
class CHeap:
    """glibc's malloc in a process: one growing heap, large blocks mapped on their own. Bytes."""

    space: Space = field(default_factory=Space)
    grown: int = 0  # the heap's break
    touched: int = 0  # written up to here
    mapped: int = 0  # resident bytes of blocks of their own
    threshold: int = MMAP_THRESHOLD
    peak: int = 0

    def malloc(self, size: int, *, aligned: bool = False, written: bool = True) -> Block:
        """A block: from a hole or below the break, else mapped when large, else the heap grows.

        An ``aligned`` one is looked for with room to shift it, which is then freed: a hole left by a block of the same
        size is too small for it.
        """
        size = _round(size + MALLOC_ALIGNMENT, MALLOC_ALIGNMENT)
        room = size + (SHIFT if aligned else 0)
        below = self.space.best(room) is not None or self.space.end + room <= self.grown
        if not below and room >= self.threshold:
            block = Block(0, size, -1)
        else:
            start, _ = self.space.take(room)
            block = Block(start, size)
            self.grown = max(self.grown, start + room)
            if aligned:
                self.space.give(start + size, SHIFT)
        if written:
            self.write(block, 0, size)
        return block

    def write(self, block: Block, already: int, upto: int) -> None:
        """``upto`` bytes of a block are now written to, ``already`` of them were before."""
        if block.region < 0:
            self.mapped += max(upto - already, 0)
        else:
            self.touched = max(self.touched, block.start + upto)
        self.peak = max(self.peak, self.touched + self.mapped)

    def release(self, block: Block) -> None:
        """Free a written block. The heap's end goes back to the system once twice the threshold is free there."""
        if block.region < 0:
            self.mapped -= block.size
            if block.size <= MMAP_THRESHOLD_MAX:
                self.threshold = max(self.threshold, block.size)
            return
        self.space.give(block.start, block.size)
        trim = MMAP_THRESHOLD if self.threshold == MMAP_THRESHOLD else 2 * self.threshold
        if self.grown - self.space.end > trim + TOP_PAD:
            self.grown = self.space.end + TOP_PAD
            self.touched = min(self.touched, self.grown)


@dataclass
class Arena:
    """The runtime's CPU arena: regions of the C heap, doubling, best fit over all; they are kept until it ends."""

    heap: CHeap
    regions: list[tuple[Block, Space]] = field(default_factory=list)
    written: list[int] = field(default_factory=list)  # bytes of each region
    region_bytes: int = FIRST_REGION
    used: int = 0
    peak: int = 0  # of the bytes in use

    def allocate(self, size: int) -> Block:
        """A chunk for ``size`` bytes, which are written."""
        rounded = _round(size, ALIGNMENT)
        found = [(*best, index) for index, (_, space) in enumerate(self.regions) if (best := space.best(rounded))]
        region = min(found)[2] if found else self._extend(rounded)
        block, space = self.regions[region]
        start, length = space.take(rounded)
        if start + rounded > self.written[region]:
            self.heap.write(block, self.written[region], start + rounded)
            self.written[region] = start + rounded
        self.used += length
        self.peak = max(self.peak, self.used)
        return Block(start, length, region)

    def release(self, chunk: Block) -> None:
        """Free a chunk."""
        self.used -= chunk.size
        self.regions[chunk.region][1].give(chunk.start, chunk.size)

    @property
    def held(self) -> int:
        """Bytes of all regions, written or not."""
        return sum(block.size for block, _ in self.regions)

    def _extend(self, size: int) -> int:
        enlarged = size > self.region_bytes
        while size > self.region_bytes:
            self.region_bytes *= 2
        region = self.region_bytes
        if not enlarged:
            self.region_bytes = min(2 * self.region_bytes, LARGEST_REGION)
        self.regions.append((self.heap.malloc(region, written=False), Space(limit=region, whole=WHOLE)))
        self.written.append(0)
        return len(self.regions) - 1


def _round(size: int, alignment: int) -> int:
    """Up to a multiple, at least one."""
    return max(-(-size // alignment), 1) * alignment


@dataclass(frozen=True)
class Buffer:
    """Memory of one or more tensors of a run, from before node ``first`` to after node ``last`` (indices in order).

    Only ``inner`` ones are part of the memory pattern. ``output``: of the graph, given to the caller; ``scratch``: a
    kernel's own.
    """

    size: int
    first: int
    last: int
    kind: Literal["inner", "output", "scratch"] = "inner"


def pattern_bytes(buffers: list[Buffer]) -> int:
    """What the memory planner reserves for the planned buffers: best fit in one block, the highest end."""
    space, starts, highest = Space(), dict[int, tuple[int, int]](), 0
    for allocates, index in _events(buffers):
        if buffers[index].kind != "inner":
            continue
        if allocates:
            starts[index] = space.take(_round(buffers[index].size, ALIGNMENT))
            highest = max(highest, space.end)
        else:
            space.give(*starts.pop(index))
    return highest


def play_run(arena: Arena, buffers: list[Buffer], pattern: int = 0) -> list[Block]:
    """One run in the arena: a chunk a buffer, or one chunk of ``pattern`` bytes for the inner ones together.

    Returns the chunks of the graph's outputs, which are the caller's: arrays that ``run`` returns lie in them.
    """
    whole = arena.allocate(pattern) if pattern else None
    chunks: dict[int, Block] = {}
    for allocates, index in _events(buffers):
        if whole is not None and buffers[index].kind == "inner":
            continue
        if allocates:
            chunks[index] = arena.allocate(buffers[index].size)
        elif buffers[index].kind != "output":
            arena.release(chunks.pop(index))
    if whole is not None:
        arena.release(whole)
    return list(chunks.values())


def live_bytes(buffers: list[Buffer]) -> int:
    """The most bytes alive at one node: what no allocator can do without."""
    live = most = 0
    for allocates, index in _events(buffers):
        live += buffers[index].size if allocates else -buffers[index].size
        most = max(most, live)
    return most


def _events(buffers: list[Buffer]) -> list[tuple[bool, int]]:
    """(allocates, index of the buffer) in the order of a run: a node's outputs come before what it frees."""
    starts = [(buffer.first, 0, index) for index, buffer in enumerate(buffers)]
    ends = [(buffer.last, 1, index) for index, buffer in enumerate(buffers)]
    return [(kind == 0, index) for _, kind, index in sorted(starts + ends)]
