"""A draft: a file that could ship, made by a plan, judged, and in edgeq's own kernels too (L10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from edgeq.analyse.coverage import read_back
from edgeq.analyse.place import Plan
from edgeq.context import Context
from edgeq.ir import io
from edgeq.lower.emit import emit
from edgeq.lower.kernels import in_own_kernels
from edgeq.lower.legalize import legalize
from edgeq.quantizer import Quantizer
from edgeq.report.record import Check, Coverage
from edgeq.rewrite.halve import rounded
from edgeq.target import kernels
from edgeq.target.detect import elsewhere
from edgeq.target.record import CPU


class Judge(Protocol):
    """Says how good a file is against the reference, in checks that hold their limits."""

    def __call__(self, artifact: Path, /) -> Sequence[Check]: ...


@dataclass(frozen=True)
class Draft:
    """A file that could ship, and the model it was lowered from. ``plan`` and ``coverage`` are None for float ones;
    ``asked``: a float file whose weights are stored as the recipe says, which ships before other float files whether it
    is faster or not."""

    name: str
    path: Path
    model: ir.Model
    plan: Plan | None = None
    coverage: Coverage | None = None
    checks: tuple[Check, ...] = ()
    relief: int = 0  # 1: has as little noise as the recipe asks for; 2: and won back half of the metric's drop
    kept_float: Mapping[str, str] = field(default_factory=dict)
    asked: bool = False
    quantizer: Quantizer | None = None  # that made it
    proof: Path | None = (
        None  # a file that rounds as its device does, where the runtime here computes this one otherwise
    )

    @property
    def accurate(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def missed(self) -> str:
        """The limits it misses, in words."""
        failed = [check for check in self.checks if not check.passed]
        return "; ".join(f"{check.name} is {check.value:.4g}, limit {check.limit:.4g}" for check in failed)


def drafted(
    name: str, quantizer: Quantizer, context: Context, folder: Path, extra: Mapping[str, str] | None = None
) -> Draft | None:
    """Plan, build, read back and write a draft; None when nothing ends up integer."""
    with context.recorder.step("quantize") as facts:
        plan, model, seen = quantizer.fused(extra)
        facts.update(draft=name, integer_atoms=len(plan.integer), integer_macs_share=seen.integer_macs_share)
        if not plan.integer:
            context.recorder.info("no-gain", f"draft {name!r} is empty: no node left gains from integers here")
            return None
        path = folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"
        lowered = context.lower(quantizer.finished(plan, legalize(model, context.target)))
        context.emit(lowered.clone(), path)
        proof = None
        if quantizer.narrow is not None and context.target.provider == CPU.name:
            proof = path.with_name(f"{path.stem}-rounded.onnx")
            context.emit(rounded(lowered), proof)
    return Draft(name, path, model, plan, seen, kept_float=extra or {}, quantizer=quantizer, proof=proof)


def in_own_kernels_too(drafts: Sequence[Draft], judge: Judge, context: Context) -> list[Draft]:
    """Each draft in edgeq's own kernels, where it has nodes for them and the target's are to be had: the race tells
    which of the two files is faster."""
    if not context.target.kernels or elsewhere(context.target):
        return []
    made = []
    for draft in (one for one in drafts if one.proof is None):  # else the proof would be of another file
        with context.recorder.step("own kernels") as facts:
            lowered = [in_own_kernels(io.read(file), context.target) for file in context.files(draft.path)]
            model, counts = lowered[-1]
            facts.update(draft=draft.name, kernels=counts)
        if not counts or draft.plan is None or draft.quantizer is None:
            continue
        if isinstance(lacking := kernels.here(), str):
            context.recorder.info("no-kernels", f"no draft runs in edgeq's own kernels: {lacking}")
            break
        path = draft.path.with_name(f"{draft.path.stem}-own-kernels.onnx")
        for (one, _), file in zip(lowered, context.files(path), strict=True):
            emit(one, context.target, file)
        seen, _ = read_back(model, draft.plan, draft.quantizer.shapes, context.target)
        made.append(judged(replace(draft, name=f"{draft.name}, own kernels", path=path, coverage=seen), judge, context))
    return made


def judged(draft: Draft, judge: Judge, context: Context) -> Draft:
    """The draft with its checks, of its proof where it has one."""
    with context.recorder.step("judge") as facts:
        facts["draft"] = draft.name
        return replace(draft, checks=tuple(judge(draft.proof or draft.path)))


def judged_once(
    made: Sequence[Draft | None], judge: Judge, context: Context, beside: Sequence[Draft] = ()
) -> list[Draft]:
    """Those that were made, judged, without ones of the same plan as another before or ``beside`` them."""
    kept: list[Draft] = []
    for draft in made:
        if draft is not None and not any(same_plan(draft, other) for other in (*beside, *kept)):
            kept.append(judged(draft, judge, context))
    return kept


def same_plan(one: Draft, other: Draft) -> bool:
    """Whether the same atoms are integer in both."""
    return one.plan is not None and other.plan is not None and one.plan.integer.keys() == other.plan.integer.keys()
