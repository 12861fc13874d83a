"""Python environments of their own, for builds of the runtime and toolkits that can't live beside this one's (L3).

The wheels onnxruntime-openvino and onnxruntime-webgpu replace onnxruntime. So each lives in a virtual environment that
a target names (``environment``), in the folder ``EDGEQ_ENVIRONMENTS``, else in edgeq's cache. The processes that open
its provider then run that environment's Python with this edgeq.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeq.errors import RuntimeUnavailableError
from edgeq.target.cache import cache_folder
from edgeq.target.provider import check_provider, held_here
from edgeq.target.record import Provider


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
