"""Encoders: any timm backbone without its classifier, fitted to the images it will see."""

import ast
import inspect
import logging
from typing import Any

import timm
from torch import nn

from ..errors import ByolTimmError, one_line
from .facts import has_residual_init
from .fit import _warn_of_lost_structure, fit_backbone, small_image_kwargs

logger = logging.getLogger(__name__)


def create_encoder(
    backbone: str,
    *,
    image_size: int | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    auto_kwargs: bool = False,
    zero_init_last: bool = True,
    **backbone_kwargs: Any,
) -> nn.Module:
    """A timm model without classifier that maps images [B, in_chans, H, W] to representations [B, width].

    backbone: a timm name, with a pretrained tag or without, or `hf-hub:user/name`, or `local-dir:folder`; the last two
        bring their weights along.
    image_size: the square size of the training images; None leaves the backbone's own.
    auto_kwargs: for small images, add the argument that keeps a larger final map, where the backbone has one.
    zero_init_last: timm starts the last norm of a residual block at 0; False starts it at 1 as the paper's networks,
        in the backbones that have the choice.
    backbone_kwargs: passed to the timm model, for example `output_stride=8`.

    Raises `ByolTimmError` for an unknown name, an unknown argument, and images that the backbone cannot take.
    """
    if auto_kwargs and image_size is not None:
        backbone_kwargs |= small_image_kwargs(backbone, image_size=image_size, in_chans=in_chans, **backbone_kwargs)
    fit = fit_backbone(backbone, image_size=image_size, in_chans=in_chans, **backbone_kwargs)
    if image_size is not None:
        _warn_of_lost_structure(backbone, fit, image_size, backbone_kwargs)
    arguments = fit.arguments
    if not zero_init_last:
        if has_residual_init(fit.encoder):
            arguments = {**arguments, "zero_init_last": False}
        else:
            logger.warning(f"{backbone} has no choice of the residual init; it starts as timm has it")
    from_source = ":" in backbone
    try:
        encoder: Any = timm.create_model(pretrained=pretrained or from_source, **arguments)
    except (RuntimeError, OSError, ValueError) as error:
        raise ByolTimmError(f"{backbone!r} could not be loaded ({one_line(error)})") from error
    if image_size is not None:
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": fit.input_size}
    return encoder


def parse_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("output_stride=8", "global_pool=max")` as `{"output_stride": 8, "global_pool": "max"}`, timm's own rule."""
    flags = inspect.signature(create_encoder).parameters.keys() - {"backbone_kwargs"}
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ByolTimmError(f"--backbone_kwargs takes key=value pairs ({pair!r})")
        if key in flags:
            raise ByolTimmError(f"--backbone_kwargs does not take {key!r}, which is a setting of its own (--{key})")
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs
