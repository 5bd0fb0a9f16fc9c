"""Create an encoder: a timm backbone without its classifier, fitted to the images it will see."""

import ast
import contextlib
import inspect
import logging
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from ..errors import ByolTimmError, one_line
from .check import check_encoder_folder, input_channels
from .facts import has_residual_init
from .fetch import cache_alone_without_network, fetch_encoder
from .fit import fit_backbone, small_image_kwargs, warn_of_lost_structure

logger = logging.getLogger(__name__)


def create_encoder(
    backbone: str,
    *,
    image_size: int | None = None,
    in_chans: int | None = None,
    pretrained: bool = False,
    auto_kwargs: bool = False,
    zero_init_last: bool = True,
    **backbone_kwargs: Any,
) -> nn.Module:
    """Return a timm model without a classifier, which maps images [B, in_chans, H, W] to vectors [B, width].

    backbone: a timm name, with or without a pretrained tag, or `hf-hub:user/name`, or `local-dir:folder`. The last two
        bring their weights, and are checked before timm builds them: config, shapes, finite safetensors.
    image_size: size of the square training images; None keeps the backbone's own.
    in_chans: channels of the images; None: 3, or those that a saved encoder was trained on.
    auto_kwargs: for small images, add the argument that keeps a larger final map, where the backbone has one.
    zero_init_last: True keeps timm's init of the last norm of a residual block, 0; False starts it at 1 as in the
        paper, where the backbone has the choice.
    backbone_kwargs: arguments of the timm model, for example `output_stride=8`.

    Raises `ByolTimmError` for an unknown name or argument, images that the backbone cannot take, and a saved encoder
    that cannot be fetched or trusted.
    """
    source, _, place = backbone.partition(":")
    saved = source in ("hf-hub", "local-dir")
    if saved:
        folder = fetch_encoder(place) if source == "hf-hub" else Path(place)
        channels = input_channels(check_encoder_folder(folder))
        backbone, in_chans = f"local-dir:{folder}", channels if in_chans is None else in_chans
    in_chans = 3 if in_chans is None else in_chans
    if auto_kwargs and image_size is not None:
        backbone_kwargs |= small_image_kwargs(backbone, image_size=image_size, in_chans=in_chans, **backbone_kwargs)
    fit = fit_backbone(backbone, image_size=image_size, in_chans=in_chans, **backbone_kwargs)
    if image_size is not None:
        warn_of_lost_structure(backbone, fit, image_size, backbone_kwargs)
    arguments = fit.arguments
    if not zero_init_last:
        if has_residual_init(fit.encoder):
            arguments = {**arguments, "zero_init_last": False}
        else:
            logger.warning(f"{backbone} has no choice of the residual init; it keeps timm's")
    encoder = _build(backbone, arguments, pretrained or saved)
    if image_size is not None:
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": fit.input_size}
    return cast("nn.Module", encoder)


def _build(backbone: str, arguments: dict[str, Any], pretrained: bool) -> Any:
    downloads = pretrained and ":" not in backbone
    with cache_alone_without_network() if downloads else contextlib.nullcontext() as unreachable:
        try:
            return timm.create_model(pretrained=pretrained, **arguments)
        except (RuntimeError, OSError, ValueError) as error:
            if unreachable and isinstance(error, FileNotFoundError):
                raise ByolTimmError(
                    f"the pretrained weights of {backbone} are not in the cache and {unreachable}. Try again later"
                ) from error
            raise ByolTimmError(f"{backbone!r} could not be loaded ({one_line(error)})") from error


def parse_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return `{"output_stride": 8, "global_pool": "max"}` for `("output_stride=8", "global_pool=max")`."""
    flags = inspect.signature(create_encoder).parameters.keys() - {"backbone_kwargs"}
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ByolTimmError(f"--backbone_kwargs takes key=value pairs ({pair!r})")
        if key in flags:
            raise ByolTimmError(f"--backbone_kwargs does not take {key!r}. It is a flag of its own: --{key}")
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs
