"""What does the jobs at a device's end: ``agent.py`` in its Python, or ``edgeq-run``, compiled here from runner/ (L4).

Both speak one protocol. The second is for devices without Python: it needs a compiler for the device's processor here,
and ONNX Runtime's library for it, which is sent along: that of a wheel, which needs glibc there, or of an Android
archive. Neither is downloaded in silence.
"""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeq.errors import RuntimeUnavailableError, UsageError
from edgeq.ir import io
from edgeq.target import cxx
from edgeq.target.cache import cache_folder, kept
from edgeq.target.cxx import MACHINES, Machine

AGENT = Path(__file__).parent / "agent.py"
SOURCES = Path(__file__).parent / "runner"
NATIVE = Path(__file__).parent.parent / "native"  # ONNX Runtime in C++, which packages of the form cpp hold as well
PROGRAM, LIBRARY = "edgeq-run", "libonnxruntime.so"
WHAT = "the C++ runner"
FLAGS = ("-std=c++17", "-O2", "-pthread", "-s", "-I", str(NATIVE))


@dataclass(frozen=True)
class Runner:
    """``name``: python or cpp; ``files``: what lies in the folder there; ``line``: starts it in a shell in that folder;
    ``lacking``: what to do when it doesn't start."""

    name: str
    files: Mapping[str, Path]
    line: str
    lacking: str


def python(program: str) -> Runner:
    """The agent in an interpreter of the device's."""
    hint = "install Python 3.8 or later with numpy and onnxruntime there, or name one: ?python=/path/to/python3"
    return Runner("python", {AGENT.name: AGENT}, f"{shlex.quote(program)} {AGENT.name}", hint)


def cpp(name: str, *, android: bool, library: str = "") -> Runner:
    """edgeq-run for a processor ``name``, with the ``library`` given or found. RuntimeUnavailableError where one of
    them can't be had, UsageError for a library that isn't one for it."""
    if name not in MACHINES:
        raise RuntimeUnavailableError(
            f"the C++ runner can't be compiled for {name}", hint=f"it can for {', '.join(MACHINES)}; or install Python"
        )
    machine = MACHINES[name]
    found = _library(name, machine, android, library)
    _, format_, number = found.open("rb").read(20).partition(b"\x7fELF")
    if not format_ or int.from_bytes(number[14:16], "little") != machine.elf:
        raise UsageError(f"{str(found)!r} is no library for {name}", hint="name another one: ?library=/path")
    files = {PROGRAM: _program(name, android), LIBRARY: found}
    libc = "Android" if android else "glibc as new as the compiler's here, and libstdc++"
    return Runner("cpp", files, f"./{PROGRAM}", f"it needs {libc}, and {found} must fit them")


def _program(name: str, android: bool) -> Path:
    """edgeq-run for a processor."""
    flags = [*FLAGS, *(["-static-libstdc++"] if android else []), "-ldl"]
    sources = sorted([*SOURCES.iterdir(), *NATIVE.iterdir()])
    return cxx.compiled(cxx.compiler(name, WHAT, android=android), sources, flags, ("runner", PROGRAM), WHAT)


def _library(name: str, machine: Machine, android: bool, given: str) -> Path:
    """ONNX Runtime's library: as given, the one installed here where it fits, or of the newest archive in the cache."""
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UsageError(f"there is no library {given!r}", hint="?library= takes a .so, a .whl or an .aar")
        return _unpacked(path, machine) if zipfile.is_zipfile(path) else path
    if not android and name == platform.machine() and sys.platform == "linux":
        spec = importlib.util.find_spec("onnxruntime")
        for place in spec.submodule_search_locations or () if spec else ():
            if found := sorted(Path(place).glob("capi/libonnxruntime.so.*")):
                return found[0]
    folder = cache_folder() / "onnxruntime"
    archives = folder.glob("*.aar" if android else f"onnxruntime-*_{name}.whl")
    if newest := max(archives, key=lambda path: path.stat().st_mtime, default=None):
        return _unpacked(newest, machine)
    wheel = f"pip download onnxruntime --no-deps --only-binary=:all: --platform {machine.wheel} -d {folder}"
    archive = f"put the archive (.aar) of the Maven package onnxruntime-android into {folder}"
    raise RuntimeUnavailableError(
        f"the C++ runner needs ONNX Runtime's library for {'Android on ' if android else ''}{name}, which isn't here",
        hint=f"{archive if android else wheel}; or name one: ?library=/path",
    )


def _unpacked(path: Path, machine: Machine) -> Path:
    """The library in a wheel or an Android archive."""
    with zipfile.ZipFile(path) as archive:
        inside = ("onnxruntime/capi/libonnxruntime.so.", f"jni/{machine.abi}/libonnxruntime.so")
        member = next((name for name in archive.namelist() if name.startswith(inside)), None)
        if member is None:
            raise UsageError(
                f"{str(path)!r} holds no {inside[0]}* and no {inside[1]}", hint="take ONNX Runtime's own archive"
            )
        return kept(io.file_digest(path) + machine.abi, "runner", LIBRARY, lambda to: _extract(archive, member, to))


def _extract(archive: zipfile.ZipFile, member: str, place: Path) -> None:
    with archive.open(member) as source, place.open("wb") as sink:
        shutil.copyfileobj(source, sink)
