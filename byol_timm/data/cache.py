"""Decoded images in one memory-mapped file that all workers and all processes of a host share."""

import atexit
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..errors import ByolTimmError, one_line
from .decoding import BadImage, Reduction, ValueRange
from .images import Images, fingerprint, readable
from .workers import BadImages, OnBadImage, in_workers, worker_count

logger = logging.getLogger(__name__)

Array = NDArray[Any]
Cache = Literal["ram", "disk", "none"]
FORMAT = 2
# Images of one shape are held in memory by default, and read whole from disk, up to this many bytes.
SMALL_BYTES = 2 * 2**30
# Images that are decoded to estimate the bytes of all.
SAMPLE = 16
# Bytes that a worker returns at a time: few, because containers have little shared memory.
CHUNK_BYTES = 2**21
# Seconds between looks at the lock of another process.
WAIT = 0.5
# The last bytes of a file: where its pixels end and its index starts.
END_BYTES = 8
# In the note of a process that found images of several shapes, which None does not decode.
NOTHING = "nothing"


def open_cache(
    images: Images,
    cache: Cache | None,
    folder: str | Path | None = None,
    *,
    workers: int | None = None,
    on_bad_image: OnBadImage = "skip",
    poll: Callable[[], object] = lambda: None,
) -> Images:
    """Return the same images, read from a file of their pixels that one process of this host writes for all.

    cache: "ram" keeps the file in memory until the last process that uses it ends, however it ends. "disk" keeps it in
        `folder`, where later calls find it by the fingerprint of the images; a file under its final name is complete.
        "none" returns `images`. None is "ram" for images of one shape that take at most 2 GB, else "none".
    poll: called while this takes long; may raise to interrupt.

    An image that cannot be read stays a `BadImage` with the same reason. Too many of them, any with
    `on_bad_image="error"`, and too little room raise `ByolTimmError`.
    """
    if cache == "none":
        return images
    bad = BadImages(images.name, len(images), on_bad_image, quiet=True)
    fill = partial(_fill, images, cache, workers=workers, bad=bad, poll=poll)
    if cache == "disk":
        file: _File | None = _on_disk(images, Path(folder or "").expanduser(), fill, poll)
    else:
        file = _in_ram(images, fill, poll)
    if file is None:
        return images
    if cache is not None:
        where = f"from {file.path}" if cache == "disk" else "from memory"
        logger.info("images are read decoded %s (%.1f GB)", where, file.path.stat().st_size / 2**30)
    return dataclasses.replace(images, source=_open(images, file), rows=np.arange(len(images)))


class _File:
    """A file of decoded images, which this process and its workers reach by `path`; `close` is called with the last
    reference to it."""

    def __init__(self, path: str | Path, close: Callable[[], object] = lambda: None) -> None:
        self.path = Path(path)
        weakref.finalize(self, close)


@dataclass(frozen=True)
class Decoded:
    """Images one after the other in a file; `shapes` int64 [N, 2], `starts` int64 [N].

    Each is uint8 [channels, H, W] if `planes`, which only a file of images of one shape has, else [H, W, channels].
    """

    originals: Images = field(repr=False)
    file: Path
    planes: bool
    shapes: Array
    starts: Array
    bad: dict[int, str]
    handle: _File | None = field(repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"handle": None}

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array:
        if row in self.bad:
            raise BadImage(self.bad[row])
        height, width = self.shapes[row].tolist()
        shape = (channels, height, width) if self.planes else (height, width, channels)
        pixels = self._map(int(self.starts[row]), shape)
        return pixels if self.planes else pixels.transpose(2, 0, 1)

    def pixels(self) -> Tensor:
        """Return all images that can be read, uint8 [M, channels, H, W], of a file with planes."""
        shape = (len(self.shapes) - len(self.bad), self.originals.channels, *self.shapes.max(axis=0).tolist())
        return torch.from_numpy(self._map(0, shape))

    def places(self, rows: Array) -> Tensor:
        """Return where in `pixels` these rows are; for one that cannot be read, the next one that can."""
        good = self.shapes[:, 0] > 0
        return torch.from_numpy(((np.cumsum(good) - good) % good.sum())[rows])

    def bad_among(self, images: Images) -> dict[int, str]:
        """Return which of these images, whose source this is, cannot be read, and why."""
        indices = np.flatnonzero(self.shapes[images.rows, 0] == 0).tolist()
        return {index: f"{images.describe(index)}: {self.bad[int(images.rows[index])]}" for index in indices}

    def side(self, row: int) -> int:
        return int(self.shapes[row].max())

    def highest(self, row: int) -> int | None:
        return None

    def describe(self, row: int) -> str:
        return self.originals.describe(row)

    def identity(self, rows: Array) -> Iterable[bytes]:
        return self.originals.subset(rows).identity()

    def _map(self, start: int, shape: tuple[int, ...]) -> Array:
        try:
            # Private and writable, because torch warns about read-only memory.
            return np.memmap(self.file, np.uint8, "c", start, shape)
        except (OSError, ValueError) as error:
            raise BadImage(f"{self.file.name} of the decoded images: {error}") from error


def _open(images: Images, file: _File) -> Decoded:
    try:
        with open(file.path, "rb") as opened:
            opened.seek(-END_BYTES, os.SEEK_END)
            end = int.from_bytes(opened.read(), "little")
            opened.seek(min(end, opened.tell()))
            index = json.loads(opened.read()[:-END_BYTES])
        shapes = np.array(index["shapes"], dtype=np.int64).reshape(-1, 2)
        ends = np.cumsum(shapes.prod(axis=1) * images.channels)
        if len(shapes) != len(images) or ends[-1] != end:
            raise ValueError(f"{end} bytes of {ends[-1]}")
    except (OSError, ValueError) as error:
        raise ByolTimmError(f"file of decoded images {file.path} is damaged ({one_line(error)}). Delete it") from error
    bad = {int(row): reason for row, reason in index["bad"].items()}
    return Decoded(images, file.path, index["planes"], shapes, np.concatenate([[0], ends[:-1]]), bad, file)


# Where the file is


def _on_disk(images: Images, folder: Path, fill: Callable[[IO[bytes]], bool], poll: Callable[[], object]) -> _File:
    key = _key(images)
    final = folder / key
    try:
        if not final.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder / f".lock-{key}", poll):
                if not final.exists():
                    _write_disk(folder / f".tmp-{key}", final, fill)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise ByolTimmError(f"cannot write to --cache_dir {folder} ({reason}). Choose another folder") from error
    return _File(final)


def _write_disk(temporary: Path, final: Path, fill: Callable[[IO[bytes]], bool]) -> None:
    try:
        with open(temporary, "wb") as file:
            fill(file)
            os.fsync(file.fileno())
        temporary.rename(final)
    except BaseException:
        temporary.unlink()
        raise


def _in_ram(images: Images, fill: Callable[[IO[bytes]], bool], poll: Callable[[], object]) -> _File | None:
    """Return memory without a name, which the kernel frees with its last process; None where `fill` keeps nothing.

    Processes of one launch find it by a note: the path to it through the process that decoded.
    """
    if sys.platform != "linux" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _fill_ram(fill)
    launch = f"{images.name} {os.getppid()} {os.environ.get('MASTER_ADDR')} {os.environ.get('MASTER_PORT')}"
    path = _private_folder() / _key(images, launch)
    with _alone(path, poll) as note:
        note.seek(0)
        named = note.read().split()
        if named == [NOTHING]:
            return None
        with contextlib.suppress(OSError, ValueError):
            process_file, inode = named
            shared = open(process_file, "rb")
            if os.fstat(shared.fileno()).st_ino == int(inode):
                return _File(_path_here(shared), shared.close)
            shared.close()
        file = _fill_ram(fill)
        note.truncate(0)
        note.write(NOTHING if file is None else f"{file.path} {file.path.stat().st_ino}")
        atexit.register(path.unlink, missing_ok=True)
        return file


def _fill_ram(fill: Callable[[IO[bytes]], bool]) -> _File | None:
    if sys.platform == "linux":
        memory: IO[bytes] = open(os.memfd_create("byol_timm"), "w+b")
        file = _File(_path_here(memory), memory.close)
    else:
        memory = tempfile.NamedTemporaryFile()
        file = _File(memory.name, memory.close)
    kept = fill(memory)
    memory.flush()
    return file if kept else None


def _path_here(file: IO[bytes]) -> str:
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _private_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"byol_timm-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise ByolTimmError(f"cannot write to {folder} ({error.strerror}). Set TMPDIR to another folder") from error
    if owner != os.getuid():
        raise ByolTimmError(f"{folder} belongs to another user. Set TMPDIR to another folder")
    return folder


def _key(images: Images, *others: str) -> str:
    return hashlib.sha256(" ".join([str(FORMAT), fingerprint(images), *others]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(path: Path, poll: Callable[[], object]) -> Iterator[IO[str]]:
    """Open a file and hold its lock once no other process does; the kernel releases that of a process that ends."""
    with open(path, "a+", encoding="utf-8") as file:
        waiting = False
        while True:
            try:
                # A POSIX lock, which forked workers do not inherit.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    logger.info("waiting for another process that decodes the same images")
                waiting = True
                poll()
                time.sleep(WAIT)
        yield file


# Decoding


def _fill(
    images: Images,
    cache: Cache | None,
    file: IO[bytes],
    *,
    workers: int | None,
    bad: BadImages,
    poll: Callable[[], object],
) -> bool:
    """Decode all images into an empty file; False if None for `cache` means not to."""
    sample = list(readable(images, SAMPLE, lambda index: images.decode(index).shape))
    num_bytes = len(images) * float(np.mean([shape.numel() for shape in sample]))
    planes = len(set(sample)) == 1 and (cache == "ram" or num_bytes <= SMALL_BYTES)
    if cache is None and not planes:
        return False
    place, free = "memory", psutil.virtual_memory().available
    if cache == "disk":
        place, free = "--cache_dir", shutil.disk_usage(file.name).free
    if num_bytes > free:
        raise ByolTimmError(
            f"{len(images):,} decoded images take about {num_bytes / 2**30:.1f} GB, {place} has {free / 2**30:.1f} GB "
            "free. Use --cache none, or --cache disk with a --cache_dir that has more"
        )
    largest = max(shape.numel() for shape in sample)
    if planes and _write(images, file, sample[0], largest, workers, bad, poll):
        return True
    if cache is None:
        return False
    file.seek(0)
    file.truncate()
    bad.clear()
    return _write(images, file, None, largest, workers, bad, poll)


def _write(
    images: Images,
    file: IO[bytes],
    shape: torch.Size | None,
    largest: int,
    workers: int | None,
    bad: BadImages,
    poll: Callable[[], object],
) -> bool:
    """Write pixels and index; as planes if `shape` is given, and then stop and return False at another shape."""
    shapes: list[list[int]] = []
    reasons: dict[int, str] = {}
    chunk = max(1, min(256, CHUNK_BYTES // largest))
    requests, count = torch.arange(len(images)).split(chunk), worker_count(workers, len(images) * largest)
    answers = in_workers(_Reader(images, shape is not None), requests, count, chunk * largest)
    with contextlib.closing(answers), tqdm(total=len(images), unit="image", desc="decoding", disable=None) as bar:
        for pixels, found, unreadable in answers:
            poll()
            bad.note({index: f"{images.describe(index)}: {reason}" for index, reason in unreadable.items()})
            bad.check(len(bad), len(images))
            if shape is not None and any(size not in ([0, 0], list(shape[1:])) for size in found):
                return False
            file.write(pixels.numpy())
            shapes += found
            reasons |= unreadable
            bar.update(len(found))
    end = file.tell()
    file.write(json.dumps({"planes": shape is not None, "shapes": shapes, "bad": reasons}).encode())
    file.write(end.to_bytes(END_BYTES, "little"))
    return True


class _Reader:
    """Answer indices with their pixels in one tensor, their [height, width] ([0, 0] if bad), and why bad."""

    def __init__(self, images: Images, planes: bool) -> None:
        self.images, self.planes = images, planes

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, list[list[int]], dict[int, str]]:
        pixels, shapes, bad = [torch.empty(0, dtype=torch.uint8)], [], {}
        for index in indices.tolist():
            try:
                image = self.images.decode(index)
            except BadImage as reason:
                bad[index] = str(reason)
                shapes.append([0, 0])
            else:
                shapes.append(list(image.shape[1:]))
                pixels.append((image if self.planes else image.permute(1, 2, 0)).flatten())
        return torch.cat(pixels), shapes, bad
