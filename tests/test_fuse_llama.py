"""Hugging Face's decoders, small and random, exported by both of torch's exporters, fuse completely, cache and all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeq.lower.fuse import fuse
from edgeq.rewrite.canonicalize import canonicalize
from edgeq.run.record import Feed
from edgeq.run.session import open_session, run_session
from edgeq.source import read_model
from edgeq.target.load import load_target
from tests.graphs import ops

LAYERS, VOCABULARY, HEADS, FEW, HIDDEN = 2, 128, 6, 2, 48
SIZE = HIDDEN // HEADS
WRITTEN_OUT = {"Softmax", "ReduceMean", "Sqrt", "Reciprocal", "Neg", "Pow", "IsNaN"}
A_LAYER = {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 7, "RMSNormalization": 2, "Sigmoid": 1}
KINDS = {
    "Llama": {},
    "Qwen2": {},  # biases of queries, keys and values
    "Qwen3": {"head_dim": SIZE},  # norms of each head
    "Phi": {"partial_rotary_factor": 0.5},
    "Phi3": {"pad_token_id": 0},  # one product of queries, keys and values
}


def decoder(kind: str, attention: str, *, cache: bool) -> Any:
    """(ids, mask) -> logits; with a cache (ids, mask, positions, past keys and values) -> logits and present ones."""
    import torch
    import transformers
    from transformers.cache_utils import DynamicCache

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=FEW, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        attn_implementation=attention, **KINDS[kind],
    )  # fmt: skip

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = getattr(transformers, f"{kind}ForCausalLM")(config)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    class Cached(Logits):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
        ) -> Any:
            found = self.network(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=True,
                past_key_values=DynamicCache(tuple(zip(past[::2], past[1::2], strict=True))),
            )  # fmt: skip
            return (found.logits, *(part for one in found.past_key_values.layers for part in (one.keys, one.values)))

    return (Cached() if cache else Logits()).eval()


def export(kind: str, attention: str, opset: int, path: Path, *, cache: bool) -> None:
    """``opset`` 17 is TorchScript's, others are dynamo's."""
    import torch

    tokens, total, past = ({0: "batch", axis: name} for axis, name in ((1, "tokens"), (1, "total"), (2, "past")))
    ids, parts = (
        torch.randint(0, VOCABULARY, (2, 7)),
        [f"{layer}.{x}" for layer in range(LAYERS) for x in ("key", "value")],
    )
    names, args, outputs = ["input_ids", "attention_mask"], [ids, torch.ones_like(ids)], ["logits"]
    shapes: list[Any] = [tokens, tokens]
    if cache:
        names += ["position_ids", *(f"past.{part}" for part in parts)]
        args = [ids, torch.ones(2, 12, dtype=torch.int64), torch.arange(5, 12)[None].repeat(2, 1)]
        args += [torch.zeros(2, FEW, 5, SIZE) for _ in parts]
        outputs, shapes = ["logits", *(f"present.{part}" for part in parts)], [tokens, total, tokens]
    how: dict[str, Any] = {
        "dynamo": False,
        "dynamic_axes": dict(zip(names, [*shapes, *([past] * len(parts))], strict=False)),
    }
    if opset != 17:
        shapes = [*shapes, tuple([past] * len(parts))] if cache else shapes
        how = {"dynamo": True, "dynamic_shapes": tuple(shapes), "verbose": False, "external_data": False}
    torch.onnx.export(
        decoder(kind, attention, cache=cache), tuple(args), str(path), opset_version=opset, input_names=names,
        output_names=outputs, **how,
    )  # fmt: skip


def feed(model: ir.Model, batch: int, tokens: int, past: int, seed: int = 0) -> dict[str, Any]:
    """Padding on the left, a token more each sequence: without a past some rows see nothing."""
    rng, total = np.random.default_rng(seed), past + tokens
    arrays = {
        "input_ids": rng.integers(0, VOCABULARY, (batch, tokens)),
        "attention_mask": np.array([[0] * padding + [1] * (total - padding) for padding in range(batch)]),
        "position_ids": np.arange(past, total)[None].repeat(batch, 0),
    }
    found = {str(value.name): value for value in model.graph.inputs}
    kept = rng.standard_normal((len(found), batch, FEW, past, SIZE)).astype(np.float32)
    return {name: arrays.get(name, kept[index]) for index, name in enumerate(found)}


def fused(path: Path, feeds: list[tuple[int, int, int]]) -> tuple[ir.Model, ir.Model]:
    """The file as read and in the target's kernels, proven on the first two feeds, compared on all."""
    target = load_target("cpu-x64-vnni")
    read, _ = read_model(path, opset=target.opset)
    samples: list[Feed] = [feed(read, *sizes) for sizes in feeds]
    model, _ = canonicalize(read, feeds=samples[:2])
    result, changes = fuse(model, target, feeds=samples[:2])
    assert not [change for change in changes if change.rolled_back]
    exact, found = open_session(read, level="none"), open_session(result)
    for sample in samples:
        for (name, a), b in zip(run_session(exact, sample).items(), run_session(found, sample).values(), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=name)
    return read, result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporters warn of themselves
@pytest.mark.parametrize(("attention", "opset"), [("sdpa", 20), ("eager", 18), ("sdpa", 17), ("eager", 17)])
def test_llama_fuses_completely(attention: str, opset: int, tmp_path: Path) -> None:
    """Masks of padding on the left, whose rows see nothing, and both batches are compared."""
    export("Llama", attention, opset, tmp_path / "llama.onnx", cache=False)
    found = Counter(ops(fused(tmp_path / "llama.onnx", [(2, 7, 0), (1, 12, 0)])[1]))
    assert not WRITTEN_OUT & set(found), found
    extra = {"MatMul": 1, "RMSNormalization": 1}  # the head, and the norm before it
    for op, count in A_LAYER.items():
        assert found[op] >= count * LAYERS + extra.get(op, 0) and (op == "MatMul" or found[op] <= count * LAYERS + 1)


CACHED = [
    ("Llama", "sdpa", 20), ("Llama", "eager", 18), ("Llama", "sdpa", 17), ("Llama", "eager", 17), ("Llama", "sdpa", 23),
    ("Qwen2", "eager", 17), ("Qwen3", "sdpa", 17), ("Qwen3", "sdpa", 20), ("Phi", "eager", 17), ("Phi", "sdpa", 20),
    ("Phi3", "sdpa", 17),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "attention", "opset"), CACHED)
def test_a_decoder_with_a_cache_fuses_completely(kind: str, attention: str, opset: int, tmp_path: Path) -> None:
    """Nothing stands between the products and Attention, which takes the past and gives the present; the cache empty or
    longer than what is new, sequences alone or padded, one token or several."""
    export(kind, attention, opset, tmp_path / "decoder.onnx", cache=True)
    sizes = [(2, 5, 7), (1, 1, 12), (1, 4, 0), (2, 4, 0), (2, 1, 9), (3, 2, 1)]
    _, result = fused(tmp_path / "decoder.onnx", sizes)
    found = Counter(ops(result))
    assert not (WRITTEN_OUT | {"Transpose"}) & set(found), found
    for node in (node for node in result.graph if node.op_type == "Attention"):
        names = [str(value.name).split(".")[0] for value in (*node.inputs[4:], *node.outputs[1:]) if value is not None]
        assert names == ["past", "past", "present", "present"]
        assert node.attributes["kv_num_heads"].value == FEW
    assert (found["Attention"], found["RotaryEmbedding"]) == (LAYERS, 2 * LAYERS)
