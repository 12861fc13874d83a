"""Footprints: formulas against what is really stored, allocators against their laws, peaks against measured ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgeq
from edgeq.analyse import footprint as bytes_of
from edgeq.analyse.arena import ALIGNMENT, Arena, Buffer, CHeap, Space, live_bytes, pattern_bytes, play_run
from edgeq.analyse.footprint import FORMATS, Decoder, Weight, kv_cache, llama_parameters, parameters, table
from edgeq.analyse.lifetimes import buffers
from edgeq.analyse.peak import predict
from edgeq.cli import main
from edgeq.errors import EdgeqError, ModelError, SampleError, UsageError
from edgeq.ir import io
from edgeq.num.quant import parse_quant
from edgeq.report.codec import from_json, to_json
from edgeq.run.executed import executed
from tests.bench.footprint import compared, feed_of
from tests.graphs import graph, normal
from tests.zoo import ZOO
from tests.zoo.packages import float_model

GB = 10**9


def _row(rows: list[bytes_of.Row], name: str) -> bytes_of.Row:
    return next(row for row in rows if row.name == name)


def _net() -> ir.Model:
    text = """(float[N, 8, 16, 16] x) => (float[N, 4, 16, 16] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        b = Relu (a)
        c = Add (b, a)
        y = Conv (c, w2)
    }"""
    return graph(text, {"w1": normal(32, 8, 3, 3), "w2": normal(4, 32, 1, 1)})


@pytest.fixture
def net(tmp_path: Path) -> Path:
    io.write(_net(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_ten_billion_parameters() -> None:
    """The figures everybody knows, then those with scales: i8 has an f32 scale a channel of 4096, u4 an f16 scale and a
    4-bit zero point a block, NVFP4 an 8-bit scale for 16."""
    rows = table(parameters(10 * GB))
    expected = {
        "FP32": 40.0, "FP16": 20.0, "BF16": 20.0, "INT8": 10 * (1 + 4 / 4096), "FP8": 10 * (1 + 4 / 4096),
        "FP6": 10 * (6 / 8 + 4 / 4096), "INT4, block 32": 10 * (4 + 20 / 32) / 8,
        "INT4, block 128": 10 * (4 + 20 / 128) / 8, "INT2, block 32": 10 * (2 + 18 / 32) / 8,
        "MXFP4": 10 * 4.25 / 8, "MXFP6": 10 * 6.25 / 8, "NVFP4": 10 * 4.5 / 8,
    }  # fmt: skip
    for name, gigabytes in expected.items():
        assert _row(rows, name).bytes == pytest.approx(gigabytes * GB, rel=1e-6), name
    assert len(rows) == len(FORMATS)


@pytest.mark.parametrize("text", FORMATS.values())
@pytest.mark.parametrize("shape", [(8, 96), (5, 33)])
def test_bytes_are_those_a_file_stores(text: str, shape: tuple[int, int]) -> None:
    quant = parse_quant(text)
    once = 4 if text == "nvfp4" else 0  # the tensor's own f32 scale, which the codes don't hold
    found = len(bytes_of.stored_bytes(normal(*shape), quant)) + once
    padding = 8 * shape[0]  # codes and zero points are packed row by row there, in a stream in the formula
    assert found - padding <= bytes_of.weight_bytes(Weight(*shape), quant) <= found


def test_an_eighth_of_a_bit_is_not_lost() -> None:
    assert bytes_of.weight_bytes(Weight(1, 3), parse_quant("i2/channel")) == 5  # 6 bits and an f32 scale
    assert parameters(4096 * 3 + 5) == [Weight(3, 4096), Weight(1, 5)]


@pytest.mark.parametrize(
    ("text", "expected"), [("10B", 10 * GB), ("7.5m", 7_500_000), ("1e9", GB), ("350 M", 350_000_000), ("12", 12)]
)
def test_counts_are_read(text: str, expected: int) -> None:
    assert bytes_of.parse_count(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("4GB", 4 * GB), ("2GiB", 2 << 30), ("512mb", 512 * 10**6), ("99", 99)])
def test_amounts_of_memory_are_read(text: str, expected: int) -> None:
    assert bytes_of.parse_bytes(text) == expected


def test_kv_cache() -> None:
    """Llama 2 7B keeps half a MiB a position in f16."""
    (row,) = kv_cache(Decoder(32, 32, 128), [4096])
    assert row["f16"] == 4096 * 524288
    assert row["i8"] == 4096 * 2 * 32 * 32 * (128 + 2)
    assert row["i4"] == 4096 * 2 * 32 * 32 * (64 + 4)
    assert kv_cache(Decoder(32, 32, 128), [4096], batch=3)[0]["f16"] == 3 * row["f16"]


CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {  # as published, with the number of parameters of the checkpoint
    "llama-2-7b": (6_738_415_616, {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}),
    "mistral-7b": (7_241_732_096, {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000}),
    "mixtral-8x7b": (46_702_792_704, {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000,
        "num_local_experts": 8}),
    "smollm2-135m": (134_515_008, {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "tie_word_embeddings": True}),
    "qwen2-0.5b": (494_032_768, {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
        "tie_word_embeddings": True}),
    "qwen3-0.6b": (596_049_920, {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_from_a_config(name: str, tmp_path: Path) -> None:
    count, config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bytes_of.from_config(tmp_path)[::2] == (count, "config")
    report = edgeq.footprint(tmp_path, context=[1000])
    assert report.source["parameters"] == count
    assert report.footprint["kv_cache"][0]["context"] == 1000


def test_weights_beside_a_config_are_counted(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"shape": [3, 5]}, "b": {"shape": [7]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-2-7b"][1] | {"model_type": "other"}))
    assert bytes_of.from_config(tmp_path / "config.json") == (22, Decoder(32, 32, 128), "safetensors")


def test_other_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"of a 'bert' model, expected a Llama-like one \(llama, mistral"):
        llama_parameters({**CONFIGS["llama-2-7b"][1], "model_type": "bert"}, Decoder(1, 1, 1))
    (tmp_path / "config.json").write_text('{"sizes": 3}')
    with pytest.raises(ModelError, match="has no 'hidden_size', found sizes"):
        edgeq.footprint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"can't read .* as a config"):
        edgeq.footprint(tmp_path)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"params": "10Q"}, UsageError, "can't read '10Q' as a number of parameters\n  try: write 10B, 350M"),
        ({"params": "0"}, UsageError, "can't read '0'"),
        ({"params": "1B", "memory": "4 apples"}, UsageError, "'4 apples' as an amount of memory\n  try: write 4GB"),
        ({"params": "1B", "weights": "INT5"}, UsageError, "unknown format 'INT5'\n  try: did you mean 'int"),
        ({"params": "1B", "layers": 4}, UsageError, "needs --kv-heads, --head-dim too"),
        ({}, UsageError, "expected either a model or a number"),
        ({"model": "a.onnx", "params": "1B"}, UsageError, "expected either a model or a number"),
        ({"model": "a.onnx", "weights": "FP16"}, UsageError, "--weights FP16 goes with --params or a config"),
        ({"model": "nowhere.onnx"}, ModelError, "no model file 'nowhere.onnx'"),
    ],
)
def test_errors_say_what_to_do(options: dict[str, Any], kind: type[EdgeqError], message: str) -> None:
    with pytest.raises(kind) as caught:
        edgeq.footprint(**options)
    assert message in str(caught.value)


def test_dynamic_axes_need_a_size(tmp_path: Path) -> None:
    io.write(graph("(float[N, T, 4] x, float[N, T] m) => (float[N, T, 4] y) { y = Relu (x) }"), tmp_path / "t.onnx")
    with pytest.raises(SampleError) as caught:
        edgeq.footprint(tmp_path / "t.onnx")
    assert "input 'x float32[N, T, 4]' has dynamic axes" in str(caught.value)
    assert "--input x=1,?,4 with numbers, or samples with -c" in str(caught.value)
    with pytest.raises(UsageError, match="--input x=1,7 fits no input"):
        edgeq.footprint(tmp_path / "t.onnx", inputs=["x=1,7"])
    report = edgeq.footprint(tmp_path / "t.onnx", inputs=["x=1,7,4"])  # T is 7 for m too
    assert report.footprint["memory"]["activations"] == 1 * 7 * 4 * 4


def test_a_model_fits_or_does_not(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = edgeq.footprint(net)
    peak = report.check("predicted_peak_bytes")
    assert (peak.limit, peak.passed) == (None, True)
    assert report.check("size_bytes").value == net.stat().st_size
    assert 0 < report.check("download_bytes").value < net.stat().st_size
    rows = {row["name"]: row for row in report.footprint["formats"]}
    elements = 32 * 8 * 9 + 4 * 32
    kept = net.stat().st_size - 4 * elements
    assert rows["FP32"]["bytes"] == net.stat().st_size
    assert rows["FP16"]["bytes"] == 2 * elements + kept
    assert rows["INT8"]["bytes"] == elements + 4 * (32 + 4) + kept  # a scale each of 36 output channels
    assert 0 < rows["INT4, block 32"]["compressed"] <= 1.05
    assert from_json(to_json(report)).footprint == report.footprint
    status = main(["footprint", str(net), "--memory", str(int(peak.value) - 1), "--json"])
    shown = from_json(capsys.readouterr().out)  # exactly one object
    assert (status, shown.passed) == (1, False)
    assert main(["footprint", str(net), "--memory", str(int(peak.value))]) == 0
    assert "fits: needs" in capsys.readouterr().out


def test_weights_a_file_holds_as_codes_count_by_their_elements() -> None:
    text = """(float[1, 8] x) => (float[1, 4] y) {
        w = DequantizeLinear <axis = 1> (codes, scale)
        y = MatMul (x, w)
    }"""
    model = graph(text, {"codes": np.ones((8, 4), np.int8), "scale": np.ones(4, np.float32)})
    (weight,) = bytes_of.weights_of(model)
    assert (weight.rows, weight.columns, weight.stored) == (4, 8, 8 * 4 + 4 * 4)
    assert bytes_of.compressed_share([weight], parse_quant("f16")) is None
    assert _row(table([weight], kept_bytes=100), "FP32").bytes == 4 * 8 * 4 + 100


def test_what_does_not_fit_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["footprint", "--params", "10B", "--memory", "8GB"]
    assert main(words) == 0  # in the smallest format
    assert main([*words, "--weights", "FP16"]) == 1
    out = capsys.readouterr().out
    assert "doesn't fit: needs 20 GB (FP16), has 8 GB: 12 GB too much" in out
    assert "FAILED weights_bytes 20 GB, limit ≤ 8 GB" in out
    assert main([*words, "--weights", "mxfp4"]) == 0
    cache = ["--layers", "32", "--kv-heads", "32", "--head-dim", "128", "--context", "2048", "--context", "16384"]
    assert main([*words, *cache]) == 1
    assert "with 8.59 GB of KV cache at 16,384 positions" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("word", "expected"),
    [("INT4", 4.625), ("int2", 2.5625), ("INT4, block 128", 4.15625), ("NVFP4", 4.5), ("i4/block32/f16", 4.5)],
)
def test_formats_go_by_several_names(word: str, expected: float) -> None:
    report = edgeq.footprint(params="8M", weights=word)
    assert report.check("weights_bytes").value == pytest.approx(expected * 1e6, rel=1e-4)


def test_the_targets_memory_is_the_limit(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        'extends = "cpu-x64-avx2"\nsummary = "small"\nverified = "documentation"\nmemory_bytes = 1000000000\n'
    )
    report = edgeq.footprint(params="10B", target=str(tmp_path / "tiny.toml"))
    assert (report.passed, report.check("weights_bytes").limit) == (False, GB)


def test_a_decoders_cache_is_found_by_its_inputs() -> None:
    inputs = ", ".join(f"float[N, 3, P, 64] past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value"))
    model = graph(f"(float[N, 4] x, {inputs}) => (float[N, 4] y) {{ y = Relu (x) }}".replace(".", "_"))
    assert bytes_of.decoder_of(model) == Decoder(2, 3, 64)
    assert bytes_of.decoder_of(_net()) is None


OPERATIONS = st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=60)


@given(OPERATIONS, st.sampled_from([1, 2]))
def test_a_space_never_gives_the_same_byte_twice(operations: list[tuple[bool, int]], whole: int) -> None:
    space, used = Space(whole=whole), []
    for allocates, number in operations:
        if allocates or not used:
            block = space.take(number)
            assert block[1] >= number
            assert all(block[0] >= start + size or start >= block[0] + block[1] for start, size in used)
            used.append(block)
        else:
            space.give(*used.pop(number % len(used)))
        assert sum(size for _, size in used) + sum(space.free.values()) == space.end
    for block in used:
        space.give(*block)
    assert (space.end, space.free) == (0, {})


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_a_pattern_holds_what_is_alive(drawn: list[tuple[int, int, int]]) -> None:
    found = [Buffer(size, min(first, last), max(first, last)) for size, first, last in drawn]
    rounded = [replace(buffer, size=-(-buffer.size // ALIGNMENT) * ALIGNMENT) for buffer in found]
    assert live_bytes(rounded) <= pattern_bytes(found) <= sum(buffer.size for buffer in rounded)
    arena = Arena(CHeap())
    assert play_run(arena, found) == []
    assert (arena.used, arena.peak >= live_bytes(rounded)) == (0, True)
    assert arena.held >= arena.peak


def test_regions_double_and_large_chunks_are_split() -> None:
    """As traced of EfficientNet-Lite0: 1.6 MB twice and 4.8 MB make regions of 2, 2 and 8 MiB, given out whole."""
    arena = Arena(CHeap())
    sizes = [1_605_632, 1_605_632, 4_816_896]
    chunks = [arena.allocate(size) for size in sizes]
    assert [chunk.size for chunk in chunks] == [2 << 20, 2 << 20, 8 << 20]
    for chunk in chunks:
        arena.release(chunk)
    assert arena.allocate(6_823_936).region == 2  # fits a hole: no new region
    assert arena.held < 12.7e6


def test_the_c_heap_maps_what_is_large_and_remembers() -> None:
    heap = CHeap()
    large = heap.malloc(4 << 20)
    assert (large.region, heap.touched) == (-1, 0)
    heap.release(large)
    assert heap.mapped == 0
    assert heap.malloc(3 << 20).region == 0  # the threshold rose to what was freed


def test_buffers_are_shared_as_the_planner_does(net: Path) -> None:
    """a -> Relu can't be in place since Add reads a too; Add takes nothing over; the output is the caller's."""
    model = io.read(net)
    ran, optimised = executed(net, {"x": normal(1, 8, 16, 16)})
    found = buffers(model, optimised.graph, ran)
    assert [buffer.kind for buffer in found].count("output") == 1
    assert {buffer.size for buffer in found if buffer.kind == "output"} == {4 * 16 * 16 * 4}
    peak = predict(model, net.stat().st_size, optimised, ran)
    assert peak.activations <= peak.arena
    assert peak.loading <= peak.total


def test_in_place_and_alias_take_no_memory() -> None:
    text = """(float[1, 64] x) => (float[8, 8] y) {
        a = MatMul (x, w)
        b = Relu (a)
        c = Reshape (b, shape)
        y = Transpose (c)
    }"""
    model = graph(text, {"w": normal(64, 64), "shape": np.array([8, 8])})
    ran, optimised = executed(model, {"x": normal(1, 64)})
    assert [buffer.size for buffer in buffers(model, optimised.graph, ran)] == [256, 256]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_predicted_peak_is_measured(name: str) -> None:
    """Within 15 %; figures in docs/results.md."""
    found = compared(name, float_model(name), feed_of(name))
    assert found.ratio == pytest.approx(1.0, abs=0.15)


@pytest.mark.zoo
def test_weights_beside_the_file_are_mapped(tmp_path: Path) -> None:
    proto = onnx.load(float_model("MBV2"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    found = compared("external", tmp_path / "m.onnx", feed_of("MBV2"))
    assert found.ratio == pytest.approx(1.0, abs=0.15)
