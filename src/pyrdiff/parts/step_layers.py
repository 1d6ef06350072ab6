"""Layers of the T sub-networks of paper X (eq. 14), of which those of the steps asked for are computed at once."""

import torch
import torch.nn.functional as F
from torch import nn


class StepConv(nn.Module):
    """T convolutions. Weight [T, out, in, k, k]."""

    def __init__(self, steps: int, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        bound = (in_channels * kernel**2) ** -0.5  # of nn.Conv2d
        self.weight = nn.Parameter(
            torch.empty(steps, out_channels, in_channels, kernel, kernel).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(steps, out_channels).uniform_(-bound, bound))

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor, shared: bool = False) -> torch.Tensor:
        """[B, S * out, h, w] of [B, S * in, h, w], or of one [B, in, h, w] that all steps share."""
        weight, bias = self.weight[rows].flatten(0, 1), self.bias[rows].flatten()
        groups = 1 if shared else len(rows)
        return F.conv2d(hidden, weight, bias, padding=self.weight.shape[-1] // 2, groups=groups)


class StepNorm(nn.Module):
    """T group norms of one group each."""

    def __init__(self, steps: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(steps, channels))
        self.bias = nn.Parameter(torch.zeros(steps, channels))

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, S * c, h, w] of the same."""
        return F.group_norm(hidden, len(rows), self.weight[rows].flatten(), self.bias[rows].flatten(), eps=1e-6)


class StepAttention(nn.Module):
    """T layers of self-attention with one head each."""

    def __init__(self, steps: int, channels: int):
        super().__init__()
        self.channels = channels
        self.norm = StepNorm(steps, channels)
        self.query, self.key, self.value, self.out = (StepConv(steps, channels, channels, 1) for _ in range(4))

    @staticmethod
    def width(channels: int) -> int:
        """The fused kernels of attention ask for a multiple of 8: zeros are added."""
        return -(-channels // 8) * 8

    def forward(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, S * c, h, w] of the same."""
        normed, added = self.norm(hidden, rows), self.width(self.channels) - self.channels

        def tokens(layer: StepConv) -> torch.Tensor:
            maps = layer(normed, rows).unflatten(1, (len(rows), self.channels)).flatten(3)
            return F.pad(maps.transpose(2, 3), (0, added))

        mixed = F.scaled_dot_product_attention(
            tokens(self.query), tokens(self.key), tokens(self.value), scale=self.channels**-0.5
        )
        mixed = mixed[..., : self.channels].transpose(2, 3).reshape(hidden.shape)
        return hidden + self.out(mixed, rows)
