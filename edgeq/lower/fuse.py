"""Rewrite a finished graph into the kernels its target has (L7).

One literal table, a row a rewrite: its name, and the op by which a target's key ``fuse`` asks for it. Rewrites run when
everything else is decided, on the float model and on the one with Q/DQ alike: what was left float between integer
kernels is fused there, what carries codes doesn't match. Instead of fusing first and quantizing around what is fused,
which would hide the products of an attention from placement.

Ops of a newer opset than the model's raise it to the one they came with; otherwise it stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from edgeq.errors import TargetError, did_you_mean
from edgeq.lower import attention, codes, heads, normalize, products, rotary
from edgeq.rewrite import shapes
from edgeq.rewrite.checked import Change, rewritten
from edgeq.rewrite.match import Rewrite
from edgeq.run.record import Feed
from edgeq.source import opset as opsets
from edgeq.target.record import Target

FUSIONS: tuple[tuple[str, str, Rewrite], ...] = (
    ("name-rms-norm", "RMSNormalization", normalize.name_rms_norms),
    ("rotate", "RotaryEmbedding", rotary.rotate),
    ("rotate-part", "RotaryEmbedding", rotary.rotate_part),
    ("rotate-rows", "RotaryEmbedding", rotary.rotate_rows),
    ("attend", "Attention", attention.attend),
    ("share-heads", "Attention", heads.share_heads),
    ("remember", "Attention", heads.remember),
    ("freeze-sizes", "Attention", shapes.freeze_sizes),  # what inference tells of Attention, not of products
    ("join-rows", "Attention", heads.join_rows),
    ("clip-codes", "Clip", codes.clip_codes),
    ("multiply-codes", "Clip", codes.multiply_codes),
    ("pad-codes", "Pad", codes.pad_codes),
    ("add-inside", "MatMulIntegerToFloat", products.add_inside),
    ("keep-sum-apart", "Sum", normalize.keep_sums_apart),
)


def fuse(model: ir.Model, target: Target, *, feeds: Sequence[Feed] = ()) -> tuple[ir.Model, tuple[Change, ...]]:
    """(The model in the target's kernels, what was done); the model itself where nothing matched. Checked on ``feeds``
    like ``canonicalize``. Raises TargetError where the target asks for what no row makes."""
    known = dict.fromkeys(op for _, op, _ in FUSIONS)
    if unknown := [op for op in target.fuse if op not in known]:
        hint = did_you_mean(unknown[0], list(known))
        raise TargetError(f"target {target.name!r}: nothing is fused into {unknown[0]!r}", hint=hint)
    table = [(name, rewrite) for name, op, rewrite in FUSIONS if op in target.fuse]
    if not table:
        return model, ()
    found = opsets.declared(model)
    raised, _ = opsets.convert(model, max(found, newest_opset(target)))
    result, changes = rewritten(raised, table, feeds=feeds)
    if not any(change.nodes and not change.rolled_back for change in changes):
        return model, changes
    return opsets.convert(result, found)[0], changes


def newest_opset(target: Target) -> int:
    """The newest opset that an op the target fuses came with."""
    return max([target.opset, *(opsets.first(op) for op in target.fuse if onnx.defs.has(op))])
