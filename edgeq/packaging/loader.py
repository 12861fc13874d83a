"""Opens the edgeq package it lies in, with numpy and onnxruntime only: ``session = load.load()`` (L8, stands alone)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort


def load(folder: Path = Path(__file__).parent, threads: int = 0) -> ort.InferenceSession:
    """Verified session. ValueError: altered, or wrong results. RuntimeError: this machine lacks what it needs."""
    text = (folder / "manifest.json").read_bytes()
    if (folder / "manifest.sha256").read_bytes() != f"{hashlib.sha256(text).hexdigest()}  manifest.json\n".encode():
        raise ValueError(f"{folder / 'manifest.json'} is altered: its sha256 isn't in manifest.sha256; copy it again")
    manifest = json.loads(text)
    for name, facts in manifest["files"].items():
        path = folder / name  # files for people may be left out of an app; what is there must be whole
        if (path.exists() or facts["needed"]) and hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
            raise ValueError(f"{path} is altered: its sha256 isn't the manifest's; copy the package again")
    needs, info = manifest["requires"], Path("/proc/cpuinfo")  # elsewhere the golden outputs alone must tell
    flags = info.read_text().split() if info.exists() else "|".join(needs["isa"]).split("|")
    missing = [word for word in needs["isa"] if not set(word.split("|")) & set(flags)]
    missing += {needs["provider"]} - set(ort.get_available_providers())
    if [int(part) for part in ort.__version__.split(".")[:2]] < [int(part) for part in needs["onnxruntime"].split(".")]:
        missing.append(f"onnxruntime >= {needs['onnxruntime']}, found {ort.__version__}")
    if missing:
        raise RuntimeError(f"{folder} can't run here: this machine lacks {', '.join(missing)}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in manifest["session"].items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(folder / manifest["model"], options, providers=[needs["provider"]])
    golden = np.load(folder / "golden.npz", allow_pickle=False)
    for index in range(manifest["golden"]["count"]):
        feed = {item.name: golden[f"{index}/input/{item.name}"] for item in session.get_inputs()}
        for name, tolerance in manifest["golden"]["tolerances"].items():
            (got,), want = session.run([name], feed), golden[f"{index}/output/{name}"]
            if got.shape != want.shape or not np.allclose(got, want, rtol=0, atol=tolerance, equal_nan=True):
                raise ValueError(f"{folder}: {name!r} differs from golden sample {index} by more than {tolerance}")
    return session


if __name__ == "__main__":
    load()
