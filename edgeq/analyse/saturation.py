"""Would a file's integer products saturate on x86 CPUs without VNNI? A proof over all inputs, not a test (L5).

Without VNNI, ONNX Runtime multiplies u8 x i8 with VPMADDUBSW, which adds products in pairs in 16 bits: 255 * 127 twice
becomes 32767 instead of 64770, silently. Which products meet is known, so each row (output) has an exact bound over all
u8 inputs. Instead of cutting every weight to 7 bits, as ``reduce_range`` does, only rows that break the bound are
repaired, and each by no more than it needs (``num.fit.fit_pairs``).

Measured on ONNX Runtime 1.32.0 under an emulated Haswell, bit for bit (tests/test_saturation.py): MatMul and Gemm pair
elements 2j and 2j + 1 of K; Conv those of [kernel, in/group]; Conv with one channel a group, in and out, widens to 32
bits first. The AVX512 kernels use the same instruction on the same packing (source, QgemmU8X8KernelAvx512Core and
ConvSymKernelAvx512Core). u8 weights are widened too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.ir.ops import OPS
from edgeq.num.fit import fit_pairs, pair_sums
from edgeq.num.formats import Int
from edgeq.num.quant import QParams
from edgeq.report.record import PairSums, Saturation
from edgeq.target.record import Target

SUM_MAX = 2**15 - 1
INPUT_MAX = 255  # any u8 code can occur, whatever calibration saw, and i8 becomes u8 when the model is loaded on x86
PAIRED = ("MatMul", "Gemm", "Conv")


def kernel_rows(node: ir.Node, weight: NDArray[Any]) -> NDArray[Any] | None:
    """The weight of a MatMul, Gemm or Conv as [rows, K], in the order its integer kernel multiplies. None where no two
    products are added in 16 bits."""
    if node.op_type == "Conv":
        depthwise = 1 < query.attribute(node, "group", 1) == weight.shape[0] and weight.shape[1] == 1
        return None if depthwise else np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    if node.op_type not in PAIRED:
        return None
    if weight.ndim < 2:
        return weight.reshape(1, -1)
    turned = weight if query.attribute(node, "transB", 0) else weight.swapaxes(-1, -2)
    return turned.reshape(-1, turned.shape[-1])


def unsaturated(rows: NDArray[Any] | None, params: QParams, target: Target) -> QParams:
    """``params`` of a weight given as ``kernel_rows``, with scales raised as far as ``target`` needs."""
    limit = target.limits.pair_sum_max // INPUT_MAX
    if rows is None or limit >= 2 * 127 or not params.quant.symmetric or params.quant.format != Int(8, True):
        return params
    return fit_pairs(rows, params, limit)


def saturates(rows: NDArray[Any] | None, target: Target) -> bool:
    """Whether codes given as ``kernel_rows`` can add beyond what ``target`` holds."""
    if rows is None:
        return False
    return bool(INPUT_MAX * pair_sums(rows.astype(np.int64)).max(initial=0) > target.limits.pair_sum_max)


def certify(model: ir.Model) -> Saturation:
    """What pairs of products can reach in every integer MatMul, Gemm and Conv of a QDQ model, its bodies included."""
    nodes = tuple(sums for node in query.nodes(model) if (sums := _sums(node)) is not None)
    return Saturation(
        sum(sums.rows for sums in nodes),
        sum(sums.flagged for sums in nodes),
        max((sums.worst for sums in nodes), default=0),
        nodes,
    )


def pair_bounds(node: ir.Node) -> NDArray[np.int64] | None:
    """i64[rows]: the largest magnitude a pair of products of each row can reach. None for nodes that don't multiply u8
    by stored i8 codes, or don't add products in 16 bits."""
    if node.op_type not in PAIRED or _source(node, 0) is None:
        return None
    codes = query.constant(_source(node, OPS[node.op_type].weight or 0))
    rows = None if codes is None or codes.dtype != np.int8 else kernel_rows(node, codes)
    return None if rows is None else pair_sums(rows.astype(np.int16)).astype(np.int64) * INPUT_MAX


def _sums(node: ir.Node) -> PairSums | None:
    worst = pair_bounds(node)
    if worst is None:
        return None
    flagged = int(np.count_nonzero(worst > SUM_MAX))
    return PairSums(str(node.name), node.op_type, len(worst), flagged, int(worst.max(initial=0)))


def _source(node: ir.Node, index: int) -> ir.Value | None:
    """The codes a DequantizeLinear decodes for an input, or None."""
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
