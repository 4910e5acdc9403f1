"""The configuration of a training run: every key of ``train_rlp.py`` with its type, default, meaning and range."""

from dataclasses import dataclass, field
import re
from typing import Any, Literal

from rlp.config_keys import (
    REQUIRED,
    Check,
    Section,
    above,
    at_least,
    at_most,
    below,
    between,
    each,
    increasing,
    key,
    not_empty,
    seed_range,
)
from rlp.errors import UserError

__all__ = ["DataConfig", "HeadsConfig", "ModelConfig", "RunConfig", "TrainConfig", "TrainingConfig"]

_POOL = Check(
    lambda value: re.fullmatch(r"auto|avg|avg_last|cls|mean|flatten|adaptive:[1-9][0-9]*", value) is not None,
    "one of auto, avg, avg_last, cls, mean, flatten and adaptive:K",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section, name="run"):
    """The run: its folder, seed and device, and what it keeps."""

    dir: str = key(REQUIRED, "folder of the run", not_empty)
    seed: int = key(0, "seed of weights, order, augmentation and dropout", seed_range)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where to train; auto is CUDA where there is one")
    deterministic: bool = key(False, "only deterministic algorithms: equal runs to the bit on one machine, slower")
    resume: str | None = key(
        None, "go on from a checkpoint: auto for the newest in run.dir (none: a fresh start), or a file", not_empty
    )
    overwrite: bool = key(False, "replace the run that is in run.dir")
    log_every: int = key(50, "steps between two rows of metrics", at_least(1))
    checkpoint_every: int = key(
        0, "steps between two checkpoints beside those at the end of epochs; 0 for none", at_least(0)
    )
    keep_last: int = key(2, "checkpoints kept beside the best", at_least(1))
    tensorboard: bool = key(False, "write TensorBoard events too")
    eval_every: int = key(
        1,
        "epochs between two readings of the training images in eval mode, also after the last epoch; the test set is "
        "evaluated after every epoch",
        at_least(1),
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, name="data"):
    """The data: two .beton files, how they are loaded, altered and augmented."""

    train: str = key(REQUIRED, ".beton of the training set", not_empty)
    val: str = key(REQUIRED, ".beton of the test set", not_empty)
    batch_size: int = key(256, "samples a step, over all ranks", at_least(1))
    eval_batch_size: int = key(0, "samples a step of evaluation, over all ranks; 0 for data.batch_size", at_least(0))
    loader: Literal["auto", "ffcv", "resident"] = key(
        "auto",
        "ffcv decodes batch by batch, resident keeps the set on the device; auto is resident where "
        "images of one size fit within data.resident_limit_gb",
    )
    resident_limit_gb: float = key(4.0, "GiB of images and words that may lie on the device", at_least(0))
    workers: int = key(0, "threads that decode, on each rank; 0 shares the cores among the ranks", at_least(0))
    flip: bool = key(False, "mirror half of the training images")
    crop_padding: int = key(0, "pad by so many pixels and crop back at random; 0 for none", at_least(0))
    cutout: int = key(0, "blank a square of so many pixels a side; 0 for none", at_least(0))
    color_jitter: tuple[float, float, float, float] = key(
        (0.0, 0.0, 0.0, 0.0), "largest change of brightness, contrast, saturation and hue", each(at_least(0))
    )
    randaugment: tuple[float, float] = key(
        (0.0, 0.0), "operations of RandAugment and their magnitude, 0 to 10; 0 operations for none", each(at_least(0))
    )
    image_size: int = key(0, "crop and resize to squares of so many pixels a side (FFCV); 0 keeps images", at_least(0))
    crop_scale: tuple[float, float] = key(
        (0.08, 1.0), "smallest and largest share of the area in a random crop", each(between(0, 1))
    )
    center_ratio: float = key(
        0.875, "evaluation's central crop: its side over the shorter side of the image", above(0), at_most(1)
    )
    interpolation: Literal["area", "bilinear"] = key(
        "area", "how data.image_size resizes: OpenCV's area as in FFCV, or Pillow's antialiased bilinear"
    )
    fraction: float = key(1.0, "share of the training samples that is used at all", above(0), at_most(1))
    fraction_per_class: bool = key(False, "take data.fraction of each class")
    imbalance: float = key(1.0, "long tail: what the first class may keep over what the last may", at_least(1))
    drop_duplicates: bool = key(
        False, "leave out near-duplicates, as `python -m rlp.data duplicates` has noted them in the card"
    )
    member_fraction: float = key(1.0, "share of the training samples that are members", above(0), at_most(1))
    members: Literal["members", "non-members"] = key("members", "which side of data.member_fraction to train on")
    label_noise: float = key(0.0, "share of the training samples that get a wrong class", between(0, 1))
    noise_kind: Literal["symmetric", "pair", "asymmetric"] = key(
        "symmetric", "the wrong class: any other, the next one, or a similar one (CIFAR-10 and CIFAR-100)"
    )
    label_file: str | None = key(
        None, "given labels from a file (.npy, .npz, .pt as CIFAR-N's, .csv, .txt), one for each sample", not_empty
    )
    label_key: str | None = key(None, "the array or column of data.label_file", not_empty)
    canary_noise: float = key(0.0, "share of the training samples whose image is replaced by noise", between(0, 0.3))
    canary_mislabelled: float = key(
        0.0, "share of the training samples that get another class, whatever the label noise", between(0, 0.3)
    )
    canary_duplicates: float = key(
        0.0, "share of the training samples that show another one's image, with its label", between(0, 0.3)
    )
    mean: tuple[float, float, float] | None = key(
        None, "mean of the pixels by channel, 255 being 1; null for the card's"
    )
    std: tuple[float, float, float] | None = key(
        None, "standard deviation of the pixels by channel; null for the card's", each(above(0))
    )
    verify: bool = key(False, "hash both files as a whole first (a resident set always is)")

    def check(self) -> None:
        """The crop's range, and one source of labels."""
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise UserError(f"data.crop_scale is [{low}, {high}]; expected the smaller share first, above 0")
        if self.label_file is not None and self.label_noise:
            raise UserError(
                f"data.label_file is '{self.label_file}' and data.label_noise is {self.label_noise}; "
                "expected only one of them"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, name="model"):
    """The network."""

    name: str = key(
        REQUIRED, "wrn_{depth}_{width}, vgg16_cifar, resnet18_cifar, small_cnn, mlp, or a timm model", not_empty
    )
    args: dict[str, Any] = key(dict, "arguments of the model, such as {drop_rate: 0.1, drop_path_rate: 0.1}")  # noqa: RUF009
    weights: str | None = key(None, "checkpoint whose weights to start from", not_empty)
    channels_last: bool = key(True, "weights and images in channels_last memory format")
    compile: bool = key(False, "compile the network with torch.compile")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(Section, name="heads"):
    """The random-label heads: where they sit, what they predict, how they train, and the penalty's weight λ."""

    taps: tuple[str, ...] = key((), "modules whose output feeds heads: paths, globs, or depth:d; empty for no heads")
    draws: int = key(8, "independent random labellings, one head each, at every tap", at_least(1))
    num_labels: int = key(10, "random labels n to tell apart", between(2, 2**31 - 1))
    kind: Literal["shared", "per_class", "copied"] = key(
        "shared",
        "one head a draw; one for each draw and class; or each head a copy of all modules behind its tap, which costs "
        "as much as running them once more for each draw",
    )
    features: Literal["raw", "standardised", "normalised", "projected"] = key(
        "raw",
        "what heads get of the features: as they are, each with mean 0 and deviation 1, each sample centred and of one "
        "length, or standardised and projected at random to heads.width; running statistics",
    )
    width: int = key(128, "features after the projection where heads.features is projected", at_least(1))
    layers: int = key(1, "layers of a head", between(1, 2))
    hidden: int = key(512, "width of the hidden layer where heads.layers is 2", at_least(1))
    pool: str = key(
        "auto",
        "how a tap's output becomes one vector a sample: global average, class token, mean of tokens, as it is, or "
        "averages on a grid of K x K; auto fits the output's shape",
        _POOL,
    )
    impl: Literal["auto", "reference", "eager", "triton"] = key(
        "auto", "how their loss is computed: auto takes Triton's kernels on a GPU; reference is plain autograd"
    )
    memory_mb: int = key(
        256, "MiB that temporary logits of one tap may take; more is faster at a very large n", at_least(1)
    )
    optimizer: Literal["adamw", "sgd"] = key("adamw", "optimiser of the heads")
    lr: float = key(1e-3, "learning rate of the heads, on the schedule of the network", at_least(0))
    weight_decay: float = key(0.0, "weight decay of the heads", at_least(0))
    lam: float = key(0.0, "weight λ of the penalty on the network; 0 only measures", at_least(0))
    lam_over_n: float | None = key(None, "λ/n, in place of heads.lam: λ is this times heads.num_labels", at_least(0))
    penalty: Literal["forget", "uniform", "entropy", "reversal", "dof", "joint"] = key(
        "forget",
        "what λ weighs: -log(1 - p), the heads' cross-entropy to uniform, their negative entropy, log p (gradient "
        "reversal), the degrees of freedom of a ridge fit (no head is asked), or -log p (joint: the network helps the "
        "heads, the opposite of a penalty)",
    )
    ridge: float = key(0.1, "ridge of the penalty dof, in units of the features' mean variance", at_least(1e-4))
    lam_taps: dict[str, Any] = key(  # noqa: RUF009
        dict,
        "factors of λ by tap, such as {layer4: 1, 'layer3*': 0.5}; the last pattern that fits counts, taps that none "
        "fits have no penalty; empty for 1 everywhere",
    )
    warmup_epochs: float = key(0.0, "epochs in which λ rises linearly to its full weight", at_least(0))
    target_kappa: float | None = key(
        None,
        "adapt λ, tap by tap from heads.lam on, so that the training heads' κ stays here; every run.log_every steps",
        between(0, 1),
    )
    steps: int = key(
        1,
        "optimiser steps of the heads for each step of the network, on the same batch; the last is the common one, "
        "whose heads the penalty sees",
        at_least(1),
    )
    restart_every: int = key(0, "epochs after which the heads start again with fresh weights; 0 for never", at_least(0))
    fresh_draws: bool = key(False, "each restart of the heads also turns to the next draws of random labels")

    def check(self) -> None:
        """One way to give λ, and settings that need another."""
        if self.lam and self.lam_over_n is not None:
            raise UserError(
                f"heads.lam is {self.lam} and heads.lam_over_n is {self.lam_over_n}; expected only one of them "
                "(heads.lam 0, or heads.lam_over_n null)"
            )
        if self.weight and not self.taps:
            raise UserError(f"λ is {self.weight}, but heads.taps is empty; expected taps, or heads.lam 0")
        for pattern, factor in self.lam_taps.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
                raise UserError(f"heads.lam_taps has {factor!r} at '{pattern}'; expected a finite number of at least 0")
        if self.target_kappa is not None and not self.weight:
            raise UserError(
                f"heads.target_kappa is {self.target_kappa}, but λ is 0, which no factor changes; expected heads.lam "
                "above 0 to start from"
            )
        if self.fresh_draws and not self.restart_every:
            raise UserError("heads.fresh_draws is true, but heads.restart_every is 0; expected epochs between restarts")

    @property
    def weight(self) -> float:
        """λ as it multiplies the penalty: ``lam``, or ``lam_over_n * num_labels``."""
        return self.lam if self.lam_over_n is None else self.lam_over_n * self.num_labels


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section, name="train"):
    """The training of the network."""

    epochs: int = key(10, "passes over the training set", at_least(1))
    optimizer: Literal["sgd", "adamw"] = key("sgd", "optimiser of the network")
    lr: float = key(0.1, "largest learning rate", at_least(0))
    momentum: float = key(0.9, "momentum of sgd", at_least(0), below(1))
    nesterov: bool = key(True, "Nesterov's momentum in sgd")
    betas: tuple[float, float] = key((0.9, 0.999), "decay rates of adamw's averages", each(at_least(0)), each(below(1)))
    weight_decay: float = key(5e-4, "weight decay, of linear and convolution weights only", at_least(0))
    schedule: Literal["cosine", "linear", "step", "constant"] = key("cosine", "learning rate after the warm-up")
    warmup_epochs: float = key(0.0, "epochs of linear warm-up", at_least(0))
    step_epochs: tuple[float, ...] = key((), "epochs at which schedule step lowers the rate", increasing)
    step_gamma: float = key(0.1, "factor of the rate at each of train.step_epochs", above(0), at_most(1))
    label_smoothing: float = key(0.0, "label smoothing of the class loss", at_least(0), below(1))
    clip_norm: float = key(0.0, "largest gradient norm of the network; 0 clips nothing", at_least(0))
    accumulate: int = key(1, "batches whose gradients are added up for one step", at_least(1))
    amp: Literal["none", "bf16", "fp16"] = key("none", "autocast of the forward pass; fp16 scales the loss")
    patience: int = key(
        0,
        "stop after so many epochs without a better accuracy on data.val (or area, see train.nmf_tap); 0 trains all "
        "epochs. The best checkpoint is kept as best.pt",
        at_least(0),
    )
    nmf_tap: str = key(
        "",
        "tap behind a ReLU: what is best, also for train.patience, is then the area under accuracy against the "
        "non-negative rank of its activations, of training images alone; empty for accuracy on data.val",
    )
    mixup: float = key(0.0, "α of mixup: the weight of the first of two images is Beta(α, α); 0 for none", at_least(0))
    manifold_mixup: float = key(
        0.0, "α of manifold mixup, at the input or one of train.manifold_taps, drawn for each batch", at_least(0)
    )
    manifold_taps: tuple[str, ...] = key((), "modules whose output manifold mixup may mix: paths or globs")
    bilevel: int = key(
        0,
        "Deep Bilevel Learning: splits of a batch, with equal class lists, of which the first validates the others; 0 "
        "for none, 8 with data.batch_size 64 in the paper. With a mixup the others are mixed, each within itself",
        Check(lambda value: value == 0 or value >= 2, "0 or at least 2"),
    )
    bilevel_mu: float = key(0.01, "μ of train.bilevel: what is added to the squared norm of a gradient", at_least(0))
    tied_dropout: float = key(
        0.0, "example-tied dropout: share of the channels that memorise; 0 for none", at_least(0), below(1)
    )
    tied_per_sample: float = key(0.1, "share of these channels that a sample has in training", between(0, 1))
    tied_taps: tuple[str, ...] = key((), "modules whose output example-tied dropout masks: paths or globs")

    def check(self) -> None:
        """The schedule, and regularisers that go together, with their taps."""
        self._check_regularisers()
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"train.warmup_epochs is {self.warmup_epochs}, longer than train.epochs, which is {self.epochs}; "
                "expected a warm-up that ends within the run"
            )
        if self.schedule == "step" and not self.step_epochs:
            raise UserError("train.schedule is step, but train.step_epochs is empty; expected the epochs of the steps")

    def _check_regularisers(self) -> None:
        chosen = [name for name in ("mixup", "manifold_mixup", "bilevel", "tied_dropout") if getattr(self, name)]
        if len(chosen) > 1 and chosen not in (["mixup", "bilevel"], ["manifold_mixup", "bilevel"]):
            both = " and ".join(f"train.{name}" for name in chosen)
            raise UserError(
                f"{both} are set; expected one of them, or train.bilevel with a mixup, for each decides what a batch's "
                "class loss is"
            )
        for name, taps in (("manifold_mixup", "manifold_taps"), ("tied_dropout", "tied_taps")):
            if getattr(self, name) and not getattr(self, taps):
                raise UserError(
                    f"train.{name} is {getattr(self, name)}, but train.{taps} is empty; expected modules to act on"
                )
        if self.bilevel and self.amp == "fp16":
            raise UserError(
                "train.bilevel weighs gradients before fp16's loss scaling; expected train.amp none or bf16"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of ``train_rlp.py``."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Checks that concern several sections."""
        if self.heads.warmup_epochs > self.train.epochs:
            raise UserError(
                f"heads.warmup_epochs is {self.heads.warmup_epochs}, longer than train.epochs, which is "
                f"{self.train.epochs}; expected a warm-up of λ that ends within the run"
            )
        if self.heads.steps > 1 and self.train.accumulate > 1:
            raise UserError(
                f"heads.steps is {self.heads.steps} and train.accumulate is {self.train.accumulate}; expected one of "
                "them to be 1, for steps of the heads would fall between batches whose gradients are added up"
            )
        self._check_regularisers()

    def _check_regularisers(self) -> None:
        train = self.train
        if train.bilevel and self.data.batch_size % train.bilevel:
            raise UserError(
                f"data.batch_size is {self.data.batch_size}, which {train.bilevel} splits (train.bilevel) cannot share "
                "equally; expected a multiple"
            )
        for name in ("manifold_mixup", "tied_dropout"):
            if getattr(train, name) and self.model.compile:
                raise UserError(f"train.{name} changes tensors within the network; expected model.compile false")
        if train.tied_dropout and self.heads.taps and self.heads.kind == "copied":
            raise UserError(
                "heads.kind is copied, and copies of the network's modules would lack train.tied_dropout; expected "
                "another kind of heads"
            )
