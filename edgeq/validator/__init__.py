"""Reference against artefact, on the device itself: accuracy, latency, memory, size -> Checks (L8).

``Judge`` (accuracy) and ``latency`` stand apart because a repair loop asks the first often and the second once;
``validate`` is both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir

from edgeq.errors import UsageError, did_you_mean
from edgeq.ir import io
from edgeq.num.metrics import METRICS
from edgeq.report.record import Check
from edgeq.run.device import Device
from edgeq.run.device.measure import Clock, outputs
from edgeq.run.record import Feed, Samples, Timing
from edgeq.run.samples import take
from edgeq.run.session import Session, open_session
from edgeq.run.timing import TimedConfig
from edgeq.target.record import CPU, Provider
from edgeq.validator.judge import Judge, accuracy
from edgeq.validator.limits import Limits
from edgeq.validator.speed import FOOTPRINTS, SIZE_CHECKS, SPEED_CHECKS, Latency, latency, size

__all__ = [
    "METRICS",
    "Judge",
    "Latency",
    "Limits",
    "Validation",
    "accuracy",
    "latency",
    "refuse_unmeasured",
    "size",
    "validate",
]

TIMED_SAMPLES = 4
EMULATED_SECONDS = 1.0


@dataclass(frozen=True)
class Validation:
    """All that was measured of one artefact; ``states``: a device's clocks and heat before and after each race."""

    checks: tuple[Check, ...]
    timings: dict[str, dict[int, Timing]]
    states: tuple[Mapping[str, Any], ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def validate(
    reference: Path | onnx_ir.Model,
    artifact: Path,
    samples: Samples,
    *,
    metric: str | None = None,
    limits: Limits | None = None,
    threads: Sequence[int] = (1, 2),
    floats: Sequence[TimedConfig] = (),
    provider: Provider = CPU,
    max_seconds: float = 20.0,
    seed: int = 0,
    device: Device | None = None,
    opener: Callable[..., Session] = open_session,
    kind: Callable[[Feed], str] | None = None,
    feeds: Sequence[Feed] = (),
) -> Validation:
    """Measure ``artifact`` against ``reference`` on ``samples``.

    ``metric`` is a name of METRICS or ``pkg.module:function`` (see ``Judge``); without one, integer labels and a
    class-like output mean top1. ``floats`` are more float configurations the artefact has to beat. Raises UsageError
    for a limit on what isn't measured. On a ``device`` the reference gives its outputs here, all else is measured
    there; the clock of an emulated one proves nothing, so it is held to nothing. ``opener`` opens the artefact to
    judge it, ``kind`` is as of ``Judge``, ``feeds`` are what is timed if that isn't some of the samples.
    """
    limits, emulated = limits or {}, device is not None and bool(device.facts.emulator)
    with ExitStack() as stack:
        if isinstance(reference, onnx_ir.Model):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True))
            io.write(reference, Path(folder) / "reference.onnx")
            reference = Path(folder) / "reference.onnx"
        judge = Judge(
            reference,
            samples,
            metric=metric,
            limits=limits,
            threads=max(threads),
            provider=provider,
            opener=opener,
            kind=kind,
        )
        clock = Clock(device) if device else None
        tested = TimedConfig("artifact", artifact, provider=provider)
        accurate = judge.judged(outputs(device, tested, samples, judge.outputs)) if device else judge(artifact)
        refuse_unmeasured(limits, accurate, timed=not emulated)
        fast = latency(
            [TimedConfig("float", reference, provider=provider), *floats],
            tested,
            feeds or [*take(samples, TIMED_SAMPLES)],
            threads=threads,
            limits=limits,
            max_seconds=EMULATED_SECONDS if emulated else max_seconds,
            seed=seed,
            footprints=1 if emulated else FOOTPRINTS,
            stopwatch=clock,
        )
        timed = [_unproven(check) if emulated else check for check in fast.checks]
        checks = (*accurate, *timed, *size(reference, artifact, limits))
    return Validation(checks, fast.timings, tuple(clock.states) if clock else ())


def _unproven(check: Check) -> Check:
    return replace(check, limit=None, passed=True, note=f"{check.note}; not a device measurement".strip("; "))


def refuse_unmeasured(limits: Limits, accurate: Sequence[Check], *, timed: bool = True) -> None:
    """UsageError for a limit on what neither the accuracy checks nor speed (if it is ``timed``) and size measure: it
    would never fail."""
    measured = [*(check.name for check in accurate), *(SPEED_CHECKS if timed else ()), *SIZE_CHECKS]
    for name in limits:
        if name not in measured:
            hint = "give labels with -e, or a --metric that needs none" if name == "top1_drop" else ""
            hint = (
                "latency is measured on the device alone: validate the package there" if name in SPEED_CHECKS else hint
            )
            raise UsageError(f"limit on {name!r}, which isn't measured here", hint=hint or did_you_mean(name, measured))
