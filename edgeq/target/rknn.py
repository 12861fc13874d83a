"""Files for Rockchip's NPUs, compiled by rknn-toolkit2 in its own Python environment, and their simulator (L3)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.target import rknn_worker
from edgeq.target.environment import run_toolkit
from edgeq.target.record import Target

Arrays = Mapping[str, NDArray[Any]]


def compile_rknn(
    model: Path, target: Target, path: Path, inputs: Sequence[str], outputs: Sequence[str], feeds: Sequence[Arrays]
) -> tuple[str, list[dict[str, NDArray[Any]]]]:
    """Compile ``model``, whose Q/DQ decide what is integer, for ``target`` to ``path``. The toolkit's version, and what
    the simulator computes of each feed.

    RuntimeUnavailableError without the toolkit, ModelError where it refuses the model."""
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        job = {
            "model": str(model.resolve()), "config": dict(target.options), "inputs": list(inputs),
            "outputs": list(outputs), "runs": len(feeds),
        }  # fmt: skip
        given: dict[str, Any] = {f"{i} {key}": feed[key] for i, feed in enumerate(feeds) for key in inputs}
        np.savez(folder / "feeds.npz", **given)
        result = run_toolkit(target, rknn_worker.__file__, folder, job)
        if "error" in result:
            raise ModelError(
                f"{target.toolkit} {result['sdk']} can't compile {model}: {result['error']}",
                hint=f"it takes fixed shapes and opset {target.opset} at most; see `edgeq explain {target.name}`",
            )
        shutil.move(folder / "model.rknn", path)
        with np.load(folder / "outputs.npz") as arrays:
            found = [{key: arrays[f"{index} {key}"] for key in outputs} for index in range(len(feeds))]
    return str(result["sdk"]), found
