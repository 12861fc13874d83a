"""Time by node, from the runtime's own profiler (L4).

The profiler adds a few microseconds a node, so these figures say where time goes; whether a model is faster is
only ever said by ``run.timing``.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgeq.ir import io
from edgeq.run.record import Feed
from edgeq.run.session import Level, open_session, run_session
from edgeq.target.record import CPU, Provider


def profile(
    model: Path | ir.Model,
    feeds: Sequence[Feed],
    *,
    threads: int = 1,
    level: Level = "all",
    provider: Provider = CPU,
    config: Mapping[str, str] | None = None,
    warmup: int = 3,
    repeats: int = 20,
) -> tuple[dict[str, float], ir.Model]:
    """Median nanoseconds a run of each node of the optimised graph, and that graph. Nodes that never ran are absent.

    Each feed runs ``repeats`` times in turn; the first ``warmup`` runs don't count.
    """
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        session: onnxruntime.InferenceSession = open_session(
            model, threads=threads, level=level, provider=provider, config=config, isolated=False,
            optimized_path=optimised, profile_prefix=Path(folder) / "profile",
        )  # fmt: skip
        for index in range(warmup + repeats):
            run_session(session, feeds[index % len(feeds)])
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = io.read(optimised)
    laps: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            laps[event["name"].removesuffix("_kernel_time")].append(event["dur"] * 1e3)
    return {name: float(np.median(times[warmup:] or times)) for name, times in laps.items()}, graph
