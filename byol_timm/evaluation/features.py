"""Features of whole data sets."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..config import EvaluationConfig, check_seed, data_settings
from ..data import Images, Splits, evaluation_batches, open_dataset, warn_of_few_levels
from ..encoders import create_encoder, encoder_width, has_convolutions, normalization
from ..errors import ByolTimmError
from ..views import EvaluationTransform, crop_pct
from ..views import normalize as normalize_pixels
from .metrics import Array

Network = TypeVar("Network", bound=nn.Module)
RAW_PIXELS_SIDE = 32


# Features


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
    """Representations of images, float32 [N, width] on the CPU, of the encoder in eval mode; it is left as it was.

    batches: uint8 [B, C, H, W] each, or all images in one tensor, cut into batches of `batch_size`.
    mean, std: of pixels in 0..1, per channel or one for all.
    device: where the encoder is; None: asked from its parameters.
    poll: called before every batch, to interrupt by raising.
    """
    device = torch.device(device) if device is not None else _device(encoder)
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
    """How images become the input of an encoder, and how they are read.

    transform: of an image to uint8 [C, H, W]. mean, std: of pixels in 0..1, per channel or one for all.
    workers: processes that decode; memory_limit: bytes of images held decoded during training; as in `data`.
    poll: called before every batch, to interrupt by raising.
    """

    transform: EvaluationTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False
    workers: int | None = None
    memory_limit: float = 2 * 2**30
    poll: Callable[[], None] | None = None

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @classmethod
    def of(cls, encoder: nn.Module, in_chans: int = 3, **settings: Any) -> "Preparation":
        """What timm knows of the encoder's input: size, crop (small images are left whole), mean and std."""
        wanted = resolve_model_data_config(encoder)
        size = wanted["input_size"][1:]
        transform = EvaluationTransform(size, crop_pct=max(wanted["crop_pct"], crop_pct(min(size))))
        return cls(transform, *normalization(encoder, in_chans), **settings)


def open_evaluation(config: EvaluationConfig, *, labelled: bool = True) -> tuple[nn.Module, Splits, Preparation]:
    """The encoder that the settings name, on a GPU where there is one, its images, and how they become its input.

    labelled: raise `ByolTimmError` for images of which none are held out with a label; else all images of the split are
        in `train`, with or without labels.
    """
    if config.workers is not None and config.workers < 0:
        raise ByolTimmError(f"--workers must not be negative ({config.workers})")
    check_seed(config.seed)
    # What a bare timm name gets without --pretrained.
    torch.manual_seed(config.seed)
    encoder = create_encoder(
        config.encoder, image_size=config.image_size, in_chans=config.in_chans, pretrained=config.pretrained
    )
    channels = resolve_model_data_config(encoder)["input_size"][0]
    splits = open_dataset(**data_settings(config), in_chans=channels, split_seed=config.split_seed, hold_out=labelled)
    warn_of_few_levels(splits.train)
    if labelled and splits.test is None:
        raise ByolTimmError(f"{config.dataset} has no labels to evaluate with. Name their column with --label_column")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    preparation = Preparation.of(encoder, channels, channels_last=has_convolutions(encoder), workers=config.workers)
    return encoder.to(device).eval(), splits, preparation


def dataset_features(
    network: nn.Module,
    images: Images,
    preparation: Preparation,
    *,
    indices: Array | Sequence[int] | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Array]:
    """Outputs of the network for images, float32 [M, width] on the CPU, and the indices of those M that can be read."""
    read = [torch.empty(0, dtype=torch.int64)]

    def pixels() -> Iterator[Tensor]:
        batches = evaluation_batches(
            images, preparation.transform, batch_size=batch_size, workers=preparation.workers, indices=indices
        )
        for batch, good in batches:
            read.append(good)
            yield batch

    features = extract_features(
        network,
        pixels(),
        mean=preparation.mean,
        std=preparation.std,
        channels_last=preparation.channels_last,
        poll=preparation.poll,
    )
    return features, torch.cat(read).numpy()


def raw_pixels(images: Tensor) -> Tensor:
    """Images [N, C, H, W] as their own representation, float32 [N, C * h * w]: averaged to 32x32 where larger."""
    if images.shape[-1] > RAW_PIXELS_SIDE:
        images = torch.cat([F.adaptive_avg_pool2d(part.float(), RAW_PIXELS_SIDE) for part in images.split(256)])
    return images.float().flatten(1)


class RawPixels(nn.Module):
    """`raw_pixels` in the place of an encoder, to compare encoders with."""

    def forward(self, images: Tensor) -> Tensor:
        return raw_pixels(images)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; afterwards every part is in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _device(module: nn.Module) -> torch.device:
    # `RawPixels` has no parameters.
    return next(module.parameters(), torch.empty(0)).device
