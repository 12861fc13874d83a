"""What an app ships, as records: Package, its Variants and their Golden runs (L8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeq.errors import PackageError
from edgeq.report.record import Report
from edgeq.run.buckets import Buckets, bucket_files
from edgeq.run.record import Feed

COMPARED = "fiub"  # kinds of dtypes that have a distance


@dataclass(frozen=True)
class Golden:
    """Sample runs that an installed package must repeat: ``outputs[i]`` came from ``inputs[i]``.

    ``tolerances``: output name -> largest absolute difference allowed, in the output's unit.
    """

    inputs: tuple[Feed, ...]
    outputs: tuple[Feed, ...]
    tolerances: Mapping[str, float]

    @property
    def compared(self) -> dict[str, float]:
        """The tolerances of outputs that are numbers; text has no distance and isn't compared."""
        first = self.outputs[0] if self.outputs else {}
        return {name: tolerance for name, tolerance in self.tolerances.items() if first[name].dtype.kind in COMPARED}


@dataclass(frozen=True)
class Variant:
    """One model of a package, for the machines its target stands for. ``model`` is a file, external data beside it;
    ``kernels``: libraries of edgeq's kernels it uses, by the system they are for (``kernels.system``)."""

    name: str
    model: Path
    report: Report
    golden: Golden
    kernels: Mapping[str, Path] = field(default_factory=dict)

    @property
    def buckets(self) -> Buckets:
        """The fixed shapes it has a file for each, as ``run.buckets`` has them; empty for one model of any shape."""
        found: Buckets = self.report.source.get("buckets", {})
        return found

    @property
    def files(self) -> list[Path]:
        """Its model, or those of its buckets, the largest last."""
        return self.beside(self.model)

    @property
    def only(self) -> Path:
        """Its model, for what takes one. PackageError where each bucket has its own."""
        if self.buckets:
            names = ", ".join(file.name for file in self.files)
            raise PackageError(
                f"{str(self.model.parent)!r} holds a model for each of {len(self.files)} shapes, and this takes one",
                hint=f"name one of them, in that folder: {names}",
            )
        return self.model

    def beside(self, model: Path) -> list[Path]:
        """What its files are called where the model lies at another place."""
        return bucket_files(model, len(self.buckets["shapes"]) if self.buckets else 1)


@dataclass(frozen=True)
class Package:
    """All an app ships. ``model``, ``report``, ``golden`` and ``kernels`` are the first variant's, ``others`` are tried
    where it can't run or is slower; ``metadata`` are words on the model itself, of which ``licence`` is read;
    ``key`` is a file with a private key to sign with."""

    model: Path
    report: Report
    golden: Golden
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    postprocessing: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[Variant, ...] = ()
    key: Path | None = None
    kernels: Mapping[str, Path] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All variants, the first one first; names are those of the targets, numbered where two are the same."""
        name = str(self.report.target.get("name", "")) or "model"
        first = Variant(name, self.model, self.report, self.golden, self.kernels)
        found: dict[str, Variant] = {}
        for variant in (first, *self.others):
            same = sum(name.rpartition("~")[0] == variant.name or name == variant.name for name in found)
            name = f"{variant.name}~{same + 1}" if same else variant.name
            found[name] = replace(variant, name=name)
        return tuple(found.values())
