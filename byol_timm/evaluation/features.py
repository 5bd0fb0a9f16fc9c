"""Features of images in memory and of whole data sets."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from ..data import Images, evaluation_batches
from ..encoders import encoder_width, normalization
from ..views import EvaluationTransform, crop_pct
from ..views import normalize as normalize_pixels
from .metrics import Array

Network = TypeVar("Network", bound=nn.Module)
RAW_PIXELS_SIZE = 32


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    batches: Tensor | Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    channels_last: bool = False,
    batch_size: int = 256,
    poll: Callable[[], None] | None = None,
) -> Tensor:
    """Return the features of images, float32 [N, width] on the CPU. The encoder runs in eval mode and is not changed.

    batches: uint8 [B, C, H, W] each, or all images in one tensor, which is cut into batches of `batch_size`.
    mean, std: of pixels in 0..1, per channel or one for all.
    device: of the encoder (default: that of its parameters).
    poll: called before every batch; may raise an error to interrupt.
    """
    device = torch.device(device) if device is not None else device_of(encoder)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = []
    with evaluating(encoder), torch.autocast(device.type, enabled=False):
        for pixels in batches.split(batch_size) if isinstance(batches, Tensor) else batches:
            if not len(pixels):
                continue
            if poll is not None:
                poll()
            images = normalize_pixels(pixels.to(device), mean, std).contiguous(memory_format=layout)
            features.append(encoder(images).float().cpu())
    return torch.cat(features) if features else torch.empty(0, encoder_width(encoder))


@dataclass(frozen=True)
class Preparation:
    """How images become the input of an encoder.

    transform: of an image to uint8 [C, H, W]. mean, std: of pixels in 0..1, per channel or one for all. workers: for
    data loading.
    """

    transform: EvaluationTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False
    workers: int | None = None

    @classmethod
    def of(cls, encoder: nn.Module, in_chans: int = 3, **settings: Any) -> "Preparation":
        """Take image size, crop, mean and std from what timm knows of the encoder. Small images are not cropped."""
        wanted = resolve_model_data_config(encoder)
        size = wanted["input_size"][1:]
        transform = EvaluationTransform(size, crop_pct=max(wanted["crop_pct"], crop_pct(min(size))))
        return cls(transform, *normalization(encoder, in_chans), **settings)

    @classmethod
    def square(cls, image_size: int, mean: Sequence[float], std: Sequence[float], **settings: Any) -> "Preparation":
        """Take square images of that size, of which small ones are not cropped."""
        transform = EvaluationTransform(image_size, crop_pct=crop_pct(image_size))
        return cls(transform, tuple(mean), tuple(std), **settings)


def dataset_features(
    network: nn.Module,
    images: Images,
    preparation: Preparation,
    *,
    indices: Array | Sequence[int] | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Array]:
    """Return outputs of the network, float32 [M, width] on the CPU, and the indices of the M images that are readable.

    indices: of the images to read (default: all).
    """
    read = [torch.empty(0, dtype=torch.int64)]

    def pixels() -> Iterator[Tensor]:
        batches = evaluation_batches(
            images, preparation.transform, batch_size=batch_size, workers=preparation.workers, indices=indices
        )
        for batch, good in batches:
            read.append(good)
            yield batch

    mean, std, channels_last = preparation.mean, preparation.std, preparation.channels_last
    features = extract_features(network, pixels(), mean=mean, std=std, channels_last=channels_last)
    return features, torch.cat(read).numpy()


class RawPixels(nn.Module):
    """Return images [N, C, H, W] as features, float32 [N, C * h * w], averaged to 32x32 if they are larger."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > RAW_PIXELS_SIZE:
            images = torch.cat([F.adaptive_avg_pool2d(part.float(), RAW_PIXELS_SIZE) for part in images.split(256)])
        return images.float().flatten(1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set the module to eval mode, and every part back to its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters, the CPU if it has none."""
    return next(module.parameters(), torch.empty(0)).device
