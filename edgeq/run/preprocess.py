"""How an image becomes a model input, as data (L4).

A frozen record with a JSON form instead of a function, because the same preprocessing must be applied here, be
packaged beside the model, and be re-implemented by an app in another language. ``from_dict`` also reads the
``preprocessor_config.json`` that Hugging Face repositories carry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from edgeq.errors import SampleError, did_you_mean
from edgeq.run.pictures import preprocess
from edgeq.run.session import TensorSpec

if TYPE_CHECKING:
    from PIL import Image

FILE_NAMES = ("preprocessing.json", "preprocessor_config.json")

# Names of PIL.Image.Resampling; the numbers are what Hugging Face writes as ``resample``.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
CHANNELS = ("RGB", "BGR", "L")


@dataclass(frozen=True)
class Preprocessing:
    """Steps in order: convert to ``channels``, resize, centre crop, then ``(pixel * scale - mean) / std`` per channel.

    ``resize``: one number scales the shorter side to it, two are [height, width], None keeps the size.
    ``crop``: [height, width] cut from the centre, padded with zeros where the image is smaller.
    ``layout``: NCHW or NHWC, with N = 1. ``dtype``: uint8 leaves ``scale``, ``mean`` and ``std`` to the model.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: str = "RGB"
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        _expect_one_of("interpolation", self.interpolation, list(INTERPOLATIONS))
        _expect_one_of("layout", self.layout, ["NCHW", "NHWC"])
        _expect_one_of("channels", self.channels, list(CHANNELS))
        _expect_one_of("dtype", self.dtype, ["float32", "uint8"])
        if self.dtype == "uint8" and (self.scale, {*self.mean}, {*self.std}) != (1.0, {0.0}, {1.0}):
            raise SampleError(
                "preprocessing key 'dtype' is 'uint8', which scale, mean or std would leave",
                hint="use scale 1, mean [0] and std [1], or float32",
            )
        if 0.0 in self.std:
            raise SampleError("preprocessing key 'std' holds 0", hint="use 1 for a channel that isn't scaled")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocessing:
        """The record's own JSON form or a Hugging Face one -> Preprocessing. SampleError on an unknown or bad key."""
        if record.keys() & {"image_mean", "do_resize", "do_normalize", "do_rescale"}:
            record = _from_hugging_face(record)
        known = [field.name for field in fields(cls)]
        for key in record:
            if key not in known:
                raise SampleError(f"unknown preprocessing key {key!r}", hint=did_you_mean(key, known))
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        try:
            return cls(**values)
        except TypeError as error:
            raise SampleError(f"bad preprocessing value: {error}") from error

    @classmethod
    def from_file(cls, path: Path) -> Preprocessing:
        """Read a JSON file. SampleError when it is missing, isn't JSON or holds a bad key."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SampleError(f"can't read preprocessing {str(path)!r}: {error}", hint="give a JSON file") from error
        if not isinstance(record, dict):
            raise SampleError(f"preprocessing {str(path)!r} holds {type(record).__name__}, expected an object")
        return cls.from_dict(record)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def for_input(self, spec: TensorSpec) -> Preprocessing:
        """The same with the layout the input's shape asks for, where the shape tells: [n, 3, h, w] or [n, h, w, 3]."""
        if len(spec.shape) == 4 and (spec.shape[1] in (1, 3)) != (spec.shape[3] in (1, 3)):
            return replace(self, layout="NCHW" if spec.shape[1] in (1, 3) else "NHWC")
        return self

    def apply(self, image: Image.Image) -> NDArray[Any]:
        """Image -> [1, c, h, w] or [1, h, w, c], f32 or u8."""
        values: NDArray[Any] = preprocess(image, self.to_dict())
        return values


def _expect_one_of(key: str, value: object, known: list[str]) -> None:
    if value not in known:
        raise SampleError(f"preprocessing key {key!r} is {value!r}", hint=did_you_mean(str(value), known))


def _from_hugging_face(record: Mapping[str, Any]) -> dict[str, Any]:
    """``preprocessor_config.json`` -> own keys. ``crop_pct`` and padding aren't expressed and stay out."""
    own: dict[str, Any] = {}
    if record.get("do_resize", True) and "size" in record:
        # A bare number is the shorter side when a crop follows; without one transformers makes a square of it.
        own["resize"] = _hugging_face_size(record["size"], square=not record.get("do_center_crop", False))
    if record.get("do_center_crop", False):
        own["crop"] = _hugging_face_size(record["crop_size"], square=True)
    names = {number: name for name, number in INTERPOLATIONS.items()}
    own["interpolation"] = names.get(record.get("resample", 2), "bilinear")
    own["scale"] = record.get("rescale_factor", 1 / 255) if record.get("do_rescale", True) else 1.0
    if record.get("do_normalize", True):
        own["mean"], own["std"] = record.get("image_mean", [0.0]), record.get("image_std", [1.0])
    return own


def _hugging_face_size(size: Any, *, square: bool) -> int | list[int]:
    """A number, {"shortest_edge": n} or {"height": h, "width": w} -> a number (shorter side) or [height, width]."""
    if isinstance(size, Mapping):
        return int(size["shortest_edge"]) if "shortest_edge" in size else [int(size["height"]), int(size["width"])]
    return [int(size), int(size)] if square else int(size)
