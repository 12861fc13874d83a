"""What becomes of a node: the oracle's answer (L3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["integer", "mover", "float"]
KINDS: tuple[Kind, ...] = ("integer", "mover", "float")

# Ops that compare codes, which is arithmetic; every other op that stays itself on codes only moves them.
COMPARING = frozenset({"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "TopK", "Clip"})


@dataclass(frozen=True)
class Verdict:
    """What becomes of a node. ``kernel`` is the runtime's op type, "" when the node vanishes; ``reason`` a sentence.

    ``integer``: a kernel computes on codes. ``mover``: codes pass unchanged, Q/DQ around it are dropped (scales equal).
    ``float``: Q/DQ stay around a float kernel. ``provider``: who runs it, "" for the target's own.
    """

    kind: Kind
    kernel: str
    reason: str
    provider: str = ""
