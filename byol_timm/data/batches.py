"""Batches: decoded images, or their crops, in an order that is a function of the seed and the step."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..errors import ByolTimmError
from .decoding import BadImage
from .images import Images, readable
from .workers import MAX_BAD, PREFETCH, BadImages, OnBadImage, in_workers, worker_count

logger = logging.getLogger(__name__)

Array = NDArray[Any]
# Of an answer while images are decoded into memory: little, as the shared memory of containers is.
LOAD_BYTES = 2**21


@dataclass(frozen=True)
class Batch:
    """Images of one forward pass: whole ones (uint8 [B, C, H, W]) or their crops (uint8 [B, 2, C, height, width]).

    `ordinals` (int64 [B], on the CPU) are epoch * number of images + index: what augmentations are drawn from.
    """

    images: Tensor | None
    crops: Tensor | None
    ordinals: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same with its pixels on that device; what is pinned travels while other work goes on."""
        images, crops = (
            None if pixels is None else pixels.to(device, non_blocking=True) for pixels in (self.images, self.crops)
        )
        return Batch(images, crops, self.ordinals)


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of `n` images in that epoch, an int64 permutation."""
    return torch.from_numpy(np.random.default_rng((seed % 2**64, epoch)).permutation(n))


def share_indices(count: int, share: float, seed: int) -> Array:
    """Sorted indices of that share (0 to 1) of `count` images, at least one, whatever their labels.

    A smaller share of the same seed is part of a larger one.
    """
    return np.sort(np.random.default_rng(seed % 2**64).permutation(count)[: max(1, round(share * count))])


def subset_indices(labels: Array, size: int, seed: int) -> Array:
    """Sorted indices of at most `size` labelled images, of every class as nearly equally many as there are."""
    order = np.random.default_rng(seed % 2**64).permutation(np.flatnonzero(labels >= 0))
    rank = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels[order]):
        members = labels[order] == label
        rank[members] = np.arange(members.sum())
    return np.sort(order[np.argsort(rank, kind="stable")[:size]])


# Training


class TrainingBatches:
    """Endless batches of one process, from optimizer step `start_step` on.

    Step k trains on the images [(k % steps) * global_batch, + global_batch) of `epoch_order(seed, k // steps, n)`,
    steps = n // global_batch, whatever the number of processes, the batch size and the number of workers: micro-batch
    m of process r is the slice at (m * world + r) * batch_size of them.
    Images that all decode to one shape are held in memory up to `memory_limit` bytes and come whole; else `workers`
    processes (None: one per core, at most 8; 0: this one) decode and come with what `cut(image, ordinal)` made;
    JPEG is decoded as many times smaller as `reduction(ordinal, height, width)` allows, if given.
    An image that cannot be read is replaced by the next one that can, and noted in `bad`; more than 5 % of them, or
    any with `on_bad_image="error"`, end it all with a `ByolTimmError`.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        global_batch: int,
        cut: Callable[[Tensor, int], Tensor],
        reduction: Callable[[int, int, int], int] | None = None,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start_step: int = 0,
        workers: int | None = None,
        memory_limit: float = 2 * 2**30,
        on_bad_image: OnBadImage = "skip",
    ) -> None:
        check_batch(len(images), batch_size, global_batch, world)
        self.images, self.seed, self.start_step = images, seed, start_step
        self.batch_size, self.global_batch, self.rank, self.world = batch_size, global_batch, rank, world
        self.workers = workers
        self.bad = BadImages(images.name, len(images), on_bad_image)
        self._cut, self._reduction = cut, reduction
        self._running: Generator[Batch] | None = None
        self._pixels = self._load(memory_limit)

    @property
    def in_memory(self) -> bool:
        """Whether all images are held decoded."""
        return self._pixels is not None

    @property
    def ahead(self) -> int:
        """Batches that workers prepare before they are asked for."""
        return 0 if self.in_memory else PREFETCH * worker_count(self.workers)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._running = self._from_memory(self._pixels) if self._pixels is not None else self._from_workers()
        return self._running

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _ordinals(self) -> Iterator[Tensor]:
        n = len(self.images)
        for step in itertools.count(self.start_step):
            epoch, place = divmod(step, n // self.global_batch)
            if place == 0 or step == self.start_step:
                ordinals = epoch_order(self.seed, epoch, n) + epoch * n
            batch = ordinals[place * self.global_batch :][: self.global_batch]
            yield from batch.split(self.batch_size)[self.rank :: self.world]

    def _from_memory(self, pixels: Tensor) -> Generator[Batch]:
        shape, pin = (self.batch_size, *pixels.shape[1:]), torch.cuda.is_available()
        for ordinals in self._ordinals():
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
            torch.index_select(pixels, 0, ordinals % len(pixels), out=images)
            yield Batch(images, None, ordinals)

    def _from_workers(self) -> Generator[Batch]:
        crops = self._cut(next(readable(self.images, 100, self.images.decode)), 0)
        reader = _CropReader(self.images, self._cut, self._reduction)
        seen = replaced = 0
        answers = in_workers(reader, self._ordinals(), worker_count(self.workers), crops.numel() * self.batch_size)
        with contextlib.closing(answers):
            for crops, ordinals, bad in answers:
                self.bad.note(bad)
                seen += len(ordinals)
                replaced += sum(ordinal % len(self.images) in bad for ordinal in ordinals.tolist())
                self.bad.check(replaced, seen)
                self.bad.check(len(self.bad), len(self.images))
                yield Batch(None, crops, ordinals)

    def _load(self, limit: float) -> Tensor | None:
        """All images, uint8 [N, C, H, W], or None if they differ in shape or take more than `limit` bytes."""
        n = len(self.images)
        shape, *others = {image.shape for image in readable(self.images, 16, self.images.decode)}
        if others or n * shape.numel() > limit:
            return None
        pixels, good = torch.empty(n, *shape, dtype=torch.uint8), torch.zeros(n, dtype=torch.bool)
        chunk = max(1, min(256, LOAD_BYTES // shape.numel()))
        workers = worker_count(self.workers, n * shape.numel())
        reader = _ImageReader(self.images, _SameShape(shape))
        answers = in_workers(reader, torch.arange(n).split(chunk), workers, chunk * shape.numel())
        bar = tqdm(total=n, unit="image", desc="decoding", disable=True if self.rank else None)
        try:
            with contextlib.closing(answers), bar:
                for decoded, indices, bad in answers:
                    self.bad.note(bad)
                    self.bad.check(len(self.bad), n)
                    if len(indices):
                        pixels[indices], good[indices] = decoded, True
                    bar.update(len(indices) + len(bad))
        except _OtherShape:
            self.bad.clear()
            return None
        whole = good.nonzero()[:, 0]
        for index in self.bad:
            pixels[index] = pixels[whole[torch.searchsorted(whole, index) % len(whole)]]
        return pixels


def check_batch(num_images: int, batch_size: int, global_batch: int, world: int) -> None:
    """Raise `ByolTimmError` unless so many images make up global batches of `batch_size` images per process."""
    micro_batches, rest = divmod(global_batch, batch_size * world)
    if rest or not micro_batches:
        raise ByolTimmError(f"global batch {global_batch} is not a multiple of {batch_size} x {world} processes")
    if num_images < global_batch:
        product = f"{batch_size} x {world * micro_batches}"
        raise ByolTimmError(
            f"dataset has {num_images} images but the global batch is {global_batch} ({product}). "
            "Lower --batch_size, the processes or the accumulation"
        )


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same endless batches; to a CUDA device each travels while the one before it is worked on.

    Only an error of reading then comes one batch earlier.
    """
    return _copied_ahead(batches, device) if device.type == "cuda" else batches


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    stream = torch.cuda.Stream(device)

    def copied(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return batch.to(device), stream.record_event()

    ahead = copied(next(batches))
    for following in batches:
        (batch, arrived), ahead = ahead, copied(following)
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for pixels in (batch.images, batch.crops):
            if pixels is not None:
                # Its memory belongs to the other stream, which must not use it again before this one is done.
                pixels.record_stream(current)
        yield batch


# Evaluation


def evaluation_batches(
    images: Images,
    transform: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int | None = None,
    indices: Array | Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Transformed images (uint8 [B, C, height, width]) and their indices (int64 [B]), in the order of `indices`.

    Images that cannot be read are left out, with one warning.
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
        logger.warning("%d of %d images cannot be read and are left out; the first: %s", len(bad), len(chosen), first)


def load_pixels(
    images: Images,
    transform: Callable[[Tensor], Tensor],
    *,
    workers: int | None = None,
    indices: Array | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """All of `evaluation_batches` in memory: uint8 [M, C, height, width] and the int64 indices of those M images."""
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


# Reading in processes


class _ImageReader:
    """Answers a request for indices with the transformed images that can be read, their indices, and the others."""

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


class _CropReader:
    """Answers a request for ordinals with crops, the ordinals, and the images that others had to replace.

    No crops if no image can be read among more in a row than may be bad in all.
    """

    def __init__(
        self,
        images: Images,
        cut: Callable[[Tensor, int], Tensor],
        reduction: Callable[[int, int, int], int] | None,
    ) -> None:
        self.images, self.cut, self.reduction = images, cut, reduction
        self.known_bad: dict[int, str] = {}

    def __getitem__(self, ordinals: Tensor) -> tuple[Tensor, Tensor, dict[int, str]]:
        crops: list[Tensor] = []
        bad: dict[int, str] = {}
        for ordinal in ordinals.tolist():
            image = self._decode(ordinal, bad)
            if image is None:
                return torch.empty(0), ordinals, bad
            crops.append(self.cut(image, ordinal))
        return torch.stack(crops), ordinals, bad

    def _decode(self, ordinal: int, bad: dict[int, str]) -> Tensor | None:
        index, reduction = ordinal % len(self.images), self.reduction and partial(self.reduction, ordinal)
        for candidate in range(index, index + int(MAX_BAD * len(self.images)) + 2):
            candidate %= len(self.images)
            if candidate not in self.known_bad:
                try:
                    return self.images.decode(candidate, reduction)
                except BadImage as reason:
                    self.known_bad[candidate] = f"{self.images.describe(candidate)}: {reason}"
            bad[candidate] = self.known_bad[candidate]
        return None


class _OtherShape(Exception):
    """An image is not of the shape that all were thought to have."""


class _SameShape:
    """Passes on images of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __call__(self, image: Tensor) -> Tensor:
        if image.shape != self.shape:
            raise _OtherShape(str(image.shape))
        return image
