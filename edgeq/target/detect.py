"""Which CPU this is, in the words targets use (L3).

Only facts are read here: flags, the family they stand for, and a fingerprint for caches. Flags come from
``/proc/cpuinfo`` where there is one and from NumPy's own detection elsewhere (macOS, Windows). What can't be seen
counts as absent, so an unknown x86 machine gets the target whose products no kernel can saturate.
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from glob import glob
from pathlib import Path

from edgeq.errors import TargetError
from edgeq.target.record import Target

CPUINFO = Path("/proc/cpuinfo")

# The flags that choose between integer kernels in ONNX Runtime's MLAS; the rest would only split caches.
X64_FLAGS = {"avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}
ARM64_FLAGS = {"asimd", "asimddp", "i8mm", "sve", "sve2", "bf16"}
ISA_FLAGS = frozenset(X64_FLAGS | ARM64_FLAGS)
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})

# NumPy's feature groups -> Linux flags. X86_V3, X86_V4 and the AVX512 groups each contain AVX2.
_NUMPY_FEATURES = {
    "AVX2": ("avx2",),
    "X86_V3": ("avx2",),
    "X86_V4": ("avx2", "avx512f", "avx512bw", "avx512vl"),
    "AVX512_SKX": ("avx2", "avx512f", "avx512bw", "avx512vl"),
    "AVX512_CLX": ("avx2", "avx512_vnni"),
    "AVX512_ICL": ("avx2", "avx512_vnni"),
    "ASIMD": ("asimd",),
    "ASIMDDP": ("asimddp",),
    "SVE": ("sve",),
}


def machine() -> str:
    """``x64`` or ``arm64``, or the platform's own word for anything else."""
    word = platform.machine().lower()
    return {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}.get(word, word)


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Text of ``/proc/cpuinfo`` -> flags of its first core (``flags`` on x86, ``Features`` on ARM)."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _numpy_flags() -> frozenset[str]:
    import numpy as np

    found = np.show_config(mode="dicts")
    simd = found.get("SIMD Extensions", {}) if found else {}
    features = [*simd.get("baseline", ()), *simd.get("found", ())]
    return frozenset(flag for feature in features for flag in _NUMPY_FEATURES.get(feature, ()))


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of this CPU by their Linux names. Empty where nothing can be found out."""
    if CPUINFO.is_file():
        return parse_cpuinfo(CPUINFO.read_text(errors="replace"))
    return _numpy_flags()


def isa_fingerprint() -> str:
    """Short text, equal on machines whose integer kernels are the same: ``x64-1f0c2a9b``."""
    flags = " ".join(sorted(cpu_flags() & ISA_FLAGS))
    return f"{machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def family(machine_name: str, flags: frozenset[str]) -> str:
    """Machine and flags -> name of the shipped target. TargetError for a machine no target describes."""
    if machine_name == "arm64":
        return "cpu-arm64"
    if machine_name == "x64":
        return "cpu-x64-vnni" if flags & VNNI_FLAGS else "cpu-x64-avx2"
    raise TargetError(
        f"no target describes this machine: found {machine_name!r}, expected x64 or arm64",
        hint="name a target (edgeq list targets) or write a TOML file that extends one",
    )


def local_name() -> str:
    """Name of the target this machine is."""
    return family(machine(), cpu_flags())


def missing_isa(needed: tuple[str, ...], flags: frozenset[str]) -> tuple[str, ...]:
    """The entries of a target's ``isa`` this CPU lacks. ``a|b`` is met by either flag."""
    return tuple(entry for entry in needed if flags.isdisjoint(entry.split("|")))


def elsewhere(target: Target) -> str:
    """Why a latency measured here says nothing of the target's device; "" when this machine is one."""
    if machine() in target.emulator:
        return f"on {machine()} machines {target.library or target.provider} emulates the device of {target.name!r}"
    if target.device_files and platform.system() == "Linux" and not any(map(glob, target.device_files)):
        return f"this machine has none of {', '.join(target.device_files)}: software stands in for a GPU"
    lacking = missing_isa(target.isa, cpu_flags())
    return f"this CPU lacks {', '.join(lacking)}, which target {target.name!r} needs" if lacking else ""
