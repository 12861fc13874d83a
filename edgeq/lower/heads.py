"""The Attention op of opset 23 with what stands around it: shared heads, a cache, rows (L7).

Attention takes fewer heads of keys and values than of queries without their repetition, joins keys and values with past
ones itself and gives the joined ones out, and reads rows [B, S, heads D] as they come from products. Each is a small
rewrite of an Attention node, whoever wrote it: ``attention.attend`` or an exporter.

Instead of ``com.microsoft.GroupQueryAttention``: that one refuses a batch of several sequences with several new tokens
behind past ones, only knows causal masks of padding on the right, and without a cache shared by input and output, which
no exporter writes, is slower (docs/targets.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq.ir import edit as edits
from edgeq.ir import query
from edgeq.rewrite.match import Edit, each, producer, rank, reader
from edgeq.rewrite.noop import reshape_keeps

SPLIT = (0, 2, 1, 3)  # [B, S, heads, D] <-> [B, heads, S, D]
PAST = 4  # the input from which on Attention takes a cache


def permutation(node: ir.Node) -> tuple[int, ...]:
    return tuple(query.attribute(node, "perm", ()))


def attributes(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node as plain values."""
    return {name: attr.value for name, attr in node.attributes.items()}


def origin(value: ir.Value) -> tuple[ir.Value, int]:
    """What heads [B, heads, S, D] were split off, as they may go, and which axis of it holds the tokens."""
    while True:
        node = producer(value, "RotaryEmbedding", "Transpose")
        if node is None or node.inputs[0] is None or (node.op_type == "Transpose" and permutation(node) != SPLIT):
            return value, 2
        value = node.inputs[0]
        if node.op_type == "Transpose":
            split = producer(value, "Reshape")
            joined = split.inputs[0] if split is not None else None
            return (joined, 1) if joined is not None and rank(joined) == 3 else (value, 1)


def count(value: ir.Value | None) -> int | None:
    """How many heads [B, heads, S, D] holds: from its shape, or from the rows it was split off."""
    shape, node = query.dims(value), producer(value, "Transpose", "RotaryEmbedding")
    if shape is None or len(shape) != 4:
        return None
    if shape[1] is not None or node is None:
        return shape[1]
    if node.op_type == "RotaryEmbedding":
        return count(node.inputs[0])
    return split_in(node.inputs[0]) if permutation(node) == SPLIT else None


def split_in(source: ir.Value | None) -> int | None:
    """How many heads [B, S, heads, D] holds."""
    shape, split = query.dims(source), producer(source, "Reshape")
    if shape is None or len(shape) != 4:
        return None
    width = (query.dims(split.inputs[0]) or (None,))[-1] if split is not None and rank(split.inputs[0]) == 3 else None
    return width // shape[3] if shape[2] is None and width is not None and shape[3] else shape[2]


def rows(value: ir.Value | None, near: ir.Node, edit: Edit) -> tuple[ir.Value, list[ir.Node]] | None:
    """Heads [B, heads, S, D] that a Transpose made of [B, S, heads, D], as rows [B, S, heads D]: those they were split
    off, or a new Reshape, not yet in the graph."""
    turned = producer(value, "Transpose")
    source, shape = (turned.inputs[0], query.dims(turned.inputs[0])) if turned is not None else (None, None)
    if turned is None or source is None or near.graph is None or permutation(turned) != SPLIT:
        return None
    heads = split_in(source)
    if shape is None or heads is None or shape[3] is None:
        return None
    width = heads * shape[3]
    split = producer(source, "Reshape")
    joined = split.inputs[0] if split is not None else None
    if joined is not None and rank(joined) == 3 and (query.dims(joined) or ())[-1] == width:
        return joined, []
    target = edit.constant(near.graph, f"{source.name}_rows", np.array([0, 0, width]))
    again = edit.node(near, "Reshape", [source, target])
    again.outputs[0].type, again.outputs[0].shape = source.type, ir.Shape((*shape[:2], width))
    return again.outputs[0], [again]


def _past(node: ir.Node) -> list[ir.Value | None]:
    return list(node.inputs[PAST:])


def _share(node: ir.Node, edit: Edit) -> bool:
    """Keys and values [B, heads, S, D] that are repeated for groups of queries -> those that are repeated."""
    if any(_past(node)) or node.graph is None:
        return False
    found = [_unrepeated(value) for value in node.inputs[1:3]]
    if None in found or len({heads for _, heads, _ in filter(None, found)}) != 1:
        return False
    for index, (source, _, turned) in enumerate(filter(None, found), 1):
        old = node.inputs[index]
        if turned:
            split = edit.node(node, "Transpose", [source], {"perm": SPLIT})
            split.outputs[0].type = source.type
            node.graph.insert_before(node, split)
        node.replace_input_with(index, split.outputs[0] if turned else source)
        edit.erase([old])
    return True


def _unrepeated(value: ir.Value | None) -> tuple[ir.Value, int, bool] | None:
    """(what is repeated, its heads, whether that is [B, S, heads, D]) of heads [B, heads groups, S, D]."""
    turned = producer(value, "Transpose")
    if turned is not None:
        found = _repeated(turned.inputs[0], 2) if permutation(turned) == SPLIT else None
        return None if found is None else (*found, True)
    found = _repeated(value, 1)
    return None if found is None else (*found, False)


def _repeated(value: ir.Value | None, axis: int) -> tuple[ir.Value, int] | None:
    """What ``Reshape(Expand(Unsqueeze(x, axis + 1)))`` repeats, or Tile instead of Expand, and its heads."""
    joined = producer(value, "Reshape")
    wide = producer(joined.inputs[0], "Expand", "Tile") if joined is not None else None
    thin = producer(wide.inputs[0], "Unsqueeze", "Reshape") if wide is not None else None
    if thin is None or wide is None or thin.inputs[0] is None:
        return None
    source, one, many = query.dims(thin.inputs[0]), query.dims(thin.outputs[0]), query.dims(wide.outputs[0])
    after = query.dims(value)
    if source is None or one is None or many is None or after is None or (len(source), len(one)) != (4, 5):
        return None
    heads, groups = many[axis], many[axis + 1]
    if heads is None or groups is None or one[axis] != heads or one[axis + 1] != 1 or source[axis] != heads:
        return None
    if len(after) != 4 or after[axis] != heads * groups or not after[3] == source[3] == one[4]:
        return None
    if any(before == 1 != size for before, size in zip(one[:axis], many[:axis], strict=True)):
        return None  # one sequence, or one token, for all
    times = query.constant(wide.inputs[1]) if wide.op_type == "Tile" else None
    if wide.op_type == "Tile" and (times is None or times.prod() != groups):
        return None
    return thin.inputs[0], heads


def _remember(node: ir.Node, edit: Edit) -> bool:
    """``Concat(past, new)`` of keys and of values, which else only the graph's outputs read -> inputs and outputs of
    Attention. Not where ``is_causal`` counts from the first key: with a cache it counts from the first new one."""
    if node.graph is None or any(_past(node)) or len(node.outputs) > 1 or query.attribute(node, "is_causal", 0):
        return False
    joins = [producer(value, "Concat") for value in node.inputs[1:3]]
    if not all(_is_cache(join, node) for join in joins):
        return False
    keys, values = (join for join in joins if join is not None)
    lengths = [query.dims(join.inputs[0]) or (None,) * 4 for join in (keys, values)]
    if lengths[0][2] != lengths[1][2]:
        return False
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    inputs = [node.inputs[0], keys.inputs[1], values.inputs[1], mask, keys.inputs[0], values.inputs[0]]
    new = edit.node(node, "Attention", inputs, attributes(node), like=node.outputs[0])
    new.resize_outputs(3)
    node.graph.insert_before(node, new)
    for before, after in zip((keys.outputs[0], values.outputs[0]), new.outputs[1:], strict=True):
        after.name = edit.names.fresh(f"{before.name}_present")
        for user, index in tuple(before.uses()):
            if user is node:
                node.replace_input_with(index, None)
        edits.take_over(before, after)
    edit.swap(node, [new])
    for join in (keys, values):
        edits.remove_node(join)
    return True


def _is_cache(join: ir.Node | None, node: ir.Node) -> bool:
    """Whether past heads and new ones, which are computed and therefore not empty, as the kernel wants them, are joined
    along the tokens, for this attention and for outputs of the graph."""
    if join is None or join.graph is not node.graph or len(join.inputs) != 2 or join.inputs[0] is None:
        return False
    if join.inputs[1] is None or join.inputs[1].producer() is None:
        return False
    if rank(join.outputs[0]) != 4 or query.attribute(join, "axis") not in (2, -2):
        return False
    return query.users(join.outputs[0]) == [node] and len(join.outputs[0].uses()) == 1


def _join(node: ir.Node, edit: Edit) -> bool:
    """Attention of heads that were just split off rows, and are joined again behind it -> Attention of the rows."""
    graph, final = node.graph, _joined(node.outputs[0])
    heads = [count(value) for value in node.inputs[:2]]
    size = (query.dims(node.inputs[2]) or (None,))[-1]
    if final is None or graph is None or heads[0] is None or heads[1] is None or size is None:
        return False
    shape, width = query.dims(final.outputs[0]) or (), heads[0] * size
    if len(shape) not in (2, 3) or shape[-1] not in (None, width) or (len(shape) == 2 and shape[-1] is None):
        return False
    made = [rows(value, node, edit) for value in node.inputs[:3]]
    if None in made:
        return False
    found = [one for one in made if one is not None]
    graph.insert_before(node, [new for _, nodes in found for new in nodes])
    counts = {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    inputs = [*(value for value, _ in found), *node.inputs[3:]]
    new = edit.node(node, "Attention", inputs, attributes(node) | counts)
    new.resize_outputs(len(node.outputs))
    new.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, new)
    for before, after in zip(node.outputs[1:], new.outputs[1:], strict=True):
        edits.take_over(before, after)
    name, left = node.name, tuple(final.inputs)
    if len(shape) == 3:
        edits.take_over(final.outputs[0], new.outputs[0])
        graph.remove(final, safe=True)
    else:  # [B S, heads D], for a Gemm
        final.replace_input_with(0, new.outputs[0])
    edit.erase(left)  # the attention of heads with it: nobody reads that any more
    new.name = name
    return True


def _joined(y: ir.Value) -> ir.Node | None:
    """The Reshape behind heads [B, heads, S, D] that makes rows of them; TorchScript writes one before that, which
    keeps their shape."""
    kept = reader(y, "Reshape")
    turned = reader(kept.outputs[0] if kept is not None and reshape_keeps(kept) else y, "Transpose")
    return reader(turned.outputs[0], "Reshape") if turned is not None and permutation(turned) == SPLIT else None


share_heads = each(_share, "Attention")
remember = each(_remember, "Attention")
join_rows = each(_join, "Attention")
