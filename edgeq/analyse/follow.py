"""Which axes of outputs follow an input's, and how: seen in runs of the float model at many sizes (L5).

Runs, and not shape inference, since that believes sizes at which a model fails and knows nothing of some ops. Strides,
paddings and resizing by whole factors in any order make ``times * floor((size + plus) / per) + offset``; the simplest
such rule that every run obeys is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edgeq.errors import ModelError

Sizes = Mapping[str, int]  # dynamic dimension -> size
OutputShapes = Mapping[str, tuple[int, ...]]
Axis = tuple[str, int]  # output and axis

WINDOW = 64  # sizes below the largest that are tried; a rule's stride may be as long
MOST_TIMES = 64


def rules(run: Callable[[Sizes], OutputShapes | None], largest: Sizes, known: Iterable[Sizes]) -> list[dict[str, Any]]:
    """A row for each output axis that follows a dimension: ``output``, ``axis``, ``dim`` and the numbers of its rule.

    ``run``: shapes of the outputs at these sizes, None where the model fails. ``known``: sizes it must hold at.
    ModelError for an axis that follows two dimensions, or by no such rule."""
    known = list(known)
    rows: dict[Axis, dict[str, Any]] = {}
    for dim in (dim for dim, size in largest.items() if size > 1):
        for axis, points in _seen(run, dim, largest, {sizes[dim] for sizes in known}).items():
            if len(set(points.values())) == 1:
                continue
            rule = _rule(points)
            if rule is None or axis in rows:
                why = "in no way that can be told" if rule is None else f"and also {rows[axis]['dim']!r}"
                raise ModelError(
                    f"axis {axis[1]} of output {axis[0]!r} follows dimension {dim!r} {why}: {points}",
                    hint="buckets need outputs whose padding can be cut off: fix that dimension to one size",
                )
            rows[axis] = {"output": axis[0], "axis": axis[1], "dim": dim, **rule}
    return list(rows.values())


def _seen(
    run: Callable[[Sizes], OutputShapes | None], dim: str, largest: Sizes, known: set[int]
) -> dict[Axis, dict[int, int]]:
    """Size of each output axis by the size of ``dim``, the other dimensions at their largest."""
    found: dict[Axis, dict[int, int]] = {}
    top = largest[dim]

    def look(size: int) -> None:
        for name, shape in (run({**largest, dim: size}) or {}).items():
            for axis, length in enumerate(shape):
                found.setdefault((name, axis), {})[size] = length

    for size in sorted({top, max(top // 2, 1), *known}, reverse=True):
        look(size)
    told = len(next(iter(found.values()), {})) > 1  # else an axis that doesn't move may still follow
    for size in range(top - 1, max(top - WINDOW - 1, 0), -1):
        look(size)
        if told and all(_moves_twice(points, size) for points in found.values()):
            break
    return found


def _moves_twice(points: Mapping[int, int], least: int) -> bool:
    """Whether an axis moves twice between ``least`` and the largest size, which shows a whole stride, or never."""
    return len({length for size, length in points.items() if size >= least}) > 2 or len(set(points.values())) == 1


def _rule(points: Mapping[int, int]) -> dict[str, int] | None:
    """The rule with the shortest stride that all points obey."""
    low, high = min(points), max(points)
    slope = (points[high] - points[low]) / (high - low)
    for per in range(1, WINDOW + 1):
        for times in range(max(1, int(slope * per) - 1), min(MOST_TIMES, int(slope * per) + 2) + 1):
            for plus in range(per):
                offset = points[high] - times * ((high + plus) // per)
                if all(times * ((size + plus) // per) + offset == length for size, length in points.items()):
                    return {"times": times, "plus": plus, "per": per, "offset": offset}
    return None
