"""Ways to a machine with a shell: what ``remote`` needs of them, and the shortest one, to this machine (L4)."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class LinkCutError(Exception):
    """The way to the device broke in the middle of something; whether that was done isn't known."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    error: str


class Link(Protocol):
    """Paths are the device's, with "/" between their parts. Every call may raise LinkCutError, which ``reconnect`` may
    mend; OSError is the device's own."""

    def execute(self, command: str) -> Done:
        """Run a line of the device's shell."""

    def put(self, path: Path, name: str) -> None:
        """Send a file; it has its name only when it is whole. One that was begun goes on where it stopped."""

    def get(self, name: str, path: Path) -> None:
        """Fetch a file."""

    def exists(self, name: str) -> bool: ...

    def touch(self, name: str) -> None:
        """Give a file the time of now, and make it when it isn't there."""

    def reconnect(self) -> None:
        """LinkCutError when the device still can't be reached, DeviceError when it refuses."""

    def close(self) -> None: ...


class LocalLink:
    """This machine, seen as a device: jobs run in the same way, in processes that know nothing of edgeq."""

    def execute(self, command: str) -> Done:
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, errors="replace", check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def put(self, path: Path, name: str) -> None:
        shutil.copyfile(path, f"{name}.part")
        os.replace(f"{name}.part", name)  # noqa: PTH105 - the name is a text, as on all devices

    def get(self, name: str, path: Path) -> None:
        shutil.copyfile(name, path)

    def exists(self, name: str) -> bool:
        return Path(name).exists()

    def touch(self, name: str) -> None:
        Path(name).touch()

    def reconnect(self) -> None: ...

    def close(self) -> None: ...
