"""Boards for tests, one of each core that is asked for, shared by the tests of a module; a small model and feeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edgeq.ir import io
from edgeq.run.record import Feed
from edgeq.run.timing import TimedConfig
from tests.devices import arm64
from tests.devices.arm64 import Board
from tests.devices.models import LAYERS
from tests.graphs import graph, normal

Boards = Callable[[str], Board]


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boards]:
    """core -> a running board. Skips where none can run; in CI, where one must, fails."""
    if lacking := arm64.missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no board: {lacking} (make devices)")
    home = tmp_path_factory.mktemp("home")
    running: dict[str, Board] = {}
    with ExitStack() as stack:

        def board(core: str) -> Board:
            if core not in running:
                running[core] = stack.enter_context(arm64.board(core, home))
            return running[core]

        yield board


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder with .ssh in it the home of this user, as it is to every client."""
    return lambda home: monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def config(tmp_path: Path) -> TimedConfig:
    """A MatMul of a megabyte and a Tanh."""
    io.write(graph(LAYERS, {"W": normal(512, 512) / 16}), tmp_path / "net.onnx")
    return TimedConfig("net", tmp_path / "net.onnx")


@pytest.fixture
def feeds() -> list[Feed]:
    return [{"x": normal(2, 512)} for _ in range(3)]
