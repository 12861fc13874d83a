"""The fusion oracle: asks the installed runtime what becomes an integer kernel (L3).

A table of what fuses would be wrong on the next release and on the next ISA. So each question is put to the runtime
itself: a micro-model (``micro``) goes in, the graph the runtime would execute comes out, the verdict is read from it,
and a run proves that the kernel computes what the float node does. Answers are kept per runtime version, ISA and
provider, so a model costs a handful of sessions of a few milliseconds once, and nothing after.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from copy import copy
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from edgeq.num.quant import Quant
from edgeq.target.cache import cache_folder
from edgeq.target.compiled import compiled_verdicts, owned
from edgeq.target.detect import isa_fingerprint
from edgeq.target.isolated import version_of
from edgeq.target.micro import CODE_TYPES, micro_model
from edgeq.target.question import Question, holds_graph, is_real, quantizable_inputs, question, signature
from edgeq.target.record import CPU, Target
from edgeq.target.runtime import disagreement, optimize, runtime_version
from edgeq.target.verdict import COMPARING, KINDS, Kind, Verdict

PROBE = 3  # raised when micro-models or the reading of verdicts change: older answers are asked again

# What the runtime puts around a kernel; skipped on the way from an edge to the kernel that computed it.
_PLUMBING = frozenset({"QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Cast", "Squeeze", "Unsqueeze"})
_CODES = frozenset(dtype for format, dtype in CODE_TYPES.items() if format.bits <= 16)


class Oracle:
    """Verdicts for one target on the installed runtime, remembered in memory and in ``folder``.

    ``folder`` None means ``EDGEQ_CACHE``, else ``XDG_CACHE_HOME/edgeq``, else ``~/.cache/edgeq``. ``sessions`` counts
    how often the runtime was asked.
    """

    def __init__(self, target: Target, folder: Path | None = None) -> None:
        self.target = target
        provider = "-".join(filter(None, (target.provider, version_of(target.execution))))
        name = f"{runtime_version()}-{isa_fingerprint()}-{provider}.json"
        self.path = (folder or cache_folder()) / "oracle" / name
        self.sessions = 0
        settings = sorted((*target.session.items(), *target.options.items()))
        self._prefix = " ".join(f"{key}={value}" for key, value in settings)
        self._known = _read_cache(self.path)
        self._shapes: Mapping[str, tuple[int, ...]] = {}

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> Oracle:
        """The same oracle, asked about nodes whose values have these shapes, by name, whatever their model says."""
        other = copy(self)
        other._shapes = shapes
        return other

    def ask(
        self,
        node: ir.Node,
        *,
        quantized_inputs: Sequence[int] | None = None,
        output: Literal["quantized", "float"] = "quantized",
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        activations: Quant | None = None,
        weights: Quant | None = None,
    ) -> Verdict:
        """Verdict for one node with Q/DQ on the inputs of these indices (None: every one that can carry them)."""
        indices = quantizable_inputs(node) if quantized_inputs is None else quantized_inputs
        edges = {value for index in indices if (value := _input(node, index)) is not None}
        if output == "quantized":
            edges |= {value for value in node.outputs if is_real(value)}
        asked = question(
            (node,), edges, self.target, shapes=shapes or self._shapes, activations=activations, weights=weights
        )
        return self._answer(asked)[0]

    def ask_pattern(
        self,
        nodes: Sequence[ir.Node],
        quantized_edges: Set[str],
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        activations: Quant | None = None,
        weights: Quant | None = None,
    ) -> tuple[Verdict, ...]:
        """A verdict a node for neighbours asked together, in topological order, Q/DQ on the values of these names."""
        values = (value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None)
        edges = {value for value in values if value.name in quantized_edges}
        asked = question(
            nodes, edges, self.target, shapes=shapes or self._shapes, activations=activations, weights=weights
        )
        return self._answer(asked)

    def _answer(self, asked: Question) -> tuple[Verdict, ...]:
        if any(holds_graph(node) for node in asked.nodes):
            return tuple(Verdict("float", node.op_type, "control flow has no integer kernel") for node in asked.nodes)
        if not asked.quantized:
            return tuple(Verdict("float", node.op_type, "nothing to quantize on its edges") for node in asked.nodes)
        return self._kept(asked)

    def owner(self, node: ir.Node) -> str:
        """The provider that runs ``node`` without Q/DQ around it, "" where it is folded away."""
        if self.target.provider == CPU.name or holds_graph(node):
            return CPU.name
        verdict = self._kept(question((node,), set(), self.target, shapes=self._shapes))[0]
        gone = verdict.kind == "mover" and not verdict.kernel
        return "" if gone else verdict.provider or self.target.provider

    def in_types(self, node: ir.Node) -> Verdict:
        """Who computes ``node`` in the types it has, without Q/DQ. The kernel is "" where nobody does, ``Cast`` where
        the CPU's provider has none of these types and computes it between casts."""
        if holds_graph(node):
            return Verdict("float", node.op_type, "control flow runs in any type", CPU.name)
        return self._kept(question((node,), set(), self.target, shapes=self._shapes), "types ", _in_types)[0]

    def _kept(
        self, asked: Question, what: str = "", ask: Callable[[Question, Target], tuple[Verdict, ...]] | None = None
    ) -> tuple[Verdict, ...]:
        key = self._prefix + what + signature(asked)
        if key not in self._known:
            self.sessions += 1
            self._known[key] = (ask or probe)(asked, self.target)
            _write_cache(self.path, self._known)
        return self._known[key]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def probe(asked: Question, target: Target) -> tuple[Verdict, ...]:
    """A verdict a node, read from what the runtime makes of the question's micro-model and then proved by a run."""
    if target.provider != CPU.name:
        return compiled_verdicts(asked, target)
    micro = micro_model(asked)
    fused = optimize(micro, target)
    if isinstance(fused, str):
        return tuple(Verdict("float", node.op_type, f"the runtime refuses it: {fused}") for node in asked.nodes)
    reading = _Reading(asked, fused)
    verdicts = tuple(reading.verdict(node) for node in asked.nodes)
    sound = all(verdict.kind == "float" for verdict in verdicts) or not (wrong := disagreement(micro, target))
    if sound:
        return verdicts
    return tuple(Verdict("float", verdict.kernel, f"{verdict.kernel} {wrong}") for verdict in verdicts)


def _in_types(asked: Question, target: Target) -> tuple[Verdict, ...]:
    node = asked.nodes[0]
    if target.provider != CPU.name:
        return (owned(asked, target),)
    found = optimize(micro_model(asked), target)
    if isinstance(found, str):
        return (Verdict("float", "", f"the runtime refuses it: {found}"),)
    inserted = node.op_type != "Cast" and any(one.op_type == "Cast" for one in found.graph)
    return (Verdict("float", "Cast" if inserted else node.op_type, "", CPU.name),)


# --- reading the answer ----------------------------------------------------------------------------------------------


class _Reading:
    """Finds in the optimised graph the kernel that took a node of the pattern over.

    Fused nodes keep the names of the values they produce, so a node's kernel is found from its output edge, walking
    up through Q/DQ and inserted reshapes; a value that is gone was absorbed by the kernel of its reader.
    """

    def __init__(self, asked: Question, model: ir.Model) -> None:
        self.asked = asked
        self.names = asked.names()
        self.made = {value.name: node for node in model.graph for value in node.outputs}

    def verdict(self, node: ir.Node) -> Verdict:
        edge = self._edge(node)
        path = list(self._walk(edge, node)) if edge else []
        kernel = path[-1] if path else None
        if kernel is None or kernel.op_type in ("QuantizeLinear", "DequantizeLinear") or _requantizes(path):
            return _vanished(node, path)
        around = [step.op_type for step in reversed(path) if step.op_type in ("QuantizeLinear", kernel.op_type)]
        if _reads_real(kernel) or not _reads_codes(kernel):
            chain = " → ".join([*_upstream(kernel), *around])
            return Verdict("float", kernel.op_type, f"no integer kernel: {chain} stays")
        left = "; QuantizeLinear stays after it" if "QuantizeLinear" in around else ""
        if kernel.op_type == node.op_type and node.op_type not in COMPARING and kernel.domain == node.domain:
            return Verdict("mover", kernel.op_type, f"{kernel.op_type} moves codes, Q/DQ around it are dropped{left}")
        return Verdict("integer", kernel.op_type, f"{kernel.op_type} computes on codes{left}")

    def _edge(self, node: ir.Node) -> str | None:
        """Name of the first value at or below ``node``'s outputs that the optimised graph still makes."""
        for value in node.outputs:
            name = self.names[value]
            for candidate in (f"{name}_codes", f"{name}_out", name):
                if candidate in self.made:
                    return candidate
        inside = set(self.asked.nodes)
        readers = (use.node for value in node.outputs for use in value.uses() if use.node in inside)
        return next((edge for reader in readers if (edge := self._edge(reader))), None)

    def _walk(self, edge: str, node: ir.Node) -> Iterator[ir.Node]:
        """Producers from ``edge`` upwards, the last one being the first that isn't plumbing."""
        step: ir.Node | None = self.made[edge]
        while step is not None:
            yield step
            if step.op_type not in _PLUMBING or step.op_type == node.op_type or step.inputs[0] is None:
                return
            step = step.inputs[0].producer()


def _vanished(node: ir.Node, path: list[ir.Node]) -> Verdict:
    """The node is gone: either nothing is left of it, or a DQ → Q pair that changes the scale."""
    if _requantizes(path):
        return Verdict("float", "", f"{node.op_type} is dropped but DequantizeLinear → QuantizeLinear stays")
    return Verdict("mover", "", f"{node.op_type} is dropped, codes pass unchanged")


def _requantizes(path: list[ir.Node]) -> bool:
    """Whether codes are turned into reals and back on the way: [..., QuantizeLinear, DequantizeLinear, ...]."""
    types = [step.op_type for step in path]
    return ("QuantizeLinear", "DequantizeLinear") in pairwise(types)


def _reads_real(kernel: ir.Node) -> bool:
    """Whether any operand is dequantized before the kernel sees it."""
    producers = (value.producer() for value in kernel.inputs if value is not None)
    return any(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _reads_codes(kernel: ir.Node) -> bool:
    """Whether any operand is made of codes, packed weights included."""
    return any(value is not None and value.dtype in _CODES for value in kernel.inputs)


def _upstream(kernel: ir.Node) -> list[str]:
    """Op types above a float kernel down from a DequantizeLinear, the way through most nodes; empty without one."""
    found: list[str] = []
    node = kernel
    for _ in range(4):
        producers = [value.producer() for value in node.inputs if value is not None]
        above = {producer.op_type: producer for producer in producers if producer is not None}
        dequantized = above.pop("DequantizeLinear", None)
        if not above:
            return ["DequantizeLinear", *found] if dequantized is not None else found
        node = next(iter(above.values()))
        found = [node.op_type, *found]
    return found


# --- cache -----------------------------------------------------------------------------------------------------------


def _read_cache(path: Path) -> dict[str, tuple[Verdict, ...]]:
    """Answers kept so far. A file that is missing, damaged or of another revision counts as empty: asking is cheap."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["probe"] != PROBE:
            return {}
        return {key: tuple(_verdict(*row) for row in rows) for key, rows in stored["verdicts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _verdict(kind: Kind, kernel: str, reason: str, provider: str) -> Verdict:
    if kind not in KINDS:
        raise ValueError(kind)
    return Verdict(kind, kernel, reason, provider)


def _write_cache(path: Path, known: Mapping[str, tuple[Verdict, ...]]) -> None:
    """Replace the file in one step, keeping what another process added since. A read-only place is no error."""
    merged = {**_read_cache(path), **known}
    rows = {key: [astuple(verdict) for verdict in verdicts] for key, verdicts in sorted(merged.items())}
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"probe": PROBE, "verdicts": rows}, indent=0), encoding="utf-8")
        part.replace(path)
    except OSError:
        return
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
