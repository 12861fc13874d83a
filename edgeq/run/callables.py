"""``pkg.module:name`` -> the Python object a user points at for samples or a metric (L4)."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeq.errors import UsageError, did_you_mean

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def load_callable(spec: str) -> Callable[..., Any]:
    """Import ``pkg.module:name``, looking in the current folder too. UsageError naming the part that isn't there."""
    if not IMPORT_PATH.fullmatch(spec):
        raise UsageError(f"{spec!r} isn't of the form pkg.module:name", hint="give the module, a colon and the name")
    module_name, name = spec.split(":")
    module = _import(module_name)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise UsageError(f"module {module_name!r} has no {name!r}", hint=did_you_mean(name, public))
    found = getattr(module, name)
    if not callable(found):
        raise UsageError(f"{spec!r} is a {type(found).__name__}, expected a callable")
    return found  # type: ignore[no-any-return]  # getattr on a module is Any


def _import(module_name: str) -> Any:
    # A console script, unlike `python -m`, doesn't have the current folder on its path.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"can't import {module_name!r}: {error}", hint=f"is it installed, or in {here}?") from error
    finally:
        if added:
            sys.path.remove(here)
