"""ONNX Runtime's own quantizers on the zoo: each artefact is a file, or the error it died with.

``python -m tests.bench.peers OUT [NAME…]`` writes ``OUT/NAME_VARIANT.onnx`` and ``OUT/NAME.json``. What each variant
does stands in ``tests.bench.quantizers``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from tests.bench.quantizers import ORT, at_best, first_line
from tests.zoo import ENTRIES, ZOO
from tests.zoo.packages import data, float_model


@dataclass(frozen=True)
class Peer:
    """What a peer made of a model: the file, or why there is none. ``note`` says where defaults had to be left.

    ``samples``, ``seconds`` and ``peak_bytes`` (the process's high-water mark) are of runs in a process of their own.
    """

    name: str
    variant: str
    path: str = ""
    error: str = ""
    note: str = ""
    samples: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


Make = Callable[[Sequence[str]], Iterable[Peer]]


def artefact(folder: Path, name: str, variant: str) -> Path:
    return folder / f"{name}_{variant}.onnx"


def quantized(name: str, folder: Path, variants: Sequence[str], samples: int | None = None) -> Iterator[Peer]:
    """The zoo model ``name`` through each of ``ORT`` named; a failure is a result, so all of them are caught."""
    feeds = calibration_feeds(name, samples) if set(variants) - {"dynamic"} else []
    for variant in variants:
        path = artefact(folder, name, variant)
        try:
            note = at_best(variant, float_model(name), path, feeds)
        except Exception as error:  # noqa: BLE001 - whatever the peer dies of is what this benchmark reports
            path.unlink(missing_ok=True)
            yield Peer(name, variant, error=first_line(error))
        else:
            yield Peer(name, variant, path=str(path), note=note)


def calibration_feeds(name: str, samples: int | None = None) -> list[dict[str, Any]]:
    """The calibration samples of a zoo model, without their labels."""
    drawn = data(ENTRIES[name].calibration, samples)
    return [{key: value for key, value in sample.items() if key != "label"} for sample in drawn]


def known_peers(name: str, folder: Path, variants: Sequence[str], make: Make, *, again: bool = False) -> list[Peer]:
    """What ``folder`` holds of earlier runs; ``make`` makes the missing variants, each noted as soon as it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{name}.json"
    rows = json.loads(record.read_text()) if record.is_file() else []
    peers = {row["variant"]: Peer(**row) for row in rows}
    missing = [variant for variant in variants if again or variant not in peers]
    for peer in make(missing) if missing else ():
        peers[peer.variant] = peer
        record.write_text(json.dumps([asdict(each) for each in peers.values()], indent=1) + "\n")
    return [peers[variant] for variant in variants]


USUAL = ("static", "channel", "dynamic")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(ENTRIES)))
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(ORT)), default=USUAL)
@click.option("--samples", type=int, help="Calibration samples; default: each loader's own.")
def main(out: Path, names: tuple[str, ...], variants: tuple[str, ...], samples: int | None) -> None:
    """Quantize zoo models with ONNX Runtime's tools into the folder OUT."""
    for name in names or ZOO:
        for peer in known_peers(name, out, variants, partial(quantized, name, out, samples=samples), again=True):
            click.echo(f"{peer.name:7} {peer.variant:18} {peer.path or peer.error}  {peer.note}")


if __name__ == "__main__":
    main()
