"""Inputs of any size for files of fixed shapes: the smallest that holds them, padded, results cut (L4, stands alone).

What is known of buckets is plain data, as a manifest holds it, by input: ``shapes``, smallest bucket first; ``open``,
the names of dimensions that change, by axis; ``pad``, what fills the end of an axis that is too short. ``cuts`` are the
axes of outputs that follow an input's. ``load.py`` holds this file too.
"""

from pathlib import Path
from typing import Any

import numpy as np

Buckets = dict[str, Any]


class Bucketed:
    """Sessions of one model, one a bucket, used like a single one that takes any size up to the largest."""

    def __init__(self, how: Buckets, sessions: list[Any]) -> None:
        self.how, self.sessions = how, tuple(sessions)

    def get_inputs(self) -> Any:
        """As the largest bucket has them."""
        return self.sessions[-1].get_inputs()

    def get_outputs(self) -> Any:
        """As the largest bucket has them."""
        return self.sessions[-1].get_outputs()

    def get_providers(self) -> Any:
        return self.sessions[-1].get_providers()

    def run(self, names: list[str] | None, feed: dict[str, Any]) -> list[Any]:
        """Outputs in the order of ``names``, of the sizes the input's own would give."""
        index = fitting(self.how, feed)
        wanted = [one.name for one in self.get_outputs()] if names is None else list(names)
        found = self.sessions[index].run(wanted, padded(self.how, feed, index))
        return [cut(self.how, name, array, feed) for name, array in zip(wanted, found, strict=True)]


def fitting(how: Buckets, feed: dict[str, Any]) -> int:
    """The first bucket that no input is larger than. ValueError when there is none, and for inputs that don't agree on
    a dimension: padded they would run, and compute something else."""
    sizes: dict[str, tuple[int, str]] = {}
    for name in (name for name in feed if name in how["open"]):
        for dim, size in zip(how["open"][name], np.shape(feed[name]), strict=False):
            known, other = sizes.setdefault(dim, (size, name)) if dim else (size, name)
            if known != size:
                raise ValueError(f"inputs {other!r} and {name!r} differ in dimension {dim!r}: {known} and {size}")
    for index, shapes in enumerate(how["shapes"]):
        if all(_holds(shapes[name], np.shape(array)) for name, array in feed.items() if name in shapes):
            return index
    largest = how["shapes"][-1]
    name = next((name for name in feed if name in largest and not _holds(largest[name], np.shape(feed[name]))), "")
    name = name or next(iter(feed))
    shapes = ", ".join(str(list(shapes[name])) for shapes in how["shapes"])
    raise ValueError(
        f"input {name!r} is {list(np.shape(feed[name]))}, and no bucket holds that: {shapes}; "
        "give less of it (scale or split it), or export again with a larger --bucket"
    )


def _holds(bucket: list[int], shape: tuple[int, ...]) -> bool:
    return len(bucket) == len(shape) and all(size <= most for size, most in zip(shape, bucket, strict=True))


def padded(how: Buckets, feed: dict[str, Any], index: int) -> dict[str, Any]:
    """The feed at the shapes of bucket ``index``."""
    shapes, pad = how["shapes"][index], how["pad"]
    return {name: _filled(array, shapes[name], pad[name]) if name in shapes else array for name, array in feed.items()}


def _filled(array: Any, shape: list[int], value: float) -> Any:
    array = np.asarray(array)
    return np.pad(array, [(0, most - size) for size, most in zip(array.shape, shape, strict=True)],
                  constant_values=np.asarray(value).astype(array.dtype))  # fmt: skip


def cut(how: Buckets, name: str, array: Any, feed: dict[str, Any]) -> Any:
    """What of output ``name`` belongs to the feed's own sizes."""
    for row in (row for row in how["cuts"] if row["output"] == name):
        size = np.shape(feed[row["input"]])[row["of"]]
        array = np.take(array, np.arange(cut_size(row, size)), axis=row["axis"])
    return array


def cut_size(row: dict[str, Any], size: int) -> int:
    """Size of an output's axis where the input's axis it follows has ``size``."""
    return int(row["times"] * ((size + row["plus"]) // row["per"]) + row["offset"])


def bucket_files(model: Path, count: int) -> list[Path]:
    """Files of the buckets, smallest first; the largest has the model's own name."""
    return [*(model.with_name(f"{model.stem}.bucket{index}{model.suffix}") for index in range(count - 1)), model]
