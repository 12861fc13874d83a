"""How many bytes weights and a KV cache take in each number format, before anything is built (L5).

``bytes = parameters x bits / 8`` with ``bits = code + (scale + zero point) / elements that share them``. GB is 10**9
bytes. Weights that count are the float constants MatMul, Gemm, convolutions and Gather read, which ONNX Runtime and
other runtimes have formats of few bits for; what else a model stores keeps its bytes.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ModelError, UsageError
from edgeq.ir import query
from edgeq.num.fit import fit_weight
from edgeq.num.formats import E4M3, Float
from edgeq.num.minifloat import encode
from edgeq.num.packing import pack
from edgeq.num.quant import CHANNEL, TENSOR, Quant, parse_quant, quantize, scale_codes

FORMATS: dict[str, str] = {  # what people call it -> its text form
    "FP32": "f32", "FP16": "f16", "BF16": "bf16", "FP8": "f8e4m3/channel", "FP6": "f6e2m3/channel",
    "INT8": "i8/channel", "INT8, block 32": "i8/block32/f16", "INT4, block 32": "u4/block32/asym/f16",
    "INT4, block 128": "u4/block128/asym/f16", "INT4, symmetric": "i4/block32/f16",
    "INT2, block 32": "u2/block32/asym/f16", "MXFP8": "mxfp8", "MXFP6": "mxfp6", "MXFP4": "mxfp4", "NVFP4": "nvfp4",
}  # fmt: skip
KV_FORMATS: dict[str, tuple[int, int]] = {  # bits of a code, and of what the elements of a head share
    "f16": (16, 0), "i8": (8, 16), "i4": (4, 32),
}  # fmt: skip
"""One f16 scale for a head's elements of a position; 4 bits need an f16 minimum too."""

CONTEXTS = (2048, 8192, 32768, 131072)
CHANNEL_INPUTS = 4096  # elements that share a scale a channel where no shapes are known: the width of a 7B Llama
WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BYTES = {
    "": 1,
    **{f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)},
    **{f"{k}iB": 1024**n for n, k in enumerate("KMGT", 1)},
}
LEVEL = 6  # of zlib
SAMPLED = 1 << 19  # weights that are stored and compressed in each format
LLAMA_LIKE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "smollm3")


@dataclass(frozen=True)
class Weight:
    """``rows`` output channels of ``columns`` elements each; blocks lie along a row. ``stored``: its bytes in the file,
    0 without one; ``value``: its float data where it is at hand."""

    rows: int
    columns: int
    stored: int = 0
    value: ir.Value | None = None
    node: ir.Node | None = None


@dataclass(frozen=True)
class Row:
    """Weights in one format: bits an element of those that count, bytes of all, and the share that is left of those
    bytes when they are compressed (None where there was nothing to compress)."""

    name: str
    format: str
    bits: float
    bytes: int
    compressed: float | None = None


@dataclass(frozen=True)
class Decoder:
    """What the size of a KV cache depends on."""

    layers: int
    kv_heads: int
    head_dim: int


def parse_count(text: str) -> int:
    """``10B``, ``350M``, ``1.5e9`` -> number of parameters. Raises UsageError."""
    return _number(text, SUFFIXES, "a number of parameters", "write 10B, 350M, 1.5T or a plain number")


def parse_bytes(text: str) -> int:
    """``4GB``, ``512MiB``, ``2e9`` -> bytes. Raises UsageError."""
    return _number(text, BYTES, "an amount of memory", "write 4GB, 512MB, 256MiB or plain bytes")


def _number(text: str, suffixes: Mapping[str, int], what: str, hint: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    known = {suffix.lower(): factor for suffix, factor in suffixes.items()}
    if match is None or match[2].lower() not in known or float(match[1]) <= 0:
        raise UsageError(f"can't read {text!r} as {what}", hint=hint)
    return round(float(match[1]) * known[match[2].lower()])


def weights_of(model: ir.Model) -> list[Weight]:
    """The float weights that count, each once, bodies included; those a file holds as codes before a DequantizeLinear
    too."""
    found: dict[str, Weight] = {}
    for node in query.nodes(model):
        slot = 0 if node.op_type == "Gather" else 1
        value = node.inputs[slot] if node.op_type in WEIGHTED and len(node.inputs) > slot else None
        producer = None if value is None else value.producer()
        coded = producer is not None and producer.op_type == "DequantizeLinear"
        parts = producer.inputs if coded and producer is not None else [value]
        tensors = [part.const_value for part in parts if part is not None and query.is_constant(part)]
        if value is None or len(tensors) < len([part for part in parts if part is not None]) or not tensors:
            continue
        shape = tuple(int(dim) for dim in query.dims(parts[0]) or () if dim is not None)
        count = math.prod(shape)
        if len(shape) > 1 and count and (coded or query.is_float(value)):
            rows = count // _columns(node, shape)
            stored = sum(tensor.nbytes for tensor in tensors if tensor is not None)
            found[str(value.name)] = Weight(rows, count // rows, stored, None if coded else value, node)
    return list(found.values())


def _columns(node: ir.Node, shape: tuple[int, ...]) -> int:
    """Elements an output channel (of Gather: an entry) sums over, those one scale a channel is for."""
    if node.op_type == "Gather":
        return shape[-1]
    if node.op_type == "Conv":
        return math.prod(shape[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shape) // shape[1]
    return shape[-1 if node.op_type == "Gemm" and query.attribute(node, "transB", 0) else -2]


def table(weights: Sequence[Weight], kept_bytes: int = 0, kept_floats: int = 0) -> list[Row]:
    """A row a format. ``kept_bytes`` is what else is stored; ``kept_floats`` of its bytes are f32 tensors, which 16-bit
    formats halve."""
    rows = []
    for name, text in FORMATS.items():
        quant = parse_quant(text)
        total = sum(weight_bytes(weight, quant) for weight in weights)
        elements = sum(weight.rows * weight.columns for weight in weights)
        spared = kept_floats // 2 if isinstance(quant.format, Float) and quant.format.bits == 16 else 0
        rows.append(
            Row(name, str(quant).removesuffix("/tensor"), 8 * total / max(elements, 1), total + kept_bytes - spared)
        )
    return rows


def weight_bytes(weight: Weight, quant: Quant) -> int:
    """Bytes of codes, scales and zero points; a row's last block may be short. Scales in f8e4m3 share an f32."""
    shared = quant.block if quant.block > 0 else weight.columns
    blocks = weight.rows * -(-weight.columns // shared)
    beside = 0 if quant.block == TENSOR else quant.scale.bits + (0 if quant.symmetric else quant.format.bits)
    once = 32 if quant.scale == E4M3 else 0
    return -(-(weight.rows * weight.columns * quant.format.bits + blocks * beside + once) // 8)


def parameters(count: int) -> list[Weight]:
    """``count`` parameters of which no shapes are known, as rows of CHANNEL_INPUTS."""
    rows, rest = divmod(count, CHANNEL_INPUTS)
    return [Weight(rows, CHANNEL_INPUTS)] * (rows > 0) + [Weight(1, rest)] * (rest > 0)


def kv_cache(decoder: Decoder, contexts: Iterable[int], batch: int = 1) -> list[dict[str, Any]]:
    """Bytes of keys and values by context length and format:
    ``2 x layers x kv_heads x (head_dim x code + shared bits) x context x batch / 8``."""
    heads = 2 * decoder.layers * decoder.kv_heads * batch
    return [
        {"context": context}
        | {
            name: -(-heads * (decoder.head_dim * code + beside) * context // 8)
            for name, (code, beside) in KV_FORMATS.items()
        }
        for context in contexts
    ]


def decoder_of(model: ir.Model) -> Decoder | None:
    """Layers, heads and width of a decoder by its inputs called past…: [batch, kv_heads, past, head_dim]."""
    shapes = [query.dims(value) for value in model.graph.inputs if "past" in str(value.name)]
    caches = [shape for shape in shapes if shape is not None and len(shape) == 4 and shape[1] and shape[3]]
    if not caches:
        return None
    return Decoder(len(caches) // 2, int(caches[0][1] or 0), int(caches[0][3] or 0))


def from_config(path: Path) -> tuple[int, Decoder, str]:
    """Parameters and KV cache of a Hugging Face causal LM, and where the former are from: the headers of the
    safetensors files beside ``config.json``, else the config of a Llama-like model."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read {str(file)!r} as a config: {error}", hint="give a Hugging Face folder") from error
    missing = [key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads") if key not in config]
    if missing:
        raise ModelError(
            f"{str(file)!r} has no {missing[0]!r}, found {', '.join(sorted(config)[:8])}",
            hint="give the config.json of a causal LM, or --params with --layers, --kv-heads and --head-dim",
        )
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    decoder = Decoder(config["num_hidden_layers"], config.get("num_key_value_heads") or heads, head_dim)
    stored = sum(_safetensors(found) for found in sorted(file.parent.glob("*.safetensors")))
    return (stored, decoder, "safetensors") if stored else (llama_parameters(config, decoder, file), decoder, "config")


def _safetensors(file: Path) -> int:
    """Elements of all tensors, from the header: 8 bytes of its length, then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def llama_parameters(config: Mapping[str, Any], decoder: Decoder, where: Path | str = "config") -> int:
    """Parameters of a Llama-like model: embeddings, and a layer's attention, gated MLP (or experts) and norms."""
    kind = config.get("model_type", "llama")
    if kind not in LLAMA_LIKE or "intermediate_size" not in config or "vocab_size" not in config:
        raise ModelError(
            f"{str(where)!r} is of a {kind!r} model, expected a Llama-like one ({', '.join(LLAMA_LIKE)}) "
            "with vocab_size and intermediate_size",
            hint="give --params N, or put the weights beside the config",
        )
    width, queries = config["hidden_size"], config["num_attention_heads"] * decoder.head_dim
    keys = decoder.kv_heads * decoder.head_dim
    attention = 2 * width * queries + 2 * width * keys
    if config.get("attention_bias", kind == "qwen2"):
        attention += queries + 2 * keys + (0 if kind == "qwen2" else width)  # Qwen2 has none on the output
    if kind == "qwen3":
        attention += 2 * decoder.head_dim  # norms of queries and keys
    experts = config.get("num_local_experts", 1)
    mlp = experts * 3 * width * config["intermediate_size"] + (width * experts if experts > 1 else 0)
    if config.get("mlp_bias"):
        mlp += 2 * config["intermediate_size"] + width
    tied = config.get("tie_word_embeddings", False)
    embeddings = config["vocab_size"] * width * (1 if tied else 2)
    return int(embeddings + decoder.layers * (attention + mlp + 2 * width) + width)


def compressed_bytes(chunks: Iterable[bytes]) -> int:
    """Bytes of a zlib stream (deflate, what gzip, zip and app packages use) of ``chunks``."""
    stream, size = zlib.compressobj(LEVEL), 0
    for chunk in chunks:
        size += len(stream.compress(chunk))
    return size + len(stream.flush())


def read_chunks(files: Iterable[Path]) -> Iterator[bytes]:
    """The bytes of files in pieces of 1 MiB."""
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                yield chunk


def compressed_share(weights: Sequence[Weight], quant: Quant) -> float | None:
    """Compressed over plain bytes of weights stored in a format, on about SAMPLED elements in rows of all of them; None
    where some aren't at hand in float."""
    total = sum(weight.rows * weight.columns for weight in weights)
    if any(weight.value is None for weight in weights):
        return None
    chunks = [stored_bytes(_rows(weight, min(SAMPLED / total, 1.0)), quant) for weight in weights]
    plain = sum(map(len, chunks))
    return compressed_bytes(chunks) / plain if plain else None


def _rows(weight: Weight, share: float) -> NDArray[np.float32]:
    """Evenly spread rows of a weight, f32[rows, columns]."""
    assert weight.node is not None
    array = np.asarray(query.constant(weight.value), np.float32)
    op = weight.node.op_type
    if op == "ConvTranspose":
        array = np.moveaxis(array, 1, 0)
    elif op == "MatMul" or (op == "Gemm" and not query.attribute(weight.node, "transB", 0)):
        array = np.swapaxes(array, -1, -2)
    picks = np.linspace(0, weight.rows - 1, max(round(weight.rows * share), 1)).astype(np.int64)
    return np.ascontiguousarray(array.reshape(weight.rows, weight.columns)[picks])


def stored_bytes(rows: NDArray[np.float32], quant: Quant) -> bytes:
    """f32[rows, columns] as a file would hold it in a format: codes, then scales, then zero points."""
    if isinstance(quant.format, Float) and quant.block == TENSOR:
        return pack(encode(rows, quant.format), quant.format.bits).tobytes()
    params = fit_weight(rows, quant, 0 if quant.block == CHANNEL else 1)
    codes = pack(quantize(rows, params), quant.format.bits).tobytes()
    scales = pack(scale_codes(params), quant.scale.bits).tobytes()
    return codes + scales + (b"" if quant.symmetric else pack(params.zero_point, quant.format.bits).tobytes())
