"""Decoded images in a file that is mapped into memory, for data whose decoding takes the time of training."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..errors import ByolTimmError, one_line
from .batches import LOAD_BYTES
from .decoding import BadImage, Reduction, ValueRange
from .images import Images, fingerprint, readable
from .workers import BadImages, OnBadImage, in_workers, worker_count

logger = logging.getLogger(__name__)

Array = NDArray[Any]
FORMAT = 1
PIXELS, INDEX = "pixels.bin", "index.json"
# Images that are decoded to learn how much all of them take.
SAMPLE = 32
# Seconds between looks after another process that writes.
WAIT = 0.5


def open_cache(
    images: Images,
    folder: str | Path,
    *,
    side: int | None = None,
    workers: int | None = None,
    on_bad_image: OnBadImage = "skip",
    poll: Callable[[], object] = lambda: None,
) -> Images:
    """The same images, read from pixels in `folder`: written there first, unless they are complete.

    Images whose shorter side has more than `side` pixels are shrunk to that (bicubic, antialiased); None keeps them as
    they are, to the same bits. Every set of images has a folder of its own below `folder`, by `sources.fingerprint` and
    side. Of several processes one writes and the others wait; a folder that has its name is whole, whatever was killed.
    Images that cannot be read stay unreadable, for the same reason; too many of them, or any with
    `on_bad_image="error"`, are a `ByolTimmError`, as is a folder that cannot be written or holds too little.

    poll: called while this takes long, to interrupt by raising.
    """
    key = hashlib.sha256(f"{FORMAT} {side} {fingerprint(images)}".encode()).hexdigest()[:16]
    final = Path(folder).expanduser() / key
    if not final.exists():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with _alone(final.with_name(f".lock-{key}"), poll):
                if not final.exists():
                    _write(images, final, side, workers, BadImages(images.name, len(images), on_bad_image), poll)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise ByolTimmError(
                f"cannot write to --decoded_cache {folder} ({reason}). Choose another folder"
            ) from error
    source = _open(images, final)
    logger.info("images are read decoded from %s (%.1f GB)", final, (final / PIXELS).stat().st_size / 2**30)
    return dataclasses.replace(images, source=source, rows=np.arange(len(images)))


@dataclass(frozen=True)
class _Decoded:
    """Images one after the other in a file, uint8 [H, W, channels] each; `shapes` int64 [N, 2], `starts` int64 [N]."""

    originals: Images = field(repr=False)
    file: Path
    shapes: Array
    starts: Array
    bad: dict[int, str]

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array:
        if row in self.bad:
            raise BadImage(self.bad[row])
        height, width = self.shapes[row].tolist()
        try:
            # Mapped one by one, and to be written to privately, which torch asks for: of the whole file, Linux would
            # want as much memory as it has bytes.
            pixels = np.memmap(self.file, np.uint8, "c", int(self.starts[row]), (height, width, channels))
        except (OSError, ValueError) as error:
            raise BadImage(f"{self.file.name} of the decoded cache: {error}") from error
        return pixels.transpose(2, 0, 1)

    def side(self, row: int) -> int:
        return int(self.shapes[row].max())

    def highest(self, row: int) -> int | None:
        return None

    def describe(self, row: int) -> str:
        return self.originals.describe(row)

    def identity(self, rows: Array) -> Iterable[bytes]:
        return self.originals.subset(rows).identity()


def _open(images: Images, folder: Path) -> _Decoded:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        found = (folder / PIXELS).stat().st_size
    except (OSError, ValueError) as error:
        raise ByolTimmError(f"decoded cache {folder} is damaged ({error}). Delete it") from error
    shapes = np.array(index["shapes"], dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum(shapes.prod(axis=1) * images.channels)
    if len(shapes) != len(images) or found != ends[-1]:
        raise ByolTimmError(f"decoded cache {folder} is damaged ({found} bytes of {ends[-1]}). Delete it")
    bad = {int(row): reason for row, reason in index["bad"].items()}
    return _Decoded(images, folder / PIXELS, shapes, np.concatenate([[0], ends[:-1]]), bad)


def _write(
    images: Images, final: Path, side: int | None, workers: int | None, bad: BadImages, poll: Callable[[], object]
) -> None:
    """Decode all images into files beside `final`, then give them that name."""

    def bytes_of(index: int) -> tuple[int, int]:
        image = images.decode(index)
        return image.numel(), shrink(image, side).numel()

    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    decoded, kept = zip(*readable(images, SAMPLE, bytes_of), strict=True)
    needed, free = len(images) * float(np.mean(kept)), shutil.disk_usage(final.parent).free
    if needed > free:
        raise ByolTimmError(
            f"{len(images):,} decoded images take about {needed / 2**30:.1f} GB, {final.parent} has "
            f"{free / 2**30:.1f} GB free. Lower --decoded_side, or leave out --decoded_cache"
        )
    chunk = max(1, min(256, LOAD_BYTES // max(decoded)))
    workers = worker_count(workers, len(images) * float(np.mean(decoded)))
    requests = torch.arange(len(images)).split(chunk)
    answers = in_workers(_Reader(images, side), requests, workers, chunk * max(kept))
    temporary.mkdir()
    try:
        with contextlib.closing(answers), open(temporary / PIXELS, "xb") as file:
            index = _decode(images, answers, file, bad, poll)
            _flush(file)
        with open(temporary / INDEX, "xb") as file:
            file.write(json.dumps(index).encode())
            _flush(file)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _decode(
    images: Images, answers: Iterable[Any], file: BinaryIO, bad: BadImages, poll: Callable[[], object]
) -> dict[str, Any]:
    """Write the pixels that workers decoded to a file; returns the index of it."""
    shapes: list[list[int]] = []
    reasons: dict[int, str] = {}
    with tqdm(total=len(images), unit="image", desc="decoding to disk", disable=None) as bar:
        for pixels, found, unreadable in answers:
            poll()
            bad.note({index: f"{images.describe(index)}: {reason}" for index, reason in unreadable.items()})
            bad.check(len(bad), len(images))
            file.write(pixels.numpy())
            shapes += found.tolist()
            reasons |= unreadable
            bar.update(len(found))
    return {"shapes": shapes, "bad": reasons}


class _Reader:
    """Answers a request for indices with their pixels one after the other, shapes (0 x 0 if bad), and why bad."""

    def __init__(self, images: Images, side: int | None) -> None:
        self.images, self.side = images, side

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor, dict[int, str]]:
        pixels = [torch.empty(0, dtype=torch.uint8)]
        shapes = torch.zeros(len(indices), 2, dtype=torch.int64)
        bad = {}
        for index, shape in zip(indices.tolist(), shapes, strict=True):
            try:
                image = shrink(self.images.decode(index), self.side)
            except BadImage as reason:
                bad[index] = str(reason)
            else:
                shape[0], shape[1] = image.shape[1:]
                pixels.append(image.permute(1, 2, 0).flatten())
        return torch.cat(pixels), shapes, bad


def shrink(image: Tensor, side: int | None) -> Tensor:
    """A uint8 image [C, H, W] whose shorter side has at most `side` pixels."""
    shorter = min(image.shape[1:])
    if side is None or shorter <= side:
        return image
    size = [max(side, round(length * side / shorter)) for length in image.shape[1:]]
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]


@contextlib.contextmanager
def _alone(path: Path, poll: Callable[[], object]) -> Iterator[None]:
    """Hold the lock of that file, once no other process does; the kernel takes it from one that ends."""
    with open(path, "a", encoding="utf-8") as file:
        told = False
        while True:
            try:
                # A POSIX lock, which forked workers do not inherit.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    logger.info("waiting for another process that decodes the same images to %s", path.parent)
                told = True
                poll()
                time.sleep(WAIT)
        yield


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
