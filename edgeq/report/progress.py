"""How a long run tells where it stands, without knowing who listens (L0).

The pipeline gets a ``Progress`` and calls it; the command line draws bars, a test or a service gives its own, and
``Silent`` is the default. A protocol instead of a logger: a bar needs totals, which log lines don't carry.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Hears of stages and of the items done in them. Stages nest; ``advance`` counts in the innermost open one."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[None]:
        """Opens a stage of ``total`` items (None: not known); leaving the context closes it."""
        ...

    def advance(self, count: int = 1) -> None:
        """``count`` more items of the innermost open stage are done."""
        ...


class Silent:
    """A Progress that nobody watches."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[None]:  # noqa: ARG002 - protocol
        return nullcontext()

    def advance(self, count: int = 1) -> None:
        """Nothing to draw."""
