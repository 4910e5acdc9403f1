"""A small convolutional network for small images on a CPU (the digits of the demo)."""

from torch import Tensor, nn

from rlp.models.wrn import initialise


class SmallCNN(nn.Module):
    """Three blocks of 3x3 convolution, norm and ReLU with ``width``, 2 and 4 times ``width`` channels, each halving.

    Taps: ``block1``, ``block2``, ``block3``. About 24,000 parameters at the default width.
    """

    default_taps = ("block1", "block2", "block3")
    smallest_image = 8

    def __init__(self, num_classes: int, width: int = 16, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.block1 = _block(3, width, norm)
        self.block2 = _block(width, 2 * width, norm)
        self.block3 = _block(2 * width, 4 * width, norm)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images float ``[B, 3, H, W]``, at least 8 pixels a side, to class logits ``[B, C]``."""
        return self.fc(self.dropout(self.pool(self.block3(self.block2(self.block1(x))))))


def _block(channels_in: int, channels: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels_in, channels, 3, 2, 1, bias=not norm)]
    return nn.Sequential(*layers, nn.BatchNorm2d(channels) if norm else nn.Identity(), nn.ReLU())
