"""edgeq takes a model to the edge: quantize, lower to the target's kernels, prove accuracy and latency, package (L11).

    import edgeq
    report = edgeq.export("model.onnx", calibration="photos/", evaluation="labelled/", out="model.edgeq")
    assert report.passed

Names are fetched on first use, so ``import edgeq`` (and ``edgeq --help``) loads neither numpy nor a runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeq.version import __version__

if TYPE_CHECKING:
    from edgeq.advice import advise
    from edgeq.apart import divergence
    from edgeq.errors import EdgeqError
    from edgeq.examine import bench, inspect, sensitivity, validate
    from edgeq.observing import observe
    from edgeq.packages import compare, make_update, package, update
    from edgeq.packaging import verify_package
    from edgeq.pipeline import export
    from edgeq.report.codec import from_json, to_json
    from edgeq.report.record import Check, Notice, Report
    from edgeq.sizes import footprint
    from edgeq.target.load import load_target

__all__ = [
    "Check",
    "EdgeqError",
    "Notice",
    "Report",
    "__version__",
    "advise",
    "bench",
    "compare",
    "divergence",
    "export",
    "footprint",
    "from_json",
    "inspect",
    "load_target",
    "make_update",
    "observe",
    "package",
    "sensitivity",
    "to_json",
    "update",
    "validate",
    "verify_package",
]

HOMES = {
    "Check": "edgeq.report.record",
    "EdgeqError": "edgeq.errors",
    "Notice": "edgeq.report.record",
    "Report": "edgeq.report.record",
    "advise": "edgeq.advice",
    "bench": "edgeq.examine",
    "compare": "edgeq.packages",
    "divergence": "edgeq.apart",
    "export": "edgeq.pipeline",
    "footprint": "edgeq.sizes",
    "from_json": "edgeq.report.codec",
    "inspect": "edgeq.examine",
    "load_target": "edgeq.target.load",
    "make_update": "edgeq.packages",
    "observe": "edgeq.observing",
    "package": "edgeq.packages",
    "sensitivity": "edgeq.examine",
    "to_json": "edgeq.report.codec",
    "update": "edgeq.packages",
    "validate": "edgeq.examine",
    "verify_package": "edgeq.packaging",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'edgeq' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
