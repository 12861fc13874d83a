"""Opens the edgeq package it lies in, with numpy and onnxruntime only (L8, stands alone).

``session = load.load()`` is a checked ONNX Runtime session, ``answer = load.pipeline()`` a function from a picture or
arrays to answers. On first start every digest is checked, the variants this machine can run repeat their golden runs,
and the fastest is remembered with the time stamps of its files; later starts only compare these.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnxruntime as ort

from edgeq.run.buckets import Bucketed  # load.py holds that file in place of this line
from edgeq.run.pictures import canary_picture, preprocess  # load.py holds that file in place of this line

HERE = Path(__file__).parent
RUNS = 5  # of a golden run, to tell which variant is fastest
CLEARLY = 0.95  # a later variant must beat the preferred one by more than noise
SETTLED_SECONDS = 0.1  # a file changed less than this ago could change again within one tick of the clock
Session: TypeAlias = ort.InferenceSession | Bucketed  # the latter of any shape up to its largest file's


class Choice(NamedTuple):
    """An open variant, and why those before it aren't used."""

    session: Session
    variant: str
    passed_over: tuple[str, ...] = ()


def load(folder: Path = HERE, threads: int = 0, *, trust: bytes = b"", fresh: bool = False) -> Session:
    """Verified session. ValueError: altered, or wrong results. RuntimeError: this machine lacks what it needs."""
    return choose(folder, threads, trust=trust, fresh=fresh).session


def choose(folder: Path = HERE, threads: int = 0, *, trust: bytes = b"", fresh: bool = False) -> Choice:
    """The variant for this machine. ``trust``: 32 bytes of an Ed25519 key that must have signed the package (needs the
    package ``cryptography``). ``fresh`` checks everything again."""
    folder = Path(folder)
    manifest = read_manifest(folder, trust)
    memory, stamp = _memory(folder), _stamp(folder, manifest)
    changed = max((times[2] for times in stamp["files"].values()), default=0)
    settled = time.time() - changed / 1e9 >= SETTLED_SECONDS
    known = None if fresh else _remembered(memory, stamp)
    if known:
        (variant,) = (row for row in manifest["variants"] if row["name"] == known["variant"])
        return Choice(_open(folder, variant, threads), variant["name"], tuple(known["passed_over"]))
    check_files(folder, manifest)
    choice = _fastest(folder, manifest, threads)
    for words in choice.passed_over:
        warnings.warn(f"{folder}: {words}; running {choice.variant!r}", stacklevel=2)
    if memory is not None and settled:
        _remember(memory, {"stamp": stamp, "variant": choice.variant, "passed_over": choice.passed_over})
    return choice


def read_manifest(folder: Path, trust: bytes = b"") -> dict[str, Any]:
    text = (folder / "manifest.json").read_bytes()
    if (folder / "manifest.sha256").read_bytes() != f"{hashlib.sha256(text).hexdigest()}  manifest.json\n".encode():
        raise ValueError(f"{folder / 'manifest.json'} is altered: its sha256 isn't in manifest.sha256; copy it again")
    if trust:
        _check_signature(folder / "manifest.sig", text, trust)
    found: dict[str, Any] = json.loads(text)
    return found


def _check_signature(path: Path, text: bytes, trust: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not path.is_file():
        raise ValueError(f"{path.parent} isn't signed: no {path.name} in it")
    try:
        Ed25519PublicKey.from_public_bytes(trust).verify(bytes.fromhex(json.loads(path.read_text())["signature"]), text)
    except (InvalidSignature, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no signature of manifest.json by the trusted key {trust.hex()}") from error


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    for name, facts in manifest["files"].items():
        path = folder / name  # files for people may be left out of an app; what is there must be whole
        if not path.exists() and not facts["needed"]:
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                raise ValueError(f"{path} is altered: its sha256 isn't the manifest's; copy the package again")


def _fastest(folder: Path, manifest: dict[str, Any], threads: int) -> Choice:
    """The first variant that runs and repeats its golden runs, unless a later one is clearly faster."""
    faults: list[Exception] = []
    passed, best, best_ms = [], None, float("inf")
    for variant in manifest["variants"]:
        try:
            _check_machine(folder, variant["requires"])
            session = _open(folder, variant, threads)
            run = _check_golden(folder, session, variant["golden"], manifest["golden"])
        except Exception as fault:  # noqa: BLE001 - the runtime's errors share no base; another variant may do
            faults.append(fault)
            passed.append(f"variant {variant['name']!r} isn't used: {fault}")
            continue
        took = _milliseconds(run) if len(manifest["variants"]) > 1 else 0.0
        if best is not None and took >= CLEARLY * best_ms:
            continue
        if best is not None:
            passed.append(
                f"variant {best.variant!r} isn't used: {best_ms:.3g} ms a run, {variant['name']!r} {took:.3g}"
            )
        best, best_ms = Choice(session, variant["name"]), took
    if best is None:
        raise faults[0] if len(faults) == 1 else RuntimeError(f"{folder} has no variant that runs: {'; '.join(passed)}")
    return best._replace(passed_over=tuple(passed))


def _check_machine(folder: Path, needs: dict[str, Any]) -> None:
    info = Path("/proc/cpuinfo")  # elsewhere the golden runs alone must tell
    flags = info.read_text().split() if info.exists() else "|".join(needs["isa"]).split("|")
    missing = [word for word in needs["isa"] if not set(word.split("|")) & set(flags)]
    provider, plugin = needs["provider"], needs.get("library")  # plugin: a Python module that ships the provider
    missing += [] if plugin or provider in ort.get_available_providers() else [provider]
    missing += [f"the Python module {plugin}"] if plugin and importlib.util.find_spec(plugin) is None else []
    if [int(part) for part in ort.__version__.split(".")[:2]] < [int(part) for part in needs["onnxruntime"].split(".")]:
        missing.append(f"onnxruntime >= {needs['onnxruntime']}, found {ort.__version__}")
    if missing:
        raise RuntimeError(f"{folder} can't run here: this machine lacks {', '.join(missing)}")


def _open(folder: Path, variant: dict[str, Any], threads: int) -> Session:
    how = variant.get("buckets")
    if how:
        return Bucketed(how, [_session(folder, {**variant, "model": model}, threads) for model in how["models"]])
    return _session(folder, variant, threads)


def _session(folder: Path, variant: dict[str, Any], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in variant["session"].items():
        options.add_session_config_entry(key, value)
    needs = variant["requires"]
    provider, plugin = needs["provider"], needs.get("library")  # plugin: a Python module that ships the provider
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    _add_kernels(folder, variant, options)
    named = {"providers": [(provider, needs.get("options", {}))]}
    if plugin:
        if all(device.ep_name != provider for device in ort.get_ep_devices()):
            library = importlib.import_module(plugin).get_library_path()
            ort.register_execution_provider_library(provider, library)
        devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
        options.add_provider_for_devices(devices, needs["options"])
        named = {}
    session = ort.InferenceSession(folder / variant["model"], options, **named)
    if all(part.ep_name != provider for part in session.get_provider_graph_assignment_info()):
        raise RuntimeError(f"{folder} would run on the CPU here: {provider} took no node of it")
    return session


def _add_kernels(folder: Path, variant: dict[str, Any], options: ort.SessionOptions) -> None:
    """Kernels of the package's own, where it holds a library for this machine; elsewhere the model's functions run,
    which compute the same."""
    name = variant.get("kernels", {}).get(f"{sys.platform}-{platform.machine()}")
    if name and (folder / name).exists():  # an app may leave it out
        try:
            options.register_custom_ops_library(str(folder / name))
        except Exception as fault:  # noqa: BLE001 - the runtime's errors share no base
            warnings.warn(f"{folder / name} isn't used, which only takes longer: {fault}", stacklevel=2)


def _check_golden(folder: Path, session: Session, golden: dict[str, Any], file: str) -> Callable[[], Any]:
    """ValueError unless every golden run is repeated; returns the first of them, to be timed."""
    data = (folder / file).read_bytes()
    feeds = []
    for index, run in enumerate(golden["runs"]):
        feeds.append({name: _array(data, reference) for name, reference in run["inputs"].items()})
        for name, tolerance in golden["tolerances"].items():
            (got,), want = session.run([name], feeds[-1]), _array(data, run["outputs"][name])
            if got.shape != want.shape or not np.allclose(got, want, rtol=0, atol=tolerance, equal_nan=True):
                raise ValueError(f"{folder}: {name!r} differs from golden sample {index} by more than {tolerance}")
    return lambda: session.run(None, feeds[0]) if feeds else None


def _array(data: bytes, reference: dict[str, Any]) -> Any:
    part = data[reference["offset"] : reference["offset"] + reference["bytes"]]
    if reference["dtype"] == "str":
        return np.array(json.loads(part), object).reshape(reference["shape"])
    return np.frombuffer(part, np.dtype(reference["dtype"]).newbyteorder("<")).reshape(reference["shape"])


def _milliseconds(run: Callable[[], Any]) -> float:
    laps = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        laps.append(1e3 * (time.perf_counter() - start))
    return statistics.median(laps)


def _memory(folder: Path) -> Path | None:
    """Where the result of the first start is kept: ``EDGEQ_STATE``, else the user's cache. None: nowhere."""
    digest = (folder / "manifest.sha256").read_text()[:64]
    place = os.environ.get("EDGEQ_STATE") or os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home: nothing is remembered, all is checked at each start
        return Path(place or Path.home() / ".cache") / "edgeq-loaded" / f"{digest}.json"
    return None


def _stamp(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a remembered result to count: runtime, CPU, each file's size and time of change."""
    info = Path("/proc/cpuinfo")
    flags = sorted(set(info.read_text().split())) if info.exists() else []
    stats = {name: (folder / name).stat() for name in manifest["files"] if (folder / name).exists()}
    return {
        "place": str(folder.resolve()),
        "onnxruntime": ort.__version__,
        "cpu": hashlib.sha256(" ".join(word for word in flags if not word[:1].isdigit()).encode()).hexdigest(),
        "files": {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()},
    }


def _remembered(memory: Path | None, stamp: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(memory.read_text()) if memory else {}
    except (OSError, ValueError):  # none, or cut off: check again
        return None
    return found if found.get("stamp") == stamp else None


def _remember(memory: Path, result: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a place that can't be written: all is checked at each start
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result))
        partial.replace(memory)


def pipeline(folder: Path = HERE, threads: int = 0, **how: Any) -> Callable[[Any], Any]:
    """A function: a picture (u8[h, w, 3] or PIL) or {input: array} -> answers, or {output: array} where the package
    has no postprocessing. Answers: a list a row of ``{"label", "index", "score"}``, best first."""
    session = load(folder, threads, **how)
    manifest = read_manifest(Path(folder))
    before, after = manifest["preprocessing"], manifest["postprocessing"]
    if before:
        _check_canary(before, manifest["canary"])
    names = [item.name for item in session.get_outputs()]

    def run(given: Any) -> Any:
        if not isinstance(given, dict):
            if not before:
                raise ValueError(f"{folder} holds no preprocessing for pictures: give {{input name: array}}")
            given = {session.get_inputs()[0].name: preprocess(given, before)}
        found = dict(zip(names, session.run(names, given), strict=True))
        return postprocess(found[after["output"]], after, manifest["labels"]) if after else found

    return run


def _check_canary(how: dict[str, Any], canary: dict[str, Any]) -> None:
    """ValueError unless a known picture becomes the known values."""
    values = preprocess(canary_picture(canary["height"], canary["width"]), how).ravel()
    for index, value in zip(canary["at"], canary["values"], strict=True):
        if abs(float(values[index]) - value) > canary["tolerance"]:
            raise ValueError(f"preprocessing makes {values[index]} of the canary picture at {index}, expected {value}")


def postprocess(scores: Any, how: dict[str, Any], labels: list[str]) -> list[list[dict[str, Any]]]:
    """Scores [..., classes] -> a list a row of ``{"label", "index", "score"}``, best first."""
    rows: Any = np.asarray(scores, np.float64).reshape(-1, scores.shape[-1])
    if how["activation"] == "softmax":
        rows = np.exp(rows - rows.max(1, keepdims=True))
        rows = rows / rows.sum(1, keepdims=True)
    elif how["activation"] == "sigmoid":
        rows = 1 / (1 + np.exp(-rows))
    answers = []
    for row in rows:
        order = np.argsort(-row, kind="stable")[: how["top"] or None]
        kept = [int(index) for index in order if row[index] >= how["threshold"]]
        answers.append(
            [{"label": labels[i] if i < len(labels) else str(i), "index": i, "score": float(row[i])} for i in kept]
        )
    return answers


if __name__ == "__main__":
    load(fresh=True)
