"""Everything a person can name on the command line, and what it means (L11).

One table of tables: `list` prints them, `explain` looks a word up in all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq import errors
from edgeq.errors import EdgeqError, UsageError, did_you_mean
from edgeq.report.record import Report
from edgeq.target.record import Target

if TYPE_CHECKING:
    from edgeq.target.patterns import Row
    from edgeq.target.verdict import Verdict

Table = Mapping[str, Any]


def _table(module: str, name: str) -> Table:
    table: Table = getattr(import_module(module), name)
    return table


def _targets() -> Table:
    from edgeq.target.load import list_targets

    return {target.name: target for target in list_targets()}


def _steps() -> Table:
    """What a step does, its options and their defaults behind."""
    from edgeq.steps import STEPS

    return {name: _with_options(function) for name, function in STEPS.items()}


def _with_options(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    words = [f"{p.name}={p.default}" for p in parameters if p.kind is p.KEYWORD_ONLY]
    told = " ".join((inspect.getdoc(function) or "").split())
    return told + (f" Options: {', '.join(words)}." if words else " No options.")


def _errors() -> Table:
    classes = (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EdgeqError))
    return {error.code: error for error in classes if error is not EdgeqError}


KINDS: dict[str, Callable[[], Table]] = {  # what is cheap to import first: `explain` stops at the first that knows
    "targets": _targets,
    "recipes": partial(_table, "edgeq.recipe", "PRESETS"),
    "errors": _errors,
    "ops": partial(_table, "edgeq.ir.ops", "OPS"),
    "packages": partial(_table, "edgeq.packaging", "PACKAGES"),
    "metrics": partial(_table, "edgeq.num.metrics", "METRICS"),
    "methods": partial(_table, "edgeq.num.fit", "METHODS"),
    "steps": _steps,
}


def everything(kind: str | None) -> dict[str, dict[str, str]]:
    """Kind -> name -> its summary in a line; all kinds for None. UsageError for a kind that isn't one."""
    if kind is not None and kind not in KINDS:
        raise UsageError(f"nothing called {kind!r} to list", hint=did_you_mean(kind, list(KINDS)))
    chosen = KINDS if kind is None else {kind: KINDS[kind]}
    return {name: {word: _summary(value) for word, value in table().items()} for name, table in chosen.items()}


def _summary(value: Any) -> str:
    """One line: a text itself, the docstring of a function or of the one a record holds, a target's summary, or the
    record's fields."""
    if isinstance(value, str):
        return value
    if isinstance(value, Target):
        return value.summary
    if not is_dataclass(value) or isinstance(value, type):
        return _first_sentence(inspect.getdoc(value) or "")
    held = [item for item in vars(value).values() if inspect.isfunction(item)]
    return _text(held[0]) if held else ", ".join(f"{key} {text}" for key, text in _facts(value).items())


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.rstrip()


def _facts(record: Any) -> dict[str, str]:
    """Fields of a record that hold something, as text; tables as ``key: value, …``."""
    found = {field.name: getattr(record, field.name) for field in fields(record)}
    empty: tuple[Any, ...] = ((), {}, "", None)
    return {name: _text(value) for name, value in found.items() if value not in empty and value is not False}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value))
    if inspect.isfunction(value):
        return _summary(value)
    if is_dataclass(value) and type(value).__str__ is object.__str__:  # a record without a text form of its own
        return ", ".join(f"{key} {text}" for key, text in _facts(value).items())
    return str(value)


def explained(word: str, report: Path | None) -> dict[str, str]:
    """What ``word`` means, fact by fact: as the report has it when one is given, else the first kind that knows it."""
    if report:
        found = dict(_in_report(word, _read_report(report)))
        if not found:
            raise UsageError(f"nothing called {word!r} in {str(report)!r}", hint="copy a node's or code's name from it")
        return found
    if word == "local" or word.endswith(".toml"):
        from edgeq.target.load import load_target

        target = load_target(word)
        return _details(target) | _kernels(target)
    for kind, table in KINDS.items():
        if word in (known := table()):
            facts = {"kind": kind.removesuffix("s")} | _details(known[word])
            return facts | _kernels(known[word]) if isinstance(known[word], Target) else facts
    names = ["local", *(name for table in KINDS.values() for name in table())]
    raise UsageError(f"nothing called {word!r}", hint=_near(word, names))


def _near(word: str, names: list[str]) -> str:
    """The nearest name; all of them would be too many."""
    near = did_you_mean(word, names)
    return near if near.startswith("did") else "see `edgeq list`, or give --report to explain a node"


def _details(value: Any) -> dict[str, str]:
    if is_dataclass(value) and not isinstance(value, type):
        sources = getattr(value, "sources", {})
        facts = {key: text for key, text in _facts(value).items() if key != "sources"}
        return facts | {f"source of {key}": text for key, text in sources.items()}
    if isinstance(value, type) and issubclass(value, EdgeqError):
        return {"meaning": inspect.getdoc(value) or "", "exit status": str(value.exit_status)}
    return {"meaning": value if isinstance(value, str) else inspect.getdoc(value) or ""}


def _kernels(target: Target) -> dict[str, str]:
    """What the runtime of this machine makes of each standard pattern in the target's formats."""
    from edgeq.target.isolated import version_of
    from edgeq.target.patterns import table
    from edgeq.target.runtime import runtime_version

    try:
        answers = table(target)
    except errors.RuntimeUnavailableError as error:
        return {"kernels of the runtime": f"can't be asked here: {error.message}; to ask, {error.hint}"}
    runtime = version_of(target.execution) or f"ONNX Runtime {runtime_version()}"
    asked = {"kernels of the runtime": f"asked of {runtime} on this machine, with Q/DQ on each edge not called float"}
    return asked | {f"kernel of {row.pattern}": _verdict(row) for row in answers}


def _verdict(row: Row) -> str:
    """A word a node, or one for all that run as one kernel: the kernel, how codes move, or what stays float."""
    words = [_fate(verdict) for verdict in row.verdicts]
    if len(set(words)) == 1:
        return words[0]
    return "; ".join(f"{op} {word}" for op, word in zip(row.ops, words, strict=True))


def _fate(verdict: Verdict) -> str:
    if verdict.kind == "integer":
        return verdict.kernel
    return verdict.reason if verdict.kind == "mover" else f"float: {verdict.reason.removeprefix('no integer kernel: ')}"


def _read_report(path: Path) -> Report:
    from edgeq.report.codec import from_json

    file = path / "report.json" if path.is_dir() else path
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read report {str(file)!r}: {error}", hint="give a report.json or a package") from error


def _in_report(word: str, report: Report) -> Iterator[tuple[str, str]]:
    """All that a report says of a node, tensor, check, step or notice code."""
    if report.coverage:
        for island in report.coverage.float_islands:
            if island.node == word:
                yield "runs in float", f"{island.op}, {island.macs:,} multiply-accumulates: {island.reason}"
        if word in report.coverage.unexplained:
            yield "left over", "a Q/DQ node that no boundary with a float island explains"
    for row in report.layers:
        if row.get("name") == word:
            yield "quantized tensor", _text(row)
    for check in report.checks:
        if check.name == word:
            yield "check", _text(check)
    for step in report.steps:
        if step.name == word:
            yield "step", _text(step)
    for number, notice in enumerate((n for n in report.notices if word in (n.code, n.node)), 1):
        yield f"{notice.level} {number}", f"{notice.message} [{notice.node}]" if notice.node else notice.message


def aligned(rows: Mapping[str, str]) -> list[str]:
    """Two columns, the first as wide as its longest word; further lines of a fact are indented below it."""
    width = max(map(len, rows), default=0)
    return [f"  {key:<{width}}  " + text.replace("\n", "\n" + " " * (width + 4)) for key, text in rows.items()]
