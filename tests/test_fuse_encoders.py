"""Encoders and encoder-decoders of Hugging Face, small and random, have Attention alone: cross-attention, relative
positions as a mask, pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.lower.fuse import fuse
from edgeq.rewrite.canonicalize import canonicalize
from edgeq.run.session import open_session, run_session
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import ops

VOCABULARY, HIDDEN, HEADS, LAYERS = 128, 64, 4, 2
WRITTEN_OUT = {"Softmax", "IsNaN", "ReduceMean", "Sqrt", "Reciprocal", "Pow"}
TEXT = ("input_ids", "attention_mask", "decoder_input_ids")


def network(kind: str, attention: str) -> Any:
    """A module of positional inputs -> one output."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    coders = {f"{part}_{what}": number for part in ("encoder", "decoder") for what, number in
              (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", 96))}  # fmt: skip
    ids = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    made = {
        "ViT": lambda: hf.ViTModel(hf.ViTConfig(
            hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=96,
            image_size=32, patch_size=8, attn_implementation=attention)),
        "Bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(
            **ids, **coders, d_model=HIDDEN, max_position_embeddings=64, attn_implementation=attention)),
        "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=16, num_layers=LAYERS, num_heads=HEADS, d_ff=96,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=1)),
        "Whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
            **ids, **coders, d_model=HIDDEN, max_source_positions=20, max_target_positions=32, num_mel_bins=8,
            attn_implementation=attention)),
    }[kind]().eval()  # fmt: skip

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = made

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            if kind == "ViT":
                return self.network(pixel_values=inputs[0]).last_hidden_state
            names = ("input_features", "decoder_input_ids") if kind == "Whisper" else TEXT
            return self.network(**dict(zip(names, inputs, strict=True)), use_cache=False).logits

    return Plain().eval()


def feed(kind: str, batch: int, total: int, tokens: int) -> dict[str, Any]:
    """Padding on the right, two tokens more each sequence."""
    rng = np.random.default_rng(batch + total + tokens)
    new = rng.integers(3, VOCABULARY, (batch, tokens))
    if kind in ("ViT", "Whisper"):
        sizes = (batch, 3, 32, 32) if kind == "ViT" else (batch, 8, 40)
        data = {"x": rng.standard_normal(sizes).astype(np.float32)}
        return data if kind == "ViT" else data | {"decoder_input_ids": new}
    mask = np.array([[1] * (total - 2 * row) + [0] * 2 * row for row in range(batch)])
    return dict(zip(TEXT, (rng.integers(3, VOCABULARY, (batch, total)), mask, new), strict=True))


def export(kind: str, attention: str, opset: int, path: Path) -> None:
    """``opset`` 17 is TorchScript's, others are dynamo's."""
    import torch

    example = feed(kind, 2, 7, 5)
    text = {"decoder_input_ids": {0: "batch", 1: "tokens"}, "x": {0: "batch"}}
    axes = [text.get(name, {0: "batch", 1: "total"}) for name in example]
    how: dict[str, Any] = {"dynamo": False, "dynamic_axes": dict(zip(example, axes, strict=True))}
    if opset != 17:
        how = {"dynamo": True, "dynamic_shapes": (tuple(axes),), "verbose": False, "external_data": False}
    args = tuple(torch.from_numpy(array) for array in example.values())
    torch.onnx.export(
        network(kind, attention), args, str(path), opset_version=opset, input_names=list(example), output_names=["y"],
        **how,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporters warn of themselves
@pytest.mark.parametrize(("kind", "attention", "opset", "count"), [
    ("ViT", "sdpa", 20, 2), ("ViT", "eager", 17, 2), ("Bart", "sdpa", 20, 6), ("Bart", "eager", 17, 6),
    ("T5", "eager", 17, 6), ("Whisper", "sdpa", 20, 6),
])  # fmt: skip
def test_every_attention_fuses(kind: str, attention: str, opset: int, count: int, tmp_path: Path) -> None:
    export(kind, attention, opset, tmp_path / "net.onnx")
    target = load_target("cpu-x64-vnni")
    read, _ = read_model(tmp_path / "net.onnx", opset=target.opset)
    feeds = [feed(kind, *sizes) for sizes in ((2, 7, 5), (1, 9, 3), (2, 6, 1))]
    model, _ = canonicalize(read, feeds=feeds[:2])
    result, changes = fuse(model, target, feeds=feeds[:2])
    assert not [change for change in changes if change.rolled_back]
    found = Counter(ops(result))
    assert not WRITTEN_OUT & set(found) and found["Attention"] == count, found
    exact, fast = open_session(read, level="none"), open_session(result)
    for one in feeds:
        for a, b in zip(run_session(exact, one).values(), run_session(fast, one).values(), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
