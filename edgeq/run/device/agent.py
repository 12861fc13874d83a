"""What runs on a device: it needs numpy and onnxruntime, for ``facts`` and ``keep`` Python alone (L4, stands alone).

``facts`` prints what this machine is. ``keep FOLDER SECONDS`` runs each ``job-N.json`` that appears in the folder, one
after the other, each in a process of its own, and leaves ``job-N.done``. It holds no connection: a cut link or a host
that is gone changes nothing, and what was asked is done when the host comes back. When the host hasn't touched
``alive`` for that long, or leaves ``stop``, every process is ended and the folder removed. Started again after the
device was off, it runs anew what wasn't done. Devices are old: Python 3.8 must do.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035 - used at run time by Python 3.8

WINDOWS = 12  # parts of a sustained run; the state is read between them
MIN_LAPS, MAX_LAPS, MIN_ROUNDS, MAX_ROUNDS = 2, 20, 3, 2000
TURN_MS = 20.0  # a turn lasts about this long, so that short laps aren't all hand-over
WATCH_SECONDS = 0.05

Tree = Dict[str, Any]  # noqa: UP006
Feeds = List[Dict[str, Any]]  # noqa: UP006
Running = Optional[Tuple[str, "subprocess.Popen[bytes]"]]  # noqa: UP006, UP045


class Failure(Exception):  # noqa: N818 - it is an answer, not a bug
    """What a job can end with: a kind the host knows, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# --- facts -----------------------------------------------------------------------------------------------------------


def facts(folder: Path) -> Tree:
    """What this machine is."""
    missing = [name for name in ("numpy", "onnxruntime") if importlib.util.find_spec(name) is None]
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "board": _text("/sys/firmware/devicetree/base/model").strip("\0"),
        "isa": _isa(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": _memory_bytes(),
        "free_bytes": shutil.disk_usage(folder).free,
        "python": platform.python_version(),
        "runtime": "" if missing else _version(),
        "missing": missing,
        "emulator": _emulator(),
        **state(),
    }


def _version() -> str:
    """ONNX Runtime's, read instead of imported, which takes seconds on a small device."""
    spec = importlib.util.find_spec("onnxruntime")
    found = re.search(r'^__version__ = "([^"]+)"', _text(spec.origin if spec and spec.origin else ""), re.MULTILINE)
    return found.group(1) if found else "unknown"


def state() -> Tree:
    """What changes from minute to minute and moves latencies: governor, clocks in MHz, temperatures in Celsius."""
    cores = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    zones = {zone: _text(zone / "temp") for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*"))}
    return {
        "governor": ", ".join(sorted({_text(core / "scaling_governor") for core in cores})),
        "mhz": [int(clock) / 1000 for clock in (_text(core / "scaling_cur_freq") for core in cores) if clock],
        "celsius": {_text(zone / "type") or zone.name: int(heat) / 1000 for zone, heat in zones.items() if heat},
    }


RAPL = ("name", "energy_uj", "max_energy_range_uj")
BATTERY = ("status", "energy_now", "charge_now", "voltage_now", "current_now", "power_now")


def power(root: Path = Path("/sys/class")) -> Tree:
    """What the kernel shows of energy, in its own words and units: counters of processor packages, batteries."""
    zones = [zone for zone in sorted((root / "powercap").glob("intel-rapl:*")) if zone.name.count(":") == 1]
    supplies = [one for one in sorted((root / "power_supply").glob("*")) if _text(one / "type") == "Battery"]
    return {
        "rapl": [{key: _text(zone / key) for key in RAPL} for zone in zones],
        "batteries": [{key: _text(one / key) for key in BATTERY} for one in supplies],
    }


def _text(path: str | Path) -> str:
    """A file of the kernel's, empty where this one hasn't it: most are missing on most machines."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _isa() -> list[str]:
    """The first core's flags, sorted."""
    rows = [line.partition(":") for line in _text("/proc/cpuinfo").splitlines()]
    return sorted(next((value.split() for key, _, value in rows if key.strip() in ("flags", "Features")), []))


def _memory_bytes() -> int:
    rows = [line.split() for line in _text("/proc/meminfo").splitlines()]
    return next((int(row[1]) * 1024 for row in rows if row[0] == "MemTotal:"), 0)


def _emulator() -> str:
    """What interprets this machine's instructions, "" where silicon does. QEMU shows a program its own name, but not
    that of its parent."""
    try:
        name = Path(os.readlink(f"/proc/{os.getppid()}/exe")).name  # noqa: PTH115 - Path.readlink is of Python 3.9
    except OSError:
        name = ""
    return name if name.startswith("qemu-") else "Android emulator" if "ranchu" in _text("/proc/cmdline") else ""


# --- keep ------------------------------------------------------------------------------------------------------------


def keep(folder: Path, lease: float) -> None:
    """Run jobs until told to stop or forgotten for ``lease`` seconds; then remove the folder."""
    import fcntl

    os.chdir(folder)
    lock = Path("lock").open("a")  # noqa: SIM115 - held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # another keeps it
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    running: Running = None
    seen, since = _touched(), time.monotonic()
    while Path("lock").exists() and not Path("stop").exists() and time.monotonic() - since < lease:
        if _touched() != seen:
            seen, since = _touched(), time.monotonic()
        running = _next(running)
        time.sleep(WATCH_SECONDS)
    if running:
        os.killpg(running[1].pid, signal.SIGKILL)
        running[1].wait()
    os.chdir("/")
    shutil.rmtree(folder, ignore_errors=True)


def _touched() -> int:
    try:
        return os.stat("alive").st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0


def _next(running: Running) -> Running:
    """(job, process) that runs after a look at what ran before and what waits."""
    if running:
        name, process = running
        if process.poll() is None:
            return running
        _finish(name, process.returncode)
        return None
    waiting = [path.stem for path in Path().glob("job-*.json") if not path.with_suffix(".done").exists()]
    if not waiting:
        return None
    name = min(waiting, key=lambda job: int(job.partition("-")[2]))
    with Path(f"{name}.log").open("wb") as log:
        command = [sys.executable, str(Path("agent.py").resolve()), "run", name]
        return name, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _finish(name: str, status: int) -> None:
    """Leave what the host waits for, whole at once."""
    result = _text(f"{name}.result")
    told = {"status": status, "log": _text(f"{name}.log")[-2000:], "result": json.loads(result) if result else None}
    _write(Path(f"{name}.done"), told)


def _write(path: Path, tree: Tree) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(tree), encoding="utf-8")
    partial.replace(path)


# --- jobs ------------------------------------------------------------------------------------------------------------


def run(name: str) -> None:
    """One job of the working folder: check every file it uses, do its task, leave ``NAME.result``."""
    job = json.loads(Path(f"{name}.json").read_text(encoding="utf-8"))
    try:
        for path, digest in job["files"].items():
            if _sha256(path) != digest:
                raise Failure("altered", f"{path} isn't what was sent: its sha256 differs")
        result = TASKS[job["task"]](job, name)
    except Failure as failure:
        result = {"error": [failure.kind, str(failure)]}
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        result = {"error": ["disk", "the disk is full"]}
    _write(Path(f"{name}.result"), result)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise Failure("runtime", str(error)) from error
    return onnxruntime


def _open(model: Tree, threads: int, **settings: str) -> Any:
    """An InferenceSession. ``threads`` 0: on the process's pool."""
    onnxruntime = _runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = threads > 0
    options.intra_op_num_threads = threads
    for key, value in settings.items():
        setattr(options, key, value)
    for key, value in model["session"].items():
        options.add_session_config_entry(key, value)
    if model["kernels"]:
        try:
            options.register_custom_ops_library(str(Path(model["kernels"]).resolve()))
        except Exception as error:  # the runtime's classes share no base
            raise Failure("model", f"the library of its kernels can't be loaded: {error}") from error
    if model["provider"] not in onnxruntime.get_available_providers():
        raise Failure("runtime", f"onnxruntime {onnxruntime.__version__} there has no {model['provider']}")
    try:
        return onnxruntime.InferenceSession(model["file"], options, providers=[model["provider"]])
    except Exception as error:  # the runtime's classes share no base
        raise Failure("model", f"{model['name']} can't be loaded: {str(error).splitlines()[0]}") from error


def _run(session: Any, model: Tree, feed: Tree, outputs: list[str] | None) -> Any:
    try:
        return session.run(outputs, feed)
    except Exception as error:  # as above
        raise Failure("run", f"{model['name']} fails while running: {str(error).splitlines()[0]}") from error


def _feeds(packed: Tree) -> Feeds:
    """What ``tensors.pack`` made on the host: a dict of arrays a sample."""
    data = Path(packed["file"]).read_bytes()
    return [{one["name"]: _array(data, one) for one in row} for row in packed["index"]]


def _array(data: bytes, one: Tree) -> Any:
    import numpy

    count = int(numpy.prod(one["shape"]))
    return numpy.frombuffer(data, one["dtype"], count, one["offset"]).reshape(one["shape"])


def _outputs(job: Tree, name: str) -> Tree:
    """Outputs of each sample, as the host packs its inputs; with ``graph`` also what the runtime made of the model."""
    path, kept = f"{name}.out", {"optimized_model_filepath": f"{name}.onnx"} if job["graph"] else {}
    model = job["models"][0]
    session = _open(model, job["threads"], **kept)
    wanted = job["outputs"] or [one.name for one in session.get_outputs()]
    index = []
    with Path(path).open("wb") as file:
        for feed in _feeds(job["feeds"]):
            row = []
            for key, array in zip(wanted, _run(session, model, feed, wanted)):  # noqa: B905 - `strict` is of 3.10
                row.append({"name": key, "dtype": array.dtype.str, "shape": array.shape, "offset": file.tell()})
                file.write(array.tobytes())
            index.append(row)
    return {"index": index, "files": {made: _sha256(made) for made in (path, *kept.values())}}


def _compare(job: Tree, _name: str) -> Tree:
    """Laps of all models, interleaved in random order on one shared thread pool until ``seconds`` are over."""
    import numpy

    _runtime().set_global_thread_pool_sizes(job["threads"], 1)
    feeds = _feeds(job["feeds"])
    contenders = [_Contender(model, feeds[0]) for model in job["models"]]
    rng, before, start = numpy.random.default_rng(job["seed"]), state(), time.monotonic()
    gc.disable()
    for index in range(MAX_ROUNDS):
        if index >= MIN_ROUNDS and time.monotonic() - start > job["seconds"]:
            break
        for position in rng.permutation(len(contenders)):
            contenders[position].turn(feeds[index % len(feeds)])
    return {"timings": {one.model["name"]: one.timing() for one in contenders}, "before": before, "after": state()}


def _sustained(job: Tree, _name: str) -> Tree:
    """Laps of one model back to back for ``seconds``, in windows, with the device's state and energy around each."""
    model = job["models"][0]
    session = _open(model, job["threads"])
    inputs = [one.name for one in session.get_inputs()]
    feeds = [{name: feed[name] for name in inputs} for feed in _feeds(job["feeds"])]
    _run(session, model, feeds[0], None)
    windows, count = [], 0  # type: List[Tree], int
    start = time.monotonic()
    before = {"at_s": 0.0, "power": power(), **state()}
    while len(windows) < WINDOWS and (not windows or time.monotonic() < start + job["seconds"]):
        end, laps = start + job["seconds"] * (len(windows) + 1) / WINDOWS, []  # type: float, List[float]
        while not laps or time.monotonic() < end:
            begun = time.perf_counter_ns()
            session.run(None, feeds[count % len(feeds)])
            laps.append(round((time.perf_counter_ns() - begun) / 1e6, 4))
            count += 1
        windows.append({"laps_ms": laps, "at_s": time.monotonic() - start, "power": power(), **state()})
    return {"before": before, "windows": windows}


def _observe(job: Tree, name: str) -> Tree:
    """Statistics of tensors over the device's own samples. These stay, and so does every single value: what leaves are
    sums, extremes and histograms, counted by the module that is sent along."""
    import numpy

    Stats = importlib.import_module(job["module"]).Stats
    taps, stats = {tap["name"]: tap for tap in job["taps"]}, {tap["name"]: Stats() for tap in job["taps"]}
    sessions = [(model, _open(model, job["threads"])) for model in job["models"]]
    count = 0
    for feed in itertools.islice(_own_rows(Path(job["data"]).expanduser(), job["inputs"]), job["limit"]):
        mask = feed.get(job["mask"])
        for key in stats:
            if key in feed:
                _count(stats[key], taps[key], feed[key], mask, count)
        for model, session in sessions:
            outputs = [one.name for one in session.get_outputs()]
            given = {one.name: feed[one.name] for one in session.get_inputs()}
            for key, array in zip(outputs, _run(session, model, given, outputs)):  # noqa: B905 - as above
                _count(stats[key], taps[key], array, mask, count)
        count += 1
    found = {f"{place}.{key}": array for place, one in enumerate(stats.values())
             for key, array in one.to_arrays().items() if key not in job["raw"]}  # fmt: skip
    with Path(f"{name}.out").open("wb") as file:
        numpy.savez(file, **found)
    return {"samples": count, "files": {f"{name}.out": _sha256(f"{name}.out")}}


def _count(stats: Any, tap: Tree, array: Any, mask: Any, index: int) -> None:
    """Take a tensor in, what ``mask`` calls padding left out."""
    axis = tap["axes"][min(array.ndim, len(tap["axes"]) - 1)]
    fits = tap["masked"] and mask is not None and mask.dtype.kind != "f" and array.shape[: mask.ndim] == mask.shape
    if fits and not mask.all():
        array, axis = array[mask.astype(bool)], axis if axis == -1 else None
    stats.add(array, index, axis)


def _own_rows(place: Path, inputs: List[Tree]) -> Any:  # noqa: UP006
    """A dict of arrays for each sample in the ``.npz`` files at ``place``, one file in memory at a time."""
    import numpy

    paths = sorted(place.glob("*.npz")) if place.is_dir() else [place] if place.is_file() else []
    if not paths:
        raise Failure("data", f"no .npz file at {place}")
    for path in paths:
        try:
            with numpy.load(path, allow_pickle=False) as file:
                arrays = {one["name"]: file[one["name"]] for one in inputs}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise Failure("data", f"{path} can't be read as samples: {error}") from error
        for index in range(min(len(array) for array in arrays.values())):
            yield {one["name"]: _row(arrays[one["name"]], index, one) for one in inputs}


def _row(array: Any, index: int, one: Tree) -> Any:
    """A sample as an input takes it: its axis is the batch's, or stands before it."""
    row = array[index : index + 1]
    return (row if row.ndim == one["rank"] else row[0]).astype(one["dtype"])


class _Contender:
    """A model and what has been measured of it so far."""

    def __init__(self, model: Tree, feed: Tree) -> None:
        self.model, self.laps = model, []  # type: Tree, List[float]
        start = time.perf_counter()
        self.session = _open(model, 0)
        loaded = time.perf_counter()
        self.inputs = [one.name for one in self.session.get_inputs()]
        self.outputs = [one.name for one in self.session.get_outputs()]
        _run(self.session, model, self.taken(feed), self.outputs)
        self.load_ms, self.first_ms = (loaded - start) * 1e3, (time.perf_counter() - loaded) * 1e3
        warm = min(self.lap(feed) for _ in range(2))
        self.laps_per_turn = min(max(round(TURN_MS / warm), MIN_LAPS), MAX_LAPS)

    def taken(self, feed: Tree) -> Tree:
        """What of ``feed`` this file takes: an input the others still have may be pinned in it."""
        return {name: feed[name] for name in self.inputs}

    def lap(self, feed: Tree) -> float:
        own = self.taken(feed)
        start = time.perf_counter_ns()
        self.session.run(self.outputs, own)
        return (time.perf_counter_ns() - start) / 1e6

    def turn(self, feed: Tree) -> None:
        self.lap(feed)  # pays for the caches the others took
        self.laps += [self.lap(feed) for _ in range(self.laps_per_turn)]

    def timing(self) -> Tree:
        names = ("laps_per_turn", "load_ms", "first_ms")
        return {"laps_ms": self.laps, **{name: getattr(self, name) for name in names}}


def _memory(job: Tree, _name: str) -> Tree:
    """Load and run twice; the peak is above what this process held before."""
    feed, model = _feeds(job["feeds"])[0], job["models"][0]
    _runtime()
    before = _resident(reset=True)
    start = time.perf_counter()
    session = _open(model, job["threads"])
    loaded = time.perf_counter()
    inputs = {one.name: feed[one.name] for one in session.get_inputs()}
    _run(session, model, inputs, None)
    first = time.perf_counter()
    _run(session, model, inputs, None)  # uses the memory plan the first run made
    peak = max(_resident() - before, 0)
    return {"peak_bytes": peak, "load_ms": (loaded - start) * 1e3, "first_ms": (first - loaded) * 1e3}


def _resident(reset: bool = False) -> int:
    """Highest resident bytes; with ``reset`` those of now, from which the highest counts again where Linux lets it."""
    if reset:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            reset = False
    rows = [line.split() for line in _text("/proc/self/status").splitlines()]
    return next(int(row[1]) * 1024 for row in rows if row and row[0] == ("VmRSS:" if reset else "VmHWM:"))


def _versions(_job: Tree, _name: str) -> Tree:
    """Whether the runtime can be loaded, and what it has."""
    onnxruntime = _runtime()
    import numpy

    return {"onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__,
            "providers": onnxruntime.get_available_providers()}  # fmt: skip


TASKS = {
    "versions": _versions, "outputs": _outputs, "compare": _compare, "memory": _memory, "sustained": _sustained,
    "observe": _observe,
}  # fmt: skip

if __name__ == "__main__":
    if sys.argv[1] == "facts":
        sys.stdout.write(json.dumps(facts(Path(__file__).resolve().parent)) + "\n")
    elif sys.argv[1] == "keep":
        os.setsid()
        keep(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it would leave files in /tmp and ~/.cache, and call home
        run(sys.argv[2])
