"""Find the arguments that a backbone needs to run on images of a size."""

import difflib
import inspect
import logging
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from ..errors import ByolTimmError, nearest, one_line
from .facts import encoder_width, pretrained_cfg, takes_argument

logger = logging.getLogger(__name__)

# Arguments that keep more of the layout of small images and that plain timm reloads, in the order of preference.
SMALL_IMAGE_KWARGS: tuple[dict[str, int], ...] = ({"output_stride": 8}, {"patch_size": 4}, {"patch_size": 2})
# A final map of at most so many places has lost the layout of the image.
FEW_PLACES = 4


@dataclass(frozen=True)
class Fit:
    """A backbone that takes images of one size, as shown by a forward pass on the meta device, without weights."""

    arguments: dict[str, Any]
    """What `timm.create_model` takes to build it."""
    encoder: nn.Module
    """The network on the meta device, in training mode."""
    input_size: tuple[int, int, int]
    """Channels, height and width of the images."""

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of the final map or grid of patch tokens; off by one where the image is cut or padded."""
        _, height, width = self.input_size
        facts = pretrained_cfg(self.encoder)
        if facts["fixed_input_size"] and "img_size" not in self.arguments:
            # The network rescales images to its own size.
            _, height, width = facts["input_size"]
        feature_info: Any = self.encoder.feature_info
        reduction = feature_info[-1]["reduction"]
        return max(1, round(height / reduction)), max(1, round(width / reduction))


def fit_backbone(backbone: str, *, image_size: int | None = None, in_chans: int = 3, **backbone_kwargs: Any) -> Fit:
    """Return the backbone with the arguments it needs for such images; parameters and errors as `create_encoder`."""
    for name, value in (("image_size", image_size), ("in_chans", in_chans)):
        if value is not None and value < 1:
            raise ByolTimmError(f"{name} must be positive ({value})")
    for name in ("num_classes", "features_only", "checkpoint_path"):
        if name in backbone_kwargs:
            raise ByolTimmError(f"{name} is not an argument of an encoder ({backbone_kwargs[name]!r}). Leave it out")
    try:
        return _fit(backbone, image_size, in_chans, backbone_kwargs)
    except _DoesNotRun as error:
        advice = _advice(backbone, image_size, in_chans, backbone_kwargs)
        raise ByolTimmError(f"{error}. {advice}") from error.__cause__


def small_image_kwargs(backbone: str, *, image_size: int, in_chans: int = 3, **backbone_kwargs: Any) -> dict[str, int]:
    """Return the argument that keeps more of the layout of small images, such as `{"output_stride": 8}`.

    Plain timm takes it too, so the encoder loads anywhere. Empty where none is needed, or none helps.
    """
    best: dict[str, int] = {}
    places = _places(backbone, image_size, in_chans, backbone_kwargs)
    for extra in SMALL_IMAGE_KWARGS:
        if places <= FEW_PLACES and not extra.keys() & backbone_kwargs.keys():
            more = _places(backbone, image_size, in_chans, {**backbone_kwargs, **extra})
            if more > places:
                best, places = extra, more
    return best


def closest_backbones(name: str, count: int = 3) -> list[str]:
    """Return the timm names nearest to a mistyped one: `vit-tiny` and `ViT_Ti_16` find `vit_tiny_patch16_224`."""
    typed = name.split(".")[0].lower()
    plain = _letters_and_digits(typed)
    names = sorted(timm.list_models(), key=len)
    beginning = [n for n in names if _letters_and_digits(n).startswith(plain)]
    containing = [n for n in names if plain in _letters_and_digits(n)]
    # Some letters left out: resnt18, vit_b_16.
    gaps = re.compile(".*".join(plain))
    abbreviated = [n for n in names if gaps.match(_letters_and_digits(n))]
    misspelt = difflib.get_close_matches(typed, names, n=count, cutoff=0.5)
    return list(dict.fromkeys(beginning + containing + abbreviated + misspelt))[:count] if plain else []


def warn_of_lost_structure(backbone: str, fit: Fit, image_size: int, backbone_kwargs: dict[str, Any]) -> None:
    """Warn where the final map is tiny, and where patches leave pixels of the border out."""
    size = f"{image_size}x{image_size}"
    if math.prod(fit.map_size) <= FEW_PLACES:
        extra = small_image_kwargs(backbone, image_size=image_size, in_chans=fit.input_size[0], **backbone_kwargs)
        ways = [f"--backbone_kwargs {key}={value} (or auto)" for key, value in extra.items()]
        height, width = fit.map_size
        logger.warning(
            f"{backbone} reduces {size} images to a {height}x{width} map. Use {', or '.join([*ways, 'larger images'])}"
        )
    for module in fit.encoder.modules():
        if isinstance(module, PatchEmbed) and not module.dynamic_img_pad and image_size % module.patch_size[0]:
            patch = module.patch_size[0]
            logger.warning(
                f"{backbone} cuts {size} images into patches of {patch} pixels and ignores the last "
                f"{image_size % patch} rows and columns. Use a multiple of {patch}"
            )


class _DoesNotRun(ByolTimmError):
    """The backbone exists and takes the arguments, but not such images."""


def _fit(backbone: str, image_size: int | None, in_chans: int, backbone_kwargs: dict[str, Any]) -> Fit:
    failure: ByolTimmError | None = None
    for arguments in _ways_to_build(backbone, image_size, in_chans, backbone_kwargs):
        try:
            return _run(backbone, arguments, image_size)
        except ByolTimmError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _ways_to_build(
    backbone: str, image_size: int | None, in_chans: int, backbone_kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    arguments = _resolve(backbone, image_size, {"num_classes": 0, "in_chans": in_chans, **backbone_kwargs})
    yield arguments
    if image_size is not None and "img_size" in arguments and "img_size" not in backbone_kwargs:
        # CrossViT rescales its input itself and breaks when it gets the size.
        yield {key: value for key, value in arguments.items() if key != "img_size"}
    if "global_pool" not in backbone_kwargs:
        # The encoders of language models return tokens, unless asked for their mean.
        yield {**arguments, "global_pool": "avg"}


def _resolve(backbone: str, image_size: int | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    requested = {} if image_size is None else {"img_size": image_size}
    try:
        return resolve_model_input_args(backbone, requested, **kwargs)
    except RuntimeError as error:
        name, _, tag = backbone.partition(".")
        if ":" in backbone:
            raise ByolTimmError(f"timm {timm.__version__} has no such network ({backbone}). Update timm?") from error
        if tag and timm.is_model(name):
            tags = timm.list_pretrained(name)
            known = ", ".join(tags) if tags else "none"
            raise ByolTimmError(f"{name} has no pretrained tag {tag!r}. It has: {known}") from error
        near = ", ".join(closest_backbones(backbone)) or "see timm.list_models()"
        raise ByolTimmError(f"timm has no backbone {backbone!r}. Nearest names: {near}") from error
    except (AssertionError, KeyError, ValueError, OSError) as error:
        raise ByolTimmError(f"backbone {backbone!r} cannot be used ({one_line(error)})") from error


def _run(backbone: str, arguments: dict[str, Any], image_size: int | None) -> Fit:
    """Build the network on the meta device and send two images through it, in training mode."""
    size = "" if image_size is None else f" for {image_size}x{image_size} images"
    # timm's networks raise whatever their first line that does not fit happens to raise.
    try:
        encoder = _build_on_meta(arguments)
    except TypeError as error:
        raise ByolTimmError(_unknown_argument(backbone, arguments["model_name"], error)) from error
    except Exception as error:
        raise _DoesNotRun(f"{backbone} cannot be built{size} ({one_line(error)})") from error
    _, height, width = pretrained_cfg(encoder)["input_size"]
    if image_size is not None:
        height = width = image_size
    input_size = (arguments["in_chans"], height, width)
    try:
        with torch.no_grad():
            output = encoder(torch.empty(2, *input_size, device="meta"))
    except Exception as error:
        raise _DoesNotRun(
            f"{backbone} does not run on {height}x{width} images with {input_size[0]} channels ({one_line(error)})"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (2, encoder_width(encoder)):
        what = tuple(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
        raise _DoesNotRun(f"{backbone} returns {what} for an image, not one vector")
    if takes_argument(encoder, "out_features"):
        # timm takes the width of a language model's projector from the pretrained tag, which a saved encoder replaces.
        arguments = {"out_features": encoder_width(encoder), **arguments}
    return Fit(arguments, encoder, input_size)


def _build_on_meta(arguments: dict[str, Any]) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        # The network that is kept warns for itself; of one that is only tried, the error says it all.
        warnings.simplefilter("ignore")
        return timm.create_model(**arguments)


def _unknown_argument(backbone: str, architecture: str, error: TypeError) -> str:
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        return f"{backbone} does not take these arguments ({one_line(error)})"
    known = list(inspect.signature(type(_build_on_meta({"model_name": architecture})).__init__).parameters)
    return f"{backbone} takes no argument {match[1]!r}. {nearest(match[1], known)}"


def _advice(backbone: str, image_size: int | None, in_chans: int, backbone_kwargs: dict[str, Any]) -> str:
    """Say what to do about a backbone that does not run."""
    if backbone_kwargs and _places(backbone, image_size, in_chans, {}):
        given = ", ".join(f"{key}={value!r}" for key, value in backbone_kwargs.items())
        return f"It runs without {given}"
    if in_chans != 3 and _places(backbone, image_size, 3, backbone_kwargs):
        return "It takes images with 3 channels; use --in_chans 3, or another backbone"
    pooled = backbone.removesuffix("_enc")
    if pooled != backbone and timm.is_model(pooled):
        return f"Use {pooled}"
    ways = []
    if image_size is not None:
        own = timm.models.get_pretrained_cfg_value(backbone, "input_size") if timm.is_model(backbone) else None
        if own and own[-1] > image_size:
            ways.append(f"--image_size {own[-1]}")
        extra = small_image_kwargs(backbone, image_size=image_size, in_chans=in_chans, **backbone_kwargs)
        ways += [f"--backbone_kwargs {key}={value}" for key, value in extra.items()]
    return f"Use {', or '.join([*ways, 'another backbone'])}"


def _places(backbone: str, image_size: int | None, in_chans: int, backbone_kwargs: dict[str, Any]) -> int:
    """Return the number of places in the final map; 0 where the backbone does not take such images or arguments."""
    try:
        return math.prod(_fit(backbone, image_size, in_chans, backbone_kwargs).map_size)
    except ByolTimmError:
        return 0


def _letters_and_digits(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
