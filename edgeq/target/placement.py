"""Which provider got which node of a model, and what kernels a compiling provider made of them (L3).

A provider that compiles whole subgraphs leaves no optimised graph to read. Which nodes it took is asked of the runtime;
what it computes them in only its own account tells, for those that give one (READERS). Runs in the isolated process.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeq.target.isolated import call
from edgeq.target.provider import Owner, assigned, first_line, open_on, profiling, ran, runtime_errors, silent
from edgeq.target.record import Provider


@dataclass(frozen=True)
class Kernel:
    """A node of the graph a provider compiled. ``real``: a float enters or leaves it."""

    name: str
    op: str
    real: bool


@dataclass(frozen=True)
class Placement:
    """``assigned``: node -> its owner. ``kernels``: of the provider's own graphs, None where it tells nothing of them.
    ``outputs``: of a run with the feed that was given, or the first line of why it failed."""

    assigned: Mapping[str, Owner]
    kernels: tuple[Kernel, ...] | None = None
    outputs: list[Any] | str = ""

    def provider_of(self, node: str) -> str:
        """Who runs a node of the model; "" when the runtime's own passes did away with it."""
        return next((owner.provider for name, owner in self.assigned.items() if plain(name) == node), "")

    def kernels_of(self, node: str) -> list[Kernel]:
        """The kernels that compute a node; empty when it is part of its neighbour's."""
        return [kernel for kernel in self.kernels or () if plain(kernel.name) == node]


def plain(name: str) -> str:
    """A node's name without what the runtime's passes append."""
    return re.sub(r"(_token_\d+|/MatMulAddFusion)+$", "", name)


def placement(
    model: Path, provider: Provider, settings: Mapping[str, Any], feed: Mapping[str, Any] | None = None
) -> Placement:
    """How ``model`` is placed on ``provider``, asked in the isolated process; of a ``silent`` one a run with ``feed``
    tells. RefusedError where it doesn't load, or then doesn't run."""
    return call(provider, _place, model, provider, dict(settings), feed)  # type: ignore[no-any-return]


def _place(model: Path, provider: Provider, settings: Mapping[str, Any], feed: Mapping[str, Any] | None) -> Placement:
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as name:
        return (_run if silent(provider) else _ask)(model, provider, settings, feed, Path(name))


def _ask(
    model: Path, provider: Provider, settings: Mapping[str, Any], feed: Mapping[str, Any] | None, folder: Path
) -> Placement:
    reader = READERS.get(provider.name)
    if reader is not None:
        provider = replace(provider, options={**provider.options, **reader[0](folder)})
    session = open_on(model, provider, settings)
    kernels = None if reader is None else tuple(reader[1](folder))
    return Placement(assigned(session), kernels, "" if feed is None else _outputs(session, feed))


def _run(
    model: Path, provider: Provider, settings: Mapping[str, Any], feed: Mapping[str, Any] | None, folder: Path
) -> Placement:
    assert feed is not None, f"only a run tells what {provider.name} does"
    session = open_on(model, provider, {**settings, **profiling(folder / "profile")})
    outputs = session.run(None, dict(feed))
    found = ran(session)
    kernels = tuple(Kernel(node.name, node.owner.op, node.real) for node in found)
    return Placement({node.name: node.owner for node in found}, kernels, outputs)


def _outputs(session: Any, feed: Mapping[str, Any]) -> list[Any] | str:
    try:
        return session.run(None, dict(feed))  # type: ignore[no-any-return]
    except runtime_errors() as error:
        return first_line(error)


def _dump_qnn(folder: Path) -> dict[str, str]:
    return {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": str(folder)}


def _read_qnn(folder: Path) -> Iterable[Kernel]:
    """QNN's graphs as the provider writes them. A type's second byte says what it is: 2 is float (QnnTypes.h)."""
    for path in sorted(folder.glob("*.json")):
        graph = json.loads(path.read_text(encoding="utf-8")).get("graph")
        if graph is None:  # the log of tensors beside it
            continue
        types = {name: tensor["data_type"] for name, tensor in graph["tensors"].items()}
        for name, node in graph["nodes"].items():
            edges = (*node["input_names"], *node["output_names"])
            yield Kernel(name, node["type"], any(types[edge] >> 8 == 2 for edge in edges if edge in types))


# Provider -> options that make it write what it compiled into a folder, and how that is read.
READERS: dict[str, tuple[Callable[[Path], dict[str, str]], Callable[[Path], Iterable[Kernel]]]] = {
    "QNNExecutionProvider": (_dump_qnn, _read_qnn),
}
