"""Progress on stderr: bars on a terminal, a line a finished stage elsewhere (L11)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """An ``edgeq.report.progress.Progress`` that people see. Use as a context: leaving it clears the bars."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.open: list[TaskID] = []

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """A bar while the stage runs; a line with its seconds once it is done."""
        start = time.perf_counter()
        task = self.bars.add_task("  " * len(self.open) + name, total=total)
        self.open.append(task)
        try:
            yield
        finally:
            self.open.remove(task)
            self.bars.remove_task(task)
        self.console.print(f"[dim]{'  ' * len(self.open)}{name}  {time.perf_counter() - start:.1f} s[/]")

    def advance(self, count: int = 1) -> None:
        """Moves the innermost bar."""
        if self.open:
            self.bars.advance(self.open[-1], count)
