"""Attention, rotary positions, normalizations and integer products in the target's kernels: forms and traps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.analyse.coverage import optimised
from edgeq.errors import ModelError, TargetError
from edgeq.ir.text import to_text
from edgeq.lower.fuse import FUSIONS, fuse, newest_opset
from edgeq.lower.legalize import legalize
from tests.fused import LOWEST, TARGET, fused
from tests.graphs import graph, normal, number, ops


def attention(
    *,
    heads: int = 3,
    groups: int = 1,
    size: int = 5,
    scaled: str = "scores",
    keys: str = "turned",
    mask: str = "rows",
    guard: bool = False,
    rows: bool = True,
) -> tuple[ir.Model, dict[str, NDArray[Any]]]:
    """Attention of [2, 4, heads size] over 6 keys in one of the forms exporters write, and a feed.

    ``scaled``: where the scale stands. ``keys``: how they are turned. ``rows``: whether heads come from rank 3."""
    few = heads // groups
    width, narrow = heads * size, few * size
    kinds = {"none": "", "rows": "float[B,1,S,6] m", "keys": "float[B,1,1,6] m", "heads": f"float[1,{heads},S,6] m",
             "chosen": "bool[B,1,S,6] m", "infinite": "bool[B,1,S,6] m"}  # fmt: skip
    if rows:
        inputs = f"float[B,S,{width}] q, float[B,6,{narrow}] k, float[B,6,{narrow}] v"
        split = (
            "q3 = Reshape(q, sq) q4 = Transpose<perm=[0,2,1,3]>(q3) k3 = Reshape(k, sk) v3 = Reshape(v, sk)"
            " v4 = Transpose<perm=[0,2,1,3]>(v3)"
        )
        split += "" if keys == "straight" else " k4 = Transpose<perm=[0,2,1,3]>(k3)"
    else:
        inputs = f"float[B,{heads},S,{size}] q4, float[B,{few},6,{size}] k4, float[B,{few},6,{size}] v4"
        split = ""
    repeat = "".join(
        f" {x}u = Unsqueeze({x}4, two) {x}w = Expand({x}u, wide) {x}5 = Reshape({x}w, many)" for x in "kv"
    ) if groups > 1 else ""  # fmt: skip
    k, v = ("k5", "v5") if groups > 1 else ("k4", "v4")
    turned = {
        "turned": f"kt = Transpose<perm=[0,1,3,2]>({k})",
        "straight": "kt = Transpose<perm=[0,2,3,1]>(k3)",
        "flat": f"kf = Reshape({k}, flat) kg = Transpose<perm=[0,2,1]>(kf) kt = Reshape(kg, back)",
    }[keys]
    product = {
        "scores": "s0 = MatMul(q4, kt) s1 = Div(s0, root)",
        "queries": "qs = Mul(q4, scale) s1 = MatMul(qs, kt)",
        "both": "qs = Mul(q4, half) ks = Mul(kt, half) s1 = MatMul(qs, ks)",
    }[scaled]
    masked = {"none": "p = Softmax<axis=-1>(s1)", "chosen": "s = Where(m, s1, low) p = Softmax<axis=-1>(s)",
              "infinite": "n = Where(m, zero, inf) s = Add(n, s1) p = Softmax<axis=3>(s)"}  # fmt: skip
    weights_of = masked.get(mask, "s = Add(s1, m) p = Softmax<axis=-1>(s)")
    weighed = f"bad = IsNaN(p) g = Where(bad, zero, p) o = MatMul(g, {v})" if guard else f"o = MatMul(p, {v})"
    end = "t = Transpose<perm=[0,2,1,3]>(o) y = Reshape(t, joined)" if rows else "y = Identity(o)"
    weights = {
        "sq": np.array([0, 0, heads, size]), "sk": np.array([0, 0, few, size]), "joined": np.array([0, 0, width]),
        "two": np.array([2]), "wide": np.array([1, 1, groups, 1, 1]), "many": np.array([0, heads, 6, size]),
        "flat": np.array([-1, 6, size]), "back": np.array([-1, heads, size, 6]), "root": number(size**0.5),
        "scale": number(size**-0.5), "half": number(size**-0.25), "low": number(-1e9), "zero": number(0),
        "inf": number(-np.inf),
    }  # fmt: skip
    shape = "B,S,W" if rows else "B,H,S,D"
    signature = f"({', '.join(filter(None, [inputs, kinds[mask]]))}) => (float[{shape}] y)"
    model = graph(f"{signature} {{ {split} {repeat} {turned} {product} {weights_of} {weighed} {end} }}", weights)
    shapes = [(2, 4, width), (2, 6, narrow), (2, 6, narrow)] if rows else [
        (2, heads, 4, size), (2, few, 6, size), (2, few, 6, size)]  # fmt: skip
    names = ("q", "k", "v") if rows else ("q4", "k4", "v4")
    feed: dict[str, NDArray[Any]] = {name: normal(*shape) for name, shape in zip(names, shapes, strict=True)}
    if mask != "none":
        feed["m"] = _mask(mask, heads)
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    for name in [name for name in model.graph.initializers if name not in used]:
        del model.graph.initializers[name]
    return model, feed


def _mask(kind: str, heads: int) -> NDArray[Any]:
    shape = {"keys": (2, 1, 1, 6), "heads": (1, heads, 4, 6)}.get(kind, (2, 1, 4, 6))
    hidden = np.zeros(shape, bool)
    hidden[..., -2:] = True
    hidden[-1, 0, 0] = True  # a query that may see nothing
    return ~hidden if kind in ("chosen", "infinite") else np.where(hidden, np.float32(LOWEST), normal(*shape))


FORMS = st.fixed_dictionaries({
    "heads": st.sampled_from([1, 3, 4]),
    "size": st.sampled_from([1, 2, 5, 16]),
    "scaled": st.sampled_from(["scores", "queries", "both"]),
    "keys": st.sampled_from(["turned", "straight", "flat"]),
    "mask": st.sampled_from(["none", "rows", "keys", "heads", "chosen"]),
    "guard": st.booleans(),
    "rows": st.booleans(),
})  # fmt: skip


@given(FORMS)
@settings(max_examples=60)
def test_attention_in_every_form_becomes_one_node(form: dict[str, Any]) -> None:
    """Rows whose every key is hidden by the lowest float included: arithmetic gives them the mean of the values."""
    if form["keys"] == "straight" and not form["rows"]:
        form["keys"] = "turned"
    model, feed = attention(**form)
    found = ops(fused(model, feed))
    assert found.count("Attention") == 1 and not {"Softmax", "MatMul", "Transpose"} & set(found), found


@pytest.mark.parametrize("keys", ["turned", "flat"])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 3), (3, 3)])
def test_groups_of_heads_share_keys_without_repeating_them(heads: int, groups: int, rows: bool, keys: str) -> None:
    model, feed = attention(heads=heads, groups=groups, rows=rows, keys=keys)
    result = fused(model, feed)
    assert not {"Softmax", "Expand", "Unsqueeze"} & set(ops(result))
    if rows:
        node = next(node for node in result.graph if node.op_type == "Attention")
        assert [node.attributes[name].value for name in ("q_num_heads", "kv_num_heads")] == [heads, heads // groups]


@pytest.mark.parametrize("guard", [True, False])
def test_rows_of_minus_infinity_fuse_behind_a_guard_alone(guard: bool) -> None:
    """Unguarded they are NaN, which the kernel wouldn't give."""
    model, feed = attention(mask="infinite", guard=guard)
    assert ("Attention" in ops(fused(model, feed))) is guard


@pytest.mark.parametrize("seen", ["s", "p", "s0"])
def test_what_is_read_elsewhere_is_not_fused_away(seen: str) -> None:
    """Scores and weights that are outputs of the graph are still there, and right."""
    model, feed = attention()
    shown = next(value for node in model.graph for value in node.outputs if value.name == seen)
    shown.dtype, shown.shape = ir.DataType.FLOAT, ir.Shape(["B", 3, "S", 6])
    model.graph.outputs.append(shown)
    result = fused(model, feed)
    assert [value.name for value in result.graph.outputs] == ["y", seen]
    assert "Attention" not in ops(result) or seen == "s0"


def test_a_softmax_over_another_axis_or_of_no_product_stays() -> None:
    feed = {"q": normal(2, 3, 4, 4), "k": normal(2, 3, 4, 4)}
    for body in ("t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, t) p = Softmax<axis=2>(s)", "p = Softmax<axis=3>(q)"):
        text = f"(float[2,3,4,4] q, float[2,3,4,4] k) => (float[2,3,4,4] y) {{ {body} y = MatMul(p, k) }}"
        assert "Softmax" in ops(fused(graph(text), feed))


def test_layers_share_one_mask() -> None:
    """It is brought to a row a query once."""
    two = """(float[B,S,6] x, float[B,1,1,S] m) => (float[B,S,6] y) {
        a3 = Reshape(x, s) a4 = Transpose<perm=[0,2,1,3]>(a3) at = Transpose<perm=[0,2,3,1]>(a3)
        as = MatMul(a4, at) am = Add(as, m) ap = Softmax<axis=3>(am) ao = MatMul(ap, a4)
        ar = Transpose<perm=[0,2,1,3]>(ao) b = Reshape(ar, j)
        b3 = Reshape(b, s) b4 = Transpose<perm=[0,2,1,3]>(b3) bt = Transpose<perm=[0,2,3,1]>(b3)
        bs = MatMul(b4, bt) bm = Add(bs, m) bp = Softmax<axis=3>(bm) bo = MatMul(bp, b4)
        br = Transpose<perm=[0,2,1,3]>(bo) y = Reshape(br, j) }"""
    model = graph(two, {"s": np.array([0, 0, 2, 3]), "j": np.array([0, 0, 6])})
    mask = np.where(np.arange(5) < 3, 0, LOWEST).astype(np.float32)[None, None, None].repeat(2, 0)
    assert ops(fused(model, {"x": normal(2, 5, 6), "m": mask})) == [
        "Max", "Shape", "Concat", "Expand", "Attention", "Attention",
    ]  # fmt: skip


GOLDEN = """\
in  q f32[B,S,12]
in  k f32[B,6,12]
in  v f32[B,6,12]
y = Attention(q, k, v) {kv_num_heads=3, q_num_heads=3, scale=0.5}
out y f32[B,S,12]"""


def test_golden() -> None:
    model, feed = attention(mask="none", size=4)
    assert to_text(fused(model, feed)) == GOLDEN


ROTARY = """(float[B,2,S,8] x, float[B,S] positions) => (float[B,2,S,8] y) {{
    u = Unsqueeze(positions, two) a = Mul(u, frequency) c = Concat<axis=-1>(a, {second})
    c0 = Cos(c) s0 = Sin(c) c1 = Unsqueeze(c0, one) s1 = Unsqueeze(s0, one)
    first = Slice(x, zero, four, three, one) last = Slice(x, four, {end}, three, one)
    negative = Neg({negated}) turned = Concat<axis=-1>(negative, {other})
    straight = Mul(x, c1) across = Mul({across}) y = Add(straight, across) }}"""
PLAIN = {"second": "a", "end": "big", "negated": "last", "other": "first", "across": "turned, s1"}
POSITIONS = {"frequency": normal(4), "two": np.array([2]), "one": np.array([1]), "three": np.array([3]),
             "zero": np.array([0]), "four": np.array([4]), "big": np.array([2**31 - 1]),
             "double": number(2)}  # fmt: skip


@pytest.mark.parametrize("changed", [{}, {"across": "s1, turned"}])
def test_rotary_positions_become_one_node(changed: dict[str, str]) -> None:
    model = graph(ROTARY.format(**{**PLAIN, **changed}), POSITIONS)
    result = fused(model, {"x": normal(2, 2, 3, 8), "positions": np.array([[0, 1, 2], [5, 6, 7]], np.float32)})
    assert ops(result).count("RotaryEmbedding") == 1 and "Neg" not in ops(result)


@pytest.mark.parametrize("changed", [{"second": "b"}, {"negated": "first", "other": "last"}, {"across": "turned, c1"}])
def test_other_rotations_stay(changed: dict[str, str]) -> None:
    """Different angles in the halves, the other half negated; sin and cos that are the same are fine."""
    text = ROTARY.format(**{**PLAIN, **changed})
    text = text.replace("c = Concat", "b = Mul(a, double) c = Concat")
    result = fused(graph(text, POSITIONS), {"x": normal(2, 2, 3, 8), "positions": normal(2, 3)})
    assert ("RotaryEmbedding" in ops(result)) is ("across" in changed)


PART = """(float[B,2,S,12] x, float[B,S] positions) => (float[B,2,S,12] y) {{
    u = Unsqueeze(positions, two) a = Mul(u, frequency) c = Concat<axis=-1>(a, a)
    c0 = Cos(c) s0 = Sin(c) c1 = Unsqueeze(c0, one) s1 = Unsqueeze(s0, one) {cut}
    first = Slice(part, zero, four, three, one) last = Slice(part, four, big, three, one) n = Neg(last)
    t = Concat<axis=-1>(n, first) straight = Mul(part, c1) across = Mul(t, s1) turned = Add(straight, across)
    y = Concat<axis=-1>({order}) }}"""
CUTS = {
    "slices": "part = Slice(x, zero, eight, three, one) rest = Slice(x, eight, big, three, one)",
    "split": "part, rest = Split<axis=-1>(x, pieces)",
    "overlap": "part = Slice(x, zero, eight, three, one) rest = Slice(x, four, eight, three, one)",
    "behind": "part = Slice(x, four, big, three, one) rest = Slice(x, zero, four, three, one)",
}


@pytest.mark.parametrize("order", ["turned, rest", "rest, turned"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_part_of_each_head_is_rotated_in_place(cut: str, order: str) -> None:
    """The first numbers alone: what is cut or joined otherwise keeps its Concat."""
    weights = {**POSITIONS, "eight": np.array([8]), "pieces": np.array([8, 4])}
    text = PART.format(cut=CUTS[cut], order=order)
    used = {name: array for name, array in weights.items() if name in text and name != "double"}
    result = fused(graph(text, used), {"x": normal(2, 2, 3, 12), "positions": normal(2, 3)})
    found = [node for node in result.graph if node.op_type == "RotaryEmbedding"]
    whole = cut in ("slices", "split") and order == "turned, rest"
    assert len(found) == 1 and ("rotary_embedding_dim" in found[0].attributes) is whole


def test_one_table_of_positions_serves_a_batch() -> None:
    """The kernel doesn't broadcast: cos and sin of one sequence are repeated, once for both readers."""
    text = """(float[B,S,16] q, float[B,S,16] k, float[1,S] positions) => (float[B,2,S,8] y) {
        u = Unsqueeze(positions, two) a = Mul(u, frequency) c = Concat<axis=-1>(a, a)
        c0 = Cos(c) s0 = Sin(c) c1 = Unsqueeze(c0, one) s1 = Unsqueeze(s0, one)
        q3 = Reshape(q, s) q4 = Transpose<perm=[0,2,1,3]>(q3) k3 = Reshape(k, s) k4 = Transpose<perm=[0,2,1,3]>(k3)
        qa = Slice(q4, zero, four, three, one) qb = Slice(q4, four, big, three, one) qn = Neg(qb)
        qt = Concat<axis=-1>(qn, qa) q5 = Mul(q4, c1) q6 = Mul(qt, s1) q7 = Add(q5, q6)
        ka = Slice(k4, zero, four, three, one) kb = Slice(k4, four, big, three, one) kn = Neg(kb)
        kt = Concat<axis=-1>(kn, ka) k5 = Mul(k4, c1) k6 = Mul(kt, s1) k7 = Add(k5, k6) y = Sub(q7, k7) }"""
    model = graph(text, {**POSITIONS, "s": np.array([0, 0, 2, 8])})
    feed = {"q": normal(3, 5, 16), "k": normal(3, 5, 16), "positions": np.arange(5, dtype=np.float32)[None]}
    found = ops(fused(model, feed))
    assert found.count("RotaryEmbedding") == 2 and found.count("Expand") == 2, found


RMS = [
    "r = Sqrt(e) n = Div(x, r) y = Mul(n, g)",
    "r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(g, n)",
    "r = Sqrt(e) i = Div(one, r) n = Mul(i, x) y = Mul(g, n)",
    "i = Pow(e, power) n = Mul(x, i) y = Mul(n, g)",
    "r = Sqrt(e) n = Div(x, r) y = Identity(n)",
]


@pytest.mark.parametrize("body", RMS)
@pytest.mark.parametrize("square", ["Mul(x, x)", "Pow(x, two)"])
def test_rms_norm_becomes_one_node(body: str, square: str) -> None:
    weights = {"g": normal(8), "one": number(1), "two": number(2), "power": number(-0.5), "eps": number(1e-5),
               "last": np.array([-1])}  # fmt: skip
    text = f"(float[B,S,8] x) => (float[B,S,8] y) {{ q = {square} m = ReduceMean(q, last) e = Add(m, eps) {body} }}"
    assert "RMSNormalization" in ops(fused(graph(text, weights), {"x": normal(2, 3, 8)}))
    another = text.replace("ReduceMean(q, last)", "ReduceMean(q, middle)")
    middle = {**weights, "middle": np.array([1])}
    assert "RMSNormalization" not in ops(fused(graph(another, middle), {"x": normal(2, 3, 8)}))


def test_a_sum_stays_apart_from_the_layer_norm_behind_it() -> None:
    """The runtime's SkipLayerNormalization is slower: none may be in what it runs."""
    body = "a = Add(x, z) y = LayerNormalization<axis=-1>(a, g, b)"
    model = graph(
        f"(float[B,S,8] x, float[B,S,8] z) => (float[B,S,8] y) {{ {body} }}", {"g": normal(8), "b": normal(8)}
    )
    result = fused(model, {"x": normal(2, 3, 8), "z": normal(2, 3, 8)})
    assert ops(result) == ["Sum", "LayerNormalization"]
    assert result.opset_imports[""] == 21, "nothing here needs a newer opset"
    assert "SkipLayerNormalization" in ops(optimised(model, TARGET))
    assert "SkipLayerNormalization" not in ops(optimised(result, TARGET))


PRODUCT = """(float[B,4,8] x) => (float[B,4,6] y) {{
    q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz) w = DequantizeLinear<axis=1>(codes, {scale}, {zero})
    m = MatMul(d, w) a = Add(m, bias) {end} }}"""
CODES = {"xs": number(0.03), "xz": np.array(120, np.uint8), "codes": (normal(8, 6) * 40).astype(np.int8),
         "ws": np.abs(normal(6)) / 50, "wz": np.zeros(6, np.int8), "s": number(0.02), "z": np.array(0, np.int8),
         "bias": normal(6)}  # fmt: skip


@pytest.mark.parametrize(("scale", "zero"), [("ws", "wz"), ("s", "z")])
def test_the_bias_goes_into_the_product(scale: str, zero: str) -> None:
    model = graph(PRODUCT.format(scale=scale, zero=zero, end="y = Relu(a)"), CODES)
    next(node for node in model.graph if node.op_type == "MatMul").name = "product"
    result = fused(model, {"x": normal(2, 4, 8)})
    assert ops(result) == ["QuantizeLinear", "MatMulIntegerToFloat", "Relu"]
    assert [node.name for node in result.graph if node.domain] == ["product"], "reports know it by this name"


def test_a_product_that_is_quantized_again_is_left_to_the_runtime() -> None:
    end = "b = QuantizeLinear(a, xs, xz) y = DequantizeLinear(b, xs, xz)"
    model = graph(PRODUCT.format(scale="ws", zero="wz", end=end), CODES)
    assert "MatMul" in ops(fused(model, {"x": normal(2, 4, 8)}))


def test_a_target_that_asks_for_nothing_gets_the_model_itself() -> None:
    model, _ = attention()
    assert fuse(model, replace(TARGET, fuse=()))[0] is model
    only = fuse(model, replace(TARGET, fuse=("Sum",)))[0]
    assert only is model and newest_opset(replace(TARGET, fuse=())) == TARGET.opset


def test_every_row_is_asked_for_by_a_target_and_the_other_way_round() -> None:
    assert {op for _, op, _ in FUSIONS} == set(TARGET.fuse)


def test_a_misspelt_fusion_is_named() -> None:
    model, _ = attention()
    with pytest.raises(TargetError, match="nothing is fused into 'Atention'") as caught:
        fuse(model, replace(TARGET, fuse=("Atention",)))
    assert "'Attention'" in str(caught.value.hint)


def test_an_opset_beyond_what_is_fused_is_refused() -> None:
    model, _ = attention()
    assert legalize(fuse(model, TARGET)[0], TARGET).opset_imports[""] == 23
    with pytest.raises(ModelError, match="uses opset 24, target 'cpu-x64-vnni' takes at most 23"):
        legalize(graph("(float[1] x) => (float[1] y) { y = Relu(x) }", opset=24), TARGET)
