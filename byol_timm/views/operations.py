"""Image operations on batches, each image with its own parameters."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from .augmentation import JITTERS, Augmentation, omitted_operations

GRAY = (0.2989, 0.5870, 0.1140)
# On a CPU: pixels of one colour plane, and values of one group of views, that stay in caches and in reused memory.
TILE_PIXELS = 1 << 17
BLUR_BLOCK = 32


def _tile(planes: Tensor) -> int:
    """Return the number of images whose planes a CPU core works on at a time."""
    _, images, height, width = planes.shape
    return images if planes.device.type != "cpu" else min(images, max(1, TILE_PIXELS // (height * width)))


def _tiles(first: int, last: int, step: int) -> Iterator[slice]:
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


# Colours: in place, on [C, B, pixels] in 0..1, with one amount per image, [B, 1], and planes to work in, [7, B, pixels]

Operation = Callable[[Tensor, Tensor, Tensor], object]
SCRATCH_PLANES = 7


def jitter_operations(augmentation: Augmentation, channels: int) -> list[Operation | None]:
    """Return the four jitters in the order of `JITTERS`, None where one is off or needs RGB."""
    if augmentation.colors == "paper":
        operations: list[Operation] = [shift_brightness, contrast_by_channel, saturate_hsv, rotate_hue]
    else:
        operations = [scale_brightness, contrast_about_gray, saturate_from_gray, rotate_hue]
    omitted = omitted_operations(augmentation, channels)
    return [
        None if name in omitted or strength == 0 else operation
        for name, strength, operation in zip(JITTERS, augmentation.strengths, operations, strict=True)
    ]


def shift_brightness(planes: Tensor, shift: Tensor, scratch: Tensor) -> None:
    """Change brightness as the released code does: add an amount."""
    planes.add_(shift).clamp_(0, 1)


def scale_brightness(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Change brightness as torchvision does: multiply by a factor."""
    planes.mul_(factor).clamp_(0, 1)


def contrast_by_channel(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Change contrast as the released code does: scale the distance from each channel's mean."""
    means = planes.mean(2, keepdim=True)
    planes.mul_(factor).add_((1 - factor) * means).clamp_(0, 1)


def contrast_about_gray(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Change contrast as torchvision does: scale the distance from the mean of grey, or of all channels if not RGB."""
    means = planes.mean(2, keepdim=True)
    mean = grayscale(means) if len(planes) == 3 else means.mean(0, keepdim=True)
    planes.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturate_hsv(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Change saturation as the released code does: multiply HSV's saturation, at most to 1."""
    red, green, blue = planes
    high, low, share = scratch[:3]
    torch.maximum(torch.maximum(red, green, out=high), blue, out=high)
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    # At fixed hue and value every channel's distance from the value is proportional to the saturation.
    torch.sub(high, low, out=low).add_(1e-12)
    torch.minimum(torch.div(high, low, out=low), factor, out=share)
    torch.lerp(high, planes, share, out=planes)


def saturate_from_gray(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Change saturation as torchvision does: scale the distance from the grey image."""
    gray = grayscale(planes, out=scratch[0]).mul_(1 - factor)
    planes.mul_(factor).add_(gray).clamp_(0, 1)


def rotate_hue(planes: Tensor, turn: Tensor, scratch: Tensor) -> None:
    """Rotate HSV's hue by an amount in turns, at most 1/6 either way."""
    red, green, blue = planes
    high, low, middle, step = scratch[:4]
    slopes = scratch[4:]
    torch.maximum(green, blue, out=high)
    torch.minimum(green, blue, out=low)
    torch.maximum(torch.minimum(high, red, out=middle), low, out=middle)
    torch.maximum(high, red, out=high)
    torch.minimum(low, red, out=low)
    # On the hexagon of hues a channel stays at the largest value for a third of a turn, falls to the smallest within a
    # sixth, stays, and rises. Unclipped, it is at 2 c - middle; the other two's difference has the slope's sign.
    torch.sub(high, low, out=step).mul_(6 * turn)
    torch.sub(blue, green, out=slopes[0])
    torch.sub(red, blue, out=slopes[1])
    torch.sub(green, red, out=slopes[2])
    slopes.sign_().mul_(step).sub_(middle).add_(planes, alpha=2)
    torch.clamp(slopes, low, high, out=planes)


def grayscale(planes: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the luma [1, ...] of RGB planes [3, ...]."""
    red, green, blue = planes
    return torch.mul(red, GRAY[0], out=out).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])[None]


def solarize(planes: Tensor) -> Tensor:
    """Return the planes with values of one half and more inverted."""
    return torch.minimum(planes, 1 - planes)


# Blur

Padding = Literal["zeros", "reflect"]


def blur_taps(size: int) -> int:
    """Return the width of the blur's kernel for an image size: 23 at 224, 9 at 96, 3 at 32."""
    return 2 * int(size / 10 / 2) + 1


def blur(planes: Tensor, sigma: Tensor, taps: int, padding: Padding) -> Tensor:
    """Blur [C, B, H, W] in place by a Gaussian with one sigma per image, [B], in pixels; returns the planes."""
    radius = taps // 2
    channels, _, height, width = planes.shape
    offsets = torch.arange(-radius, radius + 1, device=planes.device, dtype=torch.float32)
    kernels = torch.exp(-(offsets**2) / (2 * sigma[:, None] ** 2))
    kernels /= kernels.sum(1, keepdim=True)
    down = _band_matrices(kernels, height, padding)
    across = down if width == height else _band_matrices(kernels, width, padding)
    # With the channels between rows and columns, one product a block serves all channels along either axis.
    tile = _tile(planes)
    buffers = torch.empty(2, tile, height, channels, width, device=planes.device)
    for part in _tiles(0, len(sigma), tile):
        # Beyond six sigma a float32 sum does not change.
        near = min(radius, math.ceil(6 * sigma[part].max())) if planes.device.type == "cpu" else radius
        pixels, halfway = buffers[:, : part.stop - part.start]
        pixels.copy_(planes[:, part].permute(1, 2, 0, 3))
        # Band matrices in blocks of rows: each block only meets the pixels that its rows reach.
        source, target, matrices = pixels.flatten(2), halfway.flatten(2), down[part]
        for rows, reach in _blocks(height, near):
            torch.bmm(matrices[:, rows, reach], source[:, reach], out=target[:, rows])
        source, target, matrices = halfway.flatten(1, 2), pixels.flatten(1, 2), across[part].mT
        for columns, reach in _blocks(width, near):
            torch.bmm(source[:, :, reach], matrices[:, reach, columns], out=target[:, :, columns])
        planes[:, part] = pixels.permute(2, 0, 1, 3)
    return planes


def _blocks(size: int, radius: int) -> list[tuple[slice, slice]]:
    starts = range(0, size, BLUR_BLOCK)
    return [(slice(s, s + BLUR_BLOCK), slice(max(0, s - radius), s + BLUR_BLOCK + radius)) for s in starts]


def _band_matrices(kernels: Tensor, size: int, padding: Padding) -> Tensor:
    """Return matrices [B, size, size] that correlate with kernels [B, taps]."""
    images, taps = kernels.shape
    radius = taps // 2
    padded = size + 2 * radius
    bands = torch.zeros(images, size, padded, device=kernels.device)
    bands.as_strided((images, size, taps), (size * padded, padded + 1, 1)).copy_(kernels[:, None])
    inside = bands[:, :, radius : radius + size]
    if padding == "reflect":
        inside[:, :, 1 : radius + 1] += bands[:, :, :radius].flip(2)
        inside[:, :, -radius - 1 : -1] += bands[:, :, -radius:].flip(2)
    return inside
