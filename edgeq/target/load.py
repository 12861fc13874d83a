"""Target files: TOML in, ``Target`` out, every mistake named (L3).

A file holds facts and their sources, no logic. It may extend another one; single keys replace the parent's, tables
(``limits``, ``options``, ``choices``, ``session``, ``sources``) are merged key by key. ``summary`` and ``verified``
speak of one file and are not inherited: a family nobody ran may extend one that was measured.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgeq.errors import RecipeError, TargetError, did_you_mean
from edgeq.num.formats import parse_format
from edgeq.num.quant import parse_quant
from edgeq.target.detect import local_name
from edgeq.target.kernels import KERNELS
from edgeq.target.record import Limits, Target

LOCAL = "local"
OWN_KEYS = ("summary", "verified")  # never inherited
REQUIRED = ("summary", "device", "provider", "opset", "activations", "weights", "verified")
VERIFIED = ("here", "emulator", "documentation")


def targets_folder() -> Path:
    """Folder of the shipped target files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "targets", package.parent / "targets"):
        if folder.is_dir():
            return folder
    raise TargetError(f"no folder 'targets' in {package} or beside it", hint="reinstall edgeq")


def target_names() -> list[str]:
    """Names of the shipped targets, sorted."""
    return sorted(path.stem for path in targets_folder().glob("*.toml"))


def list_targets() -> list[Target]:
    """Every shipped target, sorted by name."""
    return [load_target(name) for name in target_names()]


def load_target(name_or_path: str) -> Target:
    """Name of a shipped target, path of a TOML file, or ``local`` for this machine -> Target. Raises TargetError."""
    name = local_name() if name_or_path == LOCAL else name_or_path
    path = _find(name, Path())
    return _build(path, _merged(path, ()))


def _find(name: str, beside: Path) -> Path:
    """File of a target named in a file of the folder ``beside``, or on the command line (the current folder)."""
    if name.endswith(".toml") or "/" in name:
        path = beside / name
        if path.is_file():
            return path
        raise TargetError(f"target file {path} not found", hint="give a .toml file or a name from `edgeq list`")
    known = target_names()
    if name in known:
        return targets_folder() / f"{name}.toml"
    raise TargetError(f"unknown target {name!r}", hint=did_you_mean(name, [*known, LOCAL]))


def _read(path: Path) -> dict[str, Any]:
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not a TOML file: {error}", hint="see targets/README.md") from error
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror}", hint="check the file's permissions") from error
    for key, value in keys.items():
        _check(path, key, value)
    return keys


def _merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Keys of ``path`` over those it extends. ``above`` are the files that led here."""
    if path.resolve() in above:
        chain = " -> ".join(step.stem for step in (*above, path))
        raise TargetError(f"{path}: extends goes round in a circle: {chain}", hint="break the circle in one of them")
    own = _read(path)
    for key in OWN_KEYS:
        if key not in own:
            raise TargetError(f"{path}: key {key!r} is missing", hint="every file states its own, it isn't inherited")
    if not own.get("extends"):
        return own
    parent = _merged(_find(own["extends"], path.parent), (*above, path.resolve()))
    return {key: _over(parent.get(key), own.get(key)) for key in (*parent, *(k for k in own if k not in parent))}


def _over(parent: Any, own: Any) -> Any:
    if isinstance(parent, dict) and isinstance(own, dict):
        return {**parent, **own}
    return parent if own is None else own


def _build(path: Path, keys: dict[str, Any]) -> Target:
    for key in REQUIRED:
        if key not in keys:
            raise TargetError(f"{path}: key {key!r} is missing", hint="add it, or `extends` a target that has it")
    parsed = {key: KEYS[key][1](value) for key, value in keys.items()}
    target = Target(name=path.stem, **parsed)
    _check_options(path, target)
    return target


def _check_options(path: Path, target: Target) -> None:
    """TargetError for an option whose value isn't one of its ``choices``: providers take any, and then compute nothing
    (QNN with an unknown SoC leaves all to the CPU) or for a device that isn't there."""
    for option, known in target.choices.items():
        value = target.options.get(option)
        if value is not None and value not in known:
            told = ", ".join(f"{choice} ({meaning})" for choice, meaning in known.items())
            raise TargetError(f"{path}: options.{option} is {value!r}, which isn't known here", hint=f"known: {told}")


def _check(path: Path, key: str, value: Any) -> None:
    """Raise TargetError when ``key`` isn't one of a target file or ``value`` isn't of its type."""
    if key not in KEYS:
        raise TargetError(f"{path}: unknown key {key!r}", hint=did_you_mean(key, list(KEYS)))
    expected, parse = KEYS[key]
    try:
        parse(value)
    except _WrongKeyError as error:
        raise TargetError(f"{path}: unknown key {key + '.' + error.key!r}", hint=error.hint) from error
    except RecipeError as error:
        raise TargetError(f"{path}: key {key!r}: {error.message}", hint=error.hint or expected) from error
    except (TypeError, ValueError) as error:
        message = f"{path}: key {key!r} is {value!r}, expected {expected}"
        raise TargetError(message, hint="see targets/README.md") from error


class _WrongKeyError(Exception):
    """An unknown ``key`` inside a table."""

    def __init__(self, key: str, hint: str) -> None:
        super().__init__(key)
        self.key, self.hint = key, hint


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise TypeError
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(_text(word) for word in value)


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise TypeError
    return tuple(_integer(number) for number in value)


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError
    return {key: _text(word) for key, word in value.items()}


def _tables(value: Any) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict):
        raise TypeError
    return {key: _texts(table) for key, table in value.items()}


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _format(value: Any) -> str:
    return str(parse_format(_text(value)))


def _verified(value: Any) -> str:
    if value not in VERIFIED:
        raise ValueError
    return str(value)


def _kernels(value: Any) -> tuple[str, ...]:
    if set(words := _words(value)) - set(KERNELS):
        raise ValueError
    return words


def _limits(value: Any) -> Limits:
    if not isinstance(value, dict):
        raise TypeError
    for key, number in value.items():
        if key not in LIMIT_KEYS:
            raise _WrongKeyError(key, did_you_mean(key, list(LIMIT_KEYS)))
        if key == "min_scale":
            if not isinstance(number, float) or number <= 0:
                raise TypeError
        else:
            _integer(number)
    return Limits(**value)


def _sources(value: Any) -> dict[str, str]:
    known = [*KEYS, *(f"limits.{key}" for key in LIMIT_KEYS)]
    for key in value if isinstance(value, dict) else ():
        if key not in known:
            raise _WrongKeyError(key, did_you_mean(key, known))
    return _texts(value)


LIMIT_KEYS = tuple(entry.name for entry in fields(Limits))

# Key of a target file -> what it must be, in words, and the function that reads it (TypeError or ValueError if not).
KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "extends": ("the name or path of a target", _text),
    "summary": ("a sentence", _text),
    "device": ("a text", _text),
    "provider": ("the name of an ONNX Runtime execution provider", _text),
    "opset": ("a positive integer", _integer),
    "activations": ("a mapping such as 'u8/tensor/asym'", lambda value: parse_quant(_text(value))),
    "weights": ("a mapping such as 'i8/channel'", lambda value: parse_quant(_text(value))),
    "bias": ("a number format such as 'i32'", _format),
    "float_format": ("a number format such as 'f32'", _format),
    "isa": ("a list of CPU flags, 'a|b' for either", _words),
    "quantized": ("a list of op types", _words),
    "through": ("a list of op types", _words),
    "dynamic": ("a list of op types", _words),
    "library": ("the name of a Python module", _text),
    "install": ("a text", _text),
    "environment": ("the name of a Python environment", _text),
    "packages": ("a list of texts, the arguments of a pip install each", _words),
    "toolkit": ("a text", _text),
    "threads_option": ("the name of a provider option", _text),
    "device_files": ("a list of texts", _words),
    "options": ("a table of texts", _texts),
    "choices": ("a table of tables of texts, one for each option", _tables),
    "whole": ("true or false", _flag),
    "static": ("true or false", _flag),
    "emulator": ("a list of machines", _words),
    "session": ("a table of texts", _texts),
    "threads": ("a list of positive integers", _integers),
    "limits": ("a table of " + ", ".join(LIMIT_KEYS), _limits),
    "rules": ("a list of texts", _words),
    "fuse": ("a list of texts", _words),
    "kernels": (f"a list of edgeq's own kernels: {', '.join(KERNELS)}", _kernels),
    "sparsity": ("a list of texts", _words),
    "memory_bytes": ("a positive integer", _integer),
    "verified": (" or ".join(repr(word) for word in VERIFIED), _verified),
    "sources": ("a table of texts, one for each fact", _sources),
}
