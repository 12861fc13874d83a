"""The real ``adb``, an emulated daemon and an ARM board behind it: what is computed there, and what goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import DeviceError, EdgeqError, RuntimeUnavailableError
from edgeq.run.device import measure, open_device, remote
from edgeq.run.record import Feed
from edgeq.run.timing import TimedConfig
from tests.devices import arm64
from tests.devices.adbd import Adbd, adbd
from tests.devices.arm64 import Board, left
from tests.devices.models import same
from tests.devices.wire import Wire

pytestmark = pytest.mark.slow


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


def test_nobody_there(phone: Adbd) -> None:
    refused(f"adb://127.0.0.1:{arm64.free_port()}", "can't reach", "Connection refused")


def test_a_phone_that_does_not_trust_this_machine(phone: Adbd) -> None:
    with adbd(phone.board, authorized=False) as stranger:
        refused(stranger.address, "is unauthorized", "allow USB debugging")


def test_a_phone_that_is_too_old(phone: Adbd) -> None:
    with adbd(phone.board, features=b"cmd") as old:
        refused(old.address, "too old", "Android 7")


def test_no_room(phone: Adbd, cpp: str) -> None:
    """/small holds a megabyte, ONNX Runtime's library takes 26."""
    refused(f"{phone.address}{cpp}&folder=/small", "disk", "is full: libonnxruntime.so takes", "?folder=/path")


def test_a_file_altered_on_the_device_is_found(phone: Adbd, cpp: str, config: TimedConfig, feeds: list[Feed]) -> None:
    with open_device(phone.address + cpp) as device:
        assert same(device, config, feeds)
        for name in ("*/net.onnx", "libonnxruntime.so"):
            (victim,) = phone.board.files.glob(f"data/local/tmp/edgeq-*/{name}")
            whole = victim.read_bytes()
            victim.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
            with pytest.raises(DeviceError, match=rf"{victim.name} isn't what was sent"):
                same(device, config, feeds)
            victim.write_bytes(whole)


def test_a_transfer_goes_on_where_the_link_was_cut(phone: Adbd, tmp_path: Path) -> None:
    size = 4 << 20
    (tmp_path / "large").write_bytes(np.random.default_rng(0).bytes(size))
    with wired(phone, fuse=size // 2) as (wire, address), open_device(address) as device:
        device.push("large", tmp_path / "large")
        assert wire.sent < 1.5 * size
        (there,) = phone.board.files.glob("data/local/tmp/edgeq-*/large")
        assert there.read_bytes() == (tmp_path / "large").read_bytes()


def test_a_measurement_outlives_a_killed_server_and_a_cut_link(
    phone: Adbd, cpp: str, config: TimedConfig, feeds: list[Feed]
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

    with wired(phone) as (wire, address), open_device(address + cpp) as device:
        threading.Thread(target=break_it, args=[wire], daemon=True).start()
        race = measure.compare(device, [config], feeds, max_seconds=5)
        jobs = [path.name for path in phone.board.files.glob("data/local/tmp/edgeq-*/job-*.done")]
    assert race.timings["net"].median_ms > 0 and jobs == ["job-1.done"] and happened == ["killed", "mended"]


def test_a_link_cut_for_good_is_an_error_and_the_phone_tidies_up_by_itself(
    phone: Adbd, cpp: str, config: TimedConfig, feeds: list[Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LEASE_SECONDS", 4.0)
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 1.0)
    with (
        wired(phone) as (wire, address),
        pytest.raises(DeviceError, match="was cut and didn't come back in 1 s"),
        open_device(address + cpp) as device,
    ):
        threading.Timer(2.0, wire.cut).start()
        measure.compare(device, [config], feeds, max_seconds=60)
    assert left(phone.board, seconds=15) == []
    end = time.monotonic() + 5.0
    while running(phone.board) and time.monotonic() < end:
        time.sleep(0.1)
    assert not running(phone.board)


def running(board: Board) -> dict[int, int]:
    """Processes of edgeq-run on the board and their parents, by this machine's numbers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            words = (path / "cmdline").read_bytes()
            if b"edgeq-run\0keep\0" in words and (path / "root").stat().st_ino == board.files.stat().st_ino:
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def children(known: dict[int, int]) -> list[int]:
    """Those whose parents are among them: jobs, not their keeper."""
    return [pid for pid, parent in known.items() if parent in known]


def test_a_job_that_dies_says_how(phone: Adbd, cpp: str, config: TimedConfig, feeds: list[Feed]) -> None:
    def kill() -> None:
        while not (jobs := children(running(phone.board))):
            time.sleep(0.2)
        os.kill(jobs[0], signal.SIGKILL)

    with open_device(phone.address + cpp) as device, pytest.raises(DeviceError, match=r"'compare'.*signal 9") as caught:
        threading.Thread(target=kill, daemon=True).start()
        measure.compare(device, [config], feeds, max_seconds=600)
    assert "too little memory" in caught.value.hint
