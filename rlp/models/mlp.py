"""A perceptron for small images: the network of the project's known figures on digits."""

from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """``depth`` hidden layers of ``width`` ReLU units on the flattened image. Taps: ``layer1``, ``layer2``, ..."""

    smallest_image = 1

    def __init__(
        self, num_classes: int, image_size: int, width: int = 256, depth: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError("depth must be at least 1")
        self.default_taps = tuple(f"layer{number}" for number in range(1, depth + 1))
        widths = [3 * image_size**2, *[width] * depth]
        for name, (units_in, units_out) in zip(self.default_taps, pairwise(widths), strict=True):
            self.add_module(name, nn.Sequential(nn.Linear(units_in, units_out), nn.ReLU(), nn.Dropout(dropout)))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Square images float ``[B, 3, image_size, image_size]`` to class logits ``[B, C]``."""
        x = x.flatten(1)
        for name in self.default_taps:
            x = self.get_submodule(name)(x)
        return self.fc(x)
