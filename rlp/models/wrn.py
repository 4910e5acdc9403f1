"""Wide residual networks for 32-pixel images (Zagoruyko and Komodakis, arXiv 1605.07146)."""

import torch
from torch import Tensor, nn
import torch.nn.functional as F


class PreActBlock(nn.Module):
    """Pre-activation basic block: norm, ReLU, 3x3, norm, ReLU, (dropout), 3x3, plus the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels_in, H, W]`` to ``[B, channels, H / stride, W / stride]``."""
        y = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        return skip + self.conv2(self.dropout(F.relu(self.norm2(y))))


class WideResNet(nn.Module):
    """WRN-depth-width: three groups of ``(depth - 4) / 6`` blocks with 16, 32 and 64 times ``width`` channels.

    Taps: ``stem``, ``group1.0`` ... ``group3.{last}``, ``norm`` (after the last group; heads see its ReLU), ``pool``.
    """

    default_taps = ("group1", "group2", "group3", "norm")
    smallest_image = 8

    def __init__(self, depth: int, width: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.group1 = _group(blocks, channels[0], channels[1], 1, dropout)
        self.group2 = _group(blocks, channels[1], channels[2], 2, dropout)
        self.group3 = _group(blocks, channels[2], channels[3], 2, dropout)
        self.norm = nn.Sequential(nn.BatchNorm2d(channels[3]), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels[3], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images float ``[B, 3, H, W]`` to class logits ``[B, C]``."""
        x = self.group3(self.group2(self.group1(self.stem(x))))
        return self.fc(self.pool(self.norm(x)))


def _group(blocks: int, channels_in: int, channels: int, stride: int, dropout: float) -> nn.Sequential:
    first = PreActBlock(channels_in, channels, stride, dropout)
    return nn.Sequential(first, *(PreActBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)))


def initialise(model: nn.Module) -> None:
    """He initialisation by fan-out of convolutions, zero biases (arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)
