"""Records of running: Samples and Timing (L4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]  # input name -> array as the session takes it, batch axis included
Array = NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """A finite, re-iterable source of feeds. ``label[i]`` belongs to the i-th feed when ``labels`` isn't None.

    ``digest`` is sha256 over the contents (or over spec + index for generated data); ``synthetic`` marks random data.
    """

    origin: str
    count: int
    digest: str
    read: Callable[[int], Feed]
    labels: tuple[Any, ...] | None = None
    synthetic: bool = False
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def each_label(self) -> list[Any]:
        """Labels one by one, none without labels: those of a batch are a tuple."""
        return [one for label in self.labels or () for one in (label if isinstance(label, tuple) else (label,))]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Feed]:
        return (self.read(index) for index in range(self.count))


@dataclass(frozen=True)
class Timing:
    """Latency of one configuration. All in milliseconds; ``laps_ms`` are the raw laps in the order they ran.

    ``laps_per_turn`` laps in a row belong to one turn; turn k of two configurations compared together is a pair.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    spread_ms: float  # interquartile range
    laps_ms: tuple[float, ...]
    threads: int
    warmup: int
    first_ms: float = 0.0
    load_ms: float = 0.0
    peak_bytes: int = 0
    laps_per_turn: int = 1
