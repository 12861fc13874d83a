"""The peak memory of loading and running a model, played through instead of measured (L5).

Loading is the sequence of allocations that ONNX Runtime 1.32 makes, read off a traced malloc: the file's tensors as
strings of protobuf; each copied into a tensor of its own while its string is freed; weights that fusions and blocked
layouts make anew, each in four copies of which one stays, while those they replace wait for the end; packed weights,
each beside its original for a moment. Running is the arena: the first run allocates tensor by tensor and records a
pattern, the second reserves one block for the whole pattern beside the regions the first one left. Holes in the heap
are played too: in a convolutional net they are a quarter of all, and chance moves them: EfficientNet-Lite0 measures
56 MB in one process and 64 in another. What is counted is the resident memory added to a process that has imported the
runtime, as ``run.timing.measure_memory`` measures it with one thread on Linux (glibc).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgeq.analyse.arena import Arena, Block, CHeap, live_bytes, pattern_bytes, play_run
from edgeq.analyse.lifetimes import buffers
from edgeq.ir import query
from edgeq.run.executed import Executed

LIBRARY_BYTES = 9_600_000
"""Pages of the runtime's library that loading and running a model touches for the first time. Measured, ONNX Runtime
1.32 on x86-64: RssFile grows by 8.7 MB with a single Relu, by 9.4 to 10.0 MB with each of nine real models."""

SESSION_BYTES = 1_400_000
"""What a session takes whatever the model: RssAnon grows by 1.4 MB with a single Relu."""

NODE_BYTES = 7_000
"""A node with its types, names and kernel: bytes alive after loading, less weights and SESSION_BYTES, over the file's
nodes but Constants: 5.5 kB (PP-OCRv4's recogniser), 6.8 (MiniLM, its classifier), 8.4 (its detector), 10 (EFL0)."""

READ_BUFFER = 4 << 20  # protobuf reads files in blocks of this
STRING_SLACK = 4072  # bytes a string read from a file takes beyond its content
PIN = 256  # what protobuf keeps of a tensor when its bytes are gone: name, dims
SMALL = 128  # bytes below which a weight stays in its protobuf
BODY_COPIES = 4  # of a constant in a nested body as it loads, read off the trace of Silero VAD
PANEL = 16  # columns of a float matrix that MLAS packs together

FLOAT_MATRICES = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
PACKS = {  # kernels that keep a packed weight in place of an input -> that input
    **dict.fromkeys(FLOAT_MATRICES, 1), **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"), 1),
    **dict.fromkeys(("LSTM", "GRU", "ConvTranspose", "Attention", "QAttention"), 1),
}  # fmt: skip
REORDERED = "reorder"  # in the names of weights in blocked layouts

Held = dict[int, list[Block]]  # bytes of a weight -> the blocks of weights of that size


@dataclass(frozen=True)
class Stored:
    """Weights as a file stores them, bytes a tensor: initializers, Constant nodes, constants of nested bodies.

    ``external``: names of those in files beside it, which are mapped until they are made anew or packed. ``nodes`` are
    those but Constants.
    """

    file_bytes: int
    nodes: int
    initializers: tuple[int, ...]
    constants: tuple[int, ...] = ()
    nested: tuple[int, ...] = ()
    external: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Peak:
    """Predicted bytes. ``total``: the highest resident memory; ``loading``: the highest before the first run.

    ``activations``: alive at one node at most; ``pattern``: what the planner reserves for the inner ones; ``arena``:
    the regions taken for them, not all of which are written to.
    """

    total: int
    loading: int
    activations: int
    pattern: int
    arena: int


def stored(model: ir.Model, file_bytes: int) -> Stored:
    """The weights of a model as read from a file of ``file_bytes``, untouched."""
    own = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    inner = [graph for graph in model.graphs() if graph is not model.graph]
    return Stored(
        file_bytes=file_bytes,
        nodes=sum(node.op_type != "Constant" for node in query.nodes(model)),
        initializers=tuple(tensor.nbytes for tensor in own if not isinstance(tensor, ir.ExternalTensor)),
        constants=tuple(_constants(model.graph)),
        nested=tuple(size for graph in inner for size in (*_constants(graph), *_initializers(graph))),
        external=frozenset(str(tensor.name) for tensor in own if isinstance(tensor, ir.ExternalTensor)),
    )


def _constants(graph: ir.Graph) -> Iterator[int]:
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            yield node.attributes["value"].value.nbytes


def _initializers(graph: ir.Graph) -> Iterator[int]:
    yield from (value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)


def predict(model: ir.Model, file_bytes: int, optimised: ir.Model, ran: Sequence[Executed]) -> Peak:
    """The peak of loading and running twice the ``model`` that a file of ``file_bytes`` holds, given what the runtime
    makes of it and what ran."""
    file = stored(model, file_bytes)
    heap = CHeap()
    arena = Arena(heap)
    heap.malloc(SESSION_BYTES)
    always = LIBRARY_BYTES + _load(heap, arena, file, optimised)
    loading = heap.peak
    needed = buffers(model, optimised.graph, ran)
    pattern = pattern_bytes(needed)
    play_run(arena, needed)
    play_run(arena, needed, pattern)
    return Peak(heap.peak + always, loading + always, live_bytes(needed), pattern, arena.held)


def _load(heap: CHeap, arena: Arena, file: Stored, optimised: ir.Model) -> int:
    """Play the loading; returns the bytes of external weights that stay mapped and are read whole when they run."""
    buffer = heap.malloc(min(file.file_bytes, READ_BUFFER))
    heap.malloc(file.nodes * NODE_BYTES // 2)
    in_nodes = _strings(heap, file.constants)
    for _ in range(BODY_COPIES):
        _strings(heap, file.nested)
    strings = _strings(heap, file.initializers)
    heap.release(buffer)
    strings = _strings(heap, file.constants) + strings  # a Constant becomes an initializer, then its node goes
    _free(heap, in_nodes)
    held: Held = defaultdict(list)
    for string, size in zip(strings, (*file.constants, *file.initializers), strict=True):
        if size >= SMALL:
            held[size].append(heap.malloc(size, aligned=True))
            heap.release(string)
    kept = _remade(heap, held, optimised, file.external)
    for _ in range(file.nodes):
        heap.malloc(NODE_BYTES // 2)
    _pack(heap, arena, kept, optimised, file.external)
    whole = {
        value: value.const_value.nbytes
        for node in query.nodes(optimised)
        for slot, value in enumerate(node.inputs)
        if value is not None and value.const_value is not None and value.name in file.external
        if node.op_type != "Gather" and PACKS.get(node.op_type) != slot
    }
    return sum(whole.values())


def _strings(heap: CHeap, sizes: Sequence[int]) -> list[Block]:
    return [_pinned(heap, size + (STRING_SLACK if size > STRING_SLACK else 0)) for size in sizes]


def _pinned(heap: CHeap, size: int) -> Block:
    """A block with something small behind it that stays when it is freed, so that holes don't grow together."""
    block = heap.malloc(size + PIN)
    return block if block.region < 0 else replace(block, size=block.size - PIN)


def _free(heap: CHeap, blocks: Sequence[Block]) -> None:
    for block in blocks:
        heap.release(block)


def _remade(heap: CHeap, held: Held, optimised: ir.Model, external: frozenset[str]) -> Held:
    """Play the transformers: weights of the optimised graph that no stored one of the same size stands for are made, in
    the order of their nodes; those they replace are freed after all of them. Returns what stays."""
    kept: Held = defaultdict(list)
    made = []
    used = (value for node in query.nodes(optimised) for value in node.inputs if query.is_constant(value))
    for value in dict.fromkeys(used):
        assert value is not None and value.const_value is not None
        size = value.const_value.nbytes
        if held[size] and REORDERED not in str(value.name):
            kept[size].append(held[size].pop(0))
        elif size >= SMALL and value.name not in external:
            made.append(size)
    for size in made:
        array, first, second = heap.malloc(size, aligned=True), heap.malloc(size), _pinned(heap, size)
        kept[size].append(heap.malloc(size, aligned=True))
        _free(heap, [array, first, second])
    _free(heap, [block for blocks in held.values() for block in blocks])
    return kept


def _pack(heap: CHeap, arena: Arena, held: Held, optimised: ir.Model, external: frozenset[str]) -> None:
    """Play the kernels that pack their weight: the packed one is made, then the original freed. Matrices come first;
    integer ones are transposed in the arena before, and weights of integer convolutions are packed there."""
    for node in sorted(query.nodes(optimised), key=lambda node: node.op_type == "QLinearConv"):
        slot = PACKS.get(node.op_type, len(node.inputs))
        value = node.inputs[slot] if slot < len(node.inputs) else None
        if value is None or value.const_value is None:
            continue
        size, outside = value.const_value.nbytes, value.name in external
        if not outside and not held[size]:
            continue
        if node.op_type == "QLinearConv":
            arena.allocate(size)
        else:
            if slot != 1:
                arena.release(arena.allocate(size))
            heap.malloc(_packed_bytes(node, value.const_value), aligned=True)
        if not outside:
            heap.release(held[size].pop(0))


def _packed_bytes(node: ir.Node, weight: ir.TensorProtocol) -> int:
    """f32[…, in, out] -> bytes with the columns padded to whole panels."""
    shape = tuple(weight.shape.numpy())
    if node.op_type not in FLOAT_MATRICES or len(shape) < 2:
        return weight.nbytes
    columns = shape[0 if query.attribute(node, "transB", 0) else -1]
    return weight.nbytes // max(columns, 1) * (-(-columns // PANEL) * PANEL)
