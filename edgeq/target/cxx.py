"""Compiles C++ for this machine and for others, once for each compiler and source (L3)."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.errors import RuntimeUnavailableError
from edgeq.target.cache import kept


@dataclass(frozen=True)
class Machine:
    """A processor: ``elf`` is e_machine of its programs, ``abi`` its name in Android's archives, ``gnu`` and
    ``android`` are compilers for it, ``wheel`` and ``package`` where a library and a compiler can be had."""

    elf: int
    abi: str
    gnu: str
    android: str
    wheel: str
    package: str


MACHINES = {  # by `uname -m`
    "aarch64": Machine(
        183, "arm64-v8a", "aarch64-linux-gnu-g++", "aarch64-linux-android24-clang++", "manylinux_2_28_aarch64",
        "g++-aarch64-linux-gnu",
    ),
    "x86_64": Machine(
        62, "x86_64", "x86_64-linux-gnu-g++", "x86_64-linux-android24-clang++", "manylinux_2_28_x86_64",
        "g++-x86-64-linux-gnu",
    ),
}  # fmt: skip


def compiler(name: str, what: str, *, android: bool = False) -> str:
    """A C++ compiler for the processor ``name``, found on PATH. RuntimeUnavailableError without one: ``what`` needs
    it."""
    if name not in MACHINES:
        raise RuntimeUnavailableError(
            f"{what} can't be compiled for {name}", hint=f"it can for {', '.join(MACHINES)}; or do without"
        )
    machine = MACHINES[name]
    native = ["g++"] if name == platform.machine() else []
    names = [machine.android] if android else [*native, machine.gnu]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        hint = "put toolchains/llvm/prebuilt/linux-x86_64/bin of Android's NDK on PATH"
        raise RuntimeUnavailableError(
            f"{what} needs a compiler for {name}: there is no {' and no '.join(names)} here",
            hint=hint if android else f"apt-get install {'g++' if native else machine.package}",
        )
    return found


def compiled(compiler: str, sources: Sequence[Path], flags: Sequence[str], place: tuple[str, str], what: str) -> Path:
    """The file ``compiler`` makes of ``sources`` (its .cpp files; the others are read by them), kept in edgeq's cache
    in the folder and under the name ``place``, unless the same compiler has made it of the same.
    RuntimeUnavailableError with its first error where it can't."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    key = hashlib.sha256(b"\0".join([compiler.encode(), version, *map(str.encode, flags)]))
    for source in sources:
        key.update(source.read_bytes())

    def compile_to(path: Path) -> None:
        words = [compiler, *(str(source) for source in sources if source.suffix == ".cpp"), "-o", str(path), *flags]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            told = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise RuntimeUnavailableError(f"{compiler} can't compile {what}: {told}", hint="C++17 is needed")

    return kept(key.hexdigest(), *place, compile_to)
