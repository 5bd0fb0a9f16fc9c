"""The two views of a batch on a CUDA device in at most five kernel launches and one upload, with Triton."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .augmentation import JITTERS, Augmentation
from .draws import CHANGE_DRAWS, CROP_DRAWS, Array, _uniforms, draw_changes, draw_crops
from .operations import blur_taps, jitter_operations
from .plain import _per_channel

# A view's row of the table. 0-3: its jitters in order (4 is none). 4-7: the amount of each jitter. 12: the place of
# contrast in the order, 4 if it has none. 13-16: the crop's top, left, height, width. 18, 19: cosine and sine.
GRAY, BLUR, SIGMA, SOLARIZE, CONTRAST = 8, 9, 10, 11, 12
BOX, FLIP, COS, SIN, COLUMNS = 13, 17, 18, 19, 20
NONE = 4
BLOCK = 1024


class TritonViews:
    """Compute the views of `TwoViews` on a CUDA device, with the same draws, up to 0.1 of 255 levels.

    Takes images with 1 or 3 channels. `dtype` and `channels_last` are those of the views. `out`: the views of the last
    batch, whose memory is used again.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        size: tuple[int, int],
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        self.augmentation, self.size, self.seed = augmentation, size, seed
        self.mean, self.std = mean, std
        self.dtype, self.channels_last = dtype, channels_last
        self._out: Tensor | None = None
        self._norm: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Return view 1 and view 2 of uint8 images [B, C, H, W] with int64 ordinals [B] on the CPU."""
        batch, channels, height, width = images.shape
        crops = draw_crops(self.augmentation, _uniforms(self.seed, ordinals, CROP_DRAWS), height, width)
        table = draw_table(self.augmentation, self.seed, ordinals, channels)
        radians = np.deg2rad(crops.angle)
        table[:, BOX:] = np.column_stack([crops.box, crops.flip, np.cos(radians), np.sin(radians)])
        rows = table_to(table, images.device)
        planes = torch.empty(2 * batch, channels, *self.size, device=images.device)
        support = 2 if self.augmentation.interpolation == "bicubic" else 1
        taps = [
            math.ceil(2 * support * max(1.0, side / out)) + 2
            for side, out in zip((height, width), self.size, strict=True)
        ]
        _crop[(2 * batch, channels, triton.cdiv(math.prod(self.size), BLOCK))](
            images.contiguous(),
            rows,
            planes,
            batch,
            height,
            width,
            *self.size,
            *taps,
            cubic=support == 2,
            rotated=self.augmentation.rotate > 0,
            block=BLOCK,
        )
        # Planes are in 0..1, those of view 1 first.
        values = channels * math.prod(self.size)
        return self._finish(planes, rows, batch, channels, (values, batch * values), 1.0)

    def agree(self, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
        """Return True if these views are the expected ones of the reference, within 0.1 level and their rounding."""
        level = 1 / 255 / torch.tensor(_per_channel(self.std, found[0].shape[1]), device=found[0].device).view(-1, 1, 1)
        allowed = (0.1 * level + torch.finfo(self.dtype).eps * view.abs() for view in expected)
        pairs = zip(found, expected, allowed, strict=True)
        return all(bool(((a.float() - b).abs() <= most).all()) for a, b, most in pairs)

    @torch.no_grad()
    def finish(self, crops: Tensor, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """Return view 1 and view 2 of the crops that `TwoViews.cut` made, uint8 [B, 2, C, height, width]."""
        batch, _, channels = crops.shape[:3]
        rows = table_to(draw_table(self.augmentation, self.seed, ordinals, channels), crops.device)
        values = channels * math.prod(self.size)
        return self._finish(crops.contiguous(), rows, batch, channels, (2 * values, values), 1 / 255)

    def _finish(
        self, source: Tensor, table: Tensor, batch: int, channels: int, strides: tuple[int, int], factor: float
    ) -> tuple[Tensor, Tensor]:
        """Launch everything after the crop; `strides` of an image and of a view, `factor` brings values to 0..1."""
        height, width = self.size
        rows, pixels, device = 2 * batch, height * width, source.device
        blocks = triton.cdiv(pixels, BLOCK)
        paper = self.augmentation.colors == "paper"
        norm, out = self._constants(channels, device), self._memory(rows, channels, device)
        layout = (1, channels) if self.channels_last else (pixels, 1)
        radius = blur_taps(min(height, width)) // 2 if max(self.augmentation.blur) > 0 else 0
        sums = torch.empty(rows, blocks, 3, device=device)
        half = torch.empty(2, *((rows, channels, height, width) if radius else (1,)), device=device)
        facts = dict(rgb=channels == 3, paper=paper, block=BLOCK)
        if self.augmentation.jitter > 0 and self.augmentation.contrast > 0:
            _sum[(rows, blocks)](source, table, sums, batch, pixels, blocks, *strides, factor, **facts)
        _color[(rows, blocks)](
            source,
            table,
            sums,
            norm,
            out,
            half[0],
            batch,
            pixels,
            blocks,
            *strides,
            factor,
            *layout,
            blurs=radius > 0,
            parts=triton.next_power_of_2(blocks),
            **facts,
        )
        if radius:
            shape, grid = (channels, width, height), (rows, channels, blocks)
            fixed = dict(zeros=paper, block=BLOCK)
            _blur[grid](half[0], table, norm, half[1], *shape, width, height, radius, *layout, last=False, **fixed)
            _blur[grid](half[1], table, norm, out, *shape, 1, width, radius, *layout, last=True, **fixed)
        views = out.permute(0, 3, 1, 2) if self.channels_last else out
        return views[:batch], views[batch:]

    def _constants(self, channels: int, device: torch.device) -> Tensor:
        """Return 1 / std and -mean / std on the device, [2, channels]; uploaded once."""
        if self._norm is None or self._norm.device != device:
            mean, std = (np.array(_per_channel(values, channels)) for values in (self.mean, self.std))
            self._norm = torch.from_numpy(np.stack([1 / std, -mean / std]).astype(np.float32)).to(device)
        return self._norm

    def _memory(self, rows: int, channels: int, device: torch.device) -> Tensor:
        """Return the memory of both views, the same again if the shape is."""
        shape = (rows, *self.size, channels) if self.channels_last else (rows, channels, *self.size)
        if self._out is None or self._out.shape != shape or self._out.device != device:
            self._out = torch.empty(shape, dtype=self.dtype, device=device)
        return self._out


def draw_table(augmentation: Augmentation, seed: int, ordinals: Tensor, channels: int) -> Array:
    """Return the table of draws, float32 [2 B, COLUMNS], of view 1 and then of view 2, without the crops."""
    changes = draw_changes(augmentation, _uniforms(seed, ordinals, CHANGE_DRAWS))
    asked = [operation is not None for operation in jitter_operations(augmentation, channels)]
    jitters = changes.jitter[:, None] & np.array(asked)[changes.order]
    order = np.where(jitters, changes.order, NONE)
    contrast = order == JITTERS.index("contrast")
    table = np.zeros((len(order), COLUMNS), dtype=np.float32)
    table[:, :4], table[:, 4:8] = order, changes.amount
    table[:, GRAY], table[:, BLUR], table[:, SIGMA] = changes.grayscale, changes.blur, changes.sigma
    table[:, SOLARIZE] = changes.solarize
    table[:, CONTRAST] = np.where(contrast.any(1), contrast.argmax(1), NONE)
    return table


def table_to(table: Array, device: torch.device) -> Tensor:
    """Upload a table of float32 without waiting for the device."""
    values = torch.from_numpy(table)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@triton.jit
def _jitter(r, g, b, kind, a, mean_r, mean_g, mean_b, paper: tl.constexpr):
    """Apply one jitter; all pixels of a program belong to one image, so they take the same branch."""
    if kind == 0:
        if paper:
            r, g, b = r + a, g + a, b + a
        else:
            r, g, b = r * a, g * a, b * a
        r, g, b = tl.clamp(r, 0.0, 1.0), tl.clamp(g, 0.0, 1.0), tl.clamp(b, 0.0, 1.0)
    elif kind == 1:
        r, g, b = r * a + (1 - a) * mean_r, g * a + (1 - a) * mean_g, b * a + (1 - a) * mean_b
        r, g, b = tl.clamp(r, 0.0, 1.0), tl.clamp(g, 0.0, 1.0), tl.clamp(b, 0.0, 1.0)
    elif kind == 2:
        if paper:
            high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
            share = tl.minimum(high / (high - low + 1e-12), a)
            r, g, b = high + share * (r - high), high + share * (g - high), high + share * (b - high)
        else:
            gray = (0.2989 * r + 0.5870 * g + 0.1140 * b) * (1 - a)
            r, g, b = r * a + gray, g * a + gray, b * a + gray
            r, g, b = tl.clamp(r, 0.0, 1.0), tl.clamp(g, 0.0, 1.0), tl.clamp(b, 0.0, 1.0)
    elif kind == 3:
        high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
        middle = tl.maximum(tl.minimum(tl.maximum(g, b), r), tl.minimum(g, b))
        step = (high - low) * (6 * a)
        slope_r = tl.where(b > g, step, tl.where(b < g, -step, 0.0))
        slope_g = tl.where(r > b, step, tl.where(r < b, -step, 0.0))
        slope_b = tl.where(g > r, step, tl.where(g < r, -step, 0.0))
        r = tl.minimum(tl.maximum(slope_r - middle + 2 * r, low), high)
        g = tl.minimum(tl.maximum(slope_g - middle + 2 * g, low), high)
        b = tl.minimum(tl.maximum(slope_b - middle + 2 * b, low), high)
    return r, g, b


@triton.jit
def _pixels(source, row, batch, place, inside, pixels, image_stride, view_stride, factor, rgb: tl.constexpr):
    """Load a block of pixels in 0..1 as three channels, which are the same one in grey images."""
    view, image = row // batch, row % batch
    start = source + image.to(tl.int64) * image_stride + view.to(tl.int64) * view_stride + place
    r = tl.load(start, inside, 0).to(tl.float32) * factor
    g, b = r, r
    if rgb:
        g = tl.load(start + pixels, inside, 0).to(tl.float32) * factor
        b = tl.load(start + 2 * pixels, inside, 0).to(tl.float32) * factor
    return r, g, b


@triton.jit
def _sum(source, table, sums, batch, pixels, blocks, image_stride, view_stride, factor, rgb: tl.constexpr,
         paper: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Sum the channels of a block of pixels as contrast finds them, into [2 B, blocks, 3]."""
    row, part = tl.program_id(0), tl.program_id(1)
    facts = table + row * 20
    slot = tl.load(facts + 12)
    if slot < 4:
        place = part * block + tl.arange(0, block)
        inside = place < pixels
        r, g, b = _pixels(source, row, batch, place, inside, pixels, image_stride, view_stride, factor, rgb)
        for turn in range(4):
            kind = tl.load(facts + turn).to(tl.int32)
            if (turn < slot) & (kind < 4):
                r, g, b = _jitter(r, g, b, kind, tl.load(facts + 4 + kind), 0.0, 0.0, 0.0, paper)
        target = sums + (row * blocks + part) * 3
        tl.store(target, tl.sum(tl.where(inside, r, 0.0)))
        tl.store(target + 1, tl.sum(tl.where(inside, g, 0.0)))
        tl.store(target + 2, tl.sum(tl.where(inside, b, 0.0)))


@triton.jit
def _color(source, table, sums, norm, out, half, batch, pixels, blocks, image_stride, view_stride, factor,
           channel_stride, pixel_stride, blurs: tl.constexpr, parts: tl.constexpr, rgb: tl.constexpr,
           paper: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Change the colours of a block of pixels; finish the views that are not blurred, hand the others to `_blur`."""
    row, part = tl.program_id(0), tl.program_id(1)
    facts = table + row * 20
    place = part * block + tl.arange(0, block)
    inside = place < pixels
    r, g, b = _pixels(source, row, batch, place, inside, pixels, image_stride, view_stride, factor, rgb)
    mean_r, mean_g, mean_b = 0.0, 0.0, 0.0
    if tl.load(facts + 12) < 4:
        every = tl.arange(0, parts)
        start = sums + row * blocks * 3 + every * 3
        mean_r = tl.sum(tl.load(start, every < blocks, 0.0)) / pixels
        mean_g = tl.sum(tl.load(start + 1, every < blocks, 0.0)) / pixels
        mean_b = tl.sum(tl.load(start + 2, every < blocks, 0.0)) / pixels
        if rgb and not paper:
            gray = 0.2989 * mean_r + 0.5870 * mean_g + 0.1140 * mean_b
            mean_r, mean_g, mean_b = gray, gray, gray
    for turn in range(4):
        kind = tl.load(facts + turn).to(tl.int32)
        if kind < 4:
            r, g, b = _jitter(r, g, b, kind, tl.load(facts + 4 + kind), mean_r, mean_g, mean_b, paper)
    if rgb:
        if tl.load(facts + 8) > 0:
            gray = 0.2989 * r + 0.5870 * g + 0.1140 * b
            r, g, b = gray, gray, gray
    channels: tl.constexpr = 3 if rgb else 1
    start = row.to(tl.int64) * channels * pixels
    blurred = False
    if blurs:
        blurred = tl.load(facts + 9) > 0
    if blurred:
        tl.store(half + start + place, r, inside)
        if rgb:
            tl.store(half + start + pixels + place, g, inside)
            tl.store(half + start + 2 * pixels + place, b, inside)
    else:
        if tl.load(facts + 11) > 0:
            r, g, b = tl.minimum(r, 1 - r), tl.minimum(g, 1 - g), tl.minimum(b, 1 - b)
        target = out + start + place * pixel_stride
        tl.store(target, tl.clamp(r, 0.0, 1.0) * tl.load(norm) + tl.load(norm + channels), inside)
        if rgb:
            g = tl.clamp(g, 0.0, 1.0) * tl.load(norm + 1) + tl.load(norm + 4)
            b = tl.clamp(b, 0.0, 1.0) * tl.load(norm + 2) + tl.load(norm + 5)
            tl.store(target + channel_stride, g, inside)
            tl.store(target + 2 * channel_stride, b, inside)


@triton.jit
def _blur(source, table, norm, out, channels, width, height, step, length, radius, channel_stride, pixel_stride,
          last: tl.constexpr, zeros: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Blur along the axis whose neighbours lie `step` apart and that is `length` long; finish the view if `last`."""
    row, channel, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    facts = table + row * 20
    if tl.load(facts + 9) > 0:
        sigma = tl.load(facts + 10)
        pixels = width * height
        place = part * block + tl.arange(0, block)
        inside = place < pixels
        along = (place // step) % length
        start = (row * channels + channel).to(tl.int64) * pixels
        total = tl.zeros([block], tl.float32)
        weights = 0.0
        for offset in range(-radius, radius + 1):
            weight = tl.exp(-(offset * offset) / (2 * sigma * sigma))
            at = along + offset
            if zeros:
                pixel = tl.load(source + start + place + offset * step, inside & (at >= 0) & (at < length), 0.0)
            else:
                at = tl.abs(at)
                at = tl.where(at < length, at, 2 * (length - 1) - at)
                pixel = tl.load(source + start + place + (at - along) * step, inside, 0.0)
            total += weight * pixel
            weights += weight
        total = total / weights
        if last:
            if tl.load(facts + 11) > 0:
                total = tl.minimum(total, 1 - total)
            total = tl.clamp(total, 0.0, 1.0) * tl.load(norm + channel) + tl.load(norm + channels + channel)
            target = out + row.to(tl.int64) * channels * pixels + place * pixel_stride + channel * channel_stride
            tl.store(target, total, inside)
        else:
            tl.store(out + start + place, total, inside)


@triton.jit
def _weight(distance, cubic: tl.constexpr):
    """Keys' cubic with a = -1/2, or a triangle, at a distance in pixels of the coarser grid."""
    inner = tl.maximum(1 - distance, 0.0)
    weight = inner
    if cubic:
        outer = tl.maximum(2 - distance, 0.0)
        weight = (outer - 1) * outer * outer + (2 - 4 * inner) * inner * inner
    return weight


@triton.jit
def _turned(start, y, x, cos, sin, height, width, inside):
    """Load pixels (y, x) of the image turned about its centre, its border repeated outwards."""
    down, across = y + 0.5 - height * 0.5, x + 0.5 - width * 0.5
    at_x = tl.minimum(tl.maximum(cos * across - sin * down + width * 0.5 - 0.5, 0.0), width - 1.0)
    at_y = tl.minimum(tl.maximum(sin * across + cos * down + height * 0.5 - 0.5, 0.0), height - 1.0)
    left, top = at_x.to(tl.int32), at_y.to(tl.int32)
    right, bottom = tl.minimum(left + 1, width - 1), tl.minimum(top + 1, height - 1)
    share_x, share_y = at_x - left, at_y - top
    upper = tl.load(start + top * width + left, inside, 0).to(tl.float32) * (1 - share_x)
    upper += tl.load(start + top * width + right, inside, 0).to(tl.float32) * share_x
    lower = tl.load(start + bottom * width + left, inside, 0).to(tl.float32) * (1 - share_x)
    lower += tl.load(start + bottom * width + right, inside, 0).to(tl.float32) * share_x
    return upper * (1 - share_y) + lower * share_y


@triton.jit
def _crop(images, table, out, batch, height, width, out_height, out_width, taps_y, taps_x, cubic: tl.constexpr,
          rotated: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Cut a block of pixels of one channel of a crop from its image, resized with antialiasing, into 0..1."""
    row, channel, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    facts = table + row * 20
    top, left = tl.load(facts + 13), tl.load(facts + 14)
    rows, columns = tl.load(facts + 15), tl.load(facts + 16)
    place = part * block + tl.arange(0, block)
    inside = place < out_height * out_width
    y, x = (place // out_width) + 0.5, (place % out_width) + 0.5
    x += tl.load(facts + 17) * (out_width - 2 * x)
    scale_y, scale_x = rows / out_height, columns / out_width
    center_y, center_x = top + scale_y * y, left + scale_x * x
    wide_y, wide_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    support: tl.constexpr = 2 if cubic else 1
    first_y = tl.floor(center_y - support * wide_y - 0.5)
    first_x = tl.floor(center_x - support * wide_x - 0.5)
    start = images + ((row % batch) * tl.num_programs(1) + channel).to(tl.int64) * height * width
    total = tl.zeros([block], tl.float32)
    weights = tl.zeros([block], tl.float32)
    for down in range(taps_y):
        at_y = first_y + down
        weight_y = _weight(tl.abs(at_y + 0.5 - center_y) / wide_y, cubic)
        there_y = inside & (at_y >= top) & (at_y < top + rows)
        for across in range(taps_x):
            at_x = first_x + across
            there = there_y & (at_x >= left) & (at_x < left + columns)
            weight = tl.where(there, weight_y * _weight(tl.abs(at_x + 0.5 - center_x) / wide_x, cubic), 0.0)
            if rotated:
                pixel = _turned(start, at_y, at_x, tl.load(facts + 18), tl.load(facts + 19), height, width, there)
            else:
                pixel = tl.load(start + at_y.to(tl.int32) * width + at_x.to(tl.int32), there, 0).to(tl.float32)
            total += weight * pixel
            weights += weight
    total = tl.clamp(total / tl.where(inside, weights, 1.0) / 255, 0.0, 1.0)
    tl.store(out + (row * tl.num_programs(1) + channel).to(tl.int64) * out_height * out_width + place, total, inside)
