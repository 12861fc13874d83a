"""Bring a model into the one form that later stages expect, without changing what it computes (L6).

The rewrites of a literal table, in order; ``checked`` runs them and proves the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgeq.rewrite import (
    activation,
    affine,
    arithmetic,
    einsum,
    fold,
    forward,
    linear,
    noop,
    normalization,
    pool,
    shapes,
    share,
)
from edgeq.rewrite.checked import Change, rewritten
from edgeq.rewrite.match import Rewrite
from edgeq.rewrite.preserve import Check
from edgeq.run.record import Feed

REWRITES: tuple[tuple[str, Rewrite], ...] = (
    ("lift-constants", fold.lift_constants),
    ("fold-constants", fold.fold_constants),
    ("join-softmax-rows", normalization.join_softmax_rows),
    ("freeze-sizes", shapes.freeze_sizes),
    ("drop-empty-parts", noop.drop_empty_parts),
    ("drop-noops", noop.drop_noops),
    ("merge-transposes", noop.merge_transposes),
    ("merge-regroupings", noop.merge_regroupings),
    ("merge-initializers", share.merge_initializers),
    ("merge-nodes", share.merge_nodes),
    ("einsums-as-products", einsum.einsums),
    ("sums-as-adds", arithmetic.sums_as_adds),
    ("subtract-as-add", arithmetic.subtract_as_add),
    # names before constants move: the patterns look for the constants of formulas
    ("name-softmax", normalization.name_softmaxes),
    ("name-layer-norm", normalization.name_layer_norms),
    ("name-gelu", activation.name_gelus),
    ("name-hard-swish", activation.name_hard_swishes),
    ("name-hard-sigmoid", activation.name_hard_sigmoids),
    ("join-clips", activation.join_clips),
    ("squares", arithmetic.squares),
    ("divide-as-multiply", arithmetic.divide_as_multiply),
    ("constants-second", arithmetic.constants_second),
    ("straighten-gemm", linear.straighten_gemms),
    ("join-biases", linear.join_biases),
    ("add-before-squeeze", affine.add_before_squeeze),
    ("fold-affine", affine.fold_affine),
    ("split-batch-norm", affine.split_batch_norm),
    ("fold-forward", forward.fold_forward),
    ("join-constants", arithmetic.join_constants),
    ("means-as-pools", pool.means_as_pools),
)


def canonicalize(
    model: ir.Model,
    *,
    feeds: Sequence[Feed] = (),
    check: Check | None = None,
    keep: frozenset[str] = frozenset(),
) -> tuple[ir.Model, tuple[Change, ...]]:
    """A copy with ``REWRITES`` applied and shapes inferred, and what was done; see ``checked.rewritten``."""
    return rewritten(model, REWRITES, feeds=feeds, check=check, keep=keep)
