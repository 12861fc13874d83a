"""Scales that let a function run on the codes of what it reads (L5).

HardSigmoid of codes with 254 steps between its corners is the code itself, in another scale; HardSwish needs a whole
number of steps from 0 to its corners at 3 and -3, the lower one within the range. Both cost a scale that is larger by
less than a step in that number, against a float island with Q and DQ around it. Pixels are codes with a scale of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import floor

import numpy as np

from edgeq.analyse.place import Atom, Plan
from edgeq.ir import query
from edgeq.ir.pixels import codes_of
from edgeq.num.quant import QParams, parse_quant

CODES = parse_quant("u8/tensor/asym")  # what pixels are
GATE_STEPS = 254  # of 255: an even number, so that the middle is a code
REACH = 3.0  # of HardSwish: x clip(x / 6 + 1 / 2, 0, 1)


def aligned(plan: Plan, activations: Mapping[str, QParams]) -> dict[str, QParams]:
    """Tensor -> its parameters where an integer function of ``plan`` wants others than were fitted."""
    found: dict[str, QParams] = {}
    for atom in (atom for atom in plan.atoms if atom.name in plan.integer):
        if atom.head.op_type == "HardSigmoid":
            found.update(_gate(atom, activations))
        elif atom.head.op_type == "HardSwish":
            name = str(atom.inputs[0].name)
            found[name] = _reaching(found.get(name, activations[name]))
        for value in atom.inputs:
            pixels = codes_of(value)
            if pixels is not None and str(value.name) in activations and activations[str(value.name)].quant == CODES:
                found[str(value.name)] = QParams(CODES, np.array(1, np.float32), np.array(pixels[1], np.int32))
    return found


def _gate(atom: Atom, activations: Mapping[str, QParams]) -> dict[str, QParams]:
    """[-beta / alpha, (1 - beta) / alpha] over the steps, and [0, 1] over the same."""
    source, result = str(atom.inputs[0].name), str(atom.outputs[0].name)
    alpha, beta = query.attribute(atom.head, "alpha", 0.2), query.attribute(atom.head, "beta", 0.5)
    low = activations[source].code_range[0]
    zeros = (low + round(beta * GATE_STEPS), low)
    scales = (1 / (alpha * GATE_STEPS), 1 / GATE_STEPS)
    return {
        name: replace(activations[name], scale=np.array(scale, np.float32), zero_point=np.array(zero, np.int32))
        for name, scale, zero in zip((source, result), scales, zeros, strict=True)
    }


def _reaching(params: QParams) -> QParams:
    """The nearest larger scale with a whole number of steps to the corners; the range reaches the lower one."""
    first, last = params.code_range
    low, high = ((code - int(params.zero_point)) * float(params.scale) for code in (first, last))
    low = min(low, -REACH)
    steps = max(floor(REACH * (last - first) / (high - low)), 1)
    scale = REACH / steps
    zero = min(max(round(first - low / scale), first + steps), last)
    return replace(params, scale=np.array(scale, np.float32), zero_point=np.array(zero, np.int32))
