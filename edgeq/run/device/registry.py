"""Names for devices, kept in ``EDGEQ_CONFIG`` (else ``~/.config/edgeq``): ``devices.json`` (L4)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeq.errors import UsageError, did_you_mean
from edgeq.run.device.record import Facts


def known() -> dict[str, dict[str, Any]]:
    """Name -> ``address`` and ``facts`` as they were when it was added."""
    path = _path()
    if not path.is_file():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{str(path)!r} can't be read: {error}", hint="mend or remove it") from error
    return found


def add(name: str, address: str, facts: Facts) -> None:
    """Keep a device under ``name``. UsageError for a name that reads as an address, or is taken."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "local":
        raise UsageError(f"{name!r} is no name for a device", hint="use letters, digits, dots and dashes: pi5")
    devices = known()
    if name in devices:
        raise UsageError(
            f"{name!r} is {devices[name]['address']} already", hint=f"edgeq device remove {name}, or take another name"
        )
    _write({**devices, name: {"address": address, "facts": asdict(facts)}})


def remove(name: str) -> None:
    """Forget a device. UsageError when it isn't known."""
    devices = known()
    if name not in devices:
        raise UsageError(f"no device is called {name!r}", hint=did_you_mean(name, list(devices), "none is known"))
    _write({key: value for key, value in devices.items() if key != name})


def address_of(word: str) -> str:
    """The address a name stands for; an address is itself."""
    devices = known()
    if word in devices:
        return str(devices[word]["address"])
    if word == "local" or "://" in word or word.startswith("local?"):
        return word
    names = list(devices)
    raise UsageError(
        f"no device is called {word!r}",
        hint=did_you_mean(
            word, names, "edgeq device add NAME ADDRESS, or give an address: ssh://user@host, adb://SERIAL"
        ),
    )


def _path() -> Path:
    folder = os.environ.get("EDGEQ_CONFIG")
    return (Path(folder) if folder else Path.home() / ".config/edgeq") / "devices.json"


def _write(devices: Mapping[str, Any]) -> None:
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(devices, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
