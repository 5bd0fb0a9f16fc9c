"""Encoders: any timm backbone without its classifier, checked for the images it will see."""

import ast
import difflib
import inspect
import logging
from typing import Any

import timm
import torch
from timm.models import resolve_model_input_args
from torch import nn

from .errors import ByolTimmError

logger = logging.getLogger(__name__)

# What plain timm can reload and what keeps some spatial structure of small images, in the order of preference.
SMALL_IMAGE_KWARGS: tuple[dict[str, int], ...] = ({"output_stride": 8}, {"patch_size": 4}, {"patch_size": 2})


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
    auto_kwargs: for small images, add the argument that keeps at least a 2x2 map, where the backbone has one.
    zero_init_last: timm starts the last norm of a residual block at 0; False starts it at 1 as the paper's networks,
        in the backbones that have the choice.
    backbone_kwargs: passed to the timm model, for example `output_stride=8`.

    Raises `ByolTimmError` for an unknown name, an unknown argument, and images that the backbone cannot take.
    """
    if image_size is not None and image_size < 1:
        raise ByolTimmError(f"image_size must be positive ({image_size})")
    backbone_kwargs = {"num_classes": 0, "in_chans": in_chans, **backbone_kwargs}
    arguments = _fitting_arguments(backbone, image_size, backbone_kwargs)
    if image_size is not None and _map_cells(arguments, image_size) <= 4:
        remedy = _small_image_remedy(backbone, image_size, backbone_kwargs)
        if remedy and auto_kwargs:
            arguments = remedy[1]
        elif remedy:
            key, value = next(iter(remedy[0].items()))
            logger.warning(
                f"{backbone} leaves at most a 2x2 map of {image_size}x{image_size} images; "
                f"--backbone_kwargs {key}={value} keeps more, or use larger images"
            )
    accepted = inspect.signature(type(_build_on_meta(arguments)).__init__).parameters
    if not zero_init_last and "zero_init_last" in accepted:
        arguments["zero_init_last"] = False
    from_source = ":" in backbone
    try:
        encoder: Any = timm.create_model(pretrained=pretrained or from_source, **arguments)
    except (RuntimeError, OSError, ValueError) as error:
        raise ByolTimmError(f"{backbone!r} could not be loaded ({_one_line(error)})") from error
    if image_size is not None:
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (in_chans, image_size, image_size)}
    return encoder


def encoder_width(encoder: nn.Module) -> int:
    """The width of the representation: timm's `head_hidden_size`, which `num_features` is not for 119 names."""
    width = getattr(encoder, "head_hidden_size", None)
    if width is None:
        raise ByolTimmError(f"{type(encoder).__name__} does not tell its output width; pass BYOL(encoder, width=...)")
    return width


def parse_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("output_stride=8", "global_pool=max")` as `{"output_stride": 8, "global_pool": "max"}`, timm's own rule."""
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ByolTimmError(f"--backbone_kwargs takes key=value pairs ({pair!r})")
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def closest_backbones(name: str, count: int = 3) -> list[str]:
    """The timm names nearest to a mistyped one: `vit-tiny` finds `vit_tiny_patch16_224`."""
    names = timm.list_models()
    base = name.split(".")[0].lower()
    plain = "".join(c for c in base if c.isalnum())
    starting = sorted((n for n in names if plain and n.replace("_", "").startswith(plain)), key=len)
    near = difflib.get_close_matches(base, names, n=count, cutoff=0.5)
    return list(dict.fromkeys(starting + near))[:count]


def _fitting_arguments(backbone: str, image_size: int | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` needs for these images, shown to run by a forward pass on the meta device."""
    arguments = _resolve(backbone, image_size, kwargs)
    failure = _probe(backbone, arguments, image_size)
    if failure is not None and "img_size" in arguments and "img_size" not in kwargs:
        # CrossViT rescales its input itself and breaks when it is told the size.
        native = _resolve(backbone, None, kwargs)
        if _probe(backbone, native, image_size) is None:
            return native
    if failure is not None:
        raise failure
    return arguments


def _resolve(backbone: str, image_size: int | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    requested = {} if image_size is None else {"img_size": image_size}
    try:
        return resolve_model_input_args(backbone, requested, **kwargs)
    except RuntimeError as error:
        name, _, tag = backbone.partition(".")
        if tag and timm.is_model(name):
            tags = timm.list_pretrained(name)
            known = ", ".join(tags) if tags else "none"
            raise ByolTimmError(f"{name} has no pretrained tag {tag!r}. It has: {known}") from error
        near = ", ".join(closest_backbones(backbone))
        raise ByolTimmError(f"timm has no backbone {backbone!r}. Nearest names: {near}") from error
    except (ValueError, OSError, KeyError) as error:
        raise ByolTimmError(f"backbone {backbone!r} cannot be used ({_one_line(error)})") from error


def _build_on_meta(arguments: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return timm.create_model(**arguments)


def _probe(backbone: str, arguments: dict[str, Any], image_size: int | None) -> ByolTimmError | None:
    """The reason why this backbone cannot train on these images, or None; costs milliseconds and no memory."""
    try:
        encoder = _build_on_meta(arguments)
    except TypeError as error:
        return ByolTimmError(f"{backbone} does not take these arguments ({_one_line(error)})")
    except (AssertionError, RuntimeError, ValueError) as error:
        size = "" if image_size is None else f" for {image_size}x{image_size} images"
        return ByolTimmError(f"{backbone} cannot be built{size} ({_one_line(error)})")
    shape = _input_shape(encoder, arguments, image_size)
    try:
        with torch.no_grad():
            output = encoder(torch.empty(shape, device="meta"))
    except (AssertionError, RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        channels, height, width = shape[1:]
        return ByolTimmError(
            f"{backbone} does not run on {height}x{width} images with {channels} channels ({_one_line(error)}). "
            "Use a larger --image_size or another backbone"
        )
    if output.ndim != 2 or output.shape[1] != encoder_width(encoder):
        name = backbone.removesuffix("_enc")
        choose = f"choose {name!r}" if name != backbone and timm.is_model(name) else "choose another backbone"
        return ByolTimmError(
            f"{backbone} returns {tuple(output.shape[1:])} for an image, not one vector (it has no pooling); {choose}"
        )
    return None


def _input_shape(encoder: Any, arguments: dict[str, Any], image_size: int | None) -> tuple[int, int, int, int]:
    _, height, width = encoder.pretrained_cfg["input_size"]
    if image_size is not None:
        height = width = image_size
    return 2, arguments["in_chans"], height, width


def _map_cells(arguments: dict[str, Any], image_size: int) -> float:
    """The number of places in the final map, or of patch tokens; infinite where the backbone does not say."""
    encoder = _build_on_meta(arguments)
    with torch.no_grad():
        features = encoder.forward_features(torch.empty(_input_shape(encoder, arguments, image_size), device="meta"))
    if not isinstance(features, torch.Tensor):
        return float("inf")
    if features.ndim == 3:
        return features.shape[1] - getattr(encoder, "num_prefix_tokens", 0)
    if features.ndim == 4:
        channels = encoder.num_features
        return features[0].numel() / (channels if channels in features.shape[1:] else features.shape[1])
    return float("inf")


def _small_image_remedy(
    backbone: str, image_size: int, kwargs: dict[str, Any]
) -> tuple[dict[str, int], dict[str, Any]] | None:
    for extra in SMALL_IMAGE_KWARGS:
        if not extra.keys() & kwargs.keys():
            try:
                arguments = _fitting_arguments(backbone, image_size, {**kwargs, **extra})
            except ByolTimmError:
                continue
            if _map_cells(arguments, image_size) > 4:
                return extra, arguments
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
