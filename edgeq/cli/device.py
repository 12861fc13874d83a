"""What `edgeq device` does, a row an action: a function of words and what these are (L11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeq import devices
from edgeq.run.device import registry


def _add(name: str, address: str) -> dict[str, Any]:
    return {name: _line(devices.add(name, address))}


def _list() -> dict[str, Any]:
    return {name: _line({"address": row["address"], **row["facts"]}) for name, row in registry.known().items()}


def _remove(name: str) -> dict[str, Any]:
    registry.remove(name)
    return {name: "forgotten"}


def _line(facts: dict[str, Any]) -> str:
    runtime = f"onnxruntime {facts['runtime']}" if facts["runtime"] else "no onnxruntime"
    parts = [facts["address"], facts["board"], facts["machine"], f"{facts['cores']} cores", runtime]
    return ", ".join(filter(None, [*parts, facts["emulator"] and f"emulated by {facts['emulator']}"]))


ACTIONS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "add": (_add, ("NAME", "ADDRESS")),
    "list": (_list, ()),
    "doctor": (devices.examine, ("NAME",)),
    "remove": (_remove, ("NAME",)),
}
