"""Recipes: what we want, as one line of text (L9).

``canonicalize; quantize(ranges=mse)`` is a recipe; ``balanced`` is a preset, a name for one. What is *possible* stands
in the target. Parsing and formatting are inverse, so a report's recipe can be run again as it is printed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeq.errors import RecipeError, did_you_mean

PRESETS = {
    "float": "canonicalize",
    "fast": "canonicalize; quantize(ranges=minmax)",
    "balanced": "canonicalize; smooth; embeddings; quantize",
    "accurate": "canonicalize; smooth; equalize; embeddings; quantize(ranges=search, rounding=gptq, relief=6)",
    "small": "canonicalize; smooth; weights(format=u4/block32/asym, ops=Gather); quantize",
}
DEFAULT = "balanced"


@dataclass(frozen=True)
class Step:
    """A step's name and the options that differ from its defaults, as text."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({words})" if words else self.name


@dataclass(frozen=True)
class Recipe:
    """Steps in order."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps))


def parse(text: str, known: Mapping[str, frozenset[str]]) -> Recipe:
    """A preset's name or a recipe's text -> Recipe. ``known``: step -> its option names.

    Raises RecipeError naming the word that isn't known, with the nearest one that is."""
    steps = []
    for part in PRESETS.get(text.strip(), text).split(";"):
        match = re.fullmatch(r"\s*([a-z_]+)\s*(?:\((.*)\))?\s*", part)
        if match is None:
            raise RecipeError(f"can't read {part.strip()!r} in recipe {text!r}", hint="write step(option=value); step")
        name = match[1]
        if name not in known:
            raise RecipeError(
                f"no step or preset {name!r} in recipe {text!r}", hint=did_you_mean(name, [*known, *PRESETS])
            )
        steps.append(Step(name, _options(name, match[2] or "", known[name])))
    return Recipe(tuple(steps))


def _options(step: str, text: str, known: frozenset[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        key, equals, value = (piece.strip() for piece in word.partition("="))
        if not equals or not value:
            raise RecipeError(f"option {word!r} of step {step!r} has no value", hint=f"write {key}=VALUE")
        if key not in known:
            hint = did_you_mean(key, list(known)) if known else "it takes none"
            raise RecipeError(f"step {step!r} has no option {key!r}", hint=hint)
        if key in options:
            raise RecipeError(f"option {key!r} of step {step!r} is given twice", hint="keep one")
        options[key] = value
    return options
