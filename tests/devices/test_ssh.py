"""An ARM board over SSH: what it computes, and everything that goes wrong on the way there and on it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import DeviceError, EdgeqError, ModelError, RuntimeUnavailableError
from edgeq.ir import io
from edgeq.run.device import measure, open_device, remote
from edgeq.run.record import Feed
from edgeq.run.timing import TimedConfig
from tests.devices import arm64
from tests.devices.arm64 import Board, left
from tests.devices.conftest import Boards
from tests.devices.models import LAYERS, same
from tests.devices.wire import Wire
from tests.graphs import graph, normal

pytestmark = pytest.mark.slow


@pytest.fixture
def board(boards: Boards, at_home: Callable[[Path], None]) -> Iterator[Board]:
    """A running board that this user may log in to; whatever a test does, nothing is left on it."""
    found = boards("a76")
    at_home(found.home)
    yield found
    assert left(found) == []


def test_a_board_computes_what_this_machine_does_and_says_what_it_is(
    board: Board, config: TimedConfig, feeds: list[Feed]
) -> None:
    with open_device(board.address) as device:
        facts = device.facts
        assert same(device, config, feeds)
        race = measure.compare(device, [config, TimedConfig("again", config.path)], feeds, max_seconds=1)
        footprint = measure.measure_memory(device, config, feeds[0], repeats=1)
    assert (facts.machine, facts.emulator) == ("aarch64", "qemu-aarch64-static")
    assert "asimddp" in facts.isa and "i8mm" not in facts.isa
    assert set(race.timings) == {"net", "again"} and race.timings["net"].median_ms > 0
    assert len(race.timings["net"].laps_ms) == len(race.timings["again"].laps_ms) * (
        race.timings["net"].laps_per_turn / race.timings["again"].laps_per_turn
    )
    assert footprint.peak_bytes > 1 << 20 and footprint.load_ms > 0  # at least its weights


def test_large_samples_go_in_portions(
    board: Board, config: TimedConfig, monkeypatch: pytest.MonkeyPatch, feeds: list[Feed]
) -> None:
    monkeypatch.setattr(measure, "PORTION_BYTES", 1)
    with open_device(board.address) as device:
        assert same(device, config, feeds[:2])
        names = {path.name for path in board.files.glob("var/tmp/edgeq-*/*")}
    assert "job-2.done" in names and not {name for name in names if name.startswith("feeds") or name.endswith(".out")}


# --- refused ---


def refused(address: str, *words: str, kind: type[EdgeqError] = DeviceError) -> None:
    with pytest.raises(kind) as caught:
        open_device(address)
    assert type(caught.value) is kind and caught.value.exit_status == 3
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_host_key_is_refused(board: Board, tmp_path: Path, at_home: Callable[[Path], None]) -> None:
    own = tmp_path / "home"
    (own / ".ssh").mkdir(parents=True)
    (own / ".ssh/id_ed25519").write_bytes((board.home / ".ssh/id_ed25519").read_bytes())
    at_home(own)
    refused(board.address, "isn't known", "ssh-ed25519 SHA256:", f"ssh -p {board.port} 127.0.0.1")
    assert not (own / ".ssh/known_hosts").exists()


def test_a_changed_host_key_is_refused(board: Board, tmp_path: Path, at_home: Callable[[Path], None]) -> None:
    own = tmp_path / "home"
    (own / ".ssh").mkdir(parents=True)
    other = (board.home / ".ssh/id_ed25519.pub").read_text().split()[:2]  # some key that isn't the board's
    (own / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{board.port} {' '.join(other)}\n")
    at_home(own)
    refused(board.address, "has changed", "ssh-keygen -R")


def test_a_stranger_is_told_that_no_key_fits(board: Board, tmp_path: Path, at_home: Callable[[Path], None]) -> None:
    own = tmp_path / "home"
    (own / ".ssh").mkdir(parents=True)
    (own / ".ssh/known_hosts").write_bytes((board.home / ".ssh/known_hosts").read_bytes())
    at_home(own)
    refused(board.address, "none of this machine's keys for root", "ssh-copy-id")


def test_nobody_there(board: Board) -> None:
    refused(f"ssh://root@127.0.0.1:{arm64.free_port()}", "can't reach")


def test_no_python(board: Board) -> None:
    refused(f"{board.address}?python=/opt/python9", "has no /opt/python9", "numpy and onnxruntime")


def test_no_room(board: Board, config: TimedConfig, feeds: list[Feed]) -> None:
    """/small holds a megabyte, the model takes a bit more."""
    with open_device(f"{board.address}?folder=/small") as device, pytest.raises(DeviceError) as caught:
        measure.measure_memory(device, config, feeds[0])
    assert "disk" in str(caught.value) and "is full" in str(caught.value) and "?folder=/path" in caught.value.hint


def test_no_runtime(
    tmp_path: Path, boards: Boards, at_home: Callable[[Path], None], config: TimedConfig, feeds: list[Feed], cpp: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Python's lack is told as long as there is no library for the C++ runner, which then stands in."""
    boards("a76")  # skips where none can run
    at_home(tmp_path)
    cache = os.environ["EDGEQ_CACHE"]
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    with arm64.board("a72", tmp_path, environment="NOTHING=1") as bare:
        with open_device(bare.address) as device:
            assert device.facts.machine == "aarch64" and device.facts.missing == ("numpy", "onnxruntime")
            with pytest.raises(RuntimeUnavailableError, match="no numpy and no onnxruntime") as caught:
                measure.measure_memory(device, config, {"x": normal(1, 512)})
        assert "python3 -m pip install numpy onnxruntime" in caught.value.hint
        assert "pip download onnxruntime" in caught.value.hint and "manylinux_2_28_aarch64" in caught.value.hint
        monkeypatch.setenv("EDGEQ_CACHE", cache)
        with open_device(f"{bare.address}?library={arm64.library()}") as device:
            assert device.facts.runner == "cpp" and same(device, config, feeds)
        monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
        (bare.files / "usr/bin/python3").unlink()
        refused(bare.address, "has no python3, and the C++ runner needs ONNX Runtime's library for aarch64")
        assert left(bare) == []


# --- broken on the way ---


def test_a_file_altered_on_the_device_is_found(board: Board, config: TimedConfig, feeds: list[Feed]) -> None:
    with open_device(board.address) as device:
        assert same(device, config, feeds)
        (model,) = board.files.glob("var/tmp/edgeq-*/*/net.onnx")
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
        with pytest.raises(DeviceError, match=r"net\.onnx isn't what was sent"):
            same(device, config, feeds)


def test_a_model_the_runtime_there_refuses(board: Board, config: TimedConfig, feeds: list[Feed]) -> None:
    config.path.write_bytes(io.to_bytes(graph(LAYERS.replace("Tanh", "Tanhh"), {"W": normal(512, 512)})))
    with open_device(board.address) as device, pytest.raises(ModelError, match=r"net can't be loaded.*Tanhh"):
        measure.measure_memory(device, config, feeds[0])


@contextmanager
def wired(board: Board, fuse: int | None = None) -> Iterator[tuple[Wire, str]]:
    """A wire to the board, and its address through it."""
    wire = Wire(board.port, fuse)
    known = board.home / ".ssh/known_hosts"
    kept = known.read_text()
    known.write_text(kept + kept.splitlines()[0].replace(f":{board.port} ", f":{wire.port} ") + "\n")
    try:
        yield wire, f"ssh://root@127.0.0.1:{wire.port}"
    finally:
        wire.close()
        known.write_text(kept)


def test_a_transfer_goes_on_where_the_link_was_cut(board: Board, tmp_path: Path) -> None:
    size = 4 << 20
    (tmp_path / "large").write_bytes(np.random.default_rng(0).bytes(size))
    with wired(board, fuse=size // 2) as (wire, address), open_device(address) as device:
        device.push("large", tmp_path / "large")
        assert wire.sent < 1.5 * size
        (there,) = board.files.glob("var/tmp/edgeq-*/large")
        assert there.read_bytes() == (tmp_path / "large").read_bytes()


def test_a_measurement_outlives_a_cut_link(board: Board, config: TimedConfig, feeds: list[Feed]) -> None:
    with wired(board) as (wire, address), open_device(address) as device:
        threading.Timer(2.0, wire.cut).start()
        threading.Timer(4.0, wire.mend).start()
        race = measure.compare(device, [config], feeds, max_seconds=5)
        jobs = [path.name for path in board.files.glob("var/tmp/edgeq-*/job-*.done")]
    assert race.timings["net"].median_ms > 0 and jobs == ["job-1.done"]


def test_a_link_cut_for_good_is_an_error_and_the_board_tidies_up_by_itself(
    board: Board, config: TimedConfig, feeds: list[Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LEASE_SECONDS", 4.0)
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 1.0)
    with (
        wired(board) as (wire, address),
        pytest.raises(DeviceError, match="was cut and didn't come back in 1 s"),
        open_device(address) as device,
    ):
        threading.Timer(2.0, wire.cut).start()
        measure.compare(device, [config], feeds, max_seconds=60)
    assert left(board, seconds=15) == []
    end = time.monotonic() + 5.0
    while running(board) and time.monotonic() < end:
        time.sleep(0.1)
    assert not running(board)


def running(board: Board) -> list[int]:
    """Processes of agents on the board, by this machine's numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            words = (path / "cmdline").read_bytes()
            if b"agent.py" in words and (path / "root").stat().st_ino == board.files.stat().st_ino:
                found.append(int(path.name))
    return found


def test_a_job_that_dies_says_how(board: Board, config: TimedConfig, feeds: list[Feed]) -> None:
    def kill() -> None:
        while not (jobs := [pid for pid in running(board) if b"\0run\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]):
            time.sleep(0.2)
        os.kill(jobs[0], signal.SIGKILL)

    with open_device(board.address) as device, pytest.raises(DeviceError, match=r"'compare'.*signal 9") as caught:
        threading.Thread(target=kill, daemon=True).start()
        measure.compare(device, [config], feeds, max_seconds=600)
    assert "too little memory" in caught.value.hint


def test_a_board_that_restarts_does_its_job_anew(
    boards: Boards, tmp_path: Path, at_home: Callable[[Path], None], config: TimedConfig, feeds: list[Feed]
) -> None:
    boards("a76")  # skips where none can run
    at_home(tmp_path)
    home, port = tmp_path, arm64.free_port()
    with arm64.board("a76", home, port=port) as before:
        device = open_device(before.address)
        found: list[measure.Race] = []
        thread = threading.Thread(target=lambda: found.append(measure.compare(device, [config], feeds, max_seconds=3)))
        thread.start()
        while not list(before.files.glob("var/tmp/edgeq-*/job-1.json")):
            time.sleep(0.2)
    with arm64.board("a76", home, port=port) as after:
        thread.join(300)
        device.close()
        assert [race.timings["net"].median_ms > 0 for race in found] == [True]
        assert left(after) == []
