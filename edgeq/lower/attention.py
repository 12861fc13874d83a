"""Attention written out as products and a Softmax -> the Attention op of opset 23 (L7).

What is looked for around a Softmax over keys: ``softmax(scale q k^T + mask) v`` with the scale on the scores, on q, on
k or on both (torch's SDPA), the mask added or chosen by Where, a guard against rows of NaN, keys turned for the product
in the ways exporters write. It becomes the op on heads [B, heads, S, D]; ``heads`` then takes in what stands around.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgeq.ir import query
from edgeq.lower import heads, masks
from edgeq.lower.heads import SPLIT, permutation
from edgeq.rewrite.match import Edit, each, producer, product, rank, read_once, reader, scalar

OPSET = 23
TURNED_KEYS, TURNED = (0, 2, 3, 1), (0, 1, 3, 2)
HIDES = -1e3  # what a score is at most where Where hides it


@dataclass(frozen=True)
class Keys:
    """Keys [B, heads, S, D], or [B, S, heads, D] where they still have to be ``split``."""

    value: ir.Value
    split: bool = True

    def count(self) -> int | None:
        return heads.count(self.value) if self.split else heads.split_in(self.value)


@dataclass(frozen=True)
class Scores:
    """``scale * q k^T + mask`` of q [B, heads, S, D]. ``chosen``: where it is False the score is ``fill``."""

    q: ir.Value
    k: Keys
    scale: float
    mask: ir.Value | None = None
    chosen: ir.Value | None = None
    fill: float = 0.0


def _attend(node: ir.Node, edit: Edit) -> bool:
    scores = _scores(node.inputs[0]) if _over_keys(node) and edit.opset >= OPSET else None
    after, guarded = _guarded(node)
    weighted = None if after is None or scores is None else reader(after, "MatMul")
    if scores is None or weighted is None or weighted.inputs[0] is not after or not _fit(scores, weighted.inputs[1]):
        return False
    inputs = [scores.q, scores.k.value, weighted.inputs[1]]
    if scores.mask is not None or scores.chosen is not None:
        mask = _mask(scores, guarded, node, edit)
        if mask is None:
            return False
        inputs.append(mask)
    new: list[ir.Node] = []
    if not scores.k.split:
        new.append(edit.node(weighted, "Transpose", [scores.k.value], {"perm": SPLIT}))
        new[0].outputs[0].type = scores.k.value.type
        inputs[1] = new[0].outputs[0]
    new.append(edit.node(weighted, "Attention", inputs, {"scale": scores.scale}, like=weighted.outputs[0]))
    edit.swap(weighted, new)
    return True


def _fit(scores: Scores, v: ir.Value | None) -> bool:
    """Whether the kernel would pair the heads as the products do."""
    q, k, values = heads.count(scores.q), scores.k.count(), heads.count(v)
    return q is not None and k in (q, 1) and values == k


def _mask(scores: Scores, guarded: bool, node: ir.Node, edit: Edit) -> ir.Value | None:
    if scores.chosen is not None:
        return masks.chosen(scores.chosen, scores.fill, scores.q, guarded, node, edit)
    return None if scores.mask is None else masks.added(scores.mask, scores.q, guarded, node, edit)


def _over_keys(node: ir.Node) -> bool:
    x = node.inputs[0]
    return rank(x) == 4 and query.attribute(node, "axis", -1) in (-1, 3) and x is not None and x.dtype == masks.FLOAT


def _guarded(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The weights, behind ``Where(IsNaN(p), 0, p)`` if there is one."""
    weights = node.outputs[0]
    readers = query.users(weights)
    test = next((one for one in readers if one.op_type == "IsNaN"), None)
    choice = None if test is None else reader(test.outputs[0], "Where")
    if choice is None:
        return weights, False
    guard = scalar(choice.inputs[1]) == 0 and choice.inputs[2] is weights and set(readers) == {test, choice}
    return (choice.outputs[0] if guard else None), True


def _scores(value: ir.Value | None) -> Scores | None:
    """What a Softmax reads."""
    if value is None or not read_once(value):
        return None
    added, choice = producer(value, "Add"), producer(value, "Where")
    if choice is not None:
        found, fill = _product(choice.inputs[1]), scalar(choice.inputs[2])
        if found is None or fill is None or fill > HIDES:
            return None
        return Scores(*found, chosen=choice.inputs[0], fill=fill)
    if added is None:
        found = _product(value)
        return None if found is None else Scores(*found)
    for inner, mask in ((added.inputs[0], added.inputs[1]), (added.inputs[1], added.inputs[0])):
        found = _product(inner)
        if found is not None and inner is not None and read_once(inner):
            return Scores(*found, mask=mask)
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, Keys, float] | None:
    """(queries, keys, scale) of ``scale * q k^T``, the factors on either side."""
    if value is None:
        return None
    factors, scale = product(value)
    node = producer(factors[0], "MatMul") if len(factors) == 1 else None
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    (left, first), (right, second) = product(node.inputs[0]), product(node.inputs[1])
    k = _keys(right[0]) if len(right) == 1 else None
    return None if len(left) != 1 or k is None else (left[0], k, scale * first * second)


def _keys(value: ir.Value) -> Keys | None:
    """Keys behind those that are turned for the product: [B, heads, D, S]."""
    node = producer(value, "Transpose", "Reshape")
    source = None if node is None else node.inputs[0]
    if node is None or source is None or rank(value) != 4:
        return None
    if node.op_type == "Transpose":
        turn = permutation(node)
        return Keys(source, split=turn == TURNED) if turn in (TURNED, TURNED_KEYS) else None
    turned = producer(source, "Transpose")  # torch turns them as [B heads, S, D]
    flat = producer(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or flat is None or flat.inputs[0] is None or permutation(turned) != (0, 2, 1):
        return None
    before, after = query.dims(flat.inputs[0]), query.dims(value)
    if before is None or after is None or len(before) != 4 or before[3] != after[2]:
        return None
    if before[1] is not None and after[1] is not None and before[1] != after[1]:
        return None
    return Keys(flat.inputs[0])


attend = each(_attend, "Softmax")
