"""The way to an Android device, by the program ``adb``: files and commands go through its shell alone (L4).

``adb`` says nothing when a link breaks under a shell: it ends with exit status 0. So each command tells its own status,
as the last line of its errors; where that is missing, the device didn't end it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import IO, Any

from edgeq.errors import DeviceError, RuntimeUnavailableError
from edgeq.run.device.link import Done, LinkCutError

FOLDER = "/data/local/tmp"  # what adb's user may write to and start programs from
QUIET_SECONDS = 120.0
SLOWEST = 1 << 20  # bytes a second; what takes longer than these hangs
ENDED = "\nedgeq-ended:"


class AdbLink:
    """See ``link.Link``. ``serial``: as ``adb devices`` lists it; one of the form host:port is connected to first."""

    def __init__(self, address: str, serial: str) -> None:
        program = shutil.which("adb")
        if program is None:
            raise RuntimeUnavailableError(
                "devices over adb need the program adb, which isn't installed",
                hint="apt-get install adb, or put Android's platform-tools on PATH",
            )
        self._program, self._address, self._serial = program, address, serial
        self._remote = re.fullmatch(r".+:\d+", serial) is not None
        self._connected = False  # by us, not before
        try:
            self.reconnect()
        except LinkCutError as error:
            raise DeviceError(f"can't reach {address}: {error}", hint=self._listed()) from error
        features = self._adb("-s", serial, "features").out.split()
        if "shell_v2" not in features:
            raise DeviceError(
                f"{address} is too old: its shell tells no exit status", hint="Android 7 or later is needed"
            )

    def reconnect(self) -> None:
        """A device in the state ``device``. DeviceError for what trying again can't mend."""
        told = self._connect() if self._remote else ""
        found = self._adb("-s", self._serial, "get-state")
        error = found.error.lower()
        if "unauthorized" in error or "authenticate" in told:
            raise DeviceError(
                f"{self._address} doesn't know this machine's key: it is unauthorized",
                hint="unlock its screen and allow USB debugging from this computer; if it doesn't ask, adb kill-server",
            )
        if "permission" in error:
            raise DeviceError(
                f"{self._address}: {_reason(found.error)}", hint="its udev rule is missing on this machine"
            )
        if found.out.strip() != "device":
            raise LinkCutError(_reason(found.error if "connected to" in told or not told else told))

    def execute(self, command: str) -> Done:
        return self._shell(command)

    def put(self, path: Path, name: str) -> None:
        part, size = f"{name}.part", path.stat().st_size
        begun = self._size(part) or 0
        if begun > size:
            self._shell(f"rm -f -- {shlex.quote(part)}")
            begun = 0
        with path.open("rb", buffering=0) as source:
            source.seek(begun)
            self._must(f"cat >>{shlex.quote(part)}", stdin=source, seconds=QUIET_SECONDS + size / SLOWEST)
        if self._size(part) != size:  # what was cut off came late, and twice
            self._shell(f"rm -f -- {shlex.quote(part)}")
            raise LinkCutError(f"{name} arrives with another size")
        self._must(f"mv -f -- {shlex.quote(part)} {shlex.quote(name)}")

    def get(self, name: str, path: Path) -> None:
        size = self._size(name)
        if size is None:
            raise FileNotFoundError(name)
        with path.open("wb") as sink:
            seconds = QUIET_SECONDS + size / SLOWEST
            self._must(f"cat -- {shlex.quote(name)}", stdout=sink, seconds=seconds)

    def exists(self, name: str) -> bool:
        return self._shell(f"test -e {shlex.quote(name)}").status == 0

    def touch(self, name: str) -> None:
        folder, word = shlex.quote(name.rpartition("/")[0]), shlex.quote(name)
        if self._must(f"if test -d {folder}; then touch -- {word}; else echo gone; fi").out:
            raise FileNotFoundError(name)

    def close(self) -> None:
        if self._connected:
            self._adb("disconnect", self._serial)

    def _connect(self) -> str:
        """What ``adb connect`` says, which ends with status 0 whatever comes. One that lost its device keeps it as
        offline, and must forget it first."""
        told = self._adb("connect", self._serial).out
        if "already" in told and "offline" in self._adb("-s", self._serial, "get-state").error:
            self._adb("disconnect", self._serial)
            told = self._adb("connect", self._serial).out
        else:
            self._connected |= "already" not in told
        return told

    def _listed(self) -> str:
        rows = [line.split() for line in self._adb("devices").out.splitlines()[1:]]
        known = ", ".join(f"{row[0]} ({row[1]})" for row in rows if len(row) > 1)
        return f"adb knows {known}" if known else "adb knows no device: is it plugged in, with USB debugging allowed?"

    def _size(self, name: str) -> int | None:
        """Bytes there; None when there is no such file."""
        word = shlex.quote(name)
        found = self._must(f"if test -e {word}; then wc -c <{word}; fi").out.strip()
        return int(found) if found else None

    def _must(self, command: str, **how: Any) -> Done:
        done = self._shell(command, **how)
        if done.status:
            raise OSError(done.error.strip())
        return done

    def _shell(
        self,
        command: str,
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int = subprocess.PIPE,
        seconds: float = QUIET_SECONDS,
    ) -> Done:
        """Run a line of the device's shell; its input and output are raw bytes."""
        line = f"({command}\n); printf '{ENDED.encode('unicode_escape').decode()}%d' $? >&2"
        done = self._adb("-s", self._serial, "shell", "-T", line, stdin=stdin, stdout=stdout, seconds=seconds)
        error, ended, status = done.error.rpartition(ENDED)
        if not ended or not status.isdigit():
            raise LinkCutError(_reason(done.error) or "the connection was closed")
        return Done(int(status), done.out, error)

    def _adb(
        self,
        *words: str,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int = subprocess.PIPE,
        seconds: float = QUIET_SECONDS,
    ) -> Done:
        command = [self._program, *words]
        try:
            done = subprocess.run(
                command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LinkCutError(f"adb {words[0]} says nothing for {seconds:.0f} s") from error
        return Done(
            done.returncode, (done.stdout or b"").decode(errors="replace"), done.stderr.decode(errors="replace")
        )


def _reason(text: str) -> str:
    """The line that says why."""
    lines = text.strip().splitlines()
    found = next((line for line in lines if line.startswith(("error:", "failed"))), lines[-1] if lines else "")
    return found.removeprefix("error:").strip()
