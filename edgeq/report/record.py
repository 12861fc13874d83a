"""The record that comes out of every command, and nothing else: Report and its parts (L0).

Everything edgeq prints, draws or packages is a view of this record. ``to_json`` and ``from_json`` are inverse;
the schema (``edgeq/report/schema.json``) is committed and versioned by ``SCHEMA``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1


@dataclass(frozen=True)
class Notice:
    """A decision or a warning a person should read. ``node`` names what it is about, when it is about one thing."""

    level: Literal["info", "warning"]
    code: str
    message: str
    node: str = ""


@dataclass(frozen=True)
class Check:
    """One measured value. ``low``/``high`` bound it at 95 % where it was sampled; ``limit`` is what it was held to.

    ``passed`` is True without a limit. ``limit_kind`` says whether the limit is the most or the least allowed.
    """

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    limit_kind: Literal["max", "min"] = "max"
    passed: bool = True
    samples: int = 0
    note: str = ""


@dataclass(frozen=True)
class StepRecord:
    """One stage of the pipeline: how long it took, what it changed, in numbers (``facts``) and words (``notes``)."""

    name: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Island:
    """A node that runs in float, and why. ``macs`` is its share of work in multiply-accumulates."""

    node: str
    op: str
    reason: str
    macs: int = 0


@dataclass(frozen=True)
class Coverage:
    """What runs in which arithmetic, read from the runtime's own optimised graph.

    ``unexplained`` lists Q/DQ nodes that survive fusion and that no boundary with a float island explains; of a file
    for another provider than the CPU's, nodes that run on the CPU and aren't the Q/DQ of inputs and outputs.
    ``providers``: of such a file, how many nodes each provider runs.
    """

    integer_macs_share: float
    integer_nodes: int
    mover_nodes: int
    float_nodes: int
    boundary_qdq: int
    float_islands: tuple[Island, ...] = ()
    unexplained: tuple[str, ...] = ()
    kernels: dict[str, int] = field(default_factory=dict)
    providers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSums:
    """A node whose integer kernel adds products in pairs, and what a pair can reach over all inputs.

    ``rows``: outputs; ``flagged``: those that can leave 16 bits; ``worst``: the largest magnitude."""

    node: str
    op: str
    rows: int
    flagged: int
    worst: int


@dataclass(frozen=True)
class Saturation:
    """Whether any input can make products saturate on x86 CPUs that add them in 16 bits, those without VNNI.

    When ``flagged`` is 0 it is a certificate: the same integers on every x86-64 CPU. Sums over ``nodes``."""

    rows: int
    flagged: int
    worst: int
    nodes: tuple[PairSums, ...] = ()


@dataclass(frozen=True)
class AtomNoise:
    """What quantizing one atom (a node with what folds into it) does to the outputs, and which tensor is to blame.

    ``noise_db``: SNR when it alone is quantized; ``gain_db``: SNR won when all are but it; ``kl``: divergence of class
    scores in nats when alone; ``gained_ns``: time its integer kernel saves. None: not measured."""

    atom: str
    op: str
    noise_db: float
    gain_db: float | None = None
    kl: float | None = None
    gained_ns: float | None = None
    why: str = ""


@dataclass(frozen=True)
class NodeForecast:
    """Who will run a node, and in what. ``runs``: ``integer``, ``mover`` (codes pass), ``float``, or ``index`` for what
    makes no floats; ``kernel``: the runtime's op, "" when the node is dropped or part of its neighbour's. ``fix``: what
    would run in integers instead."""

    node: str
    op: str
    provider: str
    runs: str
    kernel: str
    why: str
    fix: str = ""


@dataclass(frozen=True)
class Divergence:
    """A node that computes otherwise there than here, from equal inputs, told by the ``tensor`` it writes.

    ``cause``: ``rounding`` when right kernels may differ by that much, else what it looks like: ``scale``,
    ``zero point``, ``saturation``, ``fallback``, ``constants`` (that two models have otherwise), ``precision``,
    ``not finite``, ``shape`` or ``unknown``. ``largest``: difference, in codes of integers; ``share``: of the values
    that differ. ``changed``: the constants."""

    node: str
    op: str
    tensor: str
    cause: str
    why: str
    largest: float
    share: float
    kernel: str = ""
    kernel_there: str = ""
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A file that runs. ``digest`` is sha256 of the model with its weights; sizes in bytes, external data included."""

    path: str
    target: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Report:
    """All that a run found out. Views: ``report.text``, ``report.html`` and JSON."""

    source: dict[str, Any]
    target: dict[str, Any]
    recipe: str
    artifact: Artifact | None = None
    steps: tuple[StepRecord, ...] = ()
    checks: tuple[Check, ...] = ()
    coverage: Coverage | None = None
    saturation: Saturation | None = None  # of files for x86-64
    notices: tuple[Notice, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)  # "reference"/"artifact"/… -> Timing as a dict, per threads
    layers: tuple[dict[str, Any], ...] = ()  # name, op, snr_db, format: a row a quantised tensor
    sensitivity: tuple[AtomNoise, ...] = ()  # loudest first; of export only when a repair needed it
    candidates: tuple[dict[str, Any], ...] = ()  # what was measured: name, ships, why, …
    forecast: tuple[NodeForecast, ...] = ()  # of inspect: a row a node, in graph order
    divergence: tuple[Divergence, ...] = ()  # what differs from here to there given equal inputs, in graph order
    drift: tuple[dict[str, Any], ...] = ()  # of observe: a row a tensor of a package, its range then and now
    sustained: dict[str, Any] = field(default_factory=dict)  # seconds, windows, energy, …: a run back to back
    footprint: dict[str, Any] = field(default_factory=dict)  # formula, formats, kv_cache, memory: bytes before building
    advice: tuple[dict[str, Any], ...] = ()  # a row a tensor: values, candidates with predicted snr_db, format, why
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def check(self, name: str) -> Check:
        """The check called ``name``. KeyError when it was not measured."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)
