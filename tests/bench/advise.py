"""Predicted against measured noise of weights, and what advice costs: ``python -m tests.bench.advise [NAME…]``.

Every weight of a zoo model in every format that advice chooses from. Of tables above 2^20 numbers the first rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from edgeq.advice import ways
from edgeq.analyse.advise import SIZES, TIERS, Advice, Candidate, choose, weight_advice, weights
from edgeq.analyse.weights import axis_of
from edgeq.ir import query
from edgeq.num.fit import fit_weight
from edgeq.num.predict import decibel
from edgeq.num.quant import fake_quant, parse_quant
from edgeq.rewrite.canonicalize import canonicalize
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.zoo import ZOO
from tests.zoo.packages import float_model

NAMES = ("EFL0", "MBV2", "OCR4r", "MINI6", "MAGIKA")
MOST = 1 << 20  # numbers of a weight
NEAR_DB = 3.0


@dataclass(frozen=True)
class Compared:
    """A weight: advice on it, and what rounding it to each candidate really leaves, dB by format."""

    advice: Advice
    measured: dict[str, float]

    def errors(self, text: str) -> list[float]:
        """Predicted less measured, none where the format isn't a candidate."""
        return [c.snr_db - self.measured[text] for c in self.advice.candidates if c.format == text]

    def losses(self) -> Iterator[tuple[int, float, float]]:
        """Size, and dB that the choice lies below the best candidate that runs as fast, and below the best of all."""
        for size, group in SIZES.items():
            found = [c for c in self.advice.candidates if c.format in group]
            if found:
                best = choose(found)
                (tier,) = (tier for tier in TIERS if best.runs in tier)
                rivals = [self.measured[c.format] for c in found if c.runs in tier]
                yield size, max(rivals) - self.measured[best.format], self._all(found) - self.measured[best.format]

    def _all(self, found: list[Candidate]) -> float:
        return max(self.measured[c.format] for c in found)


def compared(name: str, target: str = "cpu-x64-vnni") -> list[Compared]:
    """Advice on all weights of a zoo model, as if each product had its integer kernel, and what is measured."""
    goal = load_target(target)
    model, _ = canonicalize(read_model(str(float_model(name)), opset=goal.opset)[0])
    products = {str(node.name) for node in model.graph if node.op_type in ("Conv", "MatMul", "Gemm")}
    way_of, found = ways(goal, products, goal.opset), []
    for node, value in weights(model):
        _cut(node, value)
        advice = weight_advice(node, value, goal, way_of, bits=8)
        w = query.constant(value)
        assert w is not None
        found.append(Compared(advice, {c.format: measured_db(w, node, c.format) for c in advice.candidates}))
    return found


def _cut(node: ir.Node, value: ir.Value) -> None:
    """Leave the first rows of a large table, which stand for the rest."""
    w = query.constant(value)
    if w is not None and w.size > MOST and node.op_type == "Gather":
        value.const_value = ir.tensor(np.ascontiguousarray(w[: MOST // w.shape[1]]), name=value.name)
        value.shape = ir.Shape(value.const_value.shape)


def measured_db(w: NDArray[np.floating], node: ir.Node, text: str) -> float:
    """Signal over noise of a weight really rounded to a format."""
    quant = parse_quant(text)
    error = fake_quant(w, fit_weight(w, quant, axis_of(node, quant))).astype(np.float64) - w
    return decibel(float(np.square(w, dtype=np.float64).sum()), float(np.square(error).sum()))


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ZOO)))
def main(names: tuple[str, ...]) -> None:
    """Print a line a model and format, and one on the choices."""
    table = Table("model", "format", "weights", "within 3 dB", "mean dB", "worst dB", box=None)
    choices = Table("model", "bits", "worst loss, as fast", "worst loss, of all", box=None)
    found = {name: compared(name) for name in names or NAMES}
    found["all"] = [row for rows in found.values() for row in rows]
    for name, rows in found.items():
        for text in dict.fromkeys(c.format for row in rows for c in row.advice.candidates):
            errors = np.array([error for row in rows for error in row.errors(text)])
            worst = errors[np.abs(errors).argmax()]
            share = float((np.abs(errors) <= NEAR_DB).mean())
            table.add_row(name, text, str(errors.size), f"{share:.1%}", f"{errors.mean():+.2f}", f"{worst:+.2f}")
        for size in SIZES:
            lost = [(fast, every) for row in rows for bits, fast, every in row.losses() if bits == size]
            choices.add_row(name, str(size), *(f"{max(column):.2f}" for column in zip(*lost, strict=True)))
    Console(width=120).print(table, choices)


if __name__ == "__main__":
    main()
