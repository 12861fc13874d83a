"""A machine with a shell as a Device: a runner goes there and does the jobs (L4); ``runners`` has what there is.

It runs detached from the link instead of at its end: a measurement goes on while the link is cut, and is fetched when
it is back. Two things hold for the device whatever happens here: nothing of ours stays (the runner removes its
folder when it is told to, or when nobody has come for ``LEASE_SECONDS``), and nothing runs unchecked (each job compares
the digests of the files it uses).
"""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from edgeq.errors import DeviceError, EdgeqError, ModelError, RuntimeUnavailableError, SampleError
from edgeq.ir import io
from edgeq.run.device import runners
from edgeq.run.device.link import Link, LinkCutError
from edgeq.run.device.record import Device, Facts
from edgeq.run.device.runners import Runner

PYTHON, FOLDER = "python3", "/var/tmp"
LEASE_SECONDS = 600.0
PATIENCE_SECONDS = 60.0  # how long a cut link is tried again
FIRST_LOOK, LAST_LOOK = 0.05, 1.0  # seconds between looks at whether a job is done: looking disturbs a small device
KEEPER_EVERY = 15.0  # seconds between looks at whether the runner still lives
RESTARTS = 2

T = TypeVar("T")


class Remote(Device):
    """``python`` is the device's interpreter, ``folder`` where there is room for files; ``runner`` is python or cpp,
    "" for what can be had; ``library`` is ONNX Runtime's for the C++ runner, "" for one that is found."""

    def __init__(
        self, address: str, link: Link, *, python: str = PYTHON, folder: str = FOLDER, runner: str = "",
        library: str = "",
    ) -> None:  # fmt: skip
        self.address = address
        self._link, self._python = link, python
        self._runner: Runner | None = None  # the one that was started
        self._otherwise = ""
        self._lease, self._patience = LEASE_SECONDS, PATIENCE_SECONDS
        self._sent: dict[str, str] = {}  # name -> sha256
        self._jobs = 0
        self._folder = self._made(folder)
        try:
            self._runner, self.facts = self._chosen(runner, library)
            self._keep(self._runner)
        except BaseException:
            self.close()
            raise

    def push(self, name: str, path: Path) -> None:
        digest = io.file_digest(path)
        if self._sent.get(name) != digest:
            self._put(name, path)
            self._sent[name] = digest

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._runner
        if not self.facts.runtime:
            raise RuntimeUnavailableError(
                f"{self.address} can run no model: its {self._python} has no {' and no '.join(self.facts.missing)}",
                hint=f"install it there: {self._python} -m pip install numpy onnxruntime; or name a Python that has "
                f"it: {self.address}?python=/path/to/python3{self._otherwise}",
            )
        self._jobs += 1
        name = f"job-{self._jobs}"
        with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
            order, answer = Path(folder) / "order", Path(folder) / "answer"
            files = {one: self._sent[one] for one in (*self._runner.files, *job["files"])}
            order.write_text(json.dumps({**job, "files": files}), encoding="utf-8")
            self._put(f"{name}.json", order)
            self._wait(name)
            self._steady(lambda: self._link.get(self._at(f"{name}.done"), answer))
            told = json.loads(answer.read_text(encoding="utf-8"))
        return self._result(job["task"], told)

    def pull(self, name: str, path: Path, digest: str) -> None:
        for _ in range(2):
            self._steady(lambda: self._link.get(self._at(name), path))
            if io.file_digest(path) == digest:
                return
        raise DeviceError(f"{name} of {self.address} arrives altered twice: its sha256 differs", hint="check the link")

    def drop(self, names: list[str]) -> None:
        for name in names:
            self._sent.pop(name, None)
        words = " ".join(shlex.quote(self._at(name)) for name in names)
        self._steady(lambda: self._link.execute(f"rm -f -- {words}"))

    def close(self) -> None:
        """Remove all that is ours. On a device that can't be reached its runner does so by itself, after the lease."""
        self._patience = min(self._patience, 5.0)
        with suppress(DeviceError, FileNotFoundError):
            self._steady(lambda: self._link.touch(self._at("stop")))
            end = time.monotonic() + 2.0
            while self._runner and self._steady(lambda: self._link.exists(self._folder)) and time.monotonic() < end:
                time.sleep(FIRST_LOOK)
            self._steady(lambda: self._link.execute(f"rm -rf -- {shlex.quote(self._folder)}"))
        self._link.close()

    # --- on the way there ---

    def _at(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _made(self, base: str) -> str:
        place = shlex.quote(base)
        done = self._steady(lambda: self._link.execute(f"mkdir -p {place} && mktemp -d {place}/edgeq-XXXXXXXX"))
        if done.status:
            self._link.close()
            raise DeviceError(
                f"{self.address} lets nothing be written in {base}: {_last(done.error)}",
                hint=f"name a folder with room: {self.address}?folder=/path",
            )
        return done.out.strip()

    def _chosen(self, wanted: str, library: str) -> tuple[Runner, Facts]:
        """The runner and what it says. Python's where the device has one that can run models, else the C++ one."""
        if wanted == "cpp":
            return self._compiled(library)
        agent, facts, refused = runners.python(self._python), None, None
        try:
            facts = self._asked(agent)
        except DeviceError as error:
            refused = error
        if facts and (wanted or not facts.missing):
            return agent, facts
        if refused and wanted:
            raise refused
        try:
            return self._compiled(library)
        except EdgeqError as error:
            if refused:
                message = f"{refused.message}, and {error.message}"
                raise DeviceError(message, hint=f"{refused.hint}; or {error.hint}") from error
            assert facts
            self._otherwise = f"; or let the C++ runner do it: {error.message}, {error.hint}"
            return agent, facts

    def _compiled(self, library: str) -> tuple[Runner, Facts]:
        told = self._steady(lambda: self._link.execute("uname -m; test -x /system/bin/linker64 && echo android"))
        machine, *android = told.out.split()
        runner = runners.cpp(machine, android=bool(android), library=library)
        return runner, self._asked(runner)

    def _asked(self, runner: Runner) -> Facts:
        """Send a runner, and let it tell what the device is. DeviceError when it doesn't start there."""
        for name, path in runner.files.items():
            self.push(name, path)
        names, program = " ".join(runner.files), runner.line.partition(" ")[0]
        line = f"cd {shlex.quote(self._folder)} && chmod 700 {names} && {runner.line} facts"
        done = self._steady(lambda: self._link.execute(line))
        if done.status in (126, 127):
            why = (
                f"has no {self._python}" if runner.name == "python" else f"doesn't start {program}: {_last(done.error)}"
            )
            raise DeviceError(f"{self.address} {why}", hint=runner.lacking)
        if done.status:
            hint = "it must be Python 3.8 or later" if runner.name == "python" else runner.lacking
            raise DeviceError(f"{program} on {self.address} fails: {_last(done.error)}", hint=hint)
        found = json.loads(done.out.splitlines()[-1])
        tuples = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
        return Facts(**{**found, **tuples, "runner": runner.name})

    def _put(self, name: str, path: Path) -> None:
        inside = name.rpartition("/")[0]
        if inside:  # from the folder, which must not be made anew
            words = f"cd {shlex.quote(self._folder)} && mkdir -p {shlex.quote(inside)}"
            self._steady(lambda: self._link.execute(words))
        try:
            self._steady(lambda: self._link.put(path, self._at(name)))
        except OSError as error:
            raise self._unwritable(name, path.stat().st_size, error) from error

    def _unwritable(self, name: str, size: int, error: OSError) -> DeviceError:
        """Which of the reasons it is: transports mostly say "failure"."""
        if not self._steady(lambda: self._link.exists(self._folder)):
            return self._gone()
        told = self._steady(lambda: self._link.execute(f"df -Pk {shlex.quote(self._folder)}"))
        columns = told.out.splitlines()[-1].split() if told.status == 0 else []
        free = int(columns[3]) * 1024 if len(columns) > 3 else None
        if free is not None and free < size:
            return DeviceError(
                f"the disk of {self.address} is full: {name} takes {size:,} bytes, {free:,} are free in {self._folder}",
                hint=f"free some, or name a folder with room: {self.address}?folder=/path",
            )
        return DeviceError(f"{name} can't be written on {self.address}: {error}", hint="see its disk with `df`")

    def _gone(self) -> DeviceError:
        return DeviceError(
            f"the folder {self._folder} of {self.address} is gone: the device was restarted or nobody came for "
            f"{self._lease:.0f} s",
            hint="run the command again",
        )

    def _steady(self, action: Callable[[], T]) -> T:
        """What ``action`` returns, done anew where the link broke and came back."""
        end = time.monotonic() + self._patience
        while True:
            try:
                return action()
            except LinkCutError as error:
                self._recover(end, error)

    def _recover(self, end: float, cut: LinkCutError) -> None:
        pause = 0.2
        while True:
            try:
                self._link.reconnect()
                if self._runner:
                    self._keep(self._runner)
                return
            except LinkCutError as error:
                if time.monotonic() > end:
                    raise DeviceError(
                        f"the link to {self.address} was cut and didn't come back in {self._patience:.0f} s: {cut}",
                        hint=f"run the command again; the device removes what was sent after {self._lease:.0f} s",
                    ) from error
                time.sleep(pause)
                pause = min(pause * 2, 5.0)

    # --- the runner ---

    def _keep(self, runner: Runner) -> None:
        """Start the runner, which ends at once where one runs already."""
        place = shlex.quote(self._folder)
        words = f"{runner.line} keep {place} {self._lease}"
        done = self._link.execute(f"cd {place} && ({words} </dev/null >>keep.log 2>&1 &)")
        if done.status:
            raise self._gone()

    def _wait(self, name: str) -> None:
        """Until the job is done. A runner that died is started again, and does the job anew."""
        pause, looked, restarts = FIRST_LOOK, time.monotonic(), 0
        while not self._steady(lambda: self._link.exists(self._at(f"{name}.done"))):
            try:
                self._steady(lambda: self._link.touch(self._at("alive")))
            except FileNotFoundError as error:
                raise self._gone() from error
            if time.monotonic() - looked > KEEPER_EVERY:
                looked = time.monotonic()
                restarts += not self._kept()
            if restarts > RESTARTS:
                raise DeviceError(
                    f"the runner on {self.address} ended {restarts} times", hint="it may be out of memory there"
                )
            time.sleep(pause)
            pause = min(pause * 1.3, LAST_LOOK)

    def _kept(self) -> bool:
        """Whether the runner lives; else it is started again."""
        lock = shlex.quote(self._at("lock"))
        alive = self._steady(lambda: self._link.execute(f"kill -0 $(cat {lock})")).status == 0
        if not alive and (runner := self._runner):
            self._steady(lambda: self._keep(runner))
        return alive

    def _result(self, task: str, told: Mapping[str, Any]) -> dict[str, Any]:
        status = told["status"]
        if status or told["result"] is None:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise DeviceError(
                f"the process doing {task!r} on {self.address} ended with {how}: {_last(told['log'])}",
                hint="signal 9 is mostly too little memory"
                if status == -9
                else "the runtime there can't take this model",
            )
        return result_of(self.address, told["result"])


# What a runner calls a failure -> the error it is here, and what to try.
FAILURES: dict[str, tuple[type[EdgeqError], str]] = {
    "altered": (DeviceError, "something changes files on the device or on the way: check its disk, then run it again"),
    "disk": (DeviceError, "free some space there, or name a folder with room: ?folder=/path"),
    "runtime": (RuntimeUnavailableError, "install an onnxruntime that has it on the device"),
    "python": (RuntimeUnavailableError, "install Python 3.8 or later with numpy and onnxruntime on the device"),
    "model": (ModelError, "an opset or op newer than the runtime there needs a newer onnxruntime"),
    "data": (
        SampleError,
        "name an .npz file there, or a folder of them: an array an input under its name, a sample a row",
    ),
    "run": (ModelError, "run it on this machine: `edgeq validate` without --on"),
}


def result_of(address: str, result: dict[str, Any]) -> dict[str, Any]:
    """What a job gave. EdgeqError for what the device calls a failure."""
    if "error" in result:
        kind, message = result["error"]
        error, hint = FAILURES[kind]
        raise error(f"{address}: {message}", hint=hint)
    return result


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
