"""The transform of evaluation."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ByolTimmError

# Evaluation


class EvaluationTransform:
    """Turn one uint8 image [C, H, W] of any size into uint8 [C, height, width]: resize (bicubic), then centre crop.

    `crop_pct` is the share of the resized image's shorter side that the crop keeps (224 / 256 = 0.875 in the paper).
    An image that already has the right size is not changed.
    """

    def __init__(self, image_size: int | tuple[int, int], *, crop_pct: float = 0.875) -> None:
        self.size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.crop_pct = crop_pct

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        sides = np.array(image.shape[-2:])
        if tuple(sides) == self.size:
            return image
        resized = np.floor(sides * (np.array(self.size) / sides).max() / self.crop_pct + 1e-6).astype(int).tolist()
        image = F.interpolate(image[None], resized, mode="bicubic", antialias=True)[0]
        top, left = (round((r - s) / 2) for r, s in zip(resized, self.size, strict=True))
        return image[:, top : top + self.size[0], left : left + self.size[1]].contiguous()


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ByolTimmError(f"images have {channels} channels, mean or std {len(values)}. Give one number per channel")
    return tuple(values) if len(values) == channels else (values[0],) * channels


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return float32 (pixel / 255 - mean) / std of uint8 images [B, C, H, W]; mean and std per channel or for all."""
    shift, scale = (torch.tensor(_per_channel(v, images.shape[1]), device=images.device) for v in (mean, std))
    return (images.float() / 255).sub_(shift[:, None, None]).div_(scale[:, None, None])


def crop_pct(image_size: int) -> float:
    """Return the share of an image that evaluation sees: all of a small one, else the paper's 224 of 256 pixels."""
    return 1.0 if image_size <= 64 else 0.875
