"""ONNX Runtime's own quantizers on the zoo: each artefact is a file, or the error it died with.

``python -m tests.bench.peers OUT [NAME…]`` writes ``OUT/NAME_VARIANT.onnx`` and ``OUT/peers.json``. The variants follow
the runtime's documentation: ``quant_pre_process`` first, then ``quantize_static`` in QDQ form with its defaults
(MinMax, int8 weights per tensor), per channel with uint8 activations, with Percentile, or ``quantize_dynamic``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from tests.zoo import ZOO
from tests.zoo.packages import data, float_model
from tests.zoo.score import session


@dataclass(frozen=True)
class Peer:
    """What a peer made of a model: the file, or why there is none. ``note`` says where defaults had to be left."""

    name: str
    variant: str
    path: str = ""
    error: str = ""
    note: str = ""


def quantized(name: str, folder: Path, variants: Sequence[str], samples: int | None = None) -> list[Peer]:
    """The zoo model ``name`` through each of ``VARIANTS`` named; a failure is a result, so all of them are caught."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared, note = _pre_processed(float_model(name), Path(scratch) / "prepared.onnx")
        feeds = list(_feeds(name, samples)) if set(variants) - {"dynamic"} else []
        return [_peer(name, variant, prepared, folder / f"{name}_{variant}.onnx", feeds, note) for variant in variants]


def _peer(name: str, variant: str, prepared: Path, path: Path, feeds: list[dict[str, Any]], note: str) -> Peer:
    try:
        VARIANTS[variant](prepared, path, feeds)
        session(path)  # some artefacts are written and can't be loaded
    except Exception as error:  # noqa: BLE001 - whatever the peer dies of is what this benchmark reports
        path.unlink(missing_ok=True)
        return Peer(name, variant, error=f"{type(error).__name__}: {error}".splitlines()[0][:300], note=note)
    return Peer(name, variant, path=str(path), note=note)


def _pre_processed(path: Path, out: Path) -> tuple[Path, str]:
    """The model after ``quant_pre_process``, with less of it where all of it fails, and what was left out."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    note = ""
    for options in ({}, {"skip_symbolic_shape": True}):
        try:
            quant_pre_process(str(path), str(out), **options)
        except Exception as error:  # noqa: BLE001 - as above
            note = f"pre-process {options or ''} failed: {type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            return out, note
    return path, note


def _feeds(name: str, samples: int | None) -> Iterable[dict[str, Any]]:
    for sample in data(ZOO[name].calibration, samples):
        sample.pop("label")
        yield sample


def _static(prepared: Path, path: Path, feeds: list[dict[str, Any]], **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Hands out the feeds, then None."""

        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    quantize_static(str(prepared), str(path), Reader(), **options)


def static(prepared: Path, path: Path, feeds: list[dict[str, Any]]) -> None:
    """``quantize_static`` as it comes: QDQ, MinMax, int8 activations and weights per tensor."""
    _static(prepared, path, feeds)


def static_u8(prepared: Path, path: Path, feeds: list[dict[str, Any]]) -> None:
    """uint8 activations, the runtime's advice for x86, int8 weights per tensor."""
    from onnxruntime.quantization import QuantType

    _static(prepared, path, feeds, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def static_channel(prepared: Path, path: Path, feeds: list[dict[str, Any]]) -> None:
    """uint8 activations, int8 weights per channel."""
    from onnxruntime.quantization import QuantType

    _static(prepared, path, feeds, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True)


def static_percentile(prepared: Path, path: Path, feeds: list[dict[str, Any]]) -> None:
    """As ``static`` with Percentile calibration; slow and hungry, so only on demand."""
    from onnxruntime.quantization import CalibrationMethod

    _static(prepared, path, feeds, calibrate_method=CalibrationMethod.Percentile)


def dynamic(prepared: Path, path: Path, feeds: list[dict[str, Any]]) -> None:
    """``quantize_dynamic`` with its defaults: int8 weights, activations quantized while running."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(prepared), str(path))


VARIANTS: dict[str, Callable[[Path, Path, list[dict[str, Any]]], None]] = {
    "static": static,
    "u8": static_u8,
    "channel": static_channel,
    "percentile": static_percentile,
    "dynamic": dynamic,
}
USUAL = ("static", "channel", "dynamic")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(ZOO)))
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), default=USUAL)
@click.option("--samples", type=int, help="Calibration samples; default: each loader's own.")
def main(out: Path, names: tuple[str, ...], variants: tuple[str, ...], samples: int | None) -> None:
    """Quantize zoo models with ONNX Runtime's tools into the folder OUT."""
    out.mkdir(parents=True, exist_ok=True)
    peers = [peer for name in names or ZOO for peer in quantized(name, out, variants, samples)]
    (out / "peers.json").write_text(json.dumps([asdict(peer) for peer in peers], indent=1) + "\n")
    for peer in peers:
        click.echo(f"{peer.name:7} {peer.variant:10} {peer.path or peer.error}  {peer.note}")


if __name__ == "__main__":
    main()
