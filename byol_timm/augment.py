"""Two random views of every image of a batch, drawn and computed per image on the batch's own device."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .errors import ByolTimmError

Colors = Literal["paper", "torchvision"]
Interpolation = Literal["bicubic", "bilinear"]
Array = NDArray[Any]
Views = tuple[Tensor, Tensor]

JITTERS = ("brightness", "contrast", "saturation", "hue")
GRAY = (0.2989, 0.5870, 0.1140)
CROP_TRIES = 10
# On a CPU: pixels of one colour plane, and values of one group of views, that stay in caches and in reused memory.
TILE_PIXELS = 1 << 17
GROUP_VALUES = 1 << 21
# On a CPU, batched matrix products resize images up to this side faster than one call an image does.
MATMUL_RESIZE_LIMIT = 48
BLUR_BLOCK = 32


@dataclass(frozen=True)
class Augmentation:
    """The distribution of views: probabilities, ranges and the family of colour operations (paper, appendix B).

    `crop_scale` is a share of the image's area, `rotate` half the range in degrees; `brightness`, `contrast` and
    `saturation` are half-ranges around no change, `hue` one in turns (at most 1/6). `blur` and `solarize` are the
    probabilities of view 1 and view 2, `blur_sigma` is in pixels.
    `colors="paper"` computes as the authors' code does: additive brightness, contrast about each channel's mean,
    saturation in HSV, zero-padded blur; `"torchvision"` as most PyTorch code does: multiplicative brightness, contrast
    about the mean of grey, saturation as a blend with grey, reflect-padded blur. Hue is the same in both.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    rotate: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    colors: Colors = "paper"
    grayscale: float = 0.2
    blur: tuple[float, float] = (1.0, 0.1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float] = (0.0, 0.2)

    def __post_init__(self) -> None:
        for name, p in (("flip", self.flip), ("jitter", self.jitter), ("grayscale", self.grayscale)):
            _check(0 <= p <= 1, name, p, "give a probability, 0 to 1")
        for name, pair in (("blur", self.blur), ("solarize", self.solarize)):
            _check(all(0 <= p <= 1 for p in pair), name, pair, "give two probabilities, of view 1 and view 2")
        for name, strength in zip(JITTERS[:3], self.strengths, strict=False):
            _check(0 <= strength <= 1, name, strength, "give a half-range, 0 to 1")
        _check(0 <= self.hue <= 1 / 6, "hue", self.hue, "give at most 1/6 of a turn")
        _check(0 <= self.rotate <= 180, "rotate", self.rotate, "give degrees, 0 to 180")
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "give two shares of the area, the smaller first")
        for name, (low, high) in (("crop_ratio", self.crop_ratio), ("blur_sigma", self.blur_sigma)):
            _check(0 < low <= high, name, (low, high), "give two positive numbers, the smaller first")
        _check(
            self.interpolation in get_args(Interpolation),
            "interpolation",
            self.interpolation,
            "give bicubic or bilinear",
        )
        _check(self.colors in get_args(Colors), "colors", self.colors, "give paper or torchvision")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The half-ranges of the jitters, in the order of `JITTERS`."""
        return self.brightness, self.contrast, self.saturation, self.hue


def _check(valid: bool, name: str, value: object, advice: str) -> None:
    if not valid:
        raise ByolTimmError(f"augmentation {name} cannot be {value!r}. {advice}")


_PAPER = Augmentation()
AUGMENTATIONS: dict[str, Augmentation] = {
    # Grill et al. 2020, table 6, with the colour operations of their released code.
    "paper": _PAPER,
    # The same table with torchvision's colour operations, as PyTorch reproductions run it.
    "torchvision": replace(_PAPER, colors="torchvision"),
    # Up to 64 px: without blur, as the CIFAR recipes of solo-learn and lightly.
    "small": replace(_PAPER, blur=(0.0, 0.0)),
    # Written characters: nothing that turns one into another, so no flips and no small crops; they have no colour.
    "digits": replace(
        _PAPER,
        crop_scale=(0.75, 1.0),
        rotate=6.0,
        flip=0.0,
        jitter=0.0,
        saturation=0.0,
        hue=0.0,
        grayscale=0.0,
        blur=(0.0, 0.0),
        solarize=(0.0, 0.0),
    ),
}


def omitted_operations(augmentation: Augmentation, channels: int) -> tuple[str, ...]:
    """Names of the asked-for operations that images of that many channels cannot have, for a notice."""
    if channels == 3:
        return ()
    asked = {"saturation": augmentation.saturation, "hue": augmentation.hue, "grayscale": augmentation.grayscale}
    return tuple(name for name, value in asked.items() if value > 0)


class TwoViews:
    """Turns uint8 images into two normalised float32 views, every parameter drawn per image and per view.

    The draws are a pure function of (`seed`, ordinal, view, parameter): batch, order, worker and device do not matter.
    `image_size` is the side of the views or (height, width); `mean` and `std` (of pixels in 0..1) have one entry per
    channel, or one for all.

    On a CPU, images above 48 pixels are resized in uint8 as PIL does, rounded between the two passes; smaller ones, and
    all on other devices, in float32. torch.compile takes the views as they are: their numbers are drawn by numpy.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        image_size: int | tuple[int, int],
        *,
        seed: int = 0,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.augmentation = augmentation
        self.height, self.width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.seed = seed
        self.mean, self.std = tuple(mean), tuple(std)

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, images: Tensor, ordinals: Tensor, *, out: Views | None = None) -> Views:
        """View 1 and view 2 (float32 [B, C, height, width]) of uint8 images [B, C, H, W] with int64 ordinals [B].

        The ordinals stay on the CPU. `out` takes the views of an earlier batch to write into: fresh memory costs a CPU
        a tenth of the time and more.
        """
        height, width = images.shape[-2:]
        one_by_one = images.device.type == "cpu" and max(self.height, self.width, height, width) > MATMUL_RESIZE_LIMIT
        if one_by_one:
            # What torch's uint8 kernels resize fastest.
            images = images.contiguous(memory_format=torch.channels_last)
        crops = draw_crops(self.augmentation, _uniforms(self.seed, ordinals, CROP_DRAWS), height, width)

        def cut(rows: Array, planes: Tensor) -> None:
            sources = rows % len(images)
            if one_by_one:
                for place, (source, row) in enumerate(zip(sources.tolist(), rows.tolist(), strict=True)):
                    planes[:, place] = self._crop(images[source], crops, row)
                planes.div_(255)
            else:
                for part in _tiles(0, len(rows), _tile(planes)):
                    selected = images.index_select(0, _to(sources[part], images.device))
                    self._crop_together(selected, crops.take(rows[part]), planes[:, part])

        return self._views(cut, images.shape[1], ordinals, images.device, out)

    @torch.compiler.disable
    @torch.no_grad()
    def cut(self, image: Tensor, ordinal: int) -> Tensor:
        """Both crops, resized and flipped (uint8 [2, C, height, width]), of one uint8 image [C, H, W], for loaders.

        `finish` turns a batch of them into the views that calling the object on the images gives, up to rounding.
        """
        channels, height, width = image.shape
        crops = draw_crops(self.augmentation, _uniforms(self.seed, [ordinal], CROP_DRAWS), height, width)
        both = torch.empty(2, channels, self.height, self.width, dtype=torch.uint8)
        for view, pixels in enumerate(both.numpy()):
            # numpy brings channels out of their turns twice as fast as torch does.
            np.copyto(pixels, self._crop(image, crops, view).numpy())
        return both

    def reduction(self, ordinal: int, height: int, width: int) -> int:
        """How many times smaller, 1, 2, 4 or 8, an image of that size may be with both crops twice the views' size.

        `cut` makes nearly the same crops of an image that was decoded so many times smaller.
        """
        box = draw_crops(self.augmentation, _uniforms(self.seed, [ordinal], CROP_DRAWS), height, width).box
        times = int((box[:, 2:] // (2 * self.height, 2 * self.width)).min())
        return next(power for power in (8, 4, 2, 1) if power <= max(1, times))

    @torch.compiler.disable
    @torch.no_grad()
    def finish(self, crops: Tensor, ordinals: Tensor, *, out: Views | None = None) -> Views:
        """View 1 and view 2 (float32 [B, C, height, width]) of what `cut` made, uint8 [B, 2, C, height, width]."""

        def pick(rows: Array, planes: Tensor) -> None:
            view, image = np.divmod(rows, len(crops))
            selected = crops.flatten(0, 1).index_select(0, _to(image * 2 + view, crops.device))
            planes.copy_(selected.transpose(0, 1)).div_(255)

        return self._views(pick, crops.shape[2], ordinals, crops.device, out)

    def _crop(self, image: Tensor, crops: "Crops", row: int) -> Tensor:
        if self.augmentation.rotate:
            angle = torch.tensor(crops.angle[row : row + 1], dtype=torch.float32)
            image = _rotate(image[None].float(), angle)[0].round_().to(torch.uint8)
        top, left, height, width = crops.box[row].tolist()
        crop = image[:, top : top + height, left : left + width]
        if (height, width) != (self.height, self.width):
            size, mode = (self.height, self.width), self.augmentation.interpolation
            crop = F.interpolate(crop[None], size, mode=mode, antialias=True)[0]
        return crop.flip(-1) if crops.flip[row] else crop

    def _crop_together(self, images: Tensor, crops: "Crops", out: Tensor) -> None:
        """The crops as two matrix products per image, into [C, B, height, width] in 0..1."""
        batch, channels, height, width = images.shape
        device, mode = images.device, self.augmentation.interpolation
        pixels = images.float()
        if self.augmentation.rotate:
            pixels = _rotate(pixels, _to(crops.angle.astype(np.float32), device))
        top, left, rows, columns = _to(crops.box.T.astype(np.float32), device)
        flip = _to(crops.flip.astype(np.float32), device)
        down = _resize_matrices(top, rows, torch.zeros_like(flip), self.height, height, mode)
        across = _resize_matrices(left, columns, flip, self.width, width, mode)
        wide = torch.bmm(pixels.view(batch, channels * height, width), across.mT)
        wide = wide.view(batch, channels, height, self.width)
        for channel, plane in enumerate(out):
            torch.bmm(down, wide[:, channel], out=plane)
        out.div_(255).clamp_(0, 1)

    def _views(
        self,
        cut: Callable[[Array, Tensor], None],
        channels: int,
        ordinals: Tensor,
        device: torch.device,
        views: Views | None,
    ) -> Views:
        """Everything after the crop; `cut` gets rows (0..B-1 of view 1, B..2B-1 of view 2) and where to put them."""
        changes = draw_changes(self.augmentation, _uniforms(self.seed, ordinals, CHANGE_DRAWS))
        means, stds = _per_channel(self.mean, channels), _per_channel(self.std, channels)
        batch, size = len(ordinals), (self.height, self.width)
        group = batch if device.type != "cpu" else min(batch, max(1, GROUP_VALUES // (channels * math.prod(size))))
        pool = torch.empty(channels * group * math.prod(size), device=device)
        scratch = torch.empty(SCRATCH_PLANES, _tile(pool.view(channels, group, *size)), math.prod(size), device=device)
        shape = (batch, channels, *size)
        if views is None or views[0].shape != shape:
            views = torch.empty(shape, device=device), torch.empty(shape, device=device)
        for first in [*range(0, batch, group), *range(batch, 2 * batch, group)]:
            view, start = divmod(first, batch)
            target = views[view][start : start + group]
            members = np.arange(first, first + len(target))
            # Equal orders side by side: an operation then works on stretches of the group, in place.
            members = members[np.argsort(changes.order_key()[members], kind="stable")]
            planes = pool[: target.numel()].view(channels, len(target), *size)
            with torch.autocast(device.type, enabled=False):
                cut(members, planes)
                self._change(planes, changes.take(members), scratch)
            for plane, mean, std in zip(planes, means, stds, strict=True):
                torch.add(torch.tensor(-mean / std), plane, alpha=1 / std, out=plane)
            places = np.argsort(members)[:, None] + np.arange(channels) * len(target)
            torch.index_select(planes.flatten(0, 1), 0, _to(places.ravel(), device), out=target.flatten(0, 1))
        return views

    def _change(self, planes: Tensor, changes: "Changes", scratch: Tensor) -> None:
        """Colour jitter, grayscale, blur and solarize, in place, of [C, B, height, width] in 0..1."""
        device, tile = planes.device, _tile(planes)
        flat = planes.flatten(2)
        jitters = jitter_operations(self.augmentation, len(planes))
        amounts = _to(changes.amount.T.astype(np.float32), device)[:, :, None].unbind()
        jittered = int(changes.jitter.sum())
        for slot in range(len(JITTERS)):
            kinds = changes.order[:jittered, slot]
            bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), jittered]
            for first, last in pairwise(bounds):
                if first < last and (operation := jitters[kinds[first]]) is not None:
                    for part in _tiles(first, last, tile):
                        operation(flat[:, part], amounts[kinds[first]][part], scratch[:, : part.stop - part.start])
        if len(planes) == 3 and len(gray := np.flatnonzero(changes.grayscale)):
            _put(flat, gray, grayscale(_take(flat, gray)).expand(3, -1, -1))
        if len(rows := np.flatnonzero(changes.blur)) and (taps := blur_taps(min(self.height, self.width))) > 1:
            sigma = _to(changes.sigma[rows].astype(np.float32), device)
            padding: Padding = "zeros" if self.augmentation.colors == "paper" else "reflect"
            if len(rows) == len(changes.blur):
                blur(planes, sigma, taps, padding)
            else:
                _put(planes, rows, blur(_take(planes, rows), sigma, taps, padding))
        if len(inverted := np.flatnonzero(changes.solarize)):
            _put(flat, inverted, solarize(_take(flat, inverted)))
        planes.clamp_(0, 1)


def _to(values: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _take(planes: Tensor, images: Array) -> Tensor:
    return planes.index_select(1, _to(images, planes.device))


def _put(planes: Tensor, images: Array, values: Tensor) -> None:
    if planes.device.type == "cpu":
        # `index_copy_` moves one number at a time there.
        for image, value in zip(images.tolist(), values.unbind(1), strict=True):
            planes[:, image] = value
    else:
        planes.index_copy_(1, _to(images, planes.device), values)


def _tile(planes: Tensor) -> int:
    """Number of images whose planes a CPU core works on at a time."""
    _, images, height, width = planes.shape
    return images if planes.device.type != "cpu" else min(images, max(1, TILE_PIXELS // (height * width)))


def _tiles(first: int, last: int, step: int) -> Iterator[slice]:
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


# Random draws

# Numbers of the draws of one view; a change of them changes every run.
CROP_DRAWS = range(0, 2 * CROP_TRIES + 4)
CHANGE_DRAWS = range(CROP_DRAWS.stop, CROP_DRAWS.stop + 2 * len(JITTERS) + 5)


class Crops(NamedTuple):
    """Drawn crops of some rows: `box` [rows, 4] is (top, left, height, width), `angle` is in degrees."""

    box: Array
    flip: Array
    angle: Array

    def take(self, rows: Array) -> "Crops":
        return Crops(*(values[rows] for values in self))


class Changes(NamedTuple):
    """Drawn changes of some rows: `order` and `amount` [rows, 4] are the jitters' order and, by jitter, strength."""

    jitter: Array
    order: Array
    amount: Array
    grayscale: Array
    blur: Array
    sigma: Array
    solarize: Array

    def order_key(self) -> Array:
        """A number per row, equal where the jitters come in the same order, largest where there are none."""
        return np.where(self.jitter, self.order @ (64, 16, 4, 1), 256)

    def take(self, rows: Array) -> "Changes":
        return Changes(*(values[rows] for values in self))


def _mix(bits: Array) -> Array:
    """The output function of splitmix64 (Steele et al. 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@cache
def _counters(parameters: range) -> NDArray[np.uint64]:
    """Increments of splitmix64's state for the draws of both views, [2, 1, parameters]."""
    views = [np.arange(parameters.start, parameters.stop, dtype=np.uint64) * 2 + view for view in (1, 2)]
    return np.stack(views)[:, None] * np.uint64(0x9E3779B97F4A7C15)


@cache
def _seed_bits(seed: int) -> NDArray[np.uint64]:
    return _mix(np.array([seed % 2**64], dtype=np.uint64))


def _uniforms(seed: int, ordinals: Tensor | Sequence[int], parameters: range) -> Array:
    """Uniform numbers in [0, 1), [2 B, parameters]: the rows of view 1, then those of view 2."""
    keys = np.asarray(ordinals.cpu() if isinstance(ordinals, Tensor) else ordinals, dtype=np.int64).view(np.uint64)
    bits = _mix(_mix(keys ^ _seed_bits(seed))[:, None] + _counters(parameters))
    return (bits.reshape(-1, len(parameters)) >> np.uint64(11)) * 2.0**-53


def _between(uniforms: Array, low: float, high: float) -> Array:
    return low + (high - low) * uniforms


def draw_crops(augmentation: Augmentation, uniforms: Array, height: int, width: int) -> Crops:
    """Boxes inside an image of that size, as torchvision's RandomResizedCrop draws them, flips and rotations."""
    tries, rest = uniforms[:, : 2 * CROP_TRIES].reshape(-1, CROP_TRIES, 2), uniforms[:, 2 * CROP_TRIES :]
    low, high = augmentation.crop_ratio
    sides = np.sqrt(height * width * _between(tries[..., 0], *augmentation.crop_scale))
    stretch = np.exp(_between(tries[..., 1], math.log(low) / 2, math.log(high) / 2))
    heights, widths = np.rint(sides / stretch), np.rint(sides * stretch)
    inside = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first, everyone = inside.argmax(axis=1), np.arange(len(inside))
    box = np.empty((len(inside), 4), dtype=np.int64)
    box[:, 2], box[:, 3] = heights[everyone, first], widths[everyone, first]
    free = np.array((height + 1, width + 1)) - box[:, 2:]
    box[:, :2] = rest[:, :2] * free
    if not (fits := inside[everyone, first]).all():
        # The whole image, or as much of its middle as the ratios allow.
        rows, columns = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
        box[~fits] = (height - rows) // 2, (width - columns) // 2, rows, columns
    angle = _between(rest[:, 3], -augmentation.rotate, augmentation.rotate)
    return Crops(box, rest[:, 2] < augmentation.flip, angle)


def draw_changes(augmentation: Augmentation, uniforms: Array) -> Changes:
    """Everything after the crop: which operations, in which order, how strong. The rows are those of both views."""
    amounts, order, rest = np.split(uniforms, (len(JITTERS), 2 * len(JITTERS)), axis=1)
    centers = (float(augmentation.colors == "torchvision"), 1.0, 1.0, 0.0)
    view = np.repeat((0, 1), len(uniforms) // 2)
    return Changes(
        jitter=rest[:, 0] < augmentation.jitter,
        order=np.argsort(order, axis=1),
        amount=centers + np.array(augmentation.strengths) * (2 * amounts - 1),
        grayscale=rest[:, 1] < augmentation.grayscale,
        blur=rest[:, 2] < np.array(augmentation.blur)[view],
        sigma=_between(rest[:, 3], *augmentation.blur_sigma),
        solarize=rest[:, 4] < np.array(augmentation.solarize)[view],
    )


# Crops


def _rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Float [B, C, H, W] turned about the centre, the border repeated outwards."""
    height, width = pixels.shape[-2:]
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    rows = [cos, -sin * (height / width), zero, sin * (width / height), cos, zero]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _resize_matrices(
    start: Tensor, length: Tensor, flip: Tensor, size: int, total: int, interpolation: Interpolation
) -> Tensor:
    """Matrices [B, size, total] that cut `length` of `total` pixels from `start`, resize them, and flip where asked.

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


# Colours: in place, on [C, B, pixels] in 0..1, with one amount per image, [B, 1], and planes to work in, [7, B, pixels]

Operation = Callable[[Tensor, Tensor, Tensor], object]
SCRATCH_PLANES = 7


def jitter_operations(augmentation: Augmentation, channels: int) -> list[Operation | None]:
    """The four jitters in the order of `JITTERS`, None where one is switched off or needs RGB."""
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
    """Brightness of the released code: an amount is added."""
    planes.add_(shift).clamp_(0, 1)


def scale_brightness(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Brightness of torchvision: a factor."""
    planes.mul_(factor).clamp_(0, 1)


def contrast_by_channel(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Contrast of the released code: a factor on the distance from each channel's mean."""
    means = planes.mean(2, keepdim=True)
    planes.mul_(factor).add_((1 - factor) * means).clamp_(0, 1)


def contrast_about_gray(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Contrast of torchvision: a factor on the distance from the mean of grey, or of all channels if not RGB."""
    means = planes.mean(2, keepdim=True)
    mean = grayscale(means) if len(planes) == 3 else means.mean(0, keepdim=True)
    planes.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturate_hsv(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Saturation of the released code: HSV's saturation times a factor, at most 1."""
    red, green, blue = planes
    high, low, share = scratch[:3]
    torch.maximum(torch.maximum(red, green, out=high), blue, out=high)
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    # At fixed hue and value every channel's distance from the value is proportional to the saturation.
    torch.sub(high, low, out=low).add_(1e-12)
    torch.minimum(torch.div(high, low, out=low), factor, out=share)
    torch.lerp(high, planes, share, out=planes)


def saturate_from_gray(planes: Tensor, factor: Tensor, scratch: Tensor) -> None:
    """Saturation of torchvision: a factor on the distance from the grey image."""
    gray = grayscale(planes, out=scratch[0]).mul_(1 - factor)
    planes.mul_(factor).add_(gray).clamp_(0, 1)


def rotate_hue(planes: Tensor, turn: Tensor, scratch: Tensor) -> None:
    """HSV's hue turned by an amount in turns, at most 1/6 either way."""
    red, green, blue = planes
    high, low, middle, step = scratch[:4]
    slopes = scratch[4:]
    torch.maximum(green, blue, out=high)
    torch.minimum(green, blue, out=low)
    torch.maximum(torch.minimum(high, red, out=middle), low, out=middle)
    torch.maximum(high, red, out=high)
    torch.minimum(low, red, out=low)
    # On the hexagon of hues a channel stays at the largest value for a third of a turn, falls to the smallest within a
    # sixth, stays, and rises. Unclipped, it is at 2 c - middle; which of the others is the larger tells the slope.
    torch.sub(high, low, out=step).mul_(6 * turn)
    torch.sub(blue, green, out=slopes[0])
    torch.sub(red, blue, out=slopes[1])
    torch.sub(green, red, out=slopes[2])
    slopes.sign_().mul_(step).sub_(middle).add_(planes, alpha=2)
    torch.clamp(slopes, low, high, out=planes)


def grayscale(planes: Tensor, out: Tensor | None = None) -> Tensor:
    """Luma [1, ...] of RGB planes [3, ...]."""
    red, green, blue = planes
    return torch.mul(red, GRAY[0], out=out).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])[None]


def solarize(planes: Tensor) -> Tensor:
    """Values of one half and more inverted."""
    return torch.minimum(planes, 1 - planes)


# Blur

Padding = Literal["zeros", "reflect"]


def blur_taps(size: int) -> int:
    """Width of the blur's kernel for that image size: 23 at 224, 9 at 96, 3 at 32."""
    return 2 * int(size / 10 / 2) + 1


def blur(planes: Tensor, sigma: Tensor, taps: int, padding: Padding) -> Tensor:
    """Gaussian blur, in place, of [C, B, H, W] with one sigma per image, [B], in pixels; returns the planes."""
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
    """Matrices [B, size, size] that correlate with kernels [B, taps]."""
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


# Evaluation


class EvaluationTransform:
    """Turns one uint8 image [C, H, W] of any size into uint8 [C, height, width]: resize (bicubic), then centre crop.

    `crop_pct` is the share of the resized image's shorter side that the crop keeps (224 / 256 = 0.875 in the paper).
    An image that already has the size asked for is left as it is.
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
    """Float32 (pixel / 255 - mean) / std of uint8 images [B, C, H, W]; mean and std per channel, or one for all."""
    shift, scale = (torch.tensor(_per_channel(v, images.shape[1]), device=images.device) for v in (mean, std))
    return (images.float() / 255).sub_(shift[:, None, None]).div_(scale[:, None, None])
