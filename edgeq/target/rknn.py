"""Files for Rockchip's NPUs, compiled by rknn-toolkit2 in its own Python environment, and their simulator (L3)."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError, RuntimeUnavailableError
from edgeq.target import rknn_worker
from edgeq.target.environment import python_of
from edgeq.target.record import Target

Arrays = Mapping[str, NDArray[Any]]


def compile_rknn(
    model: Path, target: Target, path: Path, inputs: Sequence[str], outputs: Sequence[str], feeds: Sequence[Arrays]
) -> tuple[str, list[dict[str, NDArray[Any]]]]:
    """Compile ``model``, whose Q/DQ decide what is integer, for ``target`` to ``path``. The toolkit's version, and what
    the simulator computes of each feed.

    RuntimeUnavailableError without the toolkit, ModelError where it refuses the model."""
    python = python_of(target.environment, target.packages, target.toolkit)
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        job = {
            "model": str(model.resolve()), "config": dict(target.options), "inputs": list(inputs),
            "outputs": list(outputs), "runs": len(feeds),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        given: dict[str, Any] = {f"{i} {key}": feed[key] for i, feed in enumerate(feeds) for key in inputs}
        np.savez(folder / "feeds.npz", **given)
        result = _run(python, folder)
        if "error" in result:
            raise ModelError(
                f"{target.toolkit} {result['sdk']} can't compile {model}: {result['error']}",
                hint=f"it takes fixed shapes and opset {target.opset} at most; see `edgeq explain {target.name}`",
            )
        shutil.move(folder / "model.rknn", path)
        with np.load(folder / "outputs.npz") as arrays:
            found = [{key: arrays[f"{index} {key}"] for key in outputs} for index in range(len(feeds))]
    return str(result["sdk"]), found


def _run(python: Path, folder: Path) -> dict[str, Any]:
    """``-P`` keeps this folder off the other Python's path: its modules' names are common ones."""
    done = subprocess.run(
        [python, "-P", rknn_worker.__file__, str(folder)],
        cwd=folder, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        tail = " | ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
        raise RuntimeUnavailableError(
            f"the process of rknn-toolkit2 ended with {how}: {tail}",
            hint=f"delete {python.parent.parent} and make it again if it isn't whole",
        )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result
