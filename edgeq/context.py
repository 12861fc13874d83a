"""What the steps of a recipe share (L9)."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgeq.analyse.observe import observe
from edgeq.analyse.stats import Stats
from edgeq.analyse.store import Store
from edgeq.report.recorder import Recorder
from edgeq.run.record import Samples
from edgeq.target.oracle import Oracle
from edgeq.target.record import Target


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
        return found
