"""Samples from files: arrays, images and texts, one file or a folder of them, with their labels (L4)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import RuntimeUnavailableError, SampleError
from edgeq.run.arrays import LABEL_KEYS, Rows, check_keys, files_digest, fit_feed, label_of, open_rows, sha256_of
from edgeq.run.preprocess import FILE_NAMES, Preprocessing
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import TensorSpec

KINDS = {
    "images": (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"),
    "arrays": (".npz", ".npy"),
    "texts": (".txt",),
}
FORMS = "an .npz file, a folder of .npz, images or .txt, a .txt file, pkg.module:callable, or synthetic:N"
EXAMPLE = '{"resize": 256, "crop": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'
TOKENIZED: dict[str, Callable[[Any], Sequence[int]]] = {
    "input_ids": lambda encoding: encoding.ids,
    "attention_mask": lambda encoding: encoding.attention_mask,
    "token_type_ids": lambda encoding: encoding.type_ids,
    "position_ids": lambda encoding: range(len(encoding.ids)),
}
PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")
HEADER_WORDS = ("file", "filename", "path", "name", "image", "text")
MAX_TOKENS = 512  # where neither the model nor the tokenizer limits the length: the positions most encoders have


def open_rows_file(path: Path, specs: tuple[TensorSpec, ...]) -> Samples:
    """One file whose arrays have the samples on the first axis."""
    rows = _named(open_rows(path), specs)
    check_keys(list(rows), specs, str(path))
    for spec in specs:
        if len(rows[spec.name].shape) not in (len(spec.shape), len(spec.shape) + 1):
            raise SampleError(
                f"{path}, input {spec.name!r} has shape {list(rows[spec.name].shape)}, the model takes {spec}",
                hint="the first axis holds the samples: in place of the batch axis, or before it",
            )
    counts = {name: array.shape[0] for name, array in rows.items() if array.shape}
    count = counts[specs[0].name]
    for name, other in counts.items():
        if other != count:
            raise SampleError(f"{path}: {specs[0].name!r} holds {count} samples, {name!r} holds {other}")
    if count == 0:
        raise SampleError(f"{path} holds no samples", hint="give at least one")

    def read(index: int) -> Feed:
        # An array of the input's rank keeps the sample axis as its batch axis; one rank more has its own.
        arrays = {spec.name: _row(rows[spec.name], index, len(spec.shape)) for spec in specs}
        return fit_feed(arrays, specs, f"{path}, sample {index}")

    keys = [key for key in LABEL_KEYS if key in rows and key not in {spec.name for spec in specs}]
    labels = tuple(map(label_of, rows[keys[0]].read(0, count))) if keys else None
    return Samples(str(path), count, files_digest(path.parent, [path]), read, labels)


def _row(rows: Rows, index: int, rank: int) -> Array:
    block = rows.read(index, index + 1)
    return block if len(rows.shape) == rank else block[0]


def _named(arrays: dict[str, Any], specs: tuple[TensorSpec, ...]) -> dict[str, Any]:
    """An ``.npy`` has no keys: it is the only input's array."""
    if list(arrays) != [""]:
        return arrays
    if len(specs) != 1:
        names = ", ".join(repr(spec.name) for spec in specs)
        raise SampleError(f"an .npy holds one array, the model has the inputs {names}", hint="use .npz with these keys")
    return {specs[0].name: arrays[""]}


def open_folder(
    folder: Path,
    specs: tuple[TensorSpec, ...],
    preprocessing: Preprocessing | Path | None,
    tokenizer: Path | None,
    folders: list[Path],
    limit: int | None,
) -> Samples:
    """A folder: one file a sample, of one kind; only the files kept by ``limit`` are hashed."""
    files, labels = _labelled_files(folder)
    if limit is not None and 0 < limit < len(files):
        kept = [index * len(files) // limit for index in range(limit)]
        files = [files[index] for index in kept]
        labels = None if labels is None else [labels[index] for index in kept]
    kinds = sorted({kind for file in files for kind, suffixes in KINDS.items() if file.suffix.lower() in suffixes})
    if len(kinds) != 1:
        raise SampleError(f"{str(folder)!r} mixes {' and '.join(kinds)}", hint="keep one kind in a folder")
    if kinds == ["texts"]:
        texts = [file.read_text(encoding="utf-8") for file in files]
        return _texts(str(folder), texts, labels, find_tokenizer(tokenizer, folders), specs)
    if kinds == ["images"]:
        return _images(folder, files, labels, _find_preprocessing(preprocessing, folders, specs), specs)
    return _array_files(folder, files, labels, specs)


def _labelled_files(folder: Path) -> tuple[list[Path], list[Any] | None]:
    """Files of a folder with their labels: from ``labels.csv`` (file,label[,…]) or names of sub-folders, two or more.

    Labels are integers when all of them are; else those of ``labels.csv`` stay text and sub-folders count from 0 in
    sorted order. With ``labels.csv`` only the files it lists are samples.
    """
    if (folder / "labels.csv").is_file():
        return _read_labels_csv(folder)
    suffixes = {suffix for kind in KINDS.values() for suffix in kind}
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise SampleError(f"folder {str(folder)!r} holds no samples", hint=f"use {FORMS}")
    parts = [path.relative_to(folder).parts for path in files]
    classes = sorted({part[0] for part in parts})
    if len(classes) < 2 or any(len(part) < 2 for part in parts):
        return files, None
    number = {name: index for index, name in enumerate(classes)}
    if all(name.isdigit() for name in classes):
        number = {name: int(name) for name in classes}
    return files, [number[part[0]] for part in parts]


def _read_labels_csv(folder: Path) -> tuple[list[Path], list[Any]]:
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and rows[0][0].lower() in HEADER_WORDS:
        rows = rows[1:]
    files = []
    for number, row in enumerate(rows, 1):
        # Lists often carry the folders of the place they were made in: a file lying flat counts as well.
        found = [path for path in (folder / row[0], folder / Path(row[0]).name) if path.is_file()]
        if len(row) < 2 or not found:
            what = f"file {row[0]!r} isn't there" if len(row) > 1 else f"found {row[0]!r}, expected file,label"
            raise SampleError(f"{str(folder / 'labels.csv')!r}, row {number}: {what}", hint="paths are relative to it")
        files.append(found[0])
    if not files:
        raise SampleError(f"{str(folder / 'labels.csv')!r} lists no samples", hint="a row is file,label")
    words = [row[1].strip() for row in rows]
    whole = all(word.removeprefix("-").isdigit() for word in words)
    return files, [int(word) for word in words] if whole else list(words)


def _array_files(folder: Path, files: list[Path], labels: list[Any] | None, specs: tuple[TensorSpec, ...]) -> Samples:
    """A sample a file, with or without its batch axis."""

    def arrays(path: Path) -> dict[str, Rows]:
        return _named(open_rows(path), specs)

    def read(index: int) -> Feed:
        rows = arrays(files[index])
        check_keys(list(rows), specs, str(files[index]))
        return fit_feed({spec.name: rows[spec.name].read_all() for spec in specs}, specs, str(files[index]))

    keys = [key for key in LABEL_KEYS if key in arrays(files[0]) and key not in {spec.name for spec in specs}]
    if keys and labels is None:
        labels = []
        for file in files:
            if keys[0] not in (rows := arrays(file)):
                raise SampleError(f"{file} has no {keys[0]!r}, {files[0].name} has", hint="label all samples or none")
            labels.append(label_of(rows[keys[0]].read_all()))
    return Samples(str(folder), len(files), files_digest(folder, files), read, _tuple(labels))


def _images(
    folder: Path, files: list[Path], labels: list[Any] | None, how: Preprocessing, specs: tuple[TensorSpec, ...]
) -> Samples:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise RuntimeUnavailableError("images need pillow", hint="pip install 'edgeq[images]'") from error

    def read(index: int) -> Feed:
        try:
            with Image.open(files[index]) as image:
                values = how.apply(image)
        except (UnidentifiedImageError, OSError) as error:
            raise SampleError(
                f"can't read image {str(files[index])!r}: {error}", hint="replace or remove it"
            ) from error
        return fit_feed({specs[0].name: values}, specs, f"{files[index]} after preprocessing")

    record = how.to_dict()
    digest = sha256_of(files_digest(folder, files), json.dumps(record, sort_keys=True))
    return Samples(str(folder), len(files), digest, read, _tuple(labels), preprocessing=record)


def _find_preprocessing(
    given: Preprocessing | Path | None, folders: list[Path], specs: tuple[TensorSpec, ...]
) -> Preprocessing:
    """Given, or the first file of a known name in ``folders``. A layout is taken from the input unless it is given."""
    if len(specs) != 1:
        names = ", ".join(repr(spec.name) for spec in specs)
        raise SampleError(f"images feed a model of one input, this one has {names}", hint="use .npz with these keys")
    if isinstance(given, Preprocessing):
        return given
    found = [folder / name for folder in folders for name in FILE_NAMES if (folder / name).is_file()]
    path = given or (found[0] if found else None)
    if path is None:
        raise SampleError(
            f"images in {str(folders[0])!r}, but no preprocessing given or found",
            hint=f"put {FILE_NAMES[0]} beside them, such as {EXAMPLE}",
        )
    return Preprocessing.from_file(path).for_input(specs[0])


def open_lines(path: Path, specs: tuple[TensorSpec, ...], tokenizer: Path) -> Samples:
    """A text file, a sample a line; blank lines are no samples."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return _texts(str(path), lines, None, tokenizer, specs)


def _texts(
    origin: str, texts: Sequence[str], labels: list[Any] | None, tokenizer: Path, specs: tuple[TensorSpec, ...]
) -> Samples:
    """Texts -> ids, mask and types, whichever the model has. A fixed length pads and cuts, a dynamic one only cuts."""
    if not texts:
        raise SampleError(f"{origin!r} holds no text", hint="a line is a sample")
    for spec in specs:
        if spec.name not in TOKENIZED:
            raise SampleError(
                f"a tokenizer can't make the input {spec.name!r}", hint=f"it makes {', '.join(TOKENIZED)}"
            )
    encode = _tokenizer(tokenizer, specs[0].shape[-1])

    def read(index: int) -> Feed:
        encoding = encode(texts[index])
        arrays = {spec.name: np.asarray(TOKENIZED[spec.name](encoding), np.int64) for spec in specs}
        return fit_feed(arrays, specs, f"{origin}, text {index}")

    digest = sha256_of(files_digest(tokenizer.parent, [tokenizer]), *texts)
    return Samples(origin, len(texts), digest, read, _tuple(labels))


def find_tokenizer(given: Path | None, folders: list[Path]) -> Path:
    """Given, or the first tokenizer.json in ``folders``. SampleError without one."""
    for path in [given] if given else [folder / "tokenizer.json" for folder in folders]:
        if path.is_file():
            return path
    where = repr(str(given)) if given else " or ".join(repr(str(folder)) for folder in folders)
    raise SampleError(f"text needs a tokenizer, none found at {where}", hint="put tokenizer.json beside the text")


def _tokenizer(path: Path, length: int | str | None) -> Callable[[str], Any]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RuntimeUnavailableError("text needs tokenizers", hint="pip install 'edgeq[text]'") from error
    tokenizer = Tokenizer.from_file(str(path))
    limit = length if isinstance(length, int) else (tokenizer.truncation or {}).get("max_length", MAX_TOKENS)
    tokenizer.enable_truncation(limit)
    padding = dict(tokenizer.padding or {"pad_id": next(filter(None, map(tokenizer.token_to_id, PAD_TOKENS)), 0)})
    tokenizer.no_padding()
    if isinstance(length, int):
        keys = ("direction", "pad_id", "pad_type_id", "pad_token")
        tokenizer.enable_padding(length=length, **{key: padding[key] for key in keys if key in padding})
    return tokenizer.encode


def _tuple(labels: list[Any] | None) -> tuple[Any, ...] | None:
    return None if labels is None else tuple(labels)
