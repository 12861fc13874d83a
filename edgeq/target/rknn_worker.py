"""Compiles an ONNX file for a Rockchip NPU and runs it in the simulator (L3, stands alone).

``python rknn_worker.py FOLDER`` runs in the environment of rknn-toolkit2, which has neither edgeq nor its numpy. The
folder holds ``job.json`` and ``feeds.npz``; ``result.json``, ``outputs.npz`` and the compiled file are left there.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"sdk": metadata.version("rknn-toolkit2")}
    try:
        compile_and_run(job, folder)
    except Exception as error:  # noqa: BLE001 - the toolkit's refusals share no type
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result["error"] = next((line for line in reversed(lines) if "Error" in line), type(error).__name__)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def compile_and_run(job: dict[str, Any], folder: Path) -> None:
    """``job``: the ``model``, the toolkit's ``config``, ``inputs`` and ``outputs`` in order."""
    from rknn.api import RKNN

    toolkit = RKNN(verbose=False)
    toolkit.config(**job["config"])
    done(toolkit.load_onnx(model=job["model"]), "load")
    done(toolkit.build(do_quantization=False), "build")  # Q/DQ of the file decide
    done(toolkit.export_rknn(str(folder / "model.rknn")), "export")
    done(toolkit.init_runtime(), "start the simulator")
    outputs = {}
    with np.load(folder / "feeds.npz") as feeds:
        for index in range(job["runs"]):
            given = [feeds[f"{index} {name}"] for name in job["inputs"]]
            layouts = ["nchw" if array.ndim == 4 else None for array in given]
            found = toolkit.inference(inputs=given, data_format=layouts)
            outputs.update({f"{index} {name}": array for name, array in zip(job["outputs"], found)})  # noqa: B905
    np.savez(folder / "outputs.npz", **outputs)
    toolkit.release()


def done(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"Error: the toolkit can't {what}: status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
