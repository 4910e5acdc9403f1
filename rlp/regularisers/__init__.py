"""Regularisers that change how a batch becomes the class loss: one of them beside the heads, or bilevel with mixup.

A regulariser is a :class:`rlp.regularisers.class_loss.ClassLoss`; :func:`regulariser_of` makes the run's.
"""

from torch import nn

from rlp.regularisers.bilevel import Bilevel
from rlp.regularisers.class_loss import ClassLoss, ClassStep, Plain, pass_for_heads
from rlp.regularisers.mixing import Mixing
from rlp.regularisers.taps import modules_at
from rlp.regularisers.tied_dropout import Tied, hang_tied_dropout, tell_samples, tied_dropout_of
from rlp.schema import TrainConfig

__all__ = ["ClassLoss", "ClassStep", "hang_tied_dropout", "pass_for_heads", "regulariser_of", "tell_samples"]


def regulariser_of(config: TrainConfig, model: nn.Module) -> ClassLoss:
    """The class loss that ``config.train`` asks for, of a network that :func:`rlp.build.build_network` made.

    Raises:
        UserError: a tap does not exist.
    """
    train = config.train
    plain = Plain(train.label_smoothing)
    mixing = _mixing_of(config, model)
    if train.bilevel:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Bilevel(trained, train.bilevel, train.bilevel_mu, plain, mixing)
    tied = tied_dropout_of(model)
    return mixing or (plain if tied is None else Tied(tied, train.label_smoothing))


def _mixing_of(config: TrainConfig, model: nn.Module) -> Mixing | None:
    train, seed = config.train, config.run.seed
    if train.mixup:
        return Mixing(train.mixup, seed, train.label_smoothing)
    if train.manifold_mixup:
        modules = modules_at(model, train.manifold_taps, "train.manifold_taps")
        return Mixing(train.manifold_mixup, seed, train.label_smoothing, modules)
    return None
