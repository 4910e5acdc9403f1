"""A small convolutional network for small images on a CPU (the digits of the demo)."""

from itertools import pairwise

from torch import Tensor, nn

from rlp.models.wrn import initialise


class SmallCNN(nn.Module):
    """Blocks of 3x3 convolution, norm and ReLU; each halves the image and doubles the ``width`` channels of the first.

    Taps: ``block1``, ``block2`` and so on. About 24,000 parameters at the defaults.
    """

    def __init__(
        self, num_classes: int, width: int = 16, dropout: float = 0.0, norm: bool = True, blocks: int = 3
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError("blocks must be at least 1")
        self.default_taps = tuple(f"block{number}" for number in range(1, blocks + 1))
        self.smallest_image = 2**blocks
        channels = [3, *(width * 2**number for number in range(blocks))]
        for name, (channels_in, channels_out) in zip(self.default_taps, pairwise(channels), strict=True):
            self.add_module(name, _block(channels_in, channels_out, norm))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images float ``[B, 3, H, W]``, at least 2^blocks pixels a side, to class logits ``[B, C]``."""
        for name in self.default_taps:
            x = self.get_submodule(name)(x)
        return self.fc(self.dropout(self.pool(x)))


def _block(channels_in: int, channels: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels_in, channels, 3, 2, 1, bias=not norm)]
    return nn.Sequential(*layers, nn.BatchNorm2d(channels) if norm else nn.Identity(), nn.ReLU())
