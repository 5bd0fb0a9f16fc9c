"""Crops of images, resized and flipped: one image at a time, or many of one size together."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentation import Augmentation, Interpolation
from .draws import Array, Crops


def crop(image: Tensor, crops: Crops, row: int, augmentation: Augmentation, size: Sequence[int]) -> Tensor:
    """Return crop number `row` of a uint8 image [C, H, W], resized to `size` (height, width) as PIL does."""
    if augmentation.rotate:
        angle = torch.tensor(crops.angle[row : row + 1], dtype=torch.float32)
        image = _rotate(image[None].float(), angle)[0].round_().to(torch.uint8)
    top, left, height, width = crops.box[row].tolist()
    part = image[:, top : top + height, left : left + width]
    if (height, width) != tuple(size):
        part = F.interpolate(part[None], tuple(size), mode=augmentation.interpolation, antialias=True)[0]
    return part.flip(-1) if crops.flip[row] else part


def crop_together(images: Tensor, crops: Crops, augmentation: Augmentation, out: Tensor) -> None:
    """Write the crops of uint8 [B, C, H, W] into [C, B, height, width] in 0..1, with two matrix products per image."""
    batch, channels, height, width = images.shape
    out_height, out_width = out.shape[2:]
    device, mode = images.device, augmentation.interpolation
    pixels = images.float()
    if augmentation.rotate:
        pixels = _rotate(pixels, to_device(crops.angle.astype(np.float32), device))
    top, left, rows, columns = to_device(crops.box.T.astype(np.float32), device)
    flip = to_device(crops.flip.astype(np.float32), device)
    down = _resize_matrices(top, rows, torch.zeros_like(flip), out_height, height, mode)
    across = _resize_matrices(left, columns, flip, out_width, width, mode)
    wide = torch.bmm(pixels.view(batch, channels * height, width), across.mT)
    wide = wide.view(batch, channels, height, out_width)
    for channel, plane in enumerate(out):
        torch.bmm(down, wide[:, channel], out=plane)
    out.div_(255).clamp_(0, 1)


def to_device(values: Array, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def _rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Rotate float [B, C, H, W] about the centre, with the border repeated outwards."""
    height, width = pixels.shape[-2:]
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    rows = [cos, -sin * (height / width), zero, sin * (width / height), cos, zero]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _resize_matrices(
    start: Tensor, length: Tensor, flip: Tensor, size: int, total: int, interpolation: Interpolation
) -> Tensor:
    """Return matrices [B, size, total] that cut `length` of `total` pixels from `start`, resize and flip them.

    Equal to `F.interpolate(..., antialias=True)` of the cut pixels.
    """
    start, length, flip = start[:, None, None], length[:, None, None], flip[:, None, None]
    scale = length / size
    places = torch.arange(size, device=start.device, dtype=torch.float32)[:, None] + 0.5
    centers = start + scale * (places + flip * (size - 2 * places))
    pixels = torch.arange(total, device=start.device, dtype=torch.float32) + 0.5
    distance = (pixels - centers).div_(scale.clamp(min=1)).abs_()
    inner = (1 - distance).clamp_(min=0)
    if interpolation == "bilinear":
        weights = inner
    else:
        # Twice Keys' cubic with a = -1/2: an outer part on 0..2, and what the inner piece adds to it on 0..1.
        outer = torch.sub(2, distance, out=distance).clamp_(min=0)
        weights = (outer - 1).mul_(outer).mul_(outer)
        weights.add_(torch.rsub(inner, 2, alpha=4).mul_(inner).mul_(inner))
    weights.mul_(((pixels > start) & (pixels < start + length)).float())
    return weights.div_(weights.sum(2, keepdim=True))
