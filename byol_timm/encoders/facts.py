"""Facts about an encoder, asked of the module."""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ByolTimmError


def pretrained_cfg(encoder: nn.Module) -> dict[str, Any]:
    """Return what timm records about a model: architecture, input size, normalization, names of layers."""
    return cast("dict[str, Any]", encoder.pretrained_cfg)


def normalization(encoder: nn.Module, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels in 0..1, per channel, that the pretrained weights expect."""
    mean, std = (tuple(pretrained_cfg(encoder)[name]) for name in ("mean", "std"))
    return _for_channels(mean, in_chans), _for_channels(std, in_chans)


def _for_channels(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def encoder_width(encoder: nn.Module) -> int:
    """Return the width of the representation: timm's `head_hidden_size`, which differs from `num_features` for 119."""
    width = getattr(encoder, "head_hidden_size", None)
    if width is None:
        raise ByolTimmError(f"{type(encoder).__name__} does not state its output width. Use BYOL(encoder, width=...)")
    return cast("int", width)


def has_batch_norm(encoder: nn.Module) -> bool:
    """Return True if the encoder has a BatchNorm layer."""
    return any(isinstance(module, _BatchNorm) for module in encoder.modules())


def has_convolutions(encoder: nn.Module) -> bool:
    """Return True if the encoder has convolutions beyond those that cut an image into patches."""
    return any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in encoder.modules())


def is_patch_transformer(encoder: nn.Module) -> bool:
    """Return True if the encoder attends to patches, without BatchNorm or convolutions: MoCo v3's settings fit it.

    False for the networks of SAM, unless they are built without the convolutions behind their transformer.
    """
    attends = any("num_heads" in vars(module) for module in encoder.modules())
    return attends and not has_batch_norm(encoder) and not has_convolutions(encoder)


def has_residual_init(encoder: nn.Module) -> bool:
    """Return True if timm lets its residual branches start at zero or not (`zero_init_last`)."""
    return takes_argument(encoder, "zero_init_last")


def takes_argument(encoder: nn.Module, argument: str) -> bool:
    """Return True if the class of the encoder takes such an argument."""
    return argument in inspect.signature(type(encoder).__init__).parameters


def freeze_parts(encoder: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """Freeze the parameters of `parts`, such as `layer1`, `blocks.0` or `stem`, and return their names.

    parts: names of modules or parameters. `stem`, where no module has that name, is timm's own stem in networks with
        BatchNorm, and the layers around the first convolution in others. Call it before `BYOL(encoder)`.
    BatchNorms whose parameters are frozen also keep their running statistics, and use them, while `BYOL` trains.

    Raises `ByolTimmError` for a part that the encoder does not have, and when nothing is left to train.
    """
    frozen = []
    for part in parts:
        names = _parameters_of(encoder, part)
        if not names and part == "stem":
            names = _stem(encoder)
        if not names:
            known = [name for name, _ in encoder.named_children() if _parameters_of(encoder, name)]
            raise ByolTimmError(f"the encoder has no part {part!r} to freeze. It has: {', '.join(known)}")
        frozen += names
    for name in frozen:
        encoder.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ByolTimmError(f"nothing is left to train ({', '.join(parts)} are frozen). Freeze less")
    return list(dict.fromkeys(frozen))


def _parameters_of(encoder: nn.Module, part: str) -> list[str]:
    return [name for name, _ in encoder.named_parameters() if f"{name}.".startswith(f"{part}.")]


def _stem(encoder: nn.Module) -> list[str]:
    """Return the parameters of the stem's layers: not tokens and position embeddings, which belong to no layer."""
    if has_batch_norm(encoder):
        group_matcher: Any = encoder.group_matcher
        # timm's own notion, which leaves no BatchNorm out.
        names = group_parameters(encoder, group_matcher())[0]
    else:
        names = [name for module in _first_blocks(encoder) for name in _parameters_of(encoder, module)]
    blocks = {
        name for name, module in encoder.named_modules() if any(list(child.parameters()) for child in module.children())
    }
    return [name for name in names if name.rpartition(".")[0] not in blocks]


def _first_blocks(encoder: nn.Module) -> list[str]:
    """Return the outermost modules around the first convolutions that hold neither the last features nor branches."""
    first = pretrained_cfg(encoder)["first_conv"] or []
    feature_info: Any = encoder.feature_info
    last = feature_info[-1]["module"]
    modules = []
    for convolution in [first] if isinstance(first, str) else first:
        around = accumulate(convolution.split("."), "{}.{}".format)
        modules += [m for m in around if not _holds(encoder, m, last)][:1]
    return modules


def _holds(encoder: nn.Module, module: str, feature: str) -> bool:
    inside = encoder.get_submodule(module)
    # Gemma's networks name their features as seen from the network inside.
    holds = f"{feature}.".startswith(f"{module}.") or feature in dict(inside.named_modules())
    return holds or isinstance(inside, nn.ModuleList)
