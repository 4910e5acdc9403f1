"""VGG16 for 32-pixel images (Simonyan and Zisserman, arXiv 1409.1556), with batch norm and one linear classifier."""

from itertools import pairwise

from torch import Tensor, nn

from rlp.models.wrn import initialise

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions in five stages, each stage ended by pooling; 32 pixels become one.

    The three wide linear layers of the ImageNet net are one linear layer here, as is usual for CIFAR. Taps:
    ``stage1`` ... ``stage5``, or a block in a stage: ``stage4.2``.
    """

    default_taps = ("stage1", "stage2", "stage3", "stage4", "stage5")
    smallest_image = 32

    def __init__(self, num_classes: int, batch_norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        channels_in = 3
        for number, (channels, blocks) in enumerate(_STAGES, 1):
            widths = [channels_in, *[channels] * blocks]
            convolutions = [_block(a, b, batch_norm) for a, b in pairwise(widths)]
            self.add_module(f"stage{number}", nn.Sequential(*convolutions, nn.MaxPool2d(2)))
            channels_in = channels
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels_in, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images float ``[B, 3, H, W]``, at least 32 pixels a side, to class logits ``[B, C]``."""
        for number in range(1, len(_STAGES) + 1):
            x = self.get_submodule(f"stage{number}")(x)
        return self.fc(self.dropout(self.pool(x)))


def _block(channels_in: int, channels: int, batch_norm: bool) -> nn.Sequential:
    norm = [nn.BatchNorm2d(channels)] if batch_norm else []
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, 1, 1, bias=not batch_norm), *norm, nn.ReLU())
