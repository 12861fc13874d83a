"""Hugging Face's Llama, small and random, exported by both of torch's exporters, fuses completely."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.lower.fuse import fuse
from edgeq.rewrite.canonicalize import canonicalize
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import ops

LAYERS, VOCABULARY = 2, 128
WRITTEN_OUT = {"Softmax", "ReduceMean", "Sqrt", "Reciprocal", "Neg", "Pow", "IsNaN"}
A_LAYER = {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 7, "RMSNormalization": 2, "Sigmoid": 1}


def llama(attention: str) -> Any:
    """(ids, mask) -> logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = LlamaForCausalLM(config)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    return Logits().eval()


def export(attention: str, opset: int, path: Path) -> None:
    """``opset`` 17 is TorchScript's, others are dynamo's."""
    import torch

    ids = torch.randint(0, VOCABULARY, (2, 7))
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    axes = {0: "batch", 1: "tokens"}
    both = {"input_ids": axes, "attention_mask": axes}
    how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": both, "verbose": False, "external_data": False}
    if opset == 17:
        how = {"dynamo": False, "dynamic_axes": both}
    torch.onnx.export(
        llama(attention), (ids, torch.ones_like(ids)), str(path), opset_version=opset, **names, **how
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporters warn of themselves
@pytest.mark.parametrize(("attention", "opset"), [("sdpa", 20), ("eager", 18), ("sdpa", 17), ("eager", 17)])
def test_llama_fuses_completely(attention: str, opset: int, tmp_path: Path) -> None:
    """Masks of padding on the left, whose rows see nothing, and both batches are compared."""
    export(attention, opset, tmp_path / "llama.onnx")
    target, rng = load_target("cpu-x64-vnni"), np.random.default_rng(0)
    feeds = [
        {
            "input_ids": rng.integers(0, VOCABULARY, (batch, tokens)),
            "attention_mask": np.array([[0] * padding + [1] * (tokens - padding) for padding in range(batch)]),
        }
        for batch, tokens in ((2, 7), (1, 12))
    ]
    model, _ = canonicalize(read_model(tmp_path / "llama.onnx", opset=target.opset)[0], feeds=feeds)
    result, changes = fuse(model, target, feeds=feeds)
    assert not [change for change in changes if change.rolled_back]
    found = Counter(ops(result))
    assert not WRITTEN_OUT & set(found), found
    extra = {"MatMul": 1, "RMSNormalization": 1}  # the head, and the norm before it
    for op, count in A_LAYER.items():
        assert found[op] >= count * LAYERS + extra.get(op, 0) and (op == "MatMul" or found[op] <= count * LAYERS + 1)
