"""What can go wrong by a user's hand: one tree, each leaf with a code and an exit status (L0).

A message names the node, file or key, what was found and what was expected; the hint says what to try next.
Bugs stay ordinary exceptions: they are never turned into an ``EdgeqError``.
"""

from __future__ import annotations


class EdgeqError(Exception):
    """Base of every error a user can cause. ``exit_status`` is what the command line returns."""

    code = "error"
    exit_status = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class UsageError(EdgeqError):
    """A flag, path or option that makes no sense here."""

    code = "usage"


class ModelError(EdgeqError):
    """The model can't be read, is invalid, or holds what edgeq can't take."""

    code = "model"


class SampleError(EdgeqError):
    """Calibration or evaluation data that doesn't fit the model or can't be used."""

    code = "samples"


class TargetError(EdgeqError):
    """A target that doesn't exist or whose file is wrong."""

    code = "target"


class RecipeError(EdgeqError):
    """A recipe that can't be parsed or asks for what no step offers."""

    code = "recipe"


class OutputError(EdgeqError):
    """The output place can't be written or already holds something."""

    code = "output"


class PackageError(EdgeqError):
    """A package that is incomplete, altered or not for this machine."""

    code = "package"


class RuntimeUnavailableError(EdgeqError):
    """The runtime, provider, device or optional dependency needed isn't here."""

    code = "runtime"
    exit_status = 3


class DeviceError(EdgeqError):
    """A device that can't be reached, refuses what it is sent, or fails under it."""

    code = "device"
    exit_status = 3


def did_you_mean(word: str, known: list[str], otherwise: str = "") -> str:
    """A sentence with the nearest known word; without one ``otherwise``, or the list of all of them."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else otherwise or "known: " + ", ".join(sorted(known))
