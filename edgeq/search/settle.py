"""Settle what ships: build drafts, measure them, repair them, keep the best that is proven (L10).

Two drafts come first: everything the runtime has integer kernels for, and the cut that this machine's own profile
prefers. Where they lose accuracy, channels are evened out first, which costs no speed; then the most harmful atoms go
back to float, in growing steps, until a draft keeps its promise. A draft that isn't proven faster than the best float
file is given up. The float file is always a candidate, so the answer is never worse than what the user had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeq.analyse.sensitivity import decibel
from edgeq.context import Context
from edgeq.ir import io
from edgeq.ir.ops import OPS
from edgeq.quantizer import Quantizer
from edgeq.run.record import Feed
from edgeq.run.timing import Ratio, TimedConfig, compare, ratio
from edgeq.search.draft import Draft, Judge, drafted, in_own_kernels_too, judged, judged_once
from edgeq.steps import equalize
from edgeq.target.detect import elsewhere
from edgeq.target.record import CPU

ENOUGH_DB = 40.0  # of SNR: a hundredth of the amplitude; a recipe's relief takes nothing off below
MORE_DB = (0, 2, 4)  # a relieved draft may still drop by a sample or two too many; then a little more is relieved
RELIEF_DB = (1, 2, 3, 4, 5, 6, 8, 10, 15)  # predicted noise taken off the outputs by each further repair
REFINED = 12  # atoms whose ranges are tried one by one before any is given up
DECIDE_SECONDS = 8.0  # a draft is chosen or dropped on this; the shipped one is measured again, longer
DOUBT_SECONDS = 30.0  # for drafts that seem faster at every thread count when none is proven: the machine is busy


@dataclass(frozen=True)
class Settled:
    """The choice. ``trials``: what was measured of each candidate and why it ships or not, a row each. ``quantizer``:
    that of the choice or, of a float one, of the last draft."""

    chosen: Draft
    best_float: Draft
    trials: tuple[dict[str, object], ...]
    quantizer: Quantizer | None = None


def settle(
    floats: Sequence[Draft],
    quantizer: Quantizer | None,
    judge: Judge,
    feeds: Sequence[Feed],
    context: Context,
    folder: Path,
) -> Settled:
    """Choose among ``floats`` and what ``quantizer`` can make. ``folder`` receives the candidates' files."""
    drafts = _integer_drafts(quantizer, judge, context, folder) if quantizer is not None else []
    drafts += in_own_kernels_too([draft for draft in drafts if draft.accurate], judge, context)
    accurate = [draft for draft in drafts if draft.accurate]
    ratios, best_float, proven = _proven(list(floats), accurate, feeds, context)
    unproven = next((draft for draft in floats if draft.asked), best_float)
    proven = [draft for draft in proven if draft.relief == max(one.relief for one in proven)]
    chosen = min(proven, key=lambda draft: _cost(draft, ratios), default=unproven)
    rows = [_row(draft, ratios.get(draft.name), chosen, best_float) for draft in (*floats, *drafts)]
    if quantizer is not None and chosen is unproven:
        context.recorder.warn("float-ships", _why_float(drafts, accurate))
    quantizers = [draft.quantizer for draft in (chosen, *reversed(drafts)) if draft.quantizer is not None]
    return Settled(chosen, best_float, tuple(rows), quantizers[0] if quantizers else quantizer)


def _proven(
    floats: list[Draft], accurate: list[Draft], feeds: Sequence[Feed], context: Context
) -> tuple[dict[str, list[Ratio]], Draft, list[Draft]]:
    """Ratios by draft, the best float file, and the drafts that may ship: those that are faster at every thread count.

    Where this machine isn't the device nothing is timed: an emulator's or another CPU's clock proves nothing. What is
    accurate may ship then, and the report says so."""
    away = elsewhere(context.target)
    if away:
        context.recorder.warn(
            "not-a-device", f"{away}: no latency was measured, and what has most of its work in integers ships"
        )
        return {}, floats[-1], accurate
    with context.recorder.step("race") as facts:
        ratios, best_float = _race(floats, accurate, feeds, context, DECIDE_SECONDS)
        facts["candidates"] = len(floats) + len(accurate)
        likely = [draft for draft in accurate if all(r.value < 1 for r in ratios[draft.name])]
        if likely and not any(_is_faster(ratios[draft.name]) for draft in likely):
            facts["raced_again"] = len(likely)
            ratios |= _race([best_float], likely, feeds, context, DOUBT_SECONDS)[0]
    return ratios, best_float, [draft for draft in accurate if _is_faster(ratios[draft.name])]


def _is_faster(ratios: Sequence[Ratio]) -> bool:
    """Whether that is proven at every thread count."""
    return all(r.high < 1 for r in ratios)


def _cost(draft: Draft, ratios: Mapping[str, Sequence[Ratio]]) -> tuple[float, ...]:
    """What the choice minimises: the latency ratio or, where none was measured, work and nodes left in float, noise."""
    if draft.name in ratios:
        return (_mean(ratios[draft.name]),)
    seen = draft.coverage
    return (-seen.integer_macs_share, seen.float_nodes, -_snr(draft)) if seen is not None else ()


def _integer_drafts(quantizer: Quantizer, judge: Judge, context: Context, folder: Path) -> list[Draft]:
    """Every integer draft that was made, judged, in order; the last ones are repairs when none was accurate."""
    drafts = _whole_drafts(quantizer, "", judge, context, folder)
    if drafts and not _any_accurate(drafts):
        evened = equalize(quantizer.model, context)
        if evened is not quantizer.model:
            drafts += _whole_drafts(quantizer.over(evened), ", channels evened", judge, context, folder)
    if drafts and not _any_accurate(drafts):
        for maker in dict.fromkeys(draft.quantizer for draft in drafts):  # which repair is faster, the race tells
            best = max((draft for draft in drafts if draft.quantizer is maker), key=_snr)
            drafts += _repairs(best, judge, context, folder)
    return [*drafts, *_relief(drafts, judge, context, folder)]


def _whole_drafts(quantizer: Quantizer, suffix: str, judge: Judge, context: Context, folder: Path) -> list[Draft]:
    """Drafts that nothing was repaired in: all that fuses, what gains here, with what a float kernel does in one left
    to it, and, if all lose, products by weights."""
    first = drafted(f"int8 everywhere it fuses{suffix}", quantizer, context, folder)
    if first is None:
        context.recorder.warn("nothing-to-quantize", "no node of this model has an integer kernel worth its Q/DQ")
        return []
    made: list[Draft | None] = [first]
    if first.plan is not None and context.target.provider == CPU.name and not elsewhere(context.target):
        quantizer.learn_costs(first.plan, first.model)
        made.append(drafted(f"int8 where this machine gains{suffix}", quantizer, context, folder))
        taken = quantizer.taken_in()
        if any(draft is not None and draft.plan is not None and draft.plan.integer.keys() & taken for draft in made):
            made.append(drafted(f"int8 around fused kernels{suffix}", quantizer, context, folder, taken))
    drafts = judged_once(made, judge, context)
    if _any_accurate(drafts) or context.target.whole:
        return drafts
    last = drafted(f"int8 where weights are{suffix}", quantizer, context, folder, _without_weights(quantizer))
    return [*drafts, *judged_once([last], judge, context, beside=drafts)]


def _any_accurate(drafts: Sequence[Draft]) -> bool:
    return any(draft.accurate for draft in drafts)


def _relief(drafts: Sequence[Draft], judge: Judge, context: Context, folder: Path) -> list[Draft]:
    """The most exact of ``drafts`` with so many of its most harmful atoms in float that the recipe's relief is met and,
    if it can be had, half of what the metric still dropped is won back: what an accurate draft is given up for when
    accuracy is wanted beyond the limits."""
    best = max((draft for draft in drafts if draft.accurate), key=_snr, default=None)
    if best is None or best.plan is None or best.quantizer is None or _snr(best) >= ENOUGH_DB:
        return []
    quantizer = best.quantizer
    if not quantizer.relief_db:
        return []
    ranked = _ranked(quantizer.sensitivity(best.plan), quantizer)
    made: list[Draft] = []
    for more in MORE_DB:
        wanted = quantizer.relief_db + more
        count = _count([value for _, value in ranked], wanted)
        reasons = {name: f"quantized alone it leaves {decibel(value):.1f} dB of SNR" for name, value in ranked[:count]}
        name = f"{best.name}, {wanted:g} dB relieved"
        draft = drafted(name, quantizer, context, folder, {**best.kept_float, **reasons})
        if draft is None or draft.plan is None:
            break
        made.append(judged(draft, judge, context))
        if made[-1].accurate and _drop(made[-1]) <= _drop(best) / 2:
            break
    return [replace(draft, relief=_relief_of(draft, best, quantizer.relief_db)) for draft in made]


def _relief_of(draft: Draft, best: Draft, wanted_db: float) -> int:
    if _snr(draft) - _snr(best) < wanted_db / 2:
        return 0
    return 2 if _drop(draft) <= _drop(best) / 2 else 1


def _drop(draft: Draft) -> float:
    """What the metric drops by, in its unit; 0 where it is better than float's or there is none."""
    return max([0.0, *(check.value for check in draft.checks if check.name.endswith("_drop"))])


def _without_weights(quantizer: Quantizer) -> dict[str, str]:
    """Atoms that multiply nothing by a constant, data movers apart: sums, Softmax and products of two activations hold
    a transformer's widest ranges and save little time (MiniLM-L6: cosine .74 with them, .99 without)."""
    reason = "without weights of its own it saves little and its range costs accuracy"
    return {
        atom.name: reason
        for atom in quantizer.atoms
        if OPS.get(atom.head.op_type) is not None
        and not OPS[atom.head.op_type].keeps_scale
        and OPS[atom.head.op_type].weight not in atom.constants
    }


def _snr(draft: Draft) -> float:
    """SNR of the worst output in dB; -inf where no output is float."""
    return next((check.value for check in draft.checks if check.name == "snr_db"), -math.inf)


def _repairs(draft: Draft, judge: Judge, context: Context, folder: Path) -> Iterator[Draft]:
    """Drafts that repair ``draft``, until one is accurate: with better ranges, then with ever more of
    the most harmful atoms back in float."""
    if draft.plan is None or draft.quantizer is None:
        return
    quantizer = draft.quantizer
    noise = quantizer.sensitivity(draft.plan)
    loudest = sorted(noise, key=noise.__getitem__, reverse=True)[:REFINED]
    kept = dict(draft.kept_float)
    if quantizer.refine_ranges(draft.plan, loudest):
        refined = drafted(f"{draft.name}, ranges refined", quantizer, context, folder, kept)
        if refined is not None and refined.plan is not None:
            refined = judged(refined, judge, context)
            yield refined
            if refined.accurate or refined.plan is None:
                return
            noise = quantizer.sensitivity(refined.plan)
    ranked, before = _ranked(noise, quantizer), frozenset[str]()
    for count in _counts([value for _, value in ranked]):
        reasons = {name: f"quantized alone it leaves {decibel(value):.1f} dB of SNR" for name, value in ranked[:count]}
        name = f"{draft.name}, {len(reasons)} most sensitive kept float"
        tried = drafted(name, quantizer, context, folder, {**kept, **reasons})
        if tried is None:
            return
        integer = frozenset(tried.plan.integer) if tried.plan is not None else frozenset()
        if integer == before:  # what is given up was float already, between others that were: the same file
            continue
        before = integer
        tried = judged(tried, judge, context)
        yield tried
        if tried.accurate:
            return


def _counts(noise: list[float]) -> list[int]:
    """How many of the first atoms to give up so that the noise left falls by each step of ``RELIEF_DB``. Noise of atoms
    adds up, as their errors are nearly independent."""
    return sorted({_count(noise, db) for db in RELIEF_DB} if noise else [])


def _count(noise: list[float], relief_db: float) -> int:
    """How many of the first must go for the noise left to be ``relief_db`` below that of all."""
    left = np.sum(noise) - np.cumsum(noise)
    return int(np.argmax(left <= np.sum(noise) * 10 ** (-relief_db / 10))) + 1 if noise else 0


def _ranked(noise: Mapping[str, float], quantizer: Quantizer) -> list[tuple[str, float]]:
    """Most noise for the least time gained first: what to give up first. The mean gain is added to each, since a gain
    of next to nothing must not bring a harmless atom to the front."""
    costs = quantizer.costs
    gain = {name: max(costs.float_ns[name] - costs.integer_ns[name], 0.0) for name in noise}
    usual = sum(gain.values()) / max(len(gain), 1) + 1.0
    harmful = [(name, min(value, 1e3)) for name, value in noise.items() if value > 0]
    return sorted(harmful, key=lambda row: row[1] / math.sqrt(gain[row[0]] + usual), reverse=True)


def _race(
    floats: list[Draft], drafts: list[Draft], feeds: Sequence[Feed], context: Context, seconds: float
) -> tuple[dict[str, list[Ratio]], Draft]:
    """Ratios to the best float file, one a thread count, and that file."""
    configs = [TimedConfig(draft.name, draft.path, provider=context.target.execution) for draft in (*floats, *drafts)]
    runs = [
        compare(configs, feeds, threads=threads, max_seconds=seconds, seed=context.seed)
        for threads in context.target.threads
    ]
    best = min(floats, key=lambda draft: math.prod(run[draft.name].median_ms for run in runs))
    return {config.name: [ratio(run[config.name], run[best.name]) for run in runs] for config in configs}, best


def _mean(ratios: Sequence[Ratio]) -> float:
    """Geometric mean over thread counts."""
    return math.prod(r.value for r in ratios) ** (1 / len(ratios))


def _row(draft: Draft, ratios: Sequence[Ratio] | None, chosen: Draft, best_float: Draft) -> dict[str, object]:
    if draft is chosen:
        why = "ships"
    elif not draft.accurate:
        why = draft.missed
    elif ratios is None:
        why = "another has more of its work in integers, or less noise"
    elif draft.plan is None:
        why = "the best float file" if draft is best_float else "not the fastest float file"
    elif not _is_faster(ratios):
        why = "not proven faster than the best float file"
    elif chosen.relief > draft.relief:
        why = "accurate and faster than float, but the recipe asks for less noise, or less of a drop"
    else:
        why = "accurate and faster than float, but not the fastest"
    return {
        "name": draft.name,
        "size_bytes": io.size_bytes(draft.path),
        "integer_macs_share": draft.coverage.integer_macs_share if draft.coverage else 0.0,
        "latency_ratio": [r.value for r in ratios] if ratios else [],
        "checks": {check.name: check.value for check in draft.checks},
        "ships": draft is chosen,
        "why": why,
    }


def _why_float(drafts: Sequence[Draft], accurate: Sequence[Draft]) -> str:
    if not drafts:
        return "the float model ships: nothing could be quantized"
    if not accurate:
        return "the float model ships: no quantized draft kept the accuracy limits"
    return "the float model ships: no quantized draft was proven faster on this machine"
