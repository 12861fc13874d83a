"""``pkg.module:name`` -> the object it names, with errors that say what is there instead (L3)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from edgeq.errors import UsageError, did_you_mean


def load(path: str) -> Any:
    """The object ``pkg.module:name`` (dots allowed in the name), looked up from the current folder first, as
    ``python -m`` does. Raises UsageError for another form, a module that can't be imported or a name not in it."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UsageError(f"{path!r} is no import path", hint="write pkg.module:callable")
    found: Any = _import(module_name, path)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise UsageError(
                f"{module_name!r} has no {name!r}",
                hint=did_you_mean(part, names) if names else f"{module_name!r} defines no callable",
            )
        found = getattr(found, part)
    return found


def _import(name: str, path: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(
                f"no module {error.name!r} for {path!r}", hint="run from the folder it is in, or install it"
            ) from error
        raise UsageError(f"{name!r} can't be imported: {error}", hint=f"pip install {error.name}") from error
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"{name!r} can't be imported: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
