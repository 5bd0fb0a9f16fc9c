"""Random draws as functions of (seed, ordinal)."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .augmentation import JITTERS, Augmentation

Array = NDArray[Any]
CROP_TRIES = 10
# Random draws

# Numbers of the draws of one view; a change of them changes every run.
CROP_DRAWS = range(0, 2 * CROP_TRIES + 4)
CHANGE_DRAWS = range(CROP_DRAWS.stop, CROP_DRAWS.stop + 2 * len(JITTERS) + 5)


class Crops(NamedTuple):
    """Hold the drawn crops of some rows: `box` [rows, 4] is (top, left, height, width), `angle` is in degrees."""

    box: Array
    flip: Array
    angle: Array

    def take(self, rows: Array) -> "Crops":
        return Crops(*(values[rows] for values in self))


class Changes(NamedTuple):
    """Hold drawn changes of rows: `order` and `amount` [rows, 4] are the jitters' order and, by jitter, strength."""

    jitter: Array
    order: Array
    amount: Array
    grayscale: Array
    blur: Array
    sigma: Array
    solarize: Array

    def order_key(self) -> Array:
        """Return a number per row, equal where the jitters come in the same order, largest where there are none."""
        return np.where(self.jitter, self.order @ (64, 16, 4, 1), 256)

    def take(self, rows: Array) -> "Changes":
        return Changes(*(values[rows] for values in self))


def _mix(bits: Array) -> Array:
    """Compute the output function of splitmix64 (Steele et al. 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = bits ^ (bits >> np.uint64(31))
    return mixed


@cache
def _counters(parameters: range) -> NDArray[np.uint64]:
    """Return increments of splitmix64's state for the draws of both views, [2, 1, parameters]."""
    views = [np.arange(parameters.start, parameters.stop, dtype=np.uint64) * 2 + view for view in (1, 2)]
    return np.stack(views)[:, None] * np.uint64(0x9E3779B97F4A7C15)


@cache
def _seed_bits(seed: int) -> NDArray[np.uint64]:
    return _mix(np.array([seed % 2**64], dtype=np.uint64))


def _uniforms(seed: int, ordinals: Tensor | Sequence[int], parameters: range) -> Array:
    """Return uniform numbers in [0, 1), [2 B, parameters]: the rows of view 1, then those of view 2."""
    keys = np.asarray(ordinals.cpu() if isinstance(ordinals, Tensor) else ordinals, dtype=np.int64).view(np.uint64)
    bits = _mix(_mix(keys ^ _seed_bits(seed))[:, None] + _counters(parameters))
    return (bits.reshape(-1, len(parameters)) >> np.uint64(11)) * 2.0**-53


def _between(uniforms: Array, low: float, high: float) -> Array:
    return low + (high - low) * uniforms


def draw_crops(augmentation: Augmentation, uniforms: Array, height: int, width: int) -> Crops:
    """Draw boxes inside an image of that size as torchvision's RandomResizedCrop does, flips and rotations."""
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
    """Draw everything after the crop: which operations, in which order, how strong. Rows are those of both views."""
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
