"""Training batches, whose order is a function of the seed and the step."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ByolTimmError
from .cache import Decoded
from .decoding import BadImage, Reduction
from .images import Images, readable
from .sampling import epoch_order
from .workers import MAX_BAD, PREFETCH, BadImages, OnBadImage, in_workers, worker_count

Opened = TypeVar("Opened", bound="Batches")
# Of `(ordinal, item, reduction, bad)`: return the image of an item and True, or a replacement and False; put the
# reasons why items are bad into `bad`.
Find = Callable[[int, Any, Reduction | None, dict[int, str]], tuple[Tensor | None, bool]]


@dataclass(frozen=True)
class Batch:
    """Images of one forward pass: whole (uint8 [B, C, H, W]) or their crops (uint8 [B, 2, C, height, width]).

    `ordinals` (int64 [B], on the CPU) are epoch * number of images + index: augmentations are drawn from them.
    """

    images: Tensor | None
    crops: Tensor | None
    ordinals: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its pixels on that device; pinned ones are copied while other work runs."""
        images, crops = (
            None if pixels is None else pixels.to(device, non_blocking=True) for pixels in (self.images, self.crops)
        )
        return Batch(images, crops, self.ordinals)


@dataclass(kw_only=True, eq=False)
class Batches:
    """Endless batches of one process, from optimizer step `start_step` on; iterating again starts again.

    cut: makes crops of `(image, ordinal)` in a worker. reduction: of `(ordinal, height, width)`, the factor by which to
        decode JPEG smaller.
    workers: None is one per core, at most 8; 0 is this process. pin: for training on CUDA.
    bad: images that cannot be read, which are replaced; more than 5 %, or any with `on_bad_image="error"`, raise
        `ByolTimmError`.

    A context manager, which ends the workers.
    """

    batch_size: int
    global_batch: int
    cut: Callable[[Tensor, int], Tensor]
    reduction: Callable[[int, int, int], int] | None = None
    rank: int = 0
    world: int = 1
    seed: int = 0
    start_step: int = 0
    workers: int | None = None
    on_bad_image: OnBadImage = "skip"
    pin: bool = False
    bad: BadImages = field(init=False)
    _running: Generator[Batch] | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._running = self._batches()
        return self._running

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _batches(self) -> Generator[Batch]:
        raise NotImplementedError

    def _check(self, name: str, num_images: int) -> None:
        micro_batches, rest = divmod(self.global_batch, self.batch_size * self.world)
        if rest or not micro_batches:
            product = f"{self.batch_size} x {self.world} processes"
            raise ByolTimmError(f"global batch {self.global_batch} is not a multiple of {product}")
        if num_images < self.global_batch:
            product = f"{self.batch_size} x {self.world * micro_batches}"
            raise ByolTimmError(
                f"dataset has {num_images} images but the global batch is {self.global_batch} ({product}). "
                "Lower --batch_size, the processes or the accumulation"
            )
        self.bad = BadImages(name, num_images, self.on_bad_image)

    def _read(self, find: Find, examples: Images, requests: Iterable[tuple[Tensor, Sequence[Any]]]) -> Generator[Batch]:
        """Yield the crops of the requested items."""
        example = self.cut(next(readable(examples, 100, examples.decode)), 0)
        reader, num_bytes = CropReader(find, self.cut, self.reduction), example.numel() * self.batch_size
        answers = in_workers(reader, requests, worker_count(self.workers), num_bytes, self.pin)
        seen = all_replaced = 0
        with contextlib.closing(answers):
            for crops, ordinals, reasons, replaced in answers:
                self.bad.note(reasons)
                seen += len(ordinals)
                all_replaced += replaced
                self.bad.check(all_replaced, seen)
                self.bad.check(len(self.bad), self.bad.num_images)
                yield Batch(None, crops, ordinals)


@dataclass(kw_only=True, eq=False)
class TrainingBatches(Batches):
    """Batches of images that can be read in any order.

    Step k trains on the images [(k % steps) * global_batch, + global_batch) of `epoch_order(seed, k // steps, n)`,
    steps = n // global_batch, whatever the number of processes, the batch size and the number of workers: micro-batch
    m of process r is the slice at (m * world + r) * batch_size of them.
    Images that `open_cache` stored as planes come whole, others as crops. An image that cannot be read is replaced by
    the next one that can.
    """

    images: Images = field(kw_only=False)

    def __post_init__(self) -> None:
        self._check(self.images.name, len(self.images))
        source = self.images.source
        self._decoded = source if isinstance(source, Decoded) and source.planes else None
        if self._decoded is not None:
            self.bad.note(self._decoded.bad_among(self.images))
            self.bad.check(len(self.bad), len(self.images))

    @property
    def in_memory(self) -> bool:
        """True if images come whole from a file of decoded images."""
        return self._decoded is not None

    @property
    def ahead(self) -> int:
        """Return how many batches workers prepare in advance."""
        return 0 if self.in_memory else PREFETCH * worker_count(self.workers)

    def _batches(self) -> Generator[Batch]:
        if self._decoded is not None:
            return self._whole(self._decoded)
        requests = ((ordinals, (ordinals % len(self.images)).tolist()) for ordinals in self._ordinals())
        return self._read(_ImageOrNext(self.images), self.images, requests)

    def _ordinals(self) -> Iterator[Tensor]:
        n = len(self.images)
        for step in itertools.count(self.start_step):
            epoch, place = divmod(step, n // self.global_batch)
            if place == 0 or step == self.start_step:
                ordinals = epoch_order(self.seed, epoch, n) + epoch * n
            batch = ordinals[place * self.global_batch :][: self.global_batch]
            yield from batch.split(self.batch_size)[self.rank :: self.world]

    def _whole(self, decoded: Decoded) -> Generator[Batch]:
        pixels, places = decoded.pixels(), decoded.places(self.images.rows)
        for ordinals in self._ordinals():
            images = torch.empty(self.batch_size, *pixels.shape[1:], dtype=torch.uint8, pin_memory=self.pin)
            torch.index_select(pixels, 0, places[ordinals % len(places)], out=images)
            yield Batch(images, None, ordinals)


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the same endless batches, each copied to a CUDA device while the one before it is used.

    Errors of reading then come one batch earlier.
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
                # The other stream owns the memory and must not reuse it before this one has finished.
                pixels.record_stream(current)
        yield batch


class CropReader:
    """Answer ordinals, each with an item to read, with crops, the ordinals, why items are bad, and the replaced ones.

    There are no crops if `find` returns no image for an item.
    """

    def __init__(self, find: Find, cut: Callable[[Tensor, int], Tensor], reduction: Callable[..., int] | None) -> None:
        self.find, self.cut, self.reduction = find, cut, reduction

    def __getitem__(self, request: tuple[Tensor, Sequence[Any]]) -> tuple[Tensor, Tensor, dict[int, str], int]:
        crops: list[Tensor] = []
        bad: dict[int, str] = {}
        replaced = 0
        for ordinal, item in zip(request[0].tolist(), request[1], strict=True):
            image, own = self.find(ordinal, item, self.reduction and partial(self.reduction, ordinal), bad)
            if image is None:
                return torch.empty(0), request[0], bad, len(request[0])
            crops.append(self.cut(image, ordinal))
            replaced += not own
        return torch.stack(crops), request[0], bad, replaced


class _ImageOrNext:
    """Find the image of an index, or the next one that can be read; none among more in a row than may be bad in all."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.known_bad: dict[int, str] = {}

    def __call__(
        self, ordinal: int, index: int, reduction: Reduction | None, bad: dict[int, str]
    ) -> tuple[Tensor | None, bool]:
        for candidate in range(index, index + int(MAX_BAD * len(self.images)) + 2):
            number = candidate % len(self.images)
            if number not in self.known_bad:
                try:
                    return self.images.decode(number, reduction), candidate == index
                except BadImage as reason:
                    self.known_bad[number] = f"{self.images.describe(number)}: {reason}"
            bad[number] = self.known_bad[number]
        return None, False
