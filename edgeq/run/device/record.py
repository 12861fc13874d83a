"""What a device is, and what every device can do (L4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Facts:
    """What a device says of itself. ``runtime``: ONNX Runtime's version, "" without; ``missing``: modules.

    ``emulator`` says what interprets its instructions or draws for its GPU; "" on a device. Where it is set, no time
    measured there says anything about a device. ``providers``: those a session can be opened on; ``shows_graph``:
    whether its runtime tells what it made of a model; ``runner``: what did the jobs there: python, cpp or browser.
    """

    machine: str
    system: str
    isa: tuple[str, ...] = ()
    cores: int = 0
    memory_bytes: int = 0
    free_bytes: int = 0
    board: str = ""
    python: str = ""
    runtime: str = ""
    missing: tuple[str, ...] = ()
    governor: str = ""
    mhz: tuple[float, ...] = ()
    celsius: Mapping[str, float] = field(default_factory=dict)
    emulator: str = ""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    shows_graph: bool = True
    runner: str = "python"


class Device(ABC):
    """A place where models run: files go there, jobs run on them, files come back, nothing stays.

    A job is plain data: its ``task``, the ``files`` it uses by name, and what the task wants (see ``measure``). Files
    are checked by digest where they are used. Leaving the context removes all that was sent or made.
    """

    address: str
    facts: Facts

    @abstractmethod
    def push(self, name: str, path: Path) -> None:
        """Send a file unless the device has it under that name."""

    @abstractmethod
    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Do one job and return what it found out. EdgeqError when it fails; see ``remote``."""

    @abstractmethod
    def pull(self, name: str, path: Path, digest: str) -> None:
        """Fetch a file a job made."""

    @abstractmethod
    def drop(self, names: list[str]) -> None:
        """Remove files that aren't needed any more."""

    @abstractmethod
    def close(self) -> None:
        """Remove all that was sent or made."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
