"""Everything after the crop, for a group of images at once, each with its own draws."""

from itertools import pairwise

import numpy as np
from torch import Tensor

from .augmentation import JITTERS, Augmentation
from .crops import to_device
from .draws import Array, Changes
from .operations import Padding, _tile, _tiles, blur, blur_taps, grayscale, jitter_operations, solarize


def change(planes: Tensor, changes: Changes, augmentation: Augmentation, scratch: Tensor) -> None:
    """Apply colour jitter, grayscale, blur and solarize, in place, to [C, B, height, width] in 0..1."""
    device, tile = planes.device, _tile(planes)
    flat = planes.flatten(2)
    jitters = jitter_operations(augmentation, len(planes))
    amounts = to_device(changes.amount.T.astype(np.float32), device)[:, :, None].unbind()
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
    if len(rows := np.flatnonzero(changes.blur)) and (taps := blur_taps(min(planes.shape[2:]))) > 1:
        sigma = to_device(changes.sigma[rows].astype(np.float32), device)
        padding: Padding = "zeros" if augmentation.colors == "paper" else "reflect"
        if len(rows) == len(changes.blur):
            blur(planes, sigma, taps, padding)
        else:
            _put(planes, rows, blur(_take(planes, rows), sigma, taps, padding))
    if len(inverted := np.flatnonzero(changes.solarize)):
        _put(flat, inverted, solarize(_take(flat, inverted)))
    planes.clamp_(0, 1)


def _take(planes: Tensor, images: Array) -> Tensor:
    return planes.index_select(1, to_device(images, planes.device))


def _put(planes: Tensor, images: Array, values: Tensor) -> None:
    if planes.device.type == "cpu":
        # `index_copy_` moves one number at a time there.
        for image, value in zip(images.tolist(), values.unbind(1), strict=True):
            planes[:, image] = value
    else:
        planes.index_copy_(1, to_device(images, planes.device), values)
