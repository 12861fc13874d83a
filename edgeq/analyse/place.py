"""Where Q/DQ go: the whole decision, made before any edit and printable (L5).

A Plan labels every *atom* - a node with what the target folds into it (bias Add, Relu, Clip) - integer or float.
Candidates are what the oracle saw become an integer kernel; among them one minimum cut picks the labels with the least
total cost of kernels and of the Q/DQ between the two worlds. Instead of rules ("Add after Conv is quantized"): the
rules of one runtime fail on the next, and greedy placement leaves islands that cost more than they save.
Costs are the defaults below at first, and measured per-node times once a profile exists. On a target that wants the
whole graph every candidate is integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from edgeq.analyse.cut import Network
from edgeq.ir import query
from edgeq.ir.ops import OPS
from edgeq.num.quant import Quant
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target
from edgeq.target.verdict import Verdict

Shapes = Mapping[str, tuple[int, ...]]

# Nanoseconds of one thread with VNNI (ONNX Runtime 1.32, one core of an EPYC): medians over the profiles of
# EfficientNet-Lite0, MobileNetV2 and PP-OCRv4. Only their ratios matter, and only until a profile replaces them.
NODE_NS = 1500.0
FLOAT_NS_MAC, INT_NS_MAC = 0.045, 0.018
FLOAT_NS_ELEMENT, INT_NS_ELEMENT = 0.35, 0.25
BOUNDARY_NS_ELEMENT = 0.45


FUSED = {"HardSigmoid": ("Clip", "Clip"), "HardSwish": ("Clip", "QLinearMul"), "Pad": ("Pad", "Pad")}
"""Op type that lowering computes on codes -> the kernel that a target's ``fuse`` must name, and the one that runs."""


@dataclass(frozen=True)
class Atom:
    """Nodes that run as one kernel. ``inputs`` and ``constants`` (input indices) are the edges to quantize, ``bias``
    the edge of an int32 bias, ``outputs`` what it writes; ``head`` does the work and names the atom.

    ``bare`` is the verdict with no Q behind it: an integer kernel that writes float; ``bare_bias`` says whether that
    kernel takes the bias as int32 too."""

    head: ir.Node
    tail: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    constants: tuple[int, ...]
    outputs: tuple[ir.Value, ...]
    verdict: Verdict
    bias: tuple[ir.Node, int] | None = None
    bare: Verdict | None = None
    bare_bias: bool = False

    @property
    def name(self) -> str:
        return str(self.head.name)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.head, *self.tail)


@dataclass(frozen=True)
class Costs:
    """Nanoseconds by name: of atoms in ``float_ns`` and ``integer_ns``, of crossing a tensor in ``boundary_ns``."""

    float_ns: Mapping[str, float]
    integer_ns: Mapping[str, float]
    boundary_ns: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """The decision. ``tensors``: activation -> mapping. ``integer``: atom's head -> kernel expected.
    ``left_float``: node -> reason. ``bare``: integer heads whose output stays float. ``ties``: tensor -> tensor whose
    parameters it must share (data movers)."""

    tensors: dict[str, Quant]
    integer: dict[str, str]
    left_float: dict[str, str]
    bare: frozenset[str] = frozenset()
    ties: dict[str, str] = field(default_factory=dict)
    atoms: tuple[Atom, ...] = ()


def find_atoms(model: ir.Model, target: Target, oracle: Oracle) -> tuple[Atom, ...]:
    """Group the main graph's nodes and ask the oracle about each group. Nodes in bodies are left alone.

    The model should carry inferred shapes: the runtime fuses by them."""
    found: list[Atom] = []
    absorbed: set[ir.Node] = set()
    asked = {*target.quantized, *target.through}
    for node in model.graph:
        if node in absorbed or node.domain not in ("", "ai.onnx"):
            continue
        atom = _fused(node, target) or _atom(node, asked, oracle)
        absorbed.update(atom.tail)
        found.append(atom)
    return tuple(found)


def _atom(node: ir.Node, asked: set[str], oracle: Oracle) -> Atom:
    inputs, constants = _operands(node)
    if node.op_type not in asked:
        return _float_atom(node, "no integer kernel on this target")
    if not inputs:
        return _float_atom(node, "no float tensor flows in")
    if not all(query.is_float(value) for value in node.outputs):
        return _float_atom(node, "its output is not float")
    if any(value.name and not value.uses() and not value.is_graph_output() for value in node.outputs):
        return _float_atom(node, "nobody reads one of its outputs")  # its Q would be dropped, and nothing fuses then
    return _ask(node, inputs, constants, oracle)


def _fused(node: ir.Node, target: Target) -> Atom | None:
    """The atom of a node that lowering computes on codes."""
    asked, kernel = FUSED.get(node.op_type, ("", ""))
    source = node.inputs[0] if node.inputs else None
    if asked not in target.fuse or source is None or query.is_constant(source) or not query.is_float(source):
        return None
    if node.op_type == "HardSigmoid" and not _own_scale(node, source):
        return None
    if node.op_type == "Pad" and not _pads_zeros(node):
        return None
    verdict = Verdict("mover" if kernel == "Pad" else "integer", kernel, f"edgeq makes {kernel} on codes of it")
    return Atom(node, (), (source,), (), tuple(node.outputs), verdict)


def _own_scale(node: ir.Node, source: ir.Value) -> bool:
    """Whether a HardSigmoid may choose the scale of what it reads, and has its middle on a code."""
    before = source.producer()
    row = OPS.get(before.op_type) if before is not None else None
    tied = before is None or source.is_graph_output() or (row is not None and row.keeps_scale)
    beta, alpha = query.attribute(node, "beta", 0.5), query.attribute(node, "alpha", 0.2)
    return not tied and len(source.uses()) == 1 and alpha > 0 and beta == 0.5


def _pads_zeros(node: ir.Node) -> bool:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    filled = query.constant(value)
    zeros = value is None or (filled is not None and not filled.any())
    return query.attribute(node, "mode", "constant") == "constant" and zeros


def _float_atom(node: ir.Node, reason: str) -> Atom:
    values = tuple(value for value in node.inputs if query.is_float(value) and not query.is_constant(value))
    inputs = tuple(value for value in values if value is not None)
    return Atom(node, (), inputs, (), tuple(node.outputs), Verdict("float", "", reason))


def _operands(node: ir.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input indices of float activations, and of constant float operands other than the bias."""
    row = OPS.get(node.op_type)
    if row is None:
        return (), ()
    indices = set(range(len(node.inputs))) if row.data == (-1,) else {*row.data}
    indices |= {row.weight} if row.weight is not None else set()
    present = [index for index in sorted(indices) if index < len(node.inputs) and query.is_float(node.inputs[index])]
    constants = tuple(index for index in present if query.is_constant(node.inputs[index]))
    return tuple(index for index in present if index not in constants), constants


def _ask(node: ir.Node, inputs: tuple[int, ...], constants: tuple[int, ...], oracle: Oracle) -> Atom:
    """The longest chain behind ``node`` that the target folds into one integer kernel, with and without Q behind."""
    edges = _names(node, (*inputs, *constants))
    chain = _chain(node)
    bias = _bias_edge(chain)
    bias_names = _names(bias[0], (bias[1],)) if bias is not None else set()
    bare, bare_bias = (None, False) if oracle.target.whole else _ask_bare(chain, edges, bias_names, oracle)
    while True:
        wanted = edges | bias_names | {str(value.name) for value in chain[-1].outputs}
        verdicts = oracle.ask_pattern(chain, wanted)
        folded = verdicts[0].kind != "float" and all(verdict.kind != "float" for verdict in verdicts)
        if folded or len(chain) == 1:
            break
        chain.pop()
        if bias is not None and bias[0] not in chain:
            bias, bias_names, bare_bias = None, set(), False
    values = tuple(value for index in inputs if (value := node.inputs[index]) is not None)
    return Atom(
        node, tuple(chain[1:]), values, constants, tuple(chain[-1].outputs), verdicts[0], bias,
        bare if verdicts[0].kind == "integer" else None, bare_bias,
    )  # fmt: skip


def _chain(node: ir.Node) -> list[ir.Node]:
    """``node`` with a bias Add and an activation behind it, when nothing else reads in between."""
    chain = [node]
    for kinds in (("Add",) if node.op_type == "MatMul" else (), ("Relu", "Clip")):
        follower = _only_reader(chain[-1], kinds)
        if follower is not None:
            chain.append(follower)
    return chain


def _bias_edge(chain: list[ir.Node]) -> tuple[ir.Node, int] | None:
    """The edge of a constant that integer kernels add in int32: a value an output channel, beside a constant weight."""
    head = chain[0]
    row = OPS[head.op_type]
    if row.weight is not None and not query.is_constant(head.inputs[row.weight]):
        return None
    if row.bias is not None and row.bias < len(head.inputs) and query.is_constant(head.inputs[row.bias]):
        rows = (query.dims(head.inputs[row.bias]) or ())[:-1]  # of a Gemm's C
        return None if any(dim != 1 for dim in rows) else (head, row.bias)
    if head.op_type == "MatMul" and len(chain) > 1 and chain[1].op_type == "Add":
        return chain[1], 0 if query.is_constant(chain[1].inputs[0]) else 1
    return None


def _ask_bare(
    chain: list[ir.Node], edges: set[str], bias_names: set[str], oracle: Oracle
) -> tuple[Verdict | None, bool]:
    """The integer kernel that writes float, and whether it takes an int32 bias."""
    if OPS[chain[0].op_type].weight is None:
        return None, False
    behind = [node for node in query.users(chain[-1].outputs[0]) if node.op_type == "Add"]  # merged into a float Gemm
    for names, with_bias in ((bias_names, True), (set[str](), False)):
        verdict = oracle.ask_pattern((*chain, *behind[:1]), edges | names)[0]
        # MatMulIntegerToFloat leaves the Add behind it float, where a DQ of the bias would run each time.
        if verdict.kind == "integer" and not (with_bias and verdict.kernel == "MatMulIntegerToFloat"):
            return verdict, with_bias and bool(names)
    return None, False


def _only_reader(node: ir.Node, kinds: tuple[str, ...]) -> ir.Node | None:
    """The one node of ``kinds`` that reads ``node``'s output alone, its other operands constant."""
    output = node.outputs[0]
    readers = output.uses()
    if output.is_graph_output() or len(readers) != 1:
        return None
    reader = next(iter(readers))[0]
    others = [value for value in reader.inputs if value is not output and value is not None]
    if reader.op_type not in kinds or reader.graph is not node.graph or not all(map(query.is_constant, others)):
        return None
    if reader.op_type == "Add" and len(query.dims(others[0]) or ()) != 1:
        return None
    return reader


def _names(node: ir.Node, indices: Iterable[int]) -> set[str]:
    return {str(value.name) for index in indices if (value := node.inputs[index]) is not None}


def default_costs(atoms: Iterable[Atom], shapes: Shapes) -> Costs:
    """Estimates from work and sizes, for the first plan."""
    float_ns, integer_ns, boundary = {}, {}, {}
    for atom in atoms:
        elements = sum(_elements(value, shapes) for value in atom.outputs)
        work = query.macs(atom.head, shapes.get(str(atom.head.outputs[0].name)))
        float_ns[atom.name] = NODE_NS + work * FLOAT_NS_MAC + elements * FLOAT_NS_ELEMENT
        integer_ns[atom.name] = NODE_NS + work * INT_NS_MAC + elements * INT_NS_ELEMENT
        for value in (*atom.inputs, *atom.outputs):
            boundary[str(value.name)] = NODE_NS + _elements(value, shapes) * BOUNDARY_NS_ELEMENT
    return Costs(float_ns, integer_ns, boundary)


def free_costs(atoms: Iterable[Atom]) -> Costs:
    """Costs by which all that has an integer kernel is worth it: what could be, not what pays."""
    atoms = tuple(atoms)
    edges = {str(value.name) for atom in atoms for value in (*atom.inputs, *atom.outputs)}
    names = [atom.name for atom in atoms]
    return Costs(dict.fromkeys(names, 1.0), dict.fromkeys(names, 0.0), dict.fromkeys(edges, 0.0))


def _elements(value: ir.Value, shapes: Shapes) -> int:
    shape = shapes.get(str(value.name))
    return math.prod(shape) if shape is not None else 1


def place(
    atoms: tuple[Atom, ...], target: Target, costs: Costs, *, keep_float: Mapping[str, str] | None = None
) -> Plan:
    """Atoms + costs -> Plan. ``keep_float``: node or atom name -> why it must stay float (rolled back, sensitive)."""
    keep_float = keep_float or {}
    candidates = [
        atom
        for atom in atoms
        if atom.verdict.kind != "float" and not any(str(node.name) in keep_float for node in atom.nodes)
    ]
    everything = {atom.name for atom in candidates}
    labels = everything if target.whole else _useful(candidates, _cut(candidates, costs))
    return _plan(atoms, labels, target, keep_float)


def _cut(candidates: list[Atom], costs: Costs) -> set[str]:
    """Names of the atoms on the integer side of the cheapest cut."""
    network = Network()
    vertex = {atom.name: network.vertex() for atom in candidates}
    writer = {id(value): atom for atom in candidates for value in atom.outputs}
    inner = {node: atom for atom in candidates for node in atom.nodes}
    for atom in candidates:
        network.edge(Network.SOURCE, vertex[atom.name], costs.float_ns[atom.name])
        network.edge(vertex[atom.name], Network.SINK, costs.integer_ns[atom.name])
    tensors = {id(value): value for atom in candidates for value in (*atom.inputs, *atom.outputs)}
    for key, value in tensors.items():
        price = costs.boundary_ns[str(value.name)]
        producer = writer.get(key)
        start = Network.SINK if producer is None else vertex[producer.name]
        readers = [inner.get(node) for node in query.users(value)]
        inside = [vertex[a.name] for a in readers if a is not None]
        network.entering(start, inside, price)  # one Q is paid when the producer is float and any reader integer
        if producer is not None:  # one DQ when the producer is integer and any reader float
            outside = [Network.SINK] if None in readers or value.is_graph_output() else []
            free = producer.bare is not None and not inside
            network.leaving(start, [*inside, *outside], 0.0 if free else price)
    side = network.source_side()
    return {atom.name for atom in candidates if vertex[atom.name] in side}


def _useful(candidates: list[Atom], labels: set[str]) -> set[str]:
    """Drop integer regions without a single multiply-accumulate: they only add rounding."""
    chosen = {atom.name: atom for atom in candidates if atom.name in labels}
    inner = {node: atom.name for atom in chosen.values() for node in atom.nodes}
    seen: set[str] = set()
    useful: set[str] = set()
    for atom in chosen.values():
        if atom.name in seen:
            continue
        region = _region(atom, chosen, inner)
        seen |= region
        if any(OPS[chosen[name].head.op_type].weight is not None for name in region):
            useful |= region
    return useful


def _region(start: Atom, chosen: Mapping[str, Atom], inner: Mapping[ir.Node, str]) -> set[str]:
    """Integer atoms reachable from ``start`` over tensors that carry codes."""
    region, stack = {start.name}, [start]
    while stack:
        atom = stack.pop()
        around = [value.producer() for value in atom.inputs] + [
            node for value in atom.outputs for node in query.users(value)
        ]
        for node in around:
            name = inner.get(node) if node is not None else None
            if name is not None and name not in region:
                region.add(name)
                stack.append(chosen[name])
    return region


def _plan(atoms: tuple[Atom, ...], labels: set[str], target: Target, keep_float: Mapping[str, str]) -> Plan:
    tensors: dict[str, Quant] = {}
    ties: dict[str, str] = {}
    bare: set[str] = set()
    reads_codes = {id(value) for atom in atoms if atom.name in labels for value in atom.inputs}
    for atom in (atom for atom in atoms if atom.name in labels):
        for value in atom.inputs:
            tensors[str(value.name)] = target.activations
        if atom.bare is not None and not any(id(value) in reads_codes for value in atom.outputs):
            bare.add(atom.name)
            continue
        for value in atom.outputs:
            tensors[str(value.name)] = target.activations
            if OPS[atom.head.op_type].keeps_scale:
                ties[str(value.name)] = str(atom.inputs[0].name)
    return Plan(
        tensors,
        {atom.name: _kernel(atom, bare) for atom in atoms if atom.name in labels},
        _reasons(atoms, labels, keep_float),
        frozenset(bare),
        ties,
        atoms,
    )


def _kernel(atom: Atom, bare: set[str]) -> str:
    return atom.bare.kernel if atom.bare is not None and atom.name in bare else atom.verdict.kernel


def _reasons(atoms: tuple[Atom, ...], labels: set[str], keep_float: Mapping[str, str]) -> dict[str, str]:
    """Why each node outside the integer world is there."""
    reasons = {}
    for atom in (atom for atom in atoms if atom.name not in labels):
        kept = [keep_float[str(node.name)] for node in atom.nodes if str(node.name) in keep_float]
        reason = (
            kept[0]
            if kept
            else atom.verdict.reason
            if atom.verdict.kind == "float"
            else ("an integer kernel exists, but Q/DQ around it cost more than it saves")
        )
        reasons.update({str(node.name): reason for node in atom.nodes})
    return reasons
