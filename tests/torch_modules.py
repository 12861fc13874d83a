"""Small torch modules and the ways a callable hands them over, right and wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


class Two(nn.Module):
    """Two inputs and outputs, one axis dynamic."""

    dynamic_shapes = {"left": {0: torch.export.Dim("rows")}, "right": None}  # noqa: RUF012

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left @ right, (left > 0).sum(dim=1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, bidirectional=True, batch_first=True)
        self.example_inputs = (torch.randn(2, 5, 4),)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        return self.lstm(steps)[0]


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Fixed(nn.Module):
    """Takes a batch of 2 alone."""

    example_inputs = (torch.ones(2, 3, 4),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 12) @ torch.ones(12, 3)


class Branching(nn.Module):
    """Can't be traced, and prints when it is."""

    example_inputs = (torch.ones(2, 3),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("tracing")  # noqa: T201
        return x if x.sum() > 0 else -x


def conv() -> Any:
    print("making a network")  # noqa: T201
    return ConvNet(), torch.randn(1, 3, 8, 8)


def two() -> Any:
    return Two(), {"right": torch.randn(4, 3), "left": torch.randn(5, 4)}


def returns_a_number() -> Any:
    return 3


def gives_another_name() -> Any:
    return ConvNet(), {"picture": torch.randn(1, 3, 8, 8)}


def gives_a_list() -> Any:
    return ConvNet(), {"image": [1, 2]}


def needs(width: int) -> Any:
    return nn.Linear(width, 2)


number = 3
