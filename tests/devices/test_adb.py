"""The real ``adb``, an emulated daemon and an ARM board behind it: what is computed there, and what goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import DeviceError, EdgeqError, RuntimeUnavailableError
from edgeq.run.device import measure, open_device
from edgeq.run.record import Feed
from edgeq.run.timing import TimedConfig
from tests.devices import arm64
from tests.devices.adbd import Adbd, adbd
from tests.devices.arm64 import Board, left
from tests.devices.conftest import Boards
from tests.devices.models import same
from tests.devices.wire import Wire

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """Where an adb server of this module's own listens, as its clients are told."""
    if shutil.which("adb") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no adb: make devices")
    settings = {"ANDROID_ADB_SERVER_PORT": str(arm64.free_port())}
    yield settings
    subprocess.run(["adb", "kill-server"], env=os.environ | settings, check=True, capture_output=True)


@pytest.fixture
def board(
    boards: Boards, at_home: Callable[[Path], None], server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Board]:
    """A running board; whatever a test does, nothing is left on it."""
    found = boards("a76")
    at_home(found.home)
    for key, value in server.items():
        monkeypatch.setenv(key, value)
    yield found
    assert left(found) == []


@pytest.fixture
def phone(board: Board) -> Iterator[Adbd]:
    """The board as a phone that trusts this machine."""
    with adbd(board) as daemon:
        yield daemon


@contextmanager
def wired(phone: Adbd, fuse: int | None = None) -> Iterator[tuple[Wire, str]]:
    """A wire to the phone, and its address through it."""
    wire = Wire(phone.port, fuse)
    try:
        yield wire, f"adb://127.0.0.1:{wire.port}"
    finally:
        wire.close()


def test_an_emulated_phone_computes_what_this_machine_does(phone: Adbd, config: TimedConfig, feeds: list[Feed]) -> None:
    with open_device(phone.address) as device:
        assert (device.facts.machine, device.facts.emulator) == ("aarch64", "qemu-aarch64-static")
        assert same(device, config, feeds)
        assert len(list(phone.board.files.glob("data/local/tmp/edgeq-*"))) == 1


def refused(address: str, *words: str, kind: type[EdgeqError] = DeviceError) -> None:
    with pytest.raises(kind) as caught:
        open_device(address)
    assert type(caught.value) is kind and caught.value.exit_status == 3
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_serial_is_refused_and_the_known_are_named(phone: Adbd) -> None:
    refused("adb://emulator-1", "device 'emulator-1' not found", "adb knows no device")
    subprocess.run(["adb", "connect", phone.serial], check=True, capture_output=True)
    refused("adb://emulator-1", "device 'emulator-1' not found", f"adb knows {phone.serial} (device)")
    subprocess.run(["adb", "disconnect", phone.serial], check=True, capture_output=True)


def test_no_adb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("adb://phone", "isn't installed", "apt-get install adb", kind=RuntimeUnavailableError)


def test_nobody_there(board: Board) -> None:
    refused(f"adb://127.0.0.1:{arm64.free_port()}", "can't reach", "Connection refused")


def test_a_phone_that_does_not_trust_this_machine(board: Board) -> None:
    with adbd(board, authorized=False) as stranger:
        refused(stranger.address, "is unauthorized", "allow USB debugging")


def test_a_phone_that_is_too_old(board: Board) -> None:
    with adbd(board, features=b"cmd") as old:
        refused(old.address, "too old", "Android 7")


def test_no_room(phone: Adbd, config: TimedConfig, feeds: list[Feed]) -> None:
    """/small holds a megabyte, the model takes a bit more."""
    with open_device(f"{phone.address}?folder=/small") as device, pytest.raises(DeviceError) as caught:
        measure.measure_memory(device, config, feeds[0])
    assert "disk" in str(caught.value) and "is full" in str(caught.value)


def test_a_transfer_goes_on_where_the_link_was_cut(phone: Adbd, tmp_path: Path) -> None:
    size = 4 << 20
    (tmp_path / "large").write_bytes(np.random.default_rng(0).bytes(size))
    with wired(phone, fuse=size // 2) as (wire, address), open_device(address) as device:
        device.push("large", tmp_path / "large")
        assert wire.sent < 1.5 * size
        (there,) = phone.board.files.glob("data/local/tmp/edgeq-*/large")
        assert there.read_bytes() == (tmp_path / "large").read_bytes()


def test_a_measurement_outlives_a_killed_server_and_a_cut_link(
    phone: Adbd, config: TimedConfig, feeds: list[Feed]
) -> None:
    happened: list[str] = []

    def break_it(wire: Wire) -> None:
        while not list(phone.board.files.glob("data/local/tmp/edgeq-*/job-1.json")):
            time.sleep(0.1)
        happened.append("killed" if subprocess.run(["adb", "kill-server"], check=False).returncode == 0 else "")
        time.sleep(1.0)
        wire.cut()
        time.sleep(1.0)
        happened.append("mended" if not list(phone.board.files.glob("data/local/tmp/edgeq-*/job-1.done")) else "late")
        wire.mend()

    with wired(phone) as (wire, address), open_device(address) as device:
        threading.Thread(target=break_it, args=[wire], daemon=True).start()
        race = measure.compare(device, [config], feeds, max_seconds=5)
        jobs = [path.name for path in phone.board.files.glob("data/local/tmp/edgeq-*/job-*.done")]
    assert race.timings["net"].median_ms > 0 and jobs == ["job-1.done"] and happened == ["killed", "mended"]
