"""A process of its own for providers that may abort: sessions in it, and questions put to it (L3).

A plug-in's failed assertion would end edgeq with it. So whatever isn't the CPU's own provider is opened, asked and run
in a second Python, this one's or that of the provider's environment, which lives as long as this one. When it dies the
caller gets an error that says how, and the next call starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgeq import errors
from edgeq.errors import EdgeqError, RuntimeUnavailableError
from edgeq.target.environment import python_for
from edgeq.target.provider import (
    RefusedError,
    assigned,
    check_owners,
    check_taken,
    first_line,
    open_on,
    profiling,
    provider_version,
    ran,
    runtime_errors,
    silent,
)
from edgeq.target.record import CPU, Provider


@dataclass(frozen=True)
class Argument:
    """An input or output of a session, as ``onnxruntime.NodeArg`` describes it."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class IsolatedSession:
    """A session in the other process, with the part of ``InferenceSession``'s interface that edgeq uses.

    Raises RefusedError where the runtime refuses the model, RuntimeUnavailableError where the provider took none of it,
    which of a ``silent`` one shows in the first run. ``on_cpu``: how many nodes of each op the CPU got, as far as the
    runtime tells."""

    def __init__(self, model: Path | bytes, provider: Provider, settings: Mapping[str, Any]) -> None:
        self._process = _process(provider)
        opened = self._process.call("open", model, provider, dict(settings))
        self._number, self._inputs, self._outputs, self.on_cpu = opened
        weakref.finalize(self, self._process.forgotten.append, self._number)

    def get_inputs(self) -> Sequence[Argument]:
        return self._inputs  # type: ignore[no-any-return]

    def get_outputs(self) -> Sequence[Argument]:
        return self._outputs  # type: ignore[no-any-return]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        """Outputs in the order of ``names``; RefusedError when the runtime fails."""
        wanted = [one.name for one in self._outputs] if names is None else list(names)
        if missing := [one.name for one in self._inputs if one.name not in feed]:
            raise RefusedError(f"inputs {missing} aren't fed", argument=True)
        return self._process.call("run", self._number, wanted, dict(feed))  # type: ignore[no-any-return]


def call(provider: Provider, task: Callable[..., Any], *arguments: Any) -> Any:
    """What ``task``, a function of a module, returns in the process that holds ``provider``. RuntimeUnavailableError
    when that dies."""
    return _process(provider).call("call", task, arguments)


def version_of(provider: Provider) -> str:
    """Package and version that hold ``provider``, wherever that is; "" for the CPU's own."""
    here = python_for(provider) == sys.executable
    return provider_version(provider) if here else str(call(provider, provider_version, provider))


class _Process:
    """The other Python. ``forgotten``: sessions nobody holds any more, closed by the next call, not by the collector:
    it may run in the middle of one."""

    def __init__(self, python: str) -> None:
        self.forgotten: list[int] = []
        self.log = tempfile.TemporaryFile(prefix="edgeq-")  # noqa: SIM115 - lives as long as the process
        own = str(Path(errors.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))
        self.child = subprocess.Popen(
            [python, "-m", "edgeq.target.isolated"], env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def call(self, task: str, *arguments: Any) -> Any:
        while self.forgotten:
            self._ask("close", self.forgotten.pop())
        return self._ask(task, *arguments)

    def _ask(self, task: str, *arguments: Any) -> Any:
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            pickle.dump((task, arguments), self.child.stdin)
            self.child.stdin.flush()
            kind, answer = pickle.load(self.child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._died() from error
        if kind == "error":
            name, message, hint = answer
            said = self._said(2) if name == RuntimeUnavailableError.__name__ else ""
            raise getattr(errors, name)(message, hint=f"{hint}; it said: {said}" if said else hint)
        if kind == "refused":
            raise RefusedError(*answer)
        if kind == "bug":
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # it is dead, and what was on the way to it has no reader
                    pipe.close()  # the other side reads the end of its input and leaves
        self.child.wait()
        self.log.close()

    def _said(self, lines: int) -> str:
        """The last lines that the provider and the runtime printed there, without their colours."""
        self.log.seek(0)
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read().decode(errors="replace"))
        return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])

    def _died(self) -> RuntimeUnavailableError:
        self.child.kill()
        status = self.child.wait()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return RuntimeUnavailableError(
            f"the process of the provider ended with {how}: {self._said(3) or 'no message'}",
            hint="signal 9 is mostly too little memory; else the provider can't take this model on this machine",
        )


_RUNNING: dict[str, _Process] = {}  # interpreter -> its process


def _process(provider: Provider) -> _Process:
    python = python_for(provider)
    if python in _RUNNING and _RUNNING[python].child.poll() is not None:
        _RUNNING.pop(python).close()
    if python not in _RUNNING:
        if not _RUNNING:
            atexit.register(_end)
        _RUNNING[python] = _Process(python)
    return _RUNNING[python]


def _end() -> None:
    while _RUNNING:
        _RUNNING.popitem()[1].close()


# --- the other side --------------------------------------------------------------------------------------------------


class _Server:
    """What happens in the process of its own; ``sessions`` stay open until they are closed. ``unproven``: those of
    which only a run can tell that the provider does anything."""

    def __init__(self) -> None:
        self.sessions: dict[int, Any] = {}
        self.unproven: dict[int, Provider] = {}
        self.opened = 0
        self.folder = tempfile.TemporaryDirectory(prefix="edgeq-")  # of profiles

    def open(self, model: Path | bytes, provider: Provider, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        self.opened += 1
        if silent(provider):
            settings = {**settings, **profiling(Path(self.folder.name) / str(self.opened))}
            self.unproven[self.opened] = provider
        session = open_on(model, provider, settings)
        check_taken(session, provider)
        self.sessions[self.opened] = session
        inputs, outputs = (
            tuple(Argument(one.name, one.type, tuple(one.shape)) for one in side)
            for side in (session.get_inputs(), session.get_outputs())
        )
        on_cpu = Counter(owner.op for owner in assigned(session).values() if owner.provider == CPU.name)
        return self.opened, inputs, outputs, dict(on_cpu)

    def run(self, number: int, names: list[str], feed: dict[str, Any]) -> list[Any]:
        found: list[Any] = self.sessions[number].run(names, feed)
        if provider := self.unproven.pop(number, None):
            check_owners((node.owner for node in ran(self.sessions[number])), provider)
        return found

    def close(self, number: int) -> None:
        del self.sessions[number]

    def call(self, task: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return task(*arguments)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the other side hangs up."""
    server = _Server()
    while True:
        try:
            task, arguments = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_answer(getattr(server, task), arguments), answers)
        answers.flush()


def _answer(task: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", task(*arguments)
    except EdgeqError as error:
        return "error", (type(error).__name__, error.message, error.hint)
    except runtime_errors() as error:
        return "refused", (first_line(error), type(error).__name__ == "InvalidArgument")
    except Exception:  # noqa: BLE001 - a bug, raised again where it can be seen
        return "bug", traceback.format_exc()


if __name__ == "__main__":
    from edgeq.target import isolated  # records are pickled under the module's name, which here is __main__

    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what providers print goes to the log, never between answers
    isolated._serve(sys.stdin.buffer, own)
