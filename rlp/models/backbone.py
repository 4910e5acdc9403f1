"""A backbone by name: our nets for small images, or anything timm has."""

from collections.abc import Callable
import difflib
from importlib.util import find_spec
import inspect
from pathlib import Path
import re
import sys
from typing import Any

import torch
from torch import nn

from rlp.errors import UserError
from rlp.models.cnn import SmallCNN
from rlp.models.mlp import MLP
from rlp.models.resnet import ResNet18
from rlp.models.vgg import VGG16
from rlp.models.wrn import WideResNet

OWN_MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "vgg16_cifar": VGG16,
    "resnet18_cifar": ResNet18,
}
_WRN = re.compile(r"wrn_(\d+)_(\d+)")
_torchvision_library: Any = None


def build_model(name: str, num_classes: int, image_size: int, args: dict[str, Any] | None = None) -> nn.Module:
    """Build a network for images ``[B, 3, image_size, image_size]``.

    Args:
        name: ``wrn_{depth}_{width}``, ``vgg16_cifar``, ``resnet18_cifar``, ``small_cnn``, ``mlp``, or a timm model.
        num_classes: outputs C.
        image_size: pixels a side; timm models whose weights depend on it are built for it.
        args: further arguments of the model, such as ``dropout`` (ours) or ``drop_path_rate`` (timm).

    Raises:
        UserError: no model has that name (near names are listed), or an argument is unknown or of a wrong kind.
    """
    args = dict(args or {})
    if "num_classes" in args:
        raise UserError("model.args has 'num_classes', which comes from the data; expected it to be left out")
    if match := _WRN.fullmatch(name):
        depth, width = int(match[1]), int(match[2])
        if depth < 10 or (depth - 4) % 6 or not width:
            raise UserError(f"model.name is '{name}'; expected wrn_d_k with d = 10, 16, 22, 28, ... and k at least 1")
        model = _call(name, WideResNet, args, depth=depth, width=width, num_classes=num_classes)
    elif name == "mlp":
        model = _call(name, MLP, args, num_classes=num_classes, image_size=image_size)
    elif name in OWN_MODELS:
        model = _call(name, OWN_MODELS[name], args, num_classes=num_classes)
    else:
        return _build_timm(name, num_classes, image_size, args)
    smallest = getattr(model, "smallest_image", 1)
    if image_size < smallest:
        raise UserError(f"model.name {name} needs images of at least {smallest} pixels a side; these have {image_size}")
    model.default_cfg = {"input_size": (3, image_size, image_size)}  # type: ignore[assignment]
    return model


def _call(name: str, build: Callable[..., nn.Module], args: dict[str, Any], **fixed: Any) -> nn.Module:
    known = [key for key in inspect.signature(build).parameters if key not in fixed]
    for key in args:
        if key not in known:
            raise UserError(f"model.args has '{key}', which {name} does not take; it takes {', '.join(known)}")
    try:
        return build(**args, **fixed)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.args {args} do not fit {name}: {error}") from error


def _build_timm(name: str, num_classes: int, image_size: int, args: dict[str, Any]) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*OWN_MODELS, "mlp", "wrn_16_4", *timm.list_models()], n=4, cutoff=0.5)
        hint = f"near names: {', '.join(near)}" if near else "see timm.list_models()"
        raise UserError(f"model.name '{name}' is neither one of ours nor a timm model; {hint}")
    sized = {"img_size": image_size, **args}
    try:
        try:
            return timm.create_model(name, num_classes=num_classes, **sized)
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" in args:
                raise
            return timm.create_model(name, num_classes=num_classes, **args)  # a model of any input size
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"model.args {args} do not fit {name} with images of {image_size} pixels: {reason}") from error
    except Exception as error:
        if not args.get("pretrained"):
            raise
        # The download may fail in as many ways as there are network libraries.
        raise UserError(f"model.args.pretrained: the weights of {name} cannot be had: {error}") from error


def default_taps(model: nn.Module) -> list[str]:
    """Taps at several depths that a model names itself: blocks of ours, the feature stages of a timm model.

    Raises:
        UserError: the model names none.
    """
    own = getattr(model, "default_taps", None)
    stages = getattr(model, "feature_info", None)
    names = list(own) if own else [stage["module"] for stage in stages] if isinstance(stages, list) else []
    if not names:
        raise UserError(f"{type(model).__name__} names no taps of its own; expected taps, module paths or globs")
    return list(dict.fromkeys(names))


def import_timm() -> Any:
    """Import timm, also where torchvision is a CUDA build and torch is not.

    torchvision then fails to import because the operators of its C++ library do not exist. timm needs none of them,
    so declaring their signatures is enough.

    Raises:
        UserError: timm is not installed.
    """
    global _torchvision_library
    if _torchvision_library is None and _torchvision_is_for_cuda_alone():
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_library = library  # the declarations live as long as this object
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model.name needs the package timm, which cannot be imported: {error}") from error
    return timm


def _torchvision_is_for_cuda_alone() -> bool:
    """A CUDA build of torchvision, not yet imported, beside a torch without CUDA; read from its files.

    Any other build brings its operators, and declaring them a second time would keep it from loading.
    """
    if torch.version.cuda is not None or "torchvision" in sys.modules:
        return False
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.is_file() and "+cu" in version.read_text()
