"""One attention with rotary positions and a cache, in five forms, interleaved on one thread.

``python -m tests.bench.caches [--heads 8 --few 2 --size 64]`` prints microseconds of the thread's own time, medians,
for a prompt, one token behind caches of several lengths, and a few behind one: written out as exporters do, with the
cache outside of ``Attention``, inside, and as ``com.microsoft.GroupQueryAttention`` without and with one buffer for
past and present. All forms are compared with the first before they are timed.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
CASES = {"prompt 128": (128, 0, 10), "1 behind 128": (1, 128, 100), "1 behind 512": (1, 512, 50),
         "1 behind 2048": (1, 2048, 20), "16 behind 512": (16, 512, 20)}  # fmt: skip
"""New tokens, past ones, runs a turn."""
BUFFER, TURNS = 4096, 25

SPLIT = """{x}s = Reshape({y}, s{x}) {x}4 = Transpose<perm=[0,2,1,3]>({x}s)"""
TURN = """{x}a = Slice({x}4, zero, half, three) {x}b = Slice({x}4, half, all, three) {x}n = Neg({x}b)
    {x}h = Concat<axis=-1>({x}n, {x}a) {x}c = Mul({x}4, c4) {x}d = Mul({x}h, s4) {x}5 = Add({x}c, {x}d)"""
REPEAT = "{x}u = Unsqueeze({x}p, two) {x}w = Expand({x}u, wide) {x}r = Reshape({x}w, many)"
ROTARY = "qr = RotaryEmbedding<num_heads={heads}>(q, cos, sin) kr = RotaryEmbedding<num_heads={few}>(k, cos, sin)"
JOINED = "t = Transpose<perm=[0,2,1,3]>(o) y = Reshape(t, joined)"
FORMS = {
    "written out": " ".join([
        *(SPLIT.format(x=x, y=x) for x in "qkv"), "cc = Concat<axis=-1>(cos, cos) c4 = Unsqueeze(cc, one)",
        "ss = Concat<axis=-1>(sin, sin) s4 = Unsqueeze(ss, one)", *(TURN.format(x=x) for x in "qk"),
        "kp = Concat<axis=2>(pk, k5) vp = Concat<axis=2>(pv, v4)", *(REPEAT.format(x=x) for x in "kv"),
        "kt = Transpose<perm=[0,1,3,2]>(kr) p0 = MatMul(q5, kt) p1 = Mul(p0, scale) p2 = Add(p1, m)",
        "p = Softmax<axis=-1>(p2) o = MatMul(p, vr)", JOINED]),
    "cache outside": " ".join([
        ROTARY, SPLIT.format(x="q", y="qr"), SPLIT.format(x="k", y="kr"), SPLIT.format(x="v", y="v"),
        "kp = Concat<axis=2>(pk, k4) vp = Concat<axis=2>(pv, v4) o = Attention(q4, kp, vp, m)", JOINED]),
    "cache inside": ROTARY
    + " y, kp, vp = Attention<q_num_heads={heads}, kv_num_heads={few}>(qr, kr, v, m, pk, pv)",
    "GroupQueryAttention": """y, kp, vp = com.microsoft.GroupQueryAttention<num_heads={heads}, kv_num_heads={few},
        do_rotary=1>(q, k, v, pk, pv, last, total, cosines, sines)""",
}  # fmt: skip
SHARED = "GroupQueryAttention, one buffer"


def session(body: str, heads: int, few: int, size: int) -> ort.InferenceSession:
    """One form on one thread; constants that it doesn't read are left out."""
    wide, narrow, half = heads * size, few * size, size // 2
    body = body.format(heads=heads, few=few)
    kinds = {"q": f"float[B,S,{wide}]", "k": f"float[B,S,{narrow}]", "v": f"float[B,S,{narrow}]", "m": "float[B,1,S,T]",
             "pk": f"float[B,{few},P,{size}]", "pv": f"float[B,{few},P,{size}]", "cos": f"float[B,S,{half}]",
             "sin": f"float[B,S,{half}]", "last": "int32[B]", "total": "int32"}  # fmt: skip
    angles = _angles(size)
    constants: Arrays = {
        "sq": np.array([0, 0, heads, size]), "sk": np.array([0, 0, few, size]), "sv": np.array([0, 0, few, size]),
        "joined": np.array([0, 0, wide]), "many": np.array([0, heads, -1, size]), "zero": np.array([0]),
        "one": np.array([1]), "two": np.array([2]), "three": np.array([3]), "half": np.array([half]),
        "all": np.array([size]), "wide": np.array([1, 1, heads // few, 1, 1]), "scale": np.float32(size**-0.5),
        "cosines": np.cos(angles), "sines": np.sin(angles),
    }  # fmt: skip
    named = {name.strip(" )") for part in body.split("(")[1:] for name in part.split(")")[0].split(",")}
    inputs = ", ".join(f"{kind} {name}" for name, kind in kinds.items() if name in named)
    outputs = f"float[B,S,{wide}] y, float[B,{few},T,{size}] kp, float[B,{few},T,{size}] vp"
    header = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {body} }}")
    for name in named & set(constants):
        model.graph.initializer.append(onnx.numpy_helper.from_array(constants[name], name))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _angles(size: int) -> NDArray[np.float32]:
    """Of each position and pair: f32[BUFFER, size / 2]."""
    return np.outer(np.arange(BUFFER), 10000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)


def feed(tokens: int, past: int, heads: int, few: int, size: int) -> Arrays:
    """One sequence, causal behind its past."""
    rng, angles = np.random.default_rng(0), _angles(size)[None, past : past + tokens]
    widths = {"q": heads * size, "k": few * size, "v": few * size}
    arrays: Arrays = {x: rng.standard_normal((1, tokens, width), np.float32) for x, width in widths.items()}
    arrays |= {x: rng.standard_normal((1, few, past, size), np.float32) for x in ("pk", "pv")}
    seen = np.arange(past + tokens)[None] <= np.arange(tokens)[:, None] + past
    arrays |= {"m": np.where(seen, 0, np.float32(-3e38))[None, None], "cos": np.cos(angles), "sin": np.sin(angles)}
    total = past + tokens
    return arrays | {"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}


def bound(
    made: ort.InferenceSession, arrays: Arrays, *, shared: bool = False
) -> tuple[ort.IOBinding, list[ort.OrtValue]]:
    """Inputs and outputs in place; ``shared``: past and present in one buffer. The values must outlive the binding."""
    binding, kept = made.io_binding(), []
    for value in made.get_inputs():
        array = np.ascontiguousarray(arrays[value.name])
        if shared and value.name in ("pk", "pv"):
            room = np.zeros((1, array.shape[1], BUFFER, array.shape[3]), np.float32)
            room[:, :, : array.shape[2]] = array
            array = room
        kept.append(ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_input(value.name, kept[-1])
        if shared and value.name in ("pk", "pv"):
            binding.bind_ortvalue_output({"pk": "kp", "pv": "vp"}[value.name], kept[-1])
    for name in ("y",) if shared else ("y", "kp", "vp"):
        binding.bind_output(name)
    return binding, kept


def measure(sessions: dict[str, ort.InferenceSession], arrays: Arrays, runs: int) -> dict[str, float]:
    """Median microseconds a run of each form, in turns, once their outputs agree."""
    expected = None
    for name, made in sessions.items():
        found = made.run(["y"], {value.name: arrays[value.name] for value in made.get_inputs()})[0]
        expected = found if expected is None else expected
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    made = {name: (one, *bound(one, arrays)) for name, one in sessions.items()}
    made[SHARED] = (sessions["GroupQueryAttention"], *bound(sessions["GroupQueryAttention"], arrays, shared=True))
    laps: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(TURNS):
        for name, (one, binding, _) in made.items():
            start = time.thread_time()
            for _ in range(runs):
                one.run_with_iobinding(binding)
            laps[name].append((time.thread_time() - start) / runs * 1e6)
    return {name: statistics.median(times) for name, times in laps.items()}


@click.command()
@click.option("--heads", default=8, show_default=True, help="Of queries.")
@click.option("--few", default=2, show_default=True, help="Of keys and values.")
@click.option("--size", default=64, show_default=True, help="Numbers a head.")
def main(heads: int, few: int, size: int) -> None:
    """Attention with a cache in the kernels the CPU provider has."""
    sessions = {name: session(body, heads, few, size) for name, body in FORMS.items()}
    for case, (tokens, past, runs) in CASES.items():
        found = measure(sessions, feed(tokens, past, heads, few, size), runs)
        click.echo(f"{case:14}" + "  ".join(f"{name} {time_us:.0f}" for name, time_us in found.items()))


if __name__ == "__main__":
    main()
