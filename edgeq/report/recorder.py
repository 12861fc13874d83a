"""Collects a Report's steps and notices while a pipeline runs (L0)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgeq.report.progress import Progress, Silent
from edgeq.report.record import Notice, StepRecord


class Recorder:
    """The one mutable thing of a run: what happened so far. Stages also go to ``progress``."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress: Progress = progress or Silent()
        self.steps: list[StepRecord] = []
        self.notices: list[Notice] = []

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[dict[str, Any]]:
        """Time a stage; what the body puts into the yielded dict becomes the step's facts (``notes``: its words)."""
        facts: dict[str, Any] = {}
        start = time.perf_counter()
        with self.progress.stage(name, total):
            yield facts
        notes = tuple(facts.pop("notes", ()))
        self.steps.append(StepRecord(name, round(time.perf_counter() - start, 3), facts, notes))

    def info(self, code: str, message: str, node: str = "") -> None:
        self.notices.append(Notice("info", code, message, node))

    def warn(self, code: str, message: str, node: str = "") -> None:
        self.notices.append(Notice("warning", code, message, node))
