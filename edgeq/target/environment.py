"""Python environments of their own, for builds of the runtime and toolkits that can't live beside this one's (L3).

The wheels onnxruntime-openvino and onnxruntime-webgpu replace onnxruntime. So each lives in a virtual environment that
a target names (``environment``), in the folder ``EDGEQ_ENVIRONMENTS``, else in edgeq's cache. The processes that open
its provider then run that environment's Python with this edgeq.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeq.errors import RuntimeUnavailableError
from edgeq.target.cache import cache_folder
from edgeq.target.provider import check_provider, held_here
from edgeq.target.record import Provider, Target


def environments_folder() -> Path:
    """``EDGEQ_ENVIRONMENTS``, else ``environments`` in the cache."""
    return Path(os.environ.get("EDGEQ_ENVIRONMENTS") or cache_folder() / "environments")


def python_in(environment: str) -> Path:
    """The interpreter of an environment, whether it is there or not."""
    return environments_folder() / environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def python_of(environment: str, packages: Sequence[str], use: str, instead: str = "") -> Path:
    """The interpreter of an environment. RuntimeUnavailableError where it isn't there: what it is of ``use`` for, and
    what makes it, besides what can be done ``instead``."""
    python = python_in(environment)
    if not python.is_file():
        made = " && ".join(shlex.join(command) for command in commands(environment, packages))
        raise RuntimeUnavailableError(
            f"{use} needs a Python environment of its own, {environment!r}: there is no {python}",
            hint=f"{instead}, or {made}" if instead else made,
        )
    return python


def python_for(provider: Provider) -> str:
    """The interpreter that can open a session on ``provider``: this one or that of its environment. Raises
    RuntimeUnavailableError, with what to install, where neither can."""
    if provider.environment and not held_here(provider):
        return str(python_of(provider.environment, provider.packages, provider.name, provider.install))
    check_provider(provider)
    return sys.executable


def commands(environment: str, packages: Sequence[str]) -> list[list[str]]:
    """What makes an environment: ``packages`` are the arguments of a ``pip install`` each."""
    python = python_in(environment)
    installs = [[str(python), "-m", "pip", "install", *words.split()] for words in packages]
    return [[sys.executable, "-m", "venv", str(python.parent.parent)], *installs]


def run_toolkit(target: Target, script: str, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """What ``script`` leaves in ``folder`` as ``result.json``, given ``job.json``, in the Python of a target's toolkit.
    Raises RuntimeUnavailableError where the toolkit isn't there, or its process ends before it is done.

    ``-P`` keeps the script's folder off the other Python's path: its modules' names are common ones."""
    python = python_of(target.environment, target.packages, target.toolkit)
    (folder / "job.json").write_text(json.dumps(dict(job)), encoding="utf-8")
    done = subprocess.run(
        [python, "-P", script, str(folder)], cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        tail = " | ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
        raise RuntimeUnavailableError(
            f"the process of {target.toolkit} ended with {how}: {tail}",
            hint=f"delete {python.parent.parent} and make it again if it isn't whole",
        )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result
