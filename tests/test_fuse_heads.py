"""Attention with a cache, shared heads and rows, whoever wrote the op; masks with rows that see nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgeq.ir.text import to_text
from tests.fused import LOWEST, fused, node_of
from tests.graphs import graph, normal, number, ops

HEADS, FEW, SIZE = 4, 2, 6
WIDTH, NARROW = HEADS * SIZE, FEW * SIZE
WEIGHTS: dict[str, NDArray[Any]] = {
    "sq": np.array([0, 0, HEADS, SIZE]), "sk": np.array([0, 0, FEW, SIZE]), "joined": np.array([0, 0, WIDTH]),
    "one": np.array([1]), "two": np.array([2]), "three": np.array([3]), "scale": number(SIZE**-0.5),
    "wide": np.array([1, 1, 2, 1, 1]), "inner": np.array([1, 1, 1, 2, 1]), "outer": np.array([1, 2, 1, 1, 1]),
    "many": np.array([0, HEADS, -1, SIZE]), "rows": np.array([0, 0, HEADS, SIZE]), "flat": np.array([-1, WIDTH]),
    "zero": number(0), "inf": number(-np.inf), "low": number(LOWEST),
}  # fmt: skip
REPEATS = {
    "Expand": "{x}u = Unsqueeze(c{x}, two) {x}w = Expand({x}u, wide) {x}r = Reshape({x}w, many)",
    "Tile": "{x}u = Unsqueeze(c{x}, two) {x}w = Tile({x}u, wide) {x}r = Reshape({x}w, many)",
}
SPLIT = """q3 = Reshape(q, sq) q4 = Transpose<perm=[0,2,1,3]>(q3) k3 = Reshape(k, sk) k4 = Transpose<perm=[0,2,1,3]>(k3)
    v3 = Reshape(v, sk) v4 = Transpose<perm=[0,2,1,3]>(v3)"""
JOINED = "t = Transpose<perm=[0,2,1,3]>(o) y = Reshape(t, joined)"
PLAIN = "kt = Transpose<perm=[0,1,3,2]>(kr) s0 = MatMul(q4, kt) s = Mul(s0, scale)"
SOFTMAX = f"{PLAIN} sm = Add(s, m) p = Softmax<axis=-1>(sm) o = MatMul(p, vr)"
ROWS = f"float[B,S,{WIDTH}] q, float[B,S,{NARROW}] k, float[B,S,{NARROW}] v"
CACHE = f"float[B,{FEW},P,{SIZE}] pk, float[B,{FEW},P,{SIZE}] pv"
PRESENT = f"float[B,{FEW},T,{SIZE}] ck, float[B,{FEW},T,{SIZE}] cv"


def built(
    body: str, inputs: str = f"{ROWS}, {CACHE}, float[B,1,S,T] m", outputs: str = PRESENT, opset: int = 21
) -> ir.Model:
    """``body`` gives y [B, S, heads D] and what ``outputs`` says; unused constants are left out."""
    y = f"float[B,S,{WIDTH}] y"
    used = {name: array for name, array in WEIGHTS.items() if any(name in part for part in _arguments(body))}
    return graph(f"({inputs}) => ({', '.join(filter(None, [y, outputs]))}) {{ {body} }}", used, opset)


def _arguments(body: str) -> list[list[str]]:
    return [[name.strip() for name in part.split(")")[0].split(",")] for part in body.split("(")[1:]]


def feed(batch: int = 2, tokens: int = 3, past: int = 4, *, hidden: float = LOWEST) -> dict[str, NDArray[Any]]:
    """Causal behind the past; the last sequence has padding on the left, so that rows see nothing without a past."""
    total = tokens + past
    mask = np.arange(total)[None, :] <= np.arange(tokens)[:, None] + past
    seen = np.repeat(mask[None, None], batch, 0)
    seen[-1, ..., :1] = False
    arrays: dict[str, NDArray[Any]] = {name: normal(batch, tokens, width) for name, width in
                                       (("q", WIDTH), ("k", NARROW), ("v", NARROW))}  # fmt: skip
    arrays |= {name: normal(batch, FEW, past, SIZE) for name in ("pk", "pv")}
    return arrays | {"m": np.where(seen, 0, hidden).astype(np.float32)}


def without(arrays: dict[str, NDArray[Any]], *names: str) -> dict[str, NDArray[Any]]:
    return {name: array for name, array in arrays.items() if name not in names}


FEEDS = [(2, 3, 4), (1, 5, 0), (2, 3, 0), (1, 1, 9), (3, 1, 2)]


@pytest.mark.parametrize("axis", [2, -2])
@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("core", ["written out", "op"])
def test_a_cache_and_shared_heads_go_into_one_node(core: str, repeat: str, axis: int) -> None:
    """The cache empty or not, one sequence or a padded batch."""
    joins = [f"c{x} = Concat<axis={axis}>(p{x}, {x}4) {REPEATS[repeat].format(x=x)}" for x in "kv"]
    op = core == "op"
    body = "o = Attention<scale=0.40824829>(q4, kr, vr, m)" if op else SOFTMAX
    model = built(" ".join([SPLIT, *joins, body, JOINED]), opset=23 if op else 21)
    result = fused(model, *(feed(*sizes, hidden=-1e9 if op else LOWEST) for sizes in FEEDS))
    assert set(ops(result)) <= {"Attention", "Max"}
    node = node_of(result, "Attention")
    assert [value.name for value in node.outputs] == ["y", "ck", "cv"]
    assert (len(node.inputs), node.attributes["kv_num_heads"].value) == (6, FEW)


def test_golden() -> None:
    core = "o = Attention<scale=0.5>(q4, ck, cv)"
    result = fused(built(f"{SPLIT} {JOINS} {core} {JOINED}", f"{ROWS}, {CACHE}", opset=23))
    assert to_text(result).splitlines()[5] == (
        "y, ck, cv = Attention(q, k, v, -, pk, pv) {kv_num_heads=2, q_num_heads=4, scale=0.5}"
    )


JOINS = "ck = Concat<axis=2>(pk, k4) cv = Concat<axis=2>(pv, v4)"
KEPT = {
    "the present is read by more than outputs": (f"{JOINS} more = Neg(ck)", f"{PRESENT}, float[B,{FEW},T,{SIZE}] more"),
    "heads are joined, not tokens": (JOINS.replace("2>", "1>"), PRESENT.replace(f"B,{FEW},", f"B,{HEADS},")),
    "the past, which may be empty, comes behind": ("ck = Concat<axis=2>(k4, pk) cv = Concat<axis=2>(v4, pv)", PRESENT),
}


@pytest.mark.parametrize("why", KEPT)
def test_what_is_no_cache_stays(why: str) -> None:
    joins, outputs = KEPT[why]
    model = built(f"{SPLIT} {joins} o = Attention(q4, ck, cv) {JOINED}", f"{ROWS}, {CACHE}", outputs, 23)
    sizes = [(2, 3, 3), (2, 3, 0)] if "behind" in why else [(2, 3, 3)]
    result = fused(model, *(without(feed(*size), "m") for size in sizes))
    assert ops(result).count("Concat") == 2


def test_a_causal_mask_that_counts_from_the_first_key_keeps_its_concat() -> None:
    """With a cache it would count from the first new one."""
    model = built(f"{SPLIT} {JOINS} o = Attention<is_causal=1>(q4, ck, cv) {JOINED}", f"{ROWS}, {CACHE}", opset=23)
    result = fused(model, without(feed(), "m"))
    assert ops(result).count("Concat") == 2


def test_pasts_of_known_and_different_lengths_stay() -> None:
    shapes = {"q": (1, 2, WIDTH), "k": (1, 2, NARROW), "v": (1, 4, NARROW), "pk": (1, FEW, 3, SIZE),
              "pv": (1, FEW, 1, SIZE)}  # fmt: skip
    inputs = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = built(f"{SPLIT} {JOINS} o = Attention(q4, ck, cv) {JOINED}", inputs, opset=23)
    assert ops(fused(model, {name: normal(*shape) for name, shape in shapes.items()})).count("Concat") == 2


def test_heads_repeated_before_they_are_turned() -> None:
    """Meta's Llama: [B, S, heads, 1, D] is repeated."""
    body = "q3 = Reshape(q, sq) q4 = Transpose<perm=[0,2,1,3]>(q3)"
    for x in "kv":
        body += f" {x}3 = Reshape({x}, sk) {x}u = Unsqueeze({x}3, three) {x}w = Expand({x}u, inner)"
        body += f" {x}n = Reshape({x}w, rows) {x}r = Transpose<perm=[0,2,1,3]>({x}n)"
    model = built(f"{body} {SOFTMAX} {JOINED}", f"{ROWS}, float[B,1,S,S] m", "")
    feeds = [without(feed(batch, tokens, 0), "pk", "pv") for batch, tokens in ((2, 3), (1, 4))]
    assert set(ops(fused(model, *feeds))) == {"Max", "Attention"}


@pytest.mark.parametrize("repeat", [
    "u{x} = Unsqueeze({x}4, one) w{x} = Expand(u{x}, outer) {x}r = Reshape(w{x}, many)",  # h0 h1 h0 h1
    "u{x} = Unsqueeze({x}4, two) w{x} = Tile(u{x}, outer) {x}r = Reshape(w{x}, many)",
])  # fmt: skip
def test_heads_in_another_order_are_not_shared(repeat: str) -> None:
    body = f"{SPLIT} {' '.join(repeat.format(x=x) for x in 'kv')} {SOFTMAX} {JOINED}"
    model = built(body, f"{ROWS}, float[B,1,S,S] m", "")
    found = fused(model, without(feed(2, 3, 0), "pk", "pv"))
    assert {"Expand", "Tile"} & set(ops(found))


def test_heads_are_counted_by_the_width_of_rows() -> None:
    """Where nobody knows that the axis of one input is as long as that of another: positions added by dynamo."""
    body = "z = Shape(ids) sq = Concat<axis=0>(z, rest) " + SPLIT.replace("sk", "sq").replace("k4", "kr").replace(
        "v4", "vr"
    )
    text = f"{body} {SOFTMAX} {JOINED}"
    inputs = ", ".join(f"float[B,S,{WIDTH}] {x}" for x in "qkv")
    weights = {"rest": np.array([-1, SIZE]), **{name: WEIGHTS[name] for name in ("scale", "joined")}}
    model = graph(f"({inputs}, int64[B,T] ids, float[B,1,S,T] m) => (float[B,S,{WIDTH}] y) {{ {text} }}", weights)
    arrays = {name: normal(2, 3, WIDTH) for name in "qkv"} | {
        "ids": np.zeros((2, 3), np.int64),
        "m": normal(2, 1, 3, 3),
    }
    result = fused(model, arrays)
    assert ops(result) == ["Max", "Attention"] and node_of(result, "Attention").attributes["q_num_heads"].value == HEADS


def test_normalized_heads_and_a_gemm_behind_take_rows_too() -> None:
    """Qwen3 norms each head before it turns them; GPT-2 multiplies [B S, heads D]."""
    body = SPLIT.replace("Transpose<perm=[0,2,1,3]>(q3)", "Transpose<perm=[0,2,1,3]>(qn)")
    norm = "qn = RMSNormalization<axis=-1>(q3, gamma)"
    body = body.replace("q4 =", f"{norm} q4 =", 1)
    end = "t = Transpose<perm=[0,2,1,3]>(o) f = Reshape(t, flat) y = Gemm(f, weight)"
    text = f"{body} {JOINS} o = Attention(q4, ck, cv) {end}"
    weights = {name: WEIGHTS[name] for name in ("sq", "sk", "flat")} | {
        "gamma": normal(SIZE),
        "weight": normal(WIDTH, 5),
    }
    model = graph(f"({ROWS}, {CACHE}) => (float[R,5] y, {PRESENT}) {{ {text} }}", weights, 23)
    result = fused(model, *(without(feed(*sizes), "m") for sizes in FEEDS))
    assert ops(result) == ["Reshape", "RMSNormalization", "Reshape", "Attention", "Reshape", "Gemm"]


def masked(scores: str, inputs: str, guard: bool) -> ir.Model:
    """Attention with ``scores``, which makes sm of s; ``guard``: rows of NaN become zeros."""
    weights = (
        "p0 = Softmax<axis=-1>(sm) bad = IsNaN(p0) p = Where(bad, zero, p0)" if guard else "p = Softmax<axis=-1>(sm)"
    )
    split = SPLIT.replace("k4", "kr").replace("v4", "vr").replace("sk", "sq")
    rows = ", ".join(f"float[B,S,{WIDTH}] {x}" for x in "qkv")
    return built(f"{split} {PLAIN} {scores} {weights} o = MatMul(p, vr) {JOINED}", f"{rows}, {inputs}", "")


def seen_by(*rows: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """Three tokens of two sequences, and which keys each query sees."""
    seen = np.array(rows, bool)[None, None].repeat(2, 0)
    return {name: normal(2, 3, WIDTH) for name in "qkv"} | {"b": seen}


NOTHING = ((0, 0, 0), (1, 0, 0), (1, 1, 0))


def test_a_row_of_minus_infinity_is_told_from_one_of_the_lowest_float() -> None:
    """A guard makes zeros of the one, arithmetic the mean of the other, and who feeds the mask may mix them."""
    model, arrays = masked("sm = Add(s, m)", "float[B,1,S,S] m", guard=True), seen_by(*NOTHING)
    seen = arrays.pop("b")
    masks = [np.where(seen, 0, fill).astype(np.float32) for fill in (-np.inf, LOWEST, -1e9)]
    masks[0][0, 0, 0] = LOWEST
    assert "Softmax" not in ops(fused(model, *(arrays | {"m": mask} for mask in masks)))


def test_floats_whose_shape_alone_a_mask_needs_are_no_fills() -> None:
    """TorchScript computes a mask from the shape of a float input: its own -inf stay -inf."""
    scores = """z = Shape(q) n = Gather<axis=0>(z, two) w = Mul(n, nil) j = Cast<to=9>(w) e = Or(b, j)
        m = Where(e, zero, inf) sm = Add(s, m)"""
    model = masked(scores, "bool[B,1,S,S] b, int64[1] nil", guard=True)
    found = ops(fused(model, seen_by(*NOTHING) | {"nil": np.array([0])}))
    assert "Softmax" not in found and "Max" not in found


@pytest.mark.parametrize(("fill", "guard"), [("low", False), ("inf", True), ("low", True), ("inf", False)])
def test_scores_that_where_hides_completely(fill: str, guard: bool) -> None:
    """The lowest float gives the mean of the values, -inf behind a guard zeros, without one NaN."""
    model = masked(f"sm = Where(b, s, {fill})", "bool[B,1,S,S] b", guard)
    assert ("Softmax" in ops(fused(model, seen_by(*NOTHING)))) is (fill == "inf" and not guard)
