"""Plan + statistics -> Encodings: every scale, zero point and bias code of the quantized model (L5).

Ranges come from one set of statistics by any method of ``num.fit``; tied tensors (data movers) take the parameters of
the tensor their codes come from. Biases are fitted last, because their scale is the product of the other two and a
bias that would overflow raises its channel's weight scale (AIMET's guard; ONNX Runtime issues 11415 and 21000).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.aligned import aligned
from edgeq.analyse.place import Atom, Plan
from edgeq.analyse.saturation import kernel_rows, unsaturated
from edgeq.analyse.stats import MASK, Stats
from edgeq.errors import ModelError
from edgeq.ir import query
from edgeq.ir.ops import OPS
from edgeq.num import fit
from edgeq.num.quant import TENSOR, Coded, QParams, Quant, dequantize, quantize
from edgeq.target.record import Target

Edge = tuple[str, int]  # node name, input index

FITS = 3  # a bias that raises a scale is fitted again, as other codes have another mean error; once is enough mostly

PRODUCTS = ("MatMul", "Gemm")
SUMS = ("Add", "Where")  # what puts an attention mask on scores
HIDDEN = -1e3  # a score that Softmax makes 0 in every float format beside those of ordinary size: a mask by any means


@dataclass(frozen=True)
class Encodings:
    """``activations``: tensor -> parameters. ``constants``: edge -> parameters and codes of the constant read there.
    ``biases``: edge -> int32 codes [out] and their f32 scales [out]. ``notes``: what had to be adjusted."""

    activations: dict[str, QParams]
    constants: dict[Edge, Coded]
    biases: dict[Edge, tuple[NDArray[np.int32], NDArray[np.float32]]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranges:
    """Which method of ``num.fit.METHODS`` fits which activation: ``exact`` one by name, ``products`` what MatMul and
    Gemm read, ``base`` all others.

    Products stand apart because clipping rare large values is right where they are noise and ruinous where they carry
    the result: a massive activation of a transformer ends 11 dB worse with the MSE range than with min/max (27.9 ->
    16.9 dB, MiniLM-L6, second feed-forward product of layer 0), while convolutions gain from clipping.
    """

    base: str = "mse"
    products: str = "minmax"
    exact: Mapping[str, str] = field(default_factory=dict)


def encode(
    plan: Plan,
    stats: Mapping[str, Stats],
    target: Target,
    *,
    ranges: Ranges = Ranges(),
    rounded: Mapping[Edge, Coded] | None = None,
) -> Encodings:
    """Fit everything the plan quantizes. ``rounded``: constants whose codes are found already.

    Raises ModelError naming a planned tensor that calibration never saw."""
    activations: dict[str, QParams] = {}
    products = _read_by_products(plan)
    for name, quant in plan.tensors.items():
        origin = root(name, plan.ties)
        if origin not in activations:
            method = _method(origin, products, ranges)
            activations[origin] = _activation(origin, plan.tensors.get(origin, quant), stats, target, method)
        activations[name] = activations[origin]
    moved = aligned(plan, activations)
    origins = {name: root(name, plan.ties) for name in plan.tensors}
    activations.update({name: moved[origin] for name, origin in origins.items() if origin in moved})
    activations.update(_clipped(plan, activations))
    constants: dict[Edge, Coded] = {}
    biases: dict[Edge, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
    notes: list[str] = []
    for atom in (atom for atom in plan.atoms if atom.name in plan.integer):
        for index in atom.constants:
            edge = atom.name, index
            constants[edge] = rounded[edge] if rounded and edge in rounded else _nearest(atom, index, target)
        if atom.name not in plan.bare or atom.bare_bias:
            source = stats.get(str(atom.inputs[0].name))
            _bias(atom, activations, source, constants, biases, notes)
    return Encodings(activations, constants, biases, tuple(notes))


def _method(name: str, products: set[str], ranges: Ranges) -> str:
    """The method for a root tensor."""
    return ranges.exact.get(name, ranges.products if name in products else ranges.base)


def _read_by_products(plan: Plan) -> set[str]:
    """Root tensors that a MatMul or Gemm multiplies."""
    return {
        root(str(value.name), plan.ties)
        for atom in plan.atoms
        if atom.name in plan.integer and atom.head.op_type in PRODUCTS
        for value in atom.inputs
    }


def roots(atom: Atom, plan: Plan) -> set[str]:
    """The tensors whose parameters an atom of ``plan`` uses."""
    values = atom.inputs if atom.name in plan.bare else (*atom.inputs, *atom.outputs)
    return {root(str(value.name), plan.ties) for value in values}


def observed(plan: Plan) -> list[str]:
    """The tensors whose statistics ``encode`` needs, in plan order: one a tie, and what is multiplied beside a bias,
    since a data mover that keeps the range (MaxPool, a channel shuffle) changes the channels' means."""
    ranges = [root(name, plan.ties) for name in plan.tensors]
    means = [str(atom.inputs[0].name) for atom in plan.atoms if atom.name in plan.integer and atom.bias is not None]
    return list(dict.fromkeys((*ranges, *means)))


def unholdable(plan: Plan, stats: Mapping[str, Stats]) -> dict[str, str]:
    """Integer atoms of ``plan`` that integers would break -> why: those that meet mask constants (-inf, -1e9, -1e4 in
    front of a Softmax), which no 8-bit scale holds beside real values, and sums with a tensor that was 0 throughout
    calibration, as the mask of texts without padding is: its range is unknown."""
    wrong: dict[str, str] = {}
    for atom in (atom for atom in plan.atoms if atom.name in plan.integer):
        for value in (*atom.inputs, *atom.outputs):
            seen = stats.get(root(str(value.name), plan.ties))
            if seen is not None and (seen.mask_count or (seen.min <= HIDDEN and _scores(value))):
                wrong[atom.name] = f"{value.name!r} holds mask constants, which no integer scale holds beside values"
            elif seen is not None and value in atom.inputs and atom.head.op_type in SUMS and seen.min == seen.max == 0:
                wrong[atom.name] = f"{value.name!r} was 0 throughout calibration: its range is unknown"
        for index in atom.constants:
            array = _array(atom, index)
            masks = array.min(initial=0.0) <= HIDDEN and atom.head.op_type in SUMS and _scores(atom.outputs[0])
            if OPS[atom.head.op_type].weight != index and (masks or not _holdable(array)):
                wrong[atom.name] = "its constant holds values no integer scale holds beside others"
    return wrong


def _scores(value: ir.Value) -> bool:
    """Whether a Softmax reads the value, as it is or behind sums and data movers."""
    seen, stack = {value}, [value]
    while stack:
        for node in query.users(stack.pop()):
            if node.op_type == "Softmax":
                return True
            row = OPS.get(node.op_type)
            if node.op_type in SUMS or (row is not None and row.keeps_scale):
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                stack += new
    return False


def _holdable(array: NDArray[Any]) -> bool:
    return bool(np.isfinite(array).all() and np.abs(array).max(initial=0.0) < -MASK)


def root(name: str, ties: Mapping[str, str]) -> str:
    """The tensor whose parameters ``name`` takes."""
    while name in ties:
        name = ties[name]
    return name


def _activation(name: str, quant: Quant, stats: Mapping[str, Stats], target: Target, method: str) -> QParams:
    if name not in stats or stats[name].count == 0:
        raise ModelError(
            f"calibration saw no value of tensor {name!r}", hint="use samples that reach this part of the model"
        )
    seen = stats[name]
    lo, hi = fit.fit_range(method, seen.histogram, seen.min, seen.max, quant)
    return fit.params_of_range(lo, hi, quant, min_scale=target.limits.min_scale)


def _clipped(plan: Plan, activations: Mapping[str, QParams]) -> dict[str, QParams]:
    """Parameters of what a Clip in an atom writes, so that no code lies beyond its bounds: the zero point's rounding
    may reach half a step farther, and the runtime then keeps the Clip, which makes the whole atom float."""
    found = {}
    for atom in (atom for atom in plan.atoms if atom.name in plan.integer and atom.name not in plan.bare):
        name, last = str(atom.outputs[0].name), atom.nodes[-1]
        if last.op_type == "Clip" and name not in plan.ties:
            params = activations[name]
            codes = [abs(code - int(params.zero_point)) for code in params.code_range]
            bounds = [query.constant(value) for value in (*last.inputs, None, None)[1:3]]
            fits = [np.abs(b).item() / n for b, n in zip(bounds, codes, strict=True) if b is not None and b.any() and n]
            scale = min(np.float32(params.scale), *(np.float32(fit) for fit in fits), np.float32(np.inf))
            found[name] = replace(params, scale=np.asarray(scale, np.float32))
    return found


def _nearest(atom: Atom, index: int, target: Target) -> Coded:
    params = constant_params(atom, index, target)
    return Coded(params, quantize(_array(atom, index).astype(np.float32), params))


def constant_params(atom: Atom, index: int, target: Target) -> QParams:
    """The mapping of the constant an atom reads at ``index``: per channel where it is a weight, else per tensor."""
    array = _array(atom, index)
    if OPS[atom.head.op_type].weight != index:
        lo, hi = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
        return fit.params_of_range(lo, hi, target.activations, min_scale=target.limits.min_scale)
    axis = query.out_axis(atom.head)
    if axis is None or (atom.head.op_type == "MatMul" and array.ndim != 2):
        quant, axis = replace(target.weights, block=TENSOR), None
    else:
        quant = target.weights
    return unsaturated(kernel_rows(atom.head, array), fit.fit_weight(array, quant, axis), target)


def _array(atom: Atom, index: int) -> NDArray[Any]:
    array = query.constant(atom.head.inputs[index])
    if array is None:
        raise TypeError(f"input {index} of {atom.name} is not constant")
    return array


def _bias(
    atom: Atom,
    activations: Mapping[str, QParams],
    source: Stats | None,
    constants: dict[Edge, Coded],
    biases: dict[Edge, tuple[NDArray[np.int32], NDArray[np.float32]]],
    notes: list[str],
) -> None:
    row = OPS[atom.head.op_type]
    if atom.bias is None or row.weight is None or (atom.name, row.weight) not in constants:
        return
    node, index = atom.bias
    array = query.constant(node.inputs[index])
    if array is None:
        raise TypeError(f"bias of {atom.name} is not constant")
    edge, bias = (atom.name, row.weight), array.astype(np.float32).reshape(-1)
    products, scale_x = _array(atom, row.weight).size // bias.size, float(activations[str(atom.inputs[0].name)].scale)
    given = constants[edge].params.scale
    for _ in range(FITS):
        wanted = bias - _mean_error(atom, row.weight, constants[edge], source)
        codes, scales, adjusted = fit.fit_bias(wanted, scale_x, constants[edge].params, products=products)
        if np.array_equal(adjusted.scale, constants[edge].params.scale):
            break
        constants[edge] = _rescaled(constants[edge], adjusted, _array(atom, row.weight))
    raised = int(np.count_nonzero(constants[edge].params.scale != given))
    if raised:
        notes.append(f"{atom.name}: weight scale raised on {raised} channels so that the int32 bias fits")
    biases[str(node.name), index] = codes, scales


def _rescaled(coded: Coded, params: QParams, array: NDArray[Any]) -> Coded:
    """Nearest codes where the scale is another now; all others stay, however they were found."""
    nearest = quantize(array.astype(np.float32), params)
    same = params.scale == coded.params.scale
    if params.axis is not None:
        same = same.reshape([-1 if axis == params.axis % array.ndim else 1 for axis in range(array.ndim)])
    return Coded(params, np.where(same, coded.codes, nearest))


def _mean_error(atom: Atom, index: int, coded: Coded, source: Stats | None) -> NDArray[np.float32]:
    """What rounding the weights adds to each output channel on average, f32[out] or 0: (W^ - W) E[x].

    Nagel et al. 2019 (arXiv 1906.04721, 4.2) with E[x] from calibration; taken off the bias, it removes the shift that
    depthwise layers of a few weights suffer most from."""
    array = _array(atom, index).astype(np.float32)
    error, weight = dequantize(coded.codes, coded.params) - array, coded.params
    none = np.zeros(1, np.float32)
    if source is None or source.channels is None:
        return none
    mean = source.channels.mean.astype(np.float32)
    if atom.head.op_type == "Conv":  # [out, in/group, kernel...]: a group's outputs see their own inputs
        group = int(query.attribute(atom.head, "group", 1))
        shifts = error.reshape(*error.shape[:2], -1).sum(axis=2)
        if mean.size != shifts.shape[1] * group:
            return none
        per_output = np.repeat(mean.reshape(group, -1), shifts.shape[0] // group, axis=0)
        return np.asarray((shifts * per_output).sum(axis=1), np.float32)
    transposed = query.attribute(atom.head, "transA", 0)
    if transposed or array.ndim != 2 or weight.axis is None or mean.size != array.shape[1 - weight.axis]:
        return none
    return np.asarray(mean @ (error if weight.axis == 1 else error.T), np.float32)


def head_values(model: ir.Model) -> dict[str, ir.Value]:
    """Every named value of the main graph by name."""
    values = {str(value.name): value for value in model.graph.inputs}
    values.update({str(value.name): value for node in model.graph for value in node.outputs})
    return values
