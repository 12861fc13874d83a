"""Devices: addresses, and this machine as one; tests/devices has others."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeq.errors import DeviceError, ModelError, RuntimeUnavailableError, SampleError, UsageError
from edgeq.ir import io
from edgeq.run.device import measure, open_device, tensors
from edgeq.run.record import Feed
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig, ratio
from edgeq.target.record import Provider
from tests.graphs import graph, normal

LINEAR = "(float[n, 64] x) => (float[n, 64] y, float[n, 64] z) {\n y = MatMul(x, W)\n z = Relu(y)\n}"


@pytest.fixture
def config(tmp_path: Path) -> TimedConfig:
    io.write(graph(LINEAR, {"W": normal(64, 64)}), tmp_path / "net.onnx")
    return TimedConfig("net", tmp_path / "net.onnx")


@pytest.fixture(params=["python", pytest.param("cpp", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of this machine, working in a folder of its own that must be empty afterwards, by either runner."""
    if request.param == "cpp" and shutil.which("g++") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no g++: make browser")
    (tmp_path / "work").mkdir()
    return f"local?folder={tmp_path / 'work'}&runner={request.param}"


@pytest.mark.slow
def test_this_machine_as_a_device(place: str, config: TimedConfig, tmp_path: Path) -> None:
    feeds = [{"x": normal(count, 64)} for count in (1, 2, 3)]
    here = open_session(config.path)
    with open_device(place) as device:
        for feed, found in measure.outputs(device, config, feeds):
            expected = run_session(here, feed)
            assert found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in found)
        ((_, only),) = measure.outputs(device, config, feeds[:1], ["z"])
        race = measure.compare(device, [config, TimedConfig("other", config.path)], feeds, max_seconds=0.5)
        footprint = measure.measure_memory(device, config, feeds[0])
        steady = measure.sustained(device, config, feeds, seconds=0.6)
        ((_, traced),) = measure.graph(device, config, feeds[:1], tmp_path / "graph.onnx", ["y"])
        assert device.facts.runtime and not device.facts.emulator and device.facts.cores > 0
        assert place.endswith(device.facts.runner)
    assert list(only) == ["z"] and list(traced) == ["y"]
    assert ratio(race.timings["other"], race.timings["net"]).low > 0
    assert race.timings["net"].p99_ms >= race.timings["net"].p90_ms >= race.timings["net"].median_ms > 0
    assert len(steady.windows) == 12 and all(window["p50_ms"] > 0 for window in steady.windows)
    assert 0.6 <= steady.seconds < 6 and steady.energy.source != "a browser shows no energy"
    assert footprint.peak_bytes > 0 and footprint.load_ms > 0 and footprint.first_ms > 0
    assert [node.op_type for node in io.read(tmp_path / "graph.onnx").graph] == ["MatMul", "Relu"]
    assert list((tmp_path / "work").iterdir()) == []


def test_external_data_goes_along(place: str, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "net.onnx"
    io.write(graph(LINEAR, {"W": normal(64, 64)}), path)
    here = run_session(open_session(path), feed := {"x": normal(1, 64)})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with open_device(place) as device:
        ((_, found),) = measure.outputs(device, TimedConfig("net", path), [feed])
    assert np.array_equal(found["y"], here["y"])


def test_failures_are_told_apart(place: str, config: TimedConfig, tmp_path: Path) -> None:
    with open_device(place) as device:
        io.write(graph(LINEAR.replace("Relu", "Reluu"), {"W": normal(64, 64)}), tmp_path / "odd.onnx")
        with pytest.raises(ModelError, match=r"odd can't be loaded.*Reluu"):
            measure.measure_memory(device, TimedConfig("odd", tmp_path / "odd.onnx"), {"x": normal(1, 64)})
        with pytest.raises(ModelError, match="net fails while running"):
            list(measure.outputs(device, config, [{"x": normal(1, 63)}]))
        with pytest.raises(RuntimeUnavailableError, match="has no CUDAExecutionProvider"):
            gpu = TimedConfig("net", config.path, provider=Provider("CUDAExecutionProvider"))
            measure.measure_memory(device, gpu, {"x": normal(1, 64)})
        with pytest.raises(SampleError, match=r"'x' holds <U1.*can't be sent"):
            list(measure.outputs(device, config, [{"x": np.array(["a"])}]))


@pytest.mark.slow
def test_what_the_cpp_runner_does_not_do_is_told() -> None:
    with open_device("local?runner=cpp") as device, pytest.raises(RuntimeUnavailableError) as caught:
        device.run({"task": "observe", "files": []})
    assert "edgeq-run doesn't do 'observe', Python does" in caught.value.message and "numpy" in caught.value.hint


def test_a_folder_that_vanishes_is_told(place: str, config: TimedConfig, tmp_path: Path) -> None:
    with open_device(place) as device:
        while not list((tmp_path / "work").glob("*/lock")):  # the runner has started, and writes no more
            time.sleep(0.01)
        shutil.rmtree(tmp_path / "work")
        with pytest.raises(DeviceError, match="is gone"):
            measure.measure_memory(device, config, {"x": normal(1, 64)})


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("board", "'board' is no address"),
        ("shh://me@board", "did you mean 'ssh'"),
        ("ssh://", "names no host"),
        ("adb://", "names no device"),
        ("local?runner=rust", "runner=python or runner=cpp"),
        ("local?runner=cpp&library=/none.so", "no library '/none.so'"),
        ("ssh://board:port", "ssh://user@host:port"),
        ("local?fodler=/tmp", "did you mean 'folder'"),
    ],
)
def test_addresses_that_cannot_be_read(address: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_device(address)
    assert message in str(caught.value)


KINDS = st.sampled_from(["f2", "f4", "f8", "i1", "u1", "i2", "i4", "i8", "u8", "?", ">f4"])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, max_side=4, min_side=0)
FEEDS = st.dictionaries(st.text(min_size=1, max_size=5), KINDS.flatmap(lambda kind: arrays.arrays(kind, SHAPES)))


@settings(max_examples=30)
@given(st.lists(FEEDS, max_size=3))
def test_packed_arrays_come_back(tmp_path_factory: pytest.TempPathFactory, feeds: list[Feed]) -> None:
    path = tmp_path_factory.mktemp("packed") / "feeds"
    index = tensors.pack(feeds, path)
    for feed, found in zip(feeds, tensors.unpack(path, index), strict=True):
        assert feed.keys() == found.keys()
        for name, array in feed.items():
            assert found[name].dtype == array.dtype.newbyteorder("<") and found[name].shape == array.shape
            assert np.array_equal(found[name], array, equal_nan=array.dtype.kind == "f")
    assert all(one["offset"] % 8 == 0 for row in index for one in row)
