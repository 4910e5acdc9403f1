"""mixup and manifold mixup: the network learns on mixtures of two samples, and of their labels.

With λ ~ Beta(α, α), one for a batch, and a permutation π of the batch, the network sees ``λ x_i + (1 - λ) x_π(i)`` and
minimises ``λ ℓ(f, y_i) + (1 - λ) ℓ(f, y_π(i))`` (Zhang, Cissé, Dauphin, Lopez-Paz, ICLR 2018, arXiv 1710.09412).
Manifold mixup (Verma et al., ICML 2019, arXiv 1806.05236) mixes the output of a module instead, drawn for each batch
from a list that the input belongs to.

timm has a ``Mixup``, and the tests hold this one to it. It is not used here because it draws λ from NumPy's global
generator, which neither a seed of ours nor a resume in mid-epoch reaches, pairs sample i with B - 1 - i, wants even
batches, and mixes images alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.data.batch import Batch
from rlp.models.taps import tap_tensor
from rlp.progress import Progress
from rlp.regularisers.class_loss import ClassStep, Forward, count_correct
from rlp.regularisers.taps import check_rows, not_called
from rlp.seeding import named_seed


class Mixture(NamedTuple):
    """A batch's λ, partners int64 ``[B]``, and at which place it is mixed: 0 is the input, then the modules."""

    lam: float
    partner: np.ndarray
    place: int


class Mixing:
    """mixup, or with ``modules`` manifold mixup; a :class:`rlp.regularisers.class_loss.ClassLoss`.

    What is drawn is a function of (seed, epoch, batch) alone. With several ranks λ and the place are those of the whole
    batch, and partners are sought within a rank's part of it.

    Args:
        alpha: α > 0; 1 makes λ uniform, larger values bring it to 1/2.
        seed: of the draws.
        label_smoothing: of both labels.
        modules: where else than at the input to mix, by path.
    """

    clean = False

    def __init__(
        self, alpha: float, seed: int, label_smoothing: float = 0.0, modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.alpha, self.seed, self.label_smoothing = alpha, seed, label_smoothing
        self.modules = list((modules or {}).items())

    def draw(self, epoch: int, batch: int, count: int) -> Mixture:
        """What becomes of a batch of ``count`` samples."""
        random = np.random.default_rng(named_seed(self.seed, f"mixing.{epoch}.{batch}"))
        lam, place = float(random.beta(self.alpha, self.alpha)), int(random.integers(len(self.modules) + 1))
        return Mixture(lam, random.permutation(count), place)

    def step(self, forward: Forward, image: Tensor, batch: Batch, progress: Progress) -> ClassStep:
        """One pass on mixtures; a sample counts as correct by λ for its own label and 1 - λ for its partner's."""
        lam, order, place = self.draw(progress.epoch, progress.batch, len(image))
        partner = torch.from_numpy(order).to(image.device, non_blocking=True)
        if place == 0:
            logits = forward(mix(image, partner, lam))
        else:
            logits = self._mixed_within(place - 1, forward, image, partner, lam)
        logits, other = logits.float(), batch.label[partner]
        losses = [F.cross_entropy(logits, y, label_smoothing=self.label_smoothing) for y in (batch.label, other)]
        own, theirs = count_correct(logits, batch.label), count_correct(logits, other)
        return ClassStep(lam * losses[0] + (1 - lam) * losses[1], lam * own + (1 - lam) * theirs)

    def _mixed_within(self, number: int, forward: Forward, image: Tensor, partner: Tensor, lam: float) -> Tensor:
        """Logits of a pass in which the output of one module is mixed, the first time that it is called."""
        name, module = self.modules[number]
        called: list[bool] = []

        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> Tensor | None:
            if called:
                return None
            called.append(True)
            value = tap_tensor(name, output)
            check_rows(name, value, len(partner), "train.manifold_taps")
            return mix(value, partner, lam)

        handle = module.register_forward_hook(hook)
        try:
            logits = forward(image)
        finally:
            handle.remove()
        if not called:
            raise not_called(name, "train.manifold_taps")
        return logits


def mix(x: Tensor, partner: Tensor, lam: float) -> Tensor:
    """``λ x_i + (1 - λ) x_partner(i)`` of ``[B, ...]``."""
    return lam * x + (1 - lam) * x[partner]
