"""Timing: what is run how often, in which process, and the arithmetic of the ratio. No test reads a clock."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import ModelError, RuntimeUnavailableError, SampleError, UsageError
from edgeq.run.session import timing_of
from edgeq.run.timing import Footprint, TimedConfig, compare, measure_memory, ratio, with_footprint

FEED = {"x": np.ones((1, 64), np.float32)}


def save_chain(path: Path, layers: int, width: int = 64) -> Path:
    """``layers`` times ``x @ W`` with W f32[width, width]."""
    weight = (np.eye(width) * 0.9).astype(np.float32)
    names = ["x", *[f"h{index}" for index in range(1, layers)], "y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], f"W{i}"], [names[i + 1]]) for i in range(layers)],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(weight + index, f"W{index}") for index in range(layers)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_compare_gives_paired_turns_of_every_configuration(tmp_path, threads):
    short, long = save_chain(tmp_path / "short.onnx", 2), save_chain(tmp_path / "long.onnx", 40)
    configs = [
        TimedConfig("short", short),
        TimedConfig("long", long),
        TimedConfig("plain", long, "none", {"session.intra_op.allow_spinning": "0"}),
    ]
    feeds = [FEED, {"x": np.ones((3, 64), np.float32)}]
    timings = compare(configs, feeds, threads=threads, warmup=2, rounds=6, min_seconds=0, max_seconds=0.01)
    assert list(timings) == ["short", "long", "plain"]
    for timing in timings.values():
        assert timing.threads == threads and timing.warmup == 2
        assert len(timing.laps_ms) >= 6 * timing.laps_per_turn and len(timing.laps_ms) % timing.laps_per_turn == 0
        assert timing.load_ms > 0 and timing.first_ms > 0
        assert timing.median_ms == pytest.approx(np.median(timing.laps_ms))
    rounds = {len(timing.laps_ms) // timing.laps_per_turn for timing in timings.values()}
    assert len(rounds) == 1


def test_a_footprint_grows_with_the_weights(tmp_path):
    small = save_chain(tmp_path / "small.onnx", 2)
    large = save_chain(tmp_path / "large.onnx", 20, width=512)  # 21 MB of weights
    feed = {"x": np.ones((1, 512), np.float32)}
    little = measure_memory(TimedConfig("small", small), FEED, repeats=1)
    much = measure_memory(TimedConfig("large", large), feed, repeats=1)
    assert much.peak_bytes > 20e6 and much.peak_bytes > 2 * little.peak_bytes
    assert much.load_ms > 0 and much.first_ms > 0


@pytest.mark.slow
def test_the_process_of_the_caller_does_not_count(tmp_path):
    small = save_chain(tmp_path / "small.onnx", 2)
    ballast = np.ones(200 << 20, np.uint8)
    assert measure_memory(TimedConfig("small", small), FEED, repeats=1).peak_bytes < ballast.nbytes // 4


def test_a_footprint_completes_a_timing():
    timing = with_footprint(timing_of([1.0, 2.0, 3.0], threads=1, warmup=0), Footprint(7, 8.0, 9.0))
    assert (timing.peak_bytes, timing.load_ms, timing.first_ms, timing.median_ms) == (7, 8.0, 9.0, 2.0)


@given(st.lists(st.floats(0.1, 100), min_size=3, max_size=40), st.floats(0.2, 5))
def test_ratio_of_a_scaled_twin_is_the_scale_without_spread(laps, scale):
    reference = timing_of(laps, threads=1, warmup=0)
    other = timing_of([lap * scale for lap in laps], threads=1, warmup=0)
    found = ratio(other, reference)
    assert found.value == pytest.approx(scale) and found.low == pytest.approx(scale) == pytest.approx(found.high)


def test_ratio_pairs_turns_and_ignores_what_slows_whole_rounds():
    rng = np.random.default_rng(0)
    drift = np.repeat(rng.uniform(1, 10, 50), 3)  # rounds of 3 laps, some ten times slower
    reference = timing_of(list(drift), threads=1, warmup=0, laps_per_turn=3)
    other = timing_of(list(0.8 * drift * rng.normal(1, 0.01, 150)), threads=1, warmup=0, laps_per_turn=3)
    found = ratio(other, reference)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(0.8, rel=0.01) and found.high - found.low < 0.01
    with pytest.raises(UsageError, match="timings of 50 and 1 rounds"):
        ratio(other, timing_of([1.0], threads=1, warmup=0))


def test_the_interval_of_the_ratio_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        a, b = (timing_of(list(rng.lognormal(0, 0.2, 30)), threads=1, warmup=0) for _ in range(2))
        found = ratio(a, b, resamples=300)
        held += found.low <= 1 <= found.high
    assert held >= 180  # 95 % of 200 is 190, standard deviation 3


def test_what_cannot_be_timed_says_why(tmp_path):
    model = save_chain(tmp_path / "m.onnx", 2)
    with pytest.raises(ModelError, match=r"absent.onnx: no such file"):
        compare([TimedConfig("a", tmp_path / "absent.onnx")], [FEED])
    with pytest.raises(SampleError, match=r"doesn't fit the model.*\n.*x float32\[n, 64\]"):
        compare([TimedConfig("a", model)], [{"x": np.ones((1, 3), np.float32)}])
    with pytest.raises(UsageError, match="must differ"):
        compare([TimedConfig("a", model), TimedConfig("a", model)], [FEED])
    with pytest.raises(SampleError, match="no samples to time"):
        compare([TimedConfig("a", model)], [])


def test_a_process_that_dies_is_reported_with_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(2, b'lights out')\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(RuntimeUnavailableError, match=r"measuring a ended with exit status 9: .*lights out"):
        measure_memory(TimedConfig("a", save_chain(tmp_path / "m.onnx", 2)), FEED)
