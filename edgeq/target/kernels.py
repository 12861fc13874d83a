"""edgeq's own kernels for ONNX Runtime's CPU provider: a library of custom operators, compiled on demand (L3).

A model that uses them holds their definitions as functions, so it loads everywhere; where the library is registered
with a session, its kernels run instead. The library needs nothing but the runtime, and one file serves every CPU of an
architecture: each kernel picks what the CPU has when it is loaded.
"""

from __future__ import annotations

import functools
import mmap
import platform
import sys
from pathlib import Path
from typing import Any

from edgeq.errors import RuntimeUnavailableError
from edgeq.target.cxx import compiled, compiler

DOMAIN = "edgeq.kernels"
KERNELS = ("Table", "DepthwiseConv", "StemConv")  # operators of the domain, which a target's key ``kernels`` may name
SOURCES = Path(__file__).parent / "native"
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-threadsafe-statics",
    "-Wl,--as-needed", "-s",
)  # fmt: skip
WHAT = "the library of edgeq's kernels"


def system(machine: str = "") -> str:
    """What a library is for: ``linux-x86_64`` and the like; this machine without a name of another."""
    return f"linux-{machine}" if machine else f"{sys.platform}-{platform.machine()}"


def library(machine: str = "") -> Path:
    """The library for Linux on ``machine`` (as ``uname -m`` says), else for this one. RuntimeUnavailableError where it
    can't be compiled."""
    if not machine and sys.platform != "linux":
        raise RuntimeUnavailableError(f"{WHAT} is compiled on Linux, this is {sys.platform}", hint="do without it")
    name = machine or platform.machine()
    sources = sorted(SOURCES.iterdir())
    return compiled(compiler(name, WHAT), sources, FLAGS, ("kernels", f"kernels-linux-{name}.so"), WHAT)


@functools.cache
def here() -> Path | str:
    """``library`` for this machine, or why there is none."""
    try:
        return library()
    except RuntimeUnavailableError as error:
        return f"{error.message} ({error.hint})"


def uses(model: Path | bytes) -> bool:
    """Whether a model imports the domain: its name is in the file, behind the graph. One that isn't there doesn't."""
    name = DOMAIN.encode()
    if isinstance(model, bytes):
        return name in model
    if not model.is_file() or not model.stat().st_size:
        return False
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.rfind(name) >= 0


def check(model: Path) -> None:
    """RuntimeUnavailableError where ``model`` would run without the kernels it was made for: slower than it ships."""
    if uses(model) and isinstance(lacking := here(), str):
        raise RuntimeUnavailableError(f"{str(model)!r} uses edgeq's kernels, and {lacking}", hint="mend that first")


def register(options: Any, model: Path | bytes) -> None:
    """Let a session of ``model`` with these SessionOptions run the kernels it has nodes for, where the library can be
    had; elsewhere the functions in the file run, which compute the same."""
    if uses(model) and isinstance(place := here(), Path):
        options.register_custom_ops_library(str(place))
