"""Report <-> JSON text, and the JSON schema of it, all three read off the dataclasses (L0).

One walk over the type hints instead of a hand-written table: a field added to a record is encoded, decoded and in the
schema at once. JSON has no NaN and no infinities, so they travel as the strings of protobuf's JSON mapping
(``"NaN"``, ``"Infinity"``, ``"-Infinity"``) and come back as floats; null would lose which one it was. In free-form
values (hint ``Any``) those three words are therefore reserved and sequences come back as lists.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, fields, is_dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edgeq.errors import UsageError
from edgeq.report.record import SCHEMA, Report

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
PLAIN = {str: "string", int: "integer", bool: "boolean"}
SCHEMA_PATH = Path(__file__).with_name("schema.json")


def to_json(report: Report) -> str:
    """The report as indented JSON. Raises TypeError on a value that is no JSON, which is a bug of who filled it in."""
    return json.dumps(encode(report), indent=2, ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> Report:
    """The Report that ``to_json`` wrote. Raises UsageError naming the field on anything else."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UsageError(f"not a report: {error}", hint="give the report.json of a package") from error
    found = tree.get("schema") if isinstance(tree, dict) else None
    if found != SCHEMA:
        raise UsageError(f"report of schema {found!r}, expected {SCHEMA}", hint="use the edgeq version that wrote it")
    report: Report = _decode(Report, tree, "report")
    return report


def encode(value: Any) -> Any:
    """A record, sequence, mapping, path or number -> dicts, lists and JSON scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {_key(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, PathLike):
        return fspath(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{value!r} ({type(value).__name__}) can't be in a report")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{key!r} can't be a key in a report: only strings come back as they went")
    return key


def _decode(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` wants it; ``where`` is the path in the tree, for the message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return _free(value)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(inner, value, where)
    if origin is Literal and value in arguments:
        return value
    if is_dataclass(hint) and isinstance(value, dict):
        return _record(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and (number := _number(value)) is not None:
        return number
    if hint in PLAIN and type(value) is hint:
        return value
    raise UsageError(f"{where} is {value!r}, expected {_words(hint)}", hint="give the report.json of a package")


def _record(hint: Any, value: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(hint)
    required = [field.name for field in fields(hint) if field.default is field.default_factory is MISSING]
    for name in (*value, *required):
        if name not in hints or name not in value:
            problem = "missing" if name in hints else "unknown"
            raise UsageError(f"{where}.{name} is {problem}", hint="use the edgeq version that wrote the report")
    return hint(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return NOT_FINITE.get(value)
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def _free(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _free(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_free(item) for item in value]
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(argument) for argument in get_args(hint))
    return "a number" if hint is float else getattr(hint, "__name__", str(hint))


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of ``to_json``'s text. The committed file is ``edgeq/report/schema.json``."""
    definitions: dict[str, Any] = {}
    _describe(Report, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgeq report",
        "version": SCHEMA,
        "$ref": "#/$defs/Report",
        "$defs": dict(sorted(definitions.items())),
    }


def write_schema() -> None:
    """Renew the committed schema after a change of the records (``make golden``)."""
    SCHEMA_PATH.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")


def _describe(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one type hint; records are put into ``definitions`` and referred to."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_describe(argument, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if is_dataclass(hint):
        return _describe_record(hint, definitions)
    if origin is tuple:
        return {"type": "array", "items": _describe(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _describe(arguments[1], definitions)}
    if hint is float:
        return {"anyOf": [{"type": "number"}, {"enum": list(NOT_FINITE)}]}
    return {"type": "null" if hint is type(None) else PLAIN[hint]}


def _describe_record(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if hint.__name__ not in definitions:
        definitions[hint.__name__] = {}  # taken before its fields are walked, so that a record may hold itself
        hints = get_type_hints(hint)
        definitions[hint.__name__] = {
            "type": "object",
            "description": (hint.__doc__ or "").split("\n")[0],
            "properties": {field.name: _describe(hints[field.name], definitions) for field in fields(hint)},
            "required": [field.name for field in fields(hint)],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{hint.__name__}"}
