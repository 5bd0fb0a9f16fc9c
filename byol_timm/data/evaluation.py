"""Images to evaluate on, transformed, in a given order."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decoding import BadImage
from .images import Images, readable
from .workers import in_workers, worker_count

logger = logging.getLogger(__name__)

Array = NDArray[Any]


def evaluation_batches(
    images: Images,
    transform: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int | None = None,
    indices: Array | Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield transformed images (uint8 [B, C, height, width]) and their indices (int64 [B]), in the order of `indices`.

    Skip images that cannot be read, with one warning.
    """
    chosen = _chosen(images, indices)
    example = _example(images, chosen)
    count, size = worker_count(workers, len(chosen) * example.numel()), transform(example).numel()
    bad: dict[int, str] = {}
    answers = in_workers(_ImageReader(images, transform), chosen.split(batch_size), count, size * batch_size)
    with contextlib.closing(answers):
        for pixels, good, reasons in answers:
            bad |= reasons
            if len(good):
                yield pixels, good
    if bad:
        first = next(iter(bad.values()))
        logger.warning("%d of %d images cannot be read and are skipped; the first: %s", len(bad), len(chosen), first)


def load_pixels(
    images: Images,
    transform: Callable[[Tensor], Tensor],
    *,
    workers: int | None = None,
    indices: Array | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return all of `evaluation_batches` in memory: uint8 [M, C, height, width] and their int64 indices."""
    chosen = _chosen(images, indices)
    shape = transform(_example(images, chosen)).shape
    pixels, good, count = torch.empty(len(chosen), *shape, dtype=torch.uint8), torch.empty_like(chosen), 0
    for part, found in evaluation_batches(images, transform, batch_size=32, workers=workers, indices=indices):
        place = slice(count, count + len(found))
        pixels[place], good[place] = part, found
        count = place.stop
    return pixels[:count], good[:count]


def _chosen(images: Images, indices: Array | Sequence[int] | None) -> Tensor:
    return torch.arange(len(images)) if indices is None else torch.from_numpy(np.array(indices, dtype=np.int64))


def _example(images: Images, indices: Tensor) -> Tensor:
    images = images.subset(indices.numpy())
    return next(readable(images, 100, images.decode))


class _ImageReader:
    """Answer indices with the transformed images that can be read, their indices, and the others with the reason."""

    def __init__(self, images: Images, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor, dict[int, str]]:
        pixels, good, bad = [], [], {}
        for index in indices.tolist():
            try:
                image = self.images.decode(index)
            except BadImage as reason:
                bad[index] = f"{self.images.describe(index)}: {reason}"
            else:
                pixels.append(self.transform(image))
                good.append(index)
        return torch.stack(pixels) if pixels else torch.empty(0), torch.tensor(good, dtype=torch.int64), bad
