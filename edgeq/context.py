"""What the steps of a recipe share (L9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from edgeq.analyse.observe import observe
from edgeq.analyse.statistics import Statistics, alike
from edgeq.analyse.stats import Stats, merge
from edgeq.analyse.store import Store
from edgeq.bucketing import at_largest
from edgeq.lower.emit import emit
from edgeq.lower.fuse import fuse
from edgeq.lower.pin import pinned
from edgeq.report.recorder import Recorder
from edgeq.rewrite.checked import Change
from edgeq.run.buckets import Buckets, bucket_files
from edgeq.run.record import Feed, Samples
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target

CHECK_SAMPLES = 2  # a rewrite is compared on so many samples: it is wrong everywhere or nowhere
CheckedRewrite = Callable[[ir.Model, Sequence[Feed]], tuple[ir.Model, tuple[Change, ...]]]


@dataclass
class Context:
    """What steps share: the target and its oracle, calibration samples, where results go."""

    target: Target
    oracle: Oracle
    calibration: Samples
    recorder: Recorder
    store: Store | None = None
    threads: int = 2
    seed: int = 0
    keep_float: dict[str, str] = field(default_factory=dict)  # node -> why no plan may make it integer
    elsewhere: tuple[ir.Model, Statistics] | None = None  # the model as read, and statistics of it over other data
    buckets: Buckets | None = None  # what ships has these shapes, a file each

    def example(self) -> Feed:
        """The first calibration sample, as the largest bucket has it."""
        return at_largest(self.calibration.read(0), self.buckets)

    def at_largest(self, model: ir.Model) -> ir.Model:
        """The model as its largest bucket runs it."""
        return pinned(model, self.buckets["shapes"][-1]) if self.buckets else model

    def files(self, path: Path) -> list[Path]:
        """The files of what ships to ``path``: with buckets one each, the largest there."""
        return bucket_files(path, len(self.buckets["shapes"]) if self.buckets else 1)

    def emit(self, model: ir.Model, path: Path) -> None:
        """Write what the target loads: ``files`` of ``path``."""
        for index, file in enumerate(self.files(path)):
            fixed = pinned(model, self.buckets["shapes"][index]) if self.buckets else model
            emit(fixed, self.target, file)

    def observe(self, model: ir.Model, taps: list[str]) -> dict[str, Stats]:
        """Statistics of ``taps`` over the calibration samples, from the store where they are known."""
        with self.recorder.step("observe", len(self.calibration)) as facts:
            found = observe(
                model, taps, self.calibration, threads=self.threads, store=self.store,
                progress=self.recorder.progress,
            )  # fmt: skip
            facts.update(
                tensors=len(taps), samples=len(self.calibration), samples_run=found.ran, tensors_reused=found.reused,
                samples_until_settled=found.settled,
            )  # fmt: skip
        self.recorder.notices.extend(found.notices)
        return found if self.elsewhere is None else self._joined(model, found, *self.elsewhere)

    def _joined(
        self, model: ir.Model, found: dict[str, Stats], source: ir.Model, other: Statistics
    ) -> dict[str, Stats]:
        """Statistics of the samples here and of those elsewhere, of tensors that still are what they were as read."""
        names = alike(source, model, [name for name in found if name in other.tensors], self.calibration.read(0))
        self.recorder.info(
            "statistics",
            f"{len(names)} of {len(found)} tensors take in what {other.samples} samples of {', '.join(other.origins)} "
            f"said; what rewrites made is calibrated on the {len(self.calibration)} samples here alone",
        )
        return found | {name: merge(found[name], other.tensors[name]) for name in names}

    def rewrite(self, step: str, model: ir.Model, run: CheckedRewrite) -> ir.Model:
        """The model after a table of rewrites; what would change results is left out and named."""
        feeds = [self.calibration.read(index) for index in range(min(CHECK_SAMPLES, len(self.calibration)))]
        with self.recorder.step(step) as facts:
            result, changes = run(model, feeds)
            facts.update(nodes_before=model.graph.num_nodes(), nodes_after=result.graph.num_nodes())
            facts["rewrites"] = {change.rewrite: change.nodes for change in changes if not change.rolled_back}
        for change in (change for change in changes if change.rolled_back):
            self.recorder.warn("rolled-back", f"rewrite {change.rewrite} was undone: {change.rolled_back}")
        return result

    def lower(self, model: ir.Model) -> ir.Model:
        """The model in the kernels its target has."""
        return self.rewrite("lower", model, lambda model, feeds: fuse(model, self.target, feeds=feeds))
