"""Two random views of every image of a batch, drawn and computed per image on the batch's own device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .errors import ByolTimmError

Colors = Literal["paper", "torchvision"]
Interpolation = Literal["bicubic", "bilinear"]
Array = NDArray[Any]

GRAY = (0.2989, 0.5870, 0.1140)
CROP_TRIES = 10
# Working sets of a CPU core's caches, in numbers: pixels of one colour plane (L2), values of one group of views (L3).
TILE_PIXELS = 16_384
GROUP_VALUES = 1 << 20
# On a CPU, batched matrix products resize images up to this side faster than one call an image does.
MATMUL_RESIZE_LIMIT = 48
BLUR_ROWS = 32


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
        for name in ("flip", "jitter", "grayscale"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "give a probability, 0 to 1")
        for name in ("blur", "solarize"):
            _check(all(0 <= p <= 1 for p in getattr(self, name)), name, getattr(self, name), "give two probabilities")
        for name in ("brightness", "contrast", "saturation"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "give a half-range, 0 to 1")
        _check(0 <= self.hue <= 1 / 6, "hue", self.hue, "give at most 1/6 of a turn")
        _check(0 <= self.rotate <= 180, "rotate", self.rotate, "give degrees, 0 to 180")
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "give two shares of the area, the smaller first")
        for name in ("crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            _check(0 < low <= high, name, (low, high), "give two positive numbers, the smaller first")
        _check(self.interpolation in ("bicubic", "bilinear"), "interpolation", self.interpolation, "give one of these")
        _check(self.colors in ("paper", "torchvision"), "colors", self.colors, "give 'paper' or 'torchvision'")


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
    # Written characters: nothing that turns one into another (flips, small crops), strokes slanted and inked unevenly.
    "digits": replace(
        _PAPER,
        crop_scale=(0.5, 1.0),
        rotate=12.0,
        flip=0.0,
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
    return tuple(name for name in ("saturation", "hue", "grayscale") if getattr(augmentation, name) > 0)


class TwoViews:
    """Turns uint8 images into two normalised float32 views, every parameter drawn per image and per view.

    The draws are a pure function of (`seed`, ordinal, view, parameter): batch, order, worker and device do not matter.
    `image_size` is the side of the views or (height, width); `mean` and `std` (of pixels in 0..1) have one entry per
    channel, or one for all.
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

    @torch.no_grad()
    def __call__(self, images: Tensor, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """View 1 and view 2 (float32 [B, C, height, width]) of uint8 images [B, C, H, W] with int64 ordinals [B]."""
        height, width = images.shape[-2:]
        one_by_one = images.device.type == "cpu" and max(self.height, self.width, height, width) > MATMUL_RESIZE_LIMIT
        crops = draw_crops(self.augmentation, _uniforms(self.seed, ordinals, CROP_DRAWS), height, width)

        def cut(rows: Array) -> Tensor:
            sources = rows % len(images)
            if not one_by_one:
                selected = images[torch.from_numpy(sources).to(images.device, non_blocking=True)]
                return self._crop_together(selected, crops.take(rows))
            pixels = [self._crop(images[source], crops, row) for source, row in zip(sources, rows, strict=True)]
            return _planes(torch.stack(pixels))

        return self._views(cut, images.shape[1], ordinals, images.device)

    @torch.no_grad()
    def cut(self, image: Tensor, ordinal: int) -> Tensor:
        """Both crops, resized and flipped (uint8 [2, C, height, width]), of one uint8 image [C, H, W], for loaders.

        `finish` turns a batch of them into the views that calling the object on the images gives, up to rounding.
        """
        height, width = image.shape[-2:]
        crops = draw_crops(self.augmentation, _uniforms(self.seed, [ordinal], CROP_DRAWS), height, width)
        return torch.stack([self._crop(image, crops, view) for view in range(2)])

    @torch.no_grad()
    def finish(self, crops: Tensor, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """View 1 and view 2 (float32 [B, C, height, width]) of what `cut` made, uint8 [B, 2, C, height, width]."""

        def pick(rows: Array) -> Tensor:
            view, image = np.divmod(rows, len(crops))
            return _planes(crops.flatten(0, 1)[torch.from_numpy(image * 2 + view).to(crops.device, non_blocking=True)])

        return self._views(pick, crops.shape[2], ordinals, crops.device)

    def _crop(self, image: Tensor, crops: "Crops", row: int) -> Tensor:
        if self.augmentation.rotate:
            angle = torch.tensor(crops.angle[row : row + 1], dtype=torch.float32)
            image = _rotate(image[None].float(), angle)[0].round_().to(torch.uint8)
        top, left, height, width = crops.box[row].tolist()
        crop = _resize(image[:, top : top + height, left : left + width], (self.height, self.width), self.augmentation)
        return crop.flip(-1) if crops.flip[row] else crop

    def _crop_together(self, images: Tensor, crops: "Crops") -> Tensor:
        """The crops as two matrix products per image, [C, B, height, width] in 0..1."""
        batch, channels, height, width = images.shape
        device, mode = images.device, self.augmentation.interpolation
        pixels = images.float()
        if self.augmentation.rotate:
            pixels = _rotate(pixels, torch.tensor(crops.angle, dtype=torch.float32).to(device, non_blocking=True))
        numbers = np.concatenate([crops.box, crops.flip[:, None]], axis=1).astype(np.float32)
        top, left, rows, columns, flip = torch.from_numpy(numbers).to(device, non_blocking=True).T
        down = _resize_matrices(top, rows, torch.zeros_like(flip), self.height, height, mode)
        across = _resize_matrices(left, columns, flip, self.width, width, mode)
        across.div_(255)
        with torch.autocast(device.type, enabled=False):
            wide = torch.bmm(pixels.view(batch, channels * height, width), across.mT)
            wide = wide.view(batch, channels, height, self.width)
            out = torch.empty(channels, batch, self.height, self.width, device=device)
            for channel in range(channels):
                torch.bmm(down, wide[:, channel], out=out[channel])
        return out.clamp_(0, 1)

    def _views(
        self, cut: Callable[[Array], Tensor], channels: int, ordinals: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Everything after the crop. A row is an image of one view: 0..B-1 of view 1, B..2B-1 of view 2."""
        mean, std = (torch.tensor(v).expand(channels)[:, None, None].to(device) for v in (self.mean, self.std))
        changes = draw_changes(self.augmentation, _uniforms(self.seed, ordinals, CHANGE_DRAWS))
        rows = len(changes.jitter)
        views = torch.empty(rows, channels, self.height, self.width, device=device)
        group = rows if device.type != "cpu" else max(1, GROUP_VALUES // (channels * self.height * self.width))
        for start in range(0, rows, group):
            members = np.arange(start, min(start + group, rows))
            # Equal orders side by side: an operation then works on stretches of the batch, in place.
            order = np.where(changes.jitter[members], changes.order[members] @ (64, 16, 4, 1), 256)
            members = members[np.argsort(order, kind="stable")]
            planes = self._change(cut(members), changes.take(members))
            planes.sub_(mean[:, None]).div_(std[:, None])
            views[torch.from_numpy(members).to(device, non_blocking=True)] = planes.transpose(0, 1)
        half = rows // 2
        return views[:half], views[half:]

    def _change(self, planes: Tensor, changes: "Changes") -> Tensor:
        """Colour jitter, grayscale, blur and solarize, in place, of [C, B, height, width] in 0..1."""
        device = planes.device
        flat = planes.flatten(2)
        jitters = jitter_operations(self.augmentation, len(planes))
        amounts = torch.from_numpy(changes.amount.astype(np.float32)).to(device, non_blocking=True)
        jittered = int(changes.jitter.sum())
        for slot in range(len(JITTERS)):
            kinds = changes.order[:jittered, slot]
            bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), jittered]
            for first, last in pairwise(bounds):
                if first < last and (operation := jitters[kinds[first]]) is not None:
                    operation(flat[:, first:last], amounts[first:last, kinds[first], None])
        if len(planes) == 3 and changes.grayscale.any():
            index = _index(changes.grayscale, device)
            flat[:, index] = grayscale(flat[:, index])
        if changes.blur.any():
            taps = blur_taps(min(self.height, self.width))
            sigma = torch.tensor(changes.sigma[changes.blur], dtype=torch.float32).to(device, non_blocking=True)
            padding: Literal["zeros", "reflect"] = "zeros" if self.augmentation.colors == "paper" else "reflect"
            if changes.blur.all():
                blur(planes, sigma, taps, padding)
            else:
                index = _index(changes.blur, device)
                planes[:, index] = blur(planes[:, index], sigma, taps, padding)
        if changes.solarize.any():
            index = _index(changes.solarize, device)
            flat[:, index] = solarize(flat[:, index])
        return planes


def _index(mask: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(device, non_blocking=True)


def _planes(pixels: Tensor) -> Tensor:
    """Float [C, B, H, W] in 0..1 of uint8 [B, C, H, W]: contiguous per channel, as the colour operations read it."""
    channels, rest = pixels.transpose(0, 1), (pixels.shape[0], *pixels.shape[2:])
    return torch.empty(pixels.shape[1], *rest, device=pixels.device).copy_(channels).div_(255)


# Random draws

JITTERS = ("brightness", "contrast", "saturation", "hue")
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

    def take(self, rows: Array) -> "Changes":
        return Changes(*(values[rows] for values in self))


def _mix(bits: Array) -> Array:
    """The output function of splitmix64 (Steele et al. 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _uniforms(seed: int, ordinals: Tensor | Sequence[int], parameters: range) -> Array:
    """Uniform numbers in [0, 1), [2 B, parameters]: the rows of view 1, then those of view 2."""
    keys = np.asarray(ordinals.cpu() if isinstance(ordinals, Tensor) else ordinals, dtype=np.int64).astype(np.uint64)
    keys = _mix(keys ^ _mix(np.array([seed % 2**64], dtype=np.uint64)))
    counters = np.stack([np.arange(parameters.start, parameters.stop, dtype=np.uint64) * 2 + view for view in (1, 2)])
    bits: NDArray[np.uint64] = _mix(keys[None, :, None] + counters[:, None, :] * np.uint64(0x9E3779B97F4A7C15))
    return (bits.reshape(-1, len(parameters)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _between(uniforms: Array, low: float, high: float) -> Array:
    return low + (high - low) * uniforms


def draw_crops(augmentation: Augmentation, uniforms: Array, height: int, width: int) -> Crops:
    """Boxes inside an image of that size, as torchvision's RandomResizedCrop draws them, flips and rotations."""
    scales, ratios, rest = np.split(uniforms, (CROP_TRIES, 2 * CROP_TRIES), axis=1)
    areas = height * width * _between(scales, *augmentation.crop_scale)
    low, high = augmentation.crop_ratio
    ratios = np.exp(_between(ratios, np.log(low), np.log(high)))
    tries = np.round(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=2)))
    inside = np.all((tries > 0) & (tries <= (height, width)), axis=2)
    first = inside.argmax(axis=1)
    sides = tries[np.arange(len(tries)), first]
    fallback = np.minimum((height, width), np.maximum(1, np.round((width / low, height * high))))
    failed = ~inside.any(axis=1)
    sides[failed] = fallback
    corners = np.floor(rest[:, :2] * ((height, width) - sides + 1))
    corners[failed] = ((height, width) - fallback) // 2
    box = np.concatenate([corners, sides], axis=1).astype(np.int64)
    angle = _between(rest[:, 3], -augmentation.rotate, augmentation.rotate)
    return Crops(box, rest[:, 2] < augmentation.flip, angle)


def draw_changes(augmentation: Augmentation, uniforms: Array) -> Changes:
    """Everything after the crop: which operations, in which order, how strong. The rows are those of both views."""
    amounts, order, rest = np.split(uniforms, (len(JITTERS), 2 * len(JITTERS)), axis=1)
    ranges = np.array([getattr(augmentation, name) for name in JITTERS])
    centers = (float(augmentation.colors == "torchvision"), 1.0, 1.0, 0.0)
    view = np.repeat((0, 1), len(uniforms) // 2)
    return Changes(
        jitter=rest[:, 0] < augmentation.jitter,
        order=np.argsort(order, axis=1),
        amount=centers + ranges * (2 * amounts - 1),
        grayscale=rest[:, 1] < augmentation.grayscale,
        blur=rest[:, 2] < np.array(augmentation.blur)[view],
        sigma=_between(rest[:, 3], *augmentation.blur_sigma),
        solarize=rest[:, 4] < np.array(augmentation.solarize)[view],
    )


# Crops


def _resize(crop: Tensor, size: tuple[int, int], augmentation: Augmentation) -> Tensor:
    if crop.shape[-2:] == size:
        return crop
    return F.interpolate(crop[None], size, mode=augmentation.interpolation, antialias=True)[0]


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
    device = start.device
    start, length, flip = start[:, None, None], length[:, None, None], flip[:, None, None]
    scale = length / size
    stretch = scale.clamp(min=1)
    places = torch.arange(size, device=device, dtype=torch.float32)[:, None] + 0.5
    centers = start + scale * (places + flip * (size - 2 * places))
    pixels = torch.arange(total, device=device, dtype=torch.float32) + 0.5
    distance = ((pixels - centers) / stretch).abs_()
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_(min=0)
    else:
        # Keys' cubic with a = -1/2: an outer part on 0..2, and what the inner piece adds to it on 0..1.
        outer, inner = (2 - distance).clamp_(min=0), (1 - distance).clamp_(min=0)
        weights = (outer - 1).mul_(0.5).mul_(outer).mul_(outer).add_((1 - 2 * inner).mul_(inner).mul_(inner))
    weights.mul_((pixels > start) & (pixels < start + length))
    return weights.div_(weights.sum(2, keepdim=True))


# Colours: in place, on [C, B, pixels] in 0..1, with one amount per image, [B, 1]

Operation = Callable[[Tensor, Tensor], object]


def jitter_operations(augmentation: Augmentation, channels: int) -> list[Operation | None]:
    """The four jitters in the order of `JITTERS`, None where one is switched off or needs RGB."""
    if augmentation.colors == "paper":
        operations: list[Operation] = [shift_brightness, contrast_by_channel, saturate_hsv, rotate_hue]
    else:
        operations = [scale_brightness, contrast_about_gray, saturate_from_gray, rotate_hue]
    omitted = omitted_operations(augmentation, channels)
    return [
        None if name in omitted or getattr(augmentation, name) == 0 else operation
        for name, operation in zip(JITTERS, operations, strict=True)
    ]


def _tiles(planes: Tensor, *amounts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the planes, with their images' amounts, that stay in a CPU core's cache over many passes."""
    _, images, pixels = planes.shape
    if planes.device.type != "cpu":
        yield planes, *amounts
        return
    step = max(1, TILE_PIXELS // pixels)
    for image in range(0, images, step):
        part = slice(image, image + step)
        for pixel in range(0, pixels, TILE_PIXELS):
            yield planes[:, part, pixel : pixel + TILE_PIXELS], *(amount[..., part, :] for amount in amounts)


def shift_brightness(planes: Tensor, amount: Tensor) -> None:
    """Brightness of the released code: an amount is added."""
    for tile, shift in _tiles(planes, amount):
        tile.add_(shift).clamp_(0, 1)


def scale_brightness(planes: Tensor, amount: Tensor) -> None:
    """Brightness of torchvision: a factor."""
    for tile, factor in _tiles(planes, amount):
        tile.mul_(factor).clamp_(0, 1)


def contrast_by_channel(planes: Tensor, amount: Tensor) -> None:
    """Contrast of the released code: a factor on the distance from each channel's mean."""
    _scale_about(planes, amount, planes.mean(2, keepdim=True))


def contrast_about_gray(planes: Tensor, amount: Tensor) -> None:
    """Contrast of torchvision: a factor on the distance from the mean of the grey image."""
    means = planes.mean(2, keepdim=True)
    if len(planes) == 3:
        means = means * torch.tensor(GRAY, device=planes.device)[:, None, None]
        _scale_about(planes, amount, means.sum(0, keepdim=True))
    else:
        _scale_about(planes, amount, means.mean(0, keepdim=True))


def _scale_about(planes: Tensor, amount: Tensor, center: Tensor) -> None:
    for tile, factor, offset in _tiles(planes, amount, (1 - amount) * center):
        tile.mul_(factor).add_(offset).clamp_(0, 1)


def saturate_hsv(planes: Tensor, amount: Tensor) -> None:
    """Saturation of the released code: HSV's saturation times a factor, at most 1."""
    for tile, factor in _tiles(planes, amount):
        red, green, blue = tile
        high = torch.maximum(red, green)
        low = torch.minimum(red, green)
        torch.maximum(high, blue, out=high)
        torch.minimum(low, blue, out=low)
        # At fixed hue and value every channel's distance from the value is proportional to the saturation.
        share = torch.sub(high, low, out=low).add_(1e-12)
        share = torch.minimum(torch.div(high, share, out=share), factor)
        for channel in tile:
            torch.lerp(high, channel, share, out=channel)


def saturate_from_gray(planes: Tensor, amount: Tensor) -> None:
    """Saturation of torchvision: a factor on the distance from the grey image."""
    for tile, factor in _tiles(planes, amount):
        gray = grayscale(tile).mul_(1 - factor)
        tile.mul_(factor).add_(gray).clamp_(0, 1)


def rotate_hue(planes: Tensor, amount: Tensor) -> None:
    """HSV's hue turned by an amount in turns, at most 1/6 either way."""
    for tile, turn in _tiles(planes, amount):
        red, green, blue = tile
        low, high = torch.minimum(green, blue), torch.maximum(green, blue)
        middle = torch.minimum(high, red)
        torch.maximum(middle, low, out=middle)
        torch.maximum(high, red, out=high)
        torch.minimum(low, red, out=low)
        chroma = high - low
        # Around the hexagon of hues a channel rises and falls at one chroma per sixth of a turn between the smallest
        # and the largest value: 2 c - middle is where it would be unclipped, its neighbours' order tells the slope.
        slopes = [
            torch.copysign(chroma, difference, out=difference) for difference in (blue - green, red - blue, green - red)
        ]
        for channel, slope in zip(tile, slopes, strict=True):
            slope.mul_(6 * turn).sub_(middle).add_(channel, alpha=2)
            torch.clamp(slope, low, high, out=channel)


def grayscale(planes: Tensor) -> Tensor:
    """Luma of [3, ...], [1, ...]."""
    red, green, blue = planes
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])[None]


def solarize(planes: Tensor) -> Tensor:
    """Values of one half and more inverted."""
    return torch.minimum(planes, 1 - planes)


# Blur


def blur_taps(size: int) -> int:
    """Width of the blur's kernel for that image size: 23 at 224, 9 at 96, 3 at 32."""
    return 2 * int(size / 10 / 2) + 1


def blur(planes: Tensor, sigma: Tensor, taps: int, padding: Literal["zeros", "reflect"]) -> Tensor:
    """Gaussian blur in place of [C, B, H, W] with one sigma per image, [B], in pixels; returns the planes."""
    radius = taps // 2
    if radius == 0:
        return planes
    with torch.autocast(planes.device.type, enabled=False):
        offsets = torch.arange(-radius, radius + 1, device=planes.device, dtype=torch.float32)
        kernels = torch.exp(-(offsets**2) / (2 * sigma[:, None] ** 2))
        kernels /= kernels.sum(1, keepdim=True)
        down, across = (_band_matrices(kernels, size, padding) for size in planes.shape[2:])
        halfway = torch.empty_like(planes[0])
        # A banded matrix in blocks of rows: each block only meets the pixels its rows reach.
        for plane in planes:
            for rows, reach in _blocks(plane.shape[1], radius):
                halfway[:, rows] = down[:, rows, reach] @ plane[:, reach]
            for columns, reach in _blocks(plane.shape[2], radius):
                plane[:, :, columns] = halfway[:, :, reach] @ across[:, columns, reach].mT
    return planes


def _blocks(size: int, radius: int) -> list[tuple[slice, slice]]:
    return [
        (slice(start, min(size, start + BLUR_ROWS)), slice(max(0, start - radius), start + BLUR_ROWS + radius))
        for start in range(0, size, BLUR_ROWS)
    ]


def _band_matrices(kernels: Tensor, size: int, padding: Literal["zeros", "reflect"]) -> Tensor:
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
        top, left = ((r - s) // 2 for r, s in zip(resized, self.size, strict=True))
        return image[:, top : top + self.size[0], left : left + self.size[1]].contiguous()


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 (pixel / 255 - mean) / std of uint8 images [B, C, H, W]; mean and std per channel, or one for all."""
    channels = images.shape[1]
    scale, shift = (torch.tensor(values).expand(channels)[:, None, None].to(images.device) for values in (std, mean))
    return (images.float() / 255).sub_(shift).div_(scale)
