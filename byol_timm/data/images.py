"""Data sets of images that decode one at a time."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ByolTimmError
from .decoding import BadImage, Reduction, ValueRange

logger = logging.getLogger(__name__)

Array = NDArray[Any]
T = TypeVar("T")
TRAIN, TEST_NAMES = "train", ("test", "validation", "valid", "val")
# Of 16-bit images whose values all lie below, fewer than 64 grey levels of 256 are left.
FEW_LEVELS = 1 << 14


@dataclass(frozen=True)
class Splits:
    """Images to train on, labelled images held out for evaluation (None without labels), and where both come from."""

    train: "Images"
    test: "Images | None"
    note: str

    @property
    def bank(self) -> "Images":
        """Training images that can be read in any order."""
        return self.train


class _Source(Protocol):
    """Where images lie. `read` (uint8 [channels, H, W]), `side` and `highest`, as in `decoding`, raise `BadImage`."""

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array: ...
    def side(self, row: int) -> int: ...
    def highest(self, row: int) -> int | None: ...
    def describe(self, row: int) -> str: ...
    def identity(self, rows: Array) -> Iterable[bytes]: ...


@dataclass(frozen=True, eq=False)
class Images:
    """Images in a fixed order, decoded one by one; `labels` (int64, -1: unlabelled) index `class_names`."""

    name: str
    channels: int
    labels: Array | None
    class_names: tuple[str, ...]
    source: _Source = field(repr=False)
    rows: Array = field(repr=False)
    value_range: ValueRange = None

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, index: int, reduction: Reduction | None = None) -> Tensor:
        """The image, uint8 [channels, H, W], upright; raises `BadImage` with the reason.

        With a reduction, JPEG files are decoded so many times smaller as it allows.
        """
        pixels = self.source.read(int(self.rows[index]), self.channels, reduction, self.value_range)
        return torch.from_numpy(pixels)

    def describe(self, index: int) -> str:
        """A name by which a user finds the image: its file, or its row."""
        return self.source.describe(int(self.rows[index]))

    def subset(self, indices: Array | Sequence[int]) -> "Images":
        """These images in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, labels=labels, rows=self.rows[indices])

    def identity(self) -> Iterable[bytes]:
        """What tells these images from others."""
        return self.source.identity(self.rows)

    def side(self) -> int:
        """The longer side in pixels of a typical image."""
        return int(np.median(self._sides(9)))

    def share_below(self, side: float) -> float:
        """The share of images, 0 to 1, whose longer side has fewer pixels; asked of a hundred of them."""
        return float(np.mean(np.array(self._sides(100)) < side))

    def highest(self) -> int | None:
        """The highest value of a few 16-bit images, None where they have other values."""
        found = list(readable(self, 9, lambda index: self.source.highest(int(self.rows[index]))))
        return max((value for value in found if value is not None), default=None)

    def _sides(self, count: int) -> list[int]:
        return list(readable(self, count, lambda index: self.source.side(int(self.rows[index]))))


def warn_of_few_levels(images: Images) -> None:
    """Say that 16-bit images use little of their range, where `value_range` leaves them all of it."""
    if images.value_range is None and (highest := images.highest()) and highest < FEW_LEVELS:
        logger.warning(
            "16-bit images of %s reach %d of 65535: %d of 256 grey levels are left. Give the range that they use, as "
            "in --value_range 0 %d",
            images.name,
            highest,
            round(highest / 257) + 1,
            2 ** highest.bit_length() - 1,
        )


class Identified(Protocol):
    """Images that can be told from others."""

    @property
    def channels(self) -> int: ...
    @property
    def value_range(self) -> ValueRange: ...
    def __len__(self) -> int: ...
    def identity(self) -> Iterable[bytes]: ...


def fingerprint(images: Identified) -> str:
    """A hash of which images these are: names and sizes, content where that is cheap, number and channels."""
    digest = hashlib.sha256(f"{len(images)} {images.channels}".encode())
    if images.value_range is not None:
        digest.update(" {!r} {!r}".format(*map(float, images.value_range)).encode())
    for part in images.identity():
        digest.update(part)
    return digest.hexdigest()


def spread(n: int, count: int) -> list[int]:
    """At most `count` of the indices below `n`, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int)).tolist()


def readable(images: Images, count: int, read: Callable[[int], T]) -> Iterator[T]:
    """What `read` gives of at most `count` images, evenly spread, without those that it cannot read; `ByolTimmError`
    if that leaves none."""
    found, reason = False, "there is none"
    for index in spread(len(images), count):
        try:
            result = read(index)
        except BadImage as error:
            reason = f"{images.describe(index)}: {error}"
        else:
            found = True
            yield result
    if not found:
        raise ByolTimmError(f"no image of {images.name} can be read ({reason}). Check the files")


@dataclass(frozen=True)
class _Part:
    """One split as its source has it; `classes` are the names of its images' classes, None where unlabelled."""

    source: _Source
    size: int
    classes: Sequence[str | None] | None
    class_names: tuple[str, ...] = ()


def printable(name: str) -> str:
    """A file name in one line, whatever is in it."""
    return " ".join(name.encode(errors="backslashreplace").decode().split())
