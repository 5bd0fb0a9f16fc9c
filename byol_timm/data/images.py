"""Images that are decoded one at a time."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ByolTimmError
from .decoding import BadImage, Reduction, ValueRange, decode, highest_value, longer_side

logger = logging.getLogger(__name__)

Array = NDArray[Any]
T = TypeVar("T")
TRAIN, TEST_NAMES = "train", ("test", "validation", "valid", "val")
# 16-bit images whose values all lie below keep fewer than 64 of 256 grey levels.
FEW_LEVELS = 1 << 14


@dataclass(frozen=True)
class Splits:
    """Training images, labelled held-out images (None without labels), and a note on where both come from."""

    train: "Images"
    test: "Images | None"
    note: str

    @property
    def bank(self) -> "Images":
        """Return training images that can be read in any order."""
        return self.train


class Source(Protocol):
    """The place of images. `read` (uint8 [channels, H, W]), `side` and `highest` raise `BadImage`."""

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array: ...
    def side(self, row: int) -> int: ...
    def highest(self, row: int) -> int | None: ...
    def describe(self, row: int) -> str: ...
    def identity(self, rows: Array) -> Iterable[bytes]: ...


class Encoded:
    """A source of image files or arrays, one a row, which `content` returns or raises `BadImage`."""

    def content(self, row: int) -> BinaryIO | Array:
        raise NotImplementedError

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array:
        with self._opened(row) as content:
            return decode(content, channels, reduction, value_range)

    def side(self, row: int) -> int:
        with self._opened(row) as content:
            return longer_side(content)

    def highest(self, row: int) -> int | None:
        with self._opened(row) as content:
            return highest_value(content)

    def _opened(self, row: int) -> AbstractContextManager[BinaryIO | Array]:
        content = self.content(row)
        return nullcontext(content) if isinstance(content, np.ndarray) else content


@dataclass(frozen=True, eq=False)
class Images:
    """Images in a fixed order, decoded one by one; `labels` (int64, -1: unlabelled) index `class_names`."""

    name: str
    channels: int
    labels: Array | None
    class_names: tuple[str, ...]
    source: Source = field(repr=False)
    rows: Array = field(repr=False)
    value_range: ValueRange = None

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, index: int, reduction: Reduction | None = None) -> Tensor:
        """Return the image, uint8 [channels, H, W], upright; JPEG smaller by the factor `reduction` returns.

        Raises `BadImage` with the reason.
        """
        pixels = self.source.read(int(self.rows[index]), self.channels, reduction, self.value_range)
        return torch.from_numpy(pixels)

    def describe(self, index: int) -> str:
        """Return the file or row of the image, so that a user can find it."""
        return self.source.describe(int(self.rows[index]))

    def subset(self, indices: Array | Sequence[int]) -> "Images":
        """Return these images in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, labels=labels, rows=self.rows[indices])

    def identity(self) -> Iterable[bytes]:
        """Yield what distinguishes these images from others."""
        return self.source.identity(self.rows)

    def side(self) -> int:
        """Return the longer side in pixels of a typical image."""
        return int(np.median(self._sides(9)))

    def share_below(self, side: float) -> float:
        """Return the share of a hundred images (0 to 1) whose longer side has fewer pixels."""
        return float(np.mean(np.array(self._sides(100)) < side))

    def highest(self) -> int | None:
        """Return the highest value of a few 16-bit images, None for other images."""
        found = list(readable(self, 9, lambda index: self.source.highest(int(self.rows[index]))))
        return max((value for value in found if value is not None), default=None)

    def _sides(self, count: int) -> list[int]:
        return list(readable(self, count, lambda index: self.source.side(int(self.rows[index]))))


def warn_of_few_levels(images: Images) -> None:
    """Warn if 16-bit images without a `value_range` use little of their range."""
    if images.value_range is None and (highest := images.highest()) and highest < FEW_LEVELS:
        logger.warning(
            "16-bit images of %s use values up to %d of 65535, so %d of 256 grey levels remain. Give the range that "
            "they use, for example --value_range 0 %d",
            images.name,
            highest,
            round(highest / 257) + 1,
            2 ** highest.bit_length() - 1,
        )


class Identified(Protocol):
    """Images with a `fingerprint`."""

    @property
    def channels(self) -> int: ...
    @property
    def value_range(self) -> ValueRange: ...
    def __len__(self) -> int: ...
    def identity(self) -> Iterable[bytes]: ...


def fingerprint(images: Identified) -> str:
    """Return a hash of which images these are: names and sizes, content where that is cheap, number and channels."""
    digest = hashlib.sha256(f"{len(images)} {images.channels}".encode())
    if images.value_range is not None:
        digest.update(" {!r} {!r}".format(*map(float, images.value_range)).encode())
    for part in images.identity():
        digest.update(part)
    return digest.hexdigest()


def spread(n: int, count: int) -> list[int]:
    """Return at most `count` of the indices below `n`, evenly spread."""
    indices: list[int] = np.unique(np.linspace(0, n - 1, min(n, count)).astype(int)).tolist()
    return indices


def readable(images: Images, count: int, read: Callable[[int], T]) -> Iterator[T]:
    """Yield `read(index)` for at most `count` images, evenly spread; skip `BadImage`, and raise `ByolTimmError` if no
    image can be read."""
    found, reason = False, "there are none"
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
class Part:
    """One split of a source; `classes` are the class names of its images, None where unlabelled."""

    source: Source
    size: int
    classes: Sequence[str | None] | None
    class_names: tuple[str, ...] = ()


def printable(name: str) -> str:
    """Return any file name as one line of text."""
    return " ".join(name.encode(errors="backslashreplace").decode().split())
