"""Peers in a process and a virtual environment of their own, made once from one table of versions.

edgeq's environment stays as it is, a peer that eats all memory is a result and not the end of the benchmark, and what
each took is measured. Where a peer runs out of the memory allowed it is run again with half of the samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench import quantizers
from tests.bench.peers import Peer, artefact, calibration_feeds
from tests.zoo.packages import ZooError, cache, float_model

# What peers need; the project's own versions (constraints.txt) hold for all that this table doesn't name.
PINS = {
    "nncf": "3.4.0",
    "onnxsim": "0.8.1",
    "onnx": "1.23.2",
    "onnxruntime": "1.32.0",
    "numpy": "2.4.6",
    "sympy": "1.14.0",  # quant_pre_process
}
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
QUIET = {"NNCF_CI": "1"}  # NNCF sends no usage statistics then
MOST_BYTES = 14 * 2**30  # Percentile and Entropy keep every activation of every sample
FEWEST = 8  # samples; a peer that has no room for these has failed


def interpreter() -> Path:
    """The Python of the peers' environment, which is made in the zoo's cache unless it is there."""
    folder, wanted = cache() / "peers-venv", [f"{name}=={version}" for name, version in PINS.items()]
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    if not stamp.is_file() or json.loads(stamp.read_text()) != wanted:
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraint = ["--constraint", str(CONSTRAINTS)] if CONSTRAINTS.is_file() else []
        done = subprocess.run([*command, *constraint, *wanted], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise ZooError(f"can't install {', '.join(wanted)}: {done.stderr.strip()}")
        stamp.write_text(json.dumps(wanted) + "\n")
    return python


def quantized_apart(
    name: str, folder: Path, variants: Sequence[str], samples: int | None = None, most_bytes: int = MOST_BYTES
) -> Iterator[Peer]:
    """The zoo model ``name`` through each of the variants named, one process each, one after the other."""
    python = interpreter()
    feeds = calibration_feeds(name, samples)
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "samples.npz"
        quantizers.pack(feeds, packed)
        for variant in variants:
            path, count = artefact(folder, name, variant), len(feeds)
            found = _run(python, variant, float_model(name), packed, path, count, most_bytes)
            while _starved(found) and count // 2 >= FEWEST:
                count //= 2
                found = _run(python, variant, float_model(name), packed, path, count, most_bytes)
            if count < len(feeds):
                found["note"] = "; ".join(filter(None, (found["note"], f"{count} of {len(feeds)} samples")))
            yield Peer(name, variant, "" if found["error"] else str(path), samples=count, **found)


def _run(
    python: Path, variant: str, source: Path, packed: Path, path: Path, count: int, most_bytes: int
) -> dict[str, Any]:
    """What ``quantizers.main`` found, or that it died before it could say."""
    words = (variant, source, packed, path, count, most_bytes)
    # -P: the folder of these benchmarks stays off the path, where "calibration" is a peer's module too
    command = [str(python), "-P", quantizers.__file__, *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr[-400:] if done.returncode else "")
    if done.returncode != 0:
        path.unlink(missing_ok=True)
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"exit status {done.returncode}: {last}"[:300], "note": "", "seconds": 0.0, "peak_bytes": 0}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _starved(found: dict[str, Any]) -> bool:
    """Whether memory ran out: said so, or the process was killed or aborted for it."""
    words = ("MemoryError", "bad_alloc", "exit status -", "Unable to allocate", "Failed to allocate")
    return any(word in found["error"] for word in words)
