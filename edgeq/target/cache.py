"""Where edgeq keeps what it needn't find out or make again (L3)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """``EDGEQ_CACHE``, else ``XDG_CACHE_HOME/edgeq``, else ``~/.cache/edgeq``."""
    if own := os.environ.get("EDGEQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeq"


def kept(key: str, folder: str, name: str, make: Callable[[Path], None]) -> Path:
    """A file in edgeq's cache that is made once, whole or not at all."""
    place = cache_folder() / folder / hashlib.sha256(key.encode()).hexdigest()[:16] / name
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
            make(Path(temporary) / name)
            os.replace(Path(temporary) / name, place)  # noqa: PTH105 - atomic, over what another process made meanwhile
    return place
