"""Tables as rows of 8 bits: stored where it is free, and left as they are where outputs or the file would tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from edgeq import steps
from edgeq.context import Context
from edgeq.errors import RecipeError
from edgeq.ir import io
from edgeq.recipe import parse
from edgeq.report.recorder import Recorder
from edgeq.run.record import Feed
from edgeq.run.session import open_session, run_session
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import graph, normal
from tests.placed import VNNI, all_integer, oracle_of, samples_of

ROWS, WIDTH = 4000, 64
NET = (
    "(int64[1,256] ids) => (float[1,256,64] y) { e = Gather(table, ids) a = MatMul(e, w) r = Relu(a) y = MatMul(r, o) }"
)


def ids(*shape: int) -> Feed:
    return {"ids": np.random.default_rng(3).integers(0, WIDTH, shape)}


def made(text: str, feed: Feed, **weights: np.ndarray) -> tuple[ir.Model, Context]:
    model, _ = read_model(graph(text, weights), opset=21)
    target = replace(load_target(VNNI), threads=(1,))
    return model, Context(target, oracle_of(VNNI), samples_of([feed] * 2), Recorder())


def net() -> tuple[ir.Model, Context]:
    weights = {"w": normal(WIDTH, 4096) / 8, "o": normal(4096, WIDTH) / 60}
    return made(NET, ids(1, 256), table=normal(ROWS, WIDTH), **weights)


def outlier() -> np.ndarray:
    """8 bits of a row hold its first value and no other, which is what the product behind it reads."""
    return np.where(np.arange(WIDTH) == 0, np.float32(1e4), np.float32(1)) * normal(ROWS, WIDTH)


def test_a_large_table_is_stored_and_nobody_asked() -> None:
    model, context = net()
    prepared = steps.apply(parse("canonicalize; embeddings; quantize", steps.KNOWN), model, context)
    facts = next(record.facts for record in context.recorder.steps if record.name == "embeddings")
    assert (facts["tables"], facts["kept"], prepared.stored) == (1, True, False)
    saved = io.weight_bytes(model) - io.weight_bytes(prepared.model)
    assert saved == ROWS * (3 * WIDTH - 4)  # a number takes a byte, a row has a scale
    assert context.recorder.notices == []
    feed = context.calibration.read(0)
    exact, found = (run_session(open_session(one), feed)["y"] for one in (model, prepared.model))
    assert 40 < 10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()) < 55
    quantizer = prepared.quantizer
    assert quantizer is not None
    quantizer.costs = all_integer(quantizer.atoms)
    plan, _, _ = quantizer.fused()
    assert Counter(plan.left_float.values())["its weights are stored as i8/channel"] >= 1
    assert len(plan.integer) == 2


LEFT: dict[str, Callable[[], tuple[ir.Model, Context]]] = {
    "small": lambda: made(
        "(int64[1,16] ids) => (float[1,16,64] y) { y = Gather(table, ids) }", ids(1, 16), table=normal(900, WIDTH)
    ),
    "no table": lambda: made(
        "(float[4,64] x) => (float[4,64] y) { y = MatMul(x, w) }", {"x": normal(4, 64)}, w=normal(64, 64)
    ),
    "columns": lambda: made(
        "(int64[4] ids) => (float[4000,4] y) { y = Gather<axis=1>(table, ids) }", ids(4), table=normal(ROWS, WIDTH)
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_where_there_is_nothing_to_store_nothing_is_said(name: str) -> None:
    model, context = LEFT[name]()
    assert steps.embeddings(model, context) is model
    assert (context.recorder.notices, context.recorder.steps, context.keep_float) == ([], [], {})


TOLD: dict[str, Callable[[], tuple[ir.Model, Context]]] = {
    "outputs": lambda: made(
        "(int64[1,16] ids) => (float[1,16,63] y) { e = Gather(table, ids) y = MatMul(e, w) }", ids(1, 16),
        table=outlier(), w=np.concatenate([np.zeros((1, 63), np.float32), normal(63, 63)]),
    ),
    "file": lambda: made(
        "(int64[1,16] ids, float[1,16,4000] x) => (float[1,16,64] y) {"
        " e = Gather(table, ids) p = MatMul(x, table) y = Add(e, p) }",
        {**ids(1, 16), "x": normal(1, 16, ROWS)}, table=normal(ROWS, WIDTH),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_what_outputs_or_the_file_can_tell_is_left(name: str) -> None:
    model, context = TOLD[name]()
    assert steps.embeddings(model, context) is model
    (record,) = context.recorder.steps
    facts = record.facts
    assert not facts["kept"]
    assert {
        "outputs": facts["snr_db"] < steps.FREE_DB,
        "file": facts["bytes_after"] > facts["bytes_before"],
    } == {key: key == name for key in TOLD}
    assert (context.recorder.notices, context.keep_float) == ([], {})


def test_what_reads_weights_comes_first() -> None:
    model, context = net()
    with pytest.raises(RecipeError, match=r"step 'smooth' stands behind embeddings\n.*put smooth first"):
        steps.apply(parse("embeddings; smooth", steps.KNOWN), model, context)
