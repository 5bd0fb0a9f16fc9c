"""Images in: from files, tables or the Hub to uint8 batches whose order is a function of the seed and the step."""

import contextlib
import hashlib
import io
import itertools
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .errors import ByolTimmError

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

Array = NDArray[Any]
T = TypeVar("T")
OnBadImage = Literal["skip", "error"]

TRAIN, TEST_NAMES = "train", ("test", "validation", "valid", "val")
HELD_OUT, DIGITS_HELD_OUT = 0.1, 0.2
# Formats that are read, whatever the name of the file says: none of them runs a program, as PostScript would.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .j2k .avif .npy".split()
)
TABLES = (".parquet", ".arrow")
HUB_ID = r"(?!.*\.(parquet|arrow)$)[\w-][\w.-]*(/[\w-][\w.-]*)?"
MAX_BAD = 0.05
# Seconds between looks after workers that give nothing, and until they count as hanging.
WORKER_POLL, WORKER_TIMEOUT = 5.0, 600.0
# Images of so many bytes in all are decoded before worker processes would have started.
FEW_BYTES = 2**24
PREFETCH = 2
# Of an answer while images are decoded into memory: little, as the shared memory of containers is.
LOAD_BYTES = 2**21


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


class WorkerError(ByolTimmError):
    """A data loading process died or hangs."""

    exit_code = 1


@dataclass(frozen=True)
class Splits:
    """Images to train on, labelled images held out for evaluation (None without labels), and where both come from."""

    train: "Images"
    test: "Images | None"
    note: str


@dataclass(frozen=True)
class Batch:
    """Images of one forward pass: whole ones (uint8 [B, C, H, W]) or their crops (uint8 [B, 2, C, height, width]).

    `ordinals` (int64 [B], on the CPU) are epoch * number of images + index: what augmentations are drawn from.
    """

    images: Tensor | None
    crops: Tensor | None
    ordinals: Tensor


class _Source(Protocol):
    """Where images lie. `read` and `side` raise `BadImage`."""

    def read(self, row: int, channels: int) -> Array: ...  # uint8 [channels, H, W]
    def side(self, row: int) -> int: ...
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

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, index: int) -> Tensor:
        """The image, uint8 [channels, H, W], upright; raises `BadImage` with the reason."""
        return torch.from_numpy(self.source.read(int(self.rows[index]), self.channels))

    def describe(self, index: int) -> str:
        """A name by which a user finds the image: its file, or its row."""
        return self.source.describe(int(self.rows[index]))

    def subset(self, indices: Array | Sequence[int]) -> "Images":
        """These images in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[indices]
        return Images(self.name, self.channels, labels, self.class_names, self.source, self.rows[indices])

    def side(self) -> int:
        """The longer side in pixels of a typical image."""
        return int(np.median(list(_readable(self, 9, lambda index: self.source.side(int(self.rows[index]))))))


def open_dataset(
    dataset: str = "digits",
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    in_chans: int = 3,
    seed: int = 0,
) -> Splits:
    """The images that `dataset` names: `digits`, a folder of images, parquet or arrow files, or a Hub dataset id.

    `digits` are scikit-learn's 1,797 scans. The classes of a folder are its first-level folders, its splits folders
    `train` and `test` (or `validation`, `valid`, `val`). Without a labelled test split, a tenth of every class is held
    out by `seed`; without labels nothing is. `in_chans` is 1 (grey), 3 (RGB), 4 (RGBA), or as many channels as TIFF
    stacks and arrays have. Raises `ByolTimmError`.
    """
    path = Path(dataset).expanduser()
    files = _scan(path) if path.is_dir() and dataset != "digits" else None
    held_out = HELD_OUT
    if files and files.tables and files.images:
        count = f"{files.tables} tables and {len(files.images)} images"
        raise ByolTimmError(f"data folder {dataset} holds {count}. give the folder of one kind")
    if dataset == "digits" or (files and not files.tables):
        for flag, value in dict(dataset_config=config, image_column=image_column, label_column=label_column).items():
            if value is not None:
                raise ByolTimmError(f"--{flag} ({value}) is for tables and {dataset} is none. leave it out")
    if dataset == "digits":
        parts, held_out = _digits(), DIGITS_HELD_OUT
    elif files and not files.tables:
        parts = _folder(path, files, split)
    elif path.is_file() and path.suffix not in TABLES:
        raise ByolTimmError(f"dataset {dataset} is a file. give a folder of images, or a .parquet or .arrow file")
    elif path.exists() or re.fullmatch(HUB_ID, dataset):
        parts = _columns(_load_tables(dataset, path, config), dataset, image_column, label_column)
    else:
        raise ByolTimmError(f"data folder {dataset} does not exist. check --dataset")
    return _choose(parts, dataset, split, in_chans, seed, held_out)


def fingerprint(images: Images) -> str:
    """A hash of which images these are: names and sizes, content where that is cheap, number and channels."""
    digest = hashlib.sha256(f"{len(images)} {images.channels}".encode())
    for part in images.source.identity(images.rows):
        digest.update(part)
    return digest.hexdigest()


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of `n` images in that epoch, an int64 permutation."""
    return torch.from_numpy(np.random.default_rng((seed % 2**64, epoch)).permutation(n))


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
    processes (None: one per core, at most 8; 0: this one) decode and come with what `cut(image, ordinal)` made.
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
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start_step: int = 0,
        workers: int | None = None,
        memory_limit: float = 2 * 2**30,
        on_bad_image: OnBadImage = "skip",
    ) -> None:
        micro_batches, rest = divmod(global_batch, batch_size * world)
        if rest or not micro_batches:
            raise ByolTimmError(f"global batch {global_batch} is not a multiple of {batch_size} x {world} processes")
        if len(images) < global_batch:
            product = f"{batch_size} x {world * micro_batches}"
            raise ByolTimmError(
                f"dataset has {len(images)} images but the global batch is {global_batch} ({product}). "
                "lower --batch_size, the processes or the accumulation"
            )
        self.images, self.seed, self.start_step = images, seed, start_step
        self.batch_size, self.global_batch, self.rank, self.world = batch_size, global_batch, rank, world
        self.on_bad_image = on_bad_image
        self.workers = workers
        self.bad: dict[int, str] = {}
        self._cut = cut
        self._running: Generator[Batch] | None = None
        self._pixels = self._load(memory_limit)

    @property
    def in_memory(self) -> bool:
        """Whether all images are held decoded."""
        return self._pixels is not None

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
        crops = self._cut(next(_readable(self.images, 100, self.images.decode)), 0)
        reader = _CropReader(self.images, self._cut)
        seen = replaced = 0
        answers = _stream(reader, self._ordinals(), _worker_count(self.workers), crops.numel() * self.batch_size)
        with contextlib.closing(answers):
            for crops, ordinals, bad in answers:
                self._note(bad)
                seen += len(ordinals)
                replaced += sum(ordinal % len(self.images) in bad for ordinal in ordinals.tolist())
                self._check(replaced, seen)
                self._check(len(self.bad), len(self.images))
                yield Batch(None, crops, ordinals)

    def _load(self, limit: float) -> Tensor | None:
        """All images, uint8 [N, C, H, W], or None if they differ in shape or take more than `limit` bytes."""
        n = len(self.images)
        shape, *others = {image.shape for image in _readable(self.images, 16, self.images.decode)}
        if others or n * shape.numel() > limit:
            return None
        pixels, good = torch.empty(n, *shape, dtype=torch.uint8), torch.zeros(n, dtype=torch.bool)
        chunk = max(1, min(256, LOAD_BYTES // shape.numel()))
        workers = _worker_count(self.workers, n * shape.numel())
        reader = _ImageReader(self.images, _SameShape(shape))
        answers = _stream(reader, torch.arange(n).split(chunk), workers, chunk * shape.numel())
        bar = tqdm(total=n, unit="image", desc="decoding", disable=True if self.rank else None)
        try:
            with contextlib.closing(answers), bar:
                for decoded, indices, bad in answers:
                    self._note(bad)
                    self._check(len(self.bad), n)
                    if len(indices):
                        pixels[indices], good[indices] = decoded, True
                    bar.update(len(indices) + len(bad))
        except _OtherShape:
            self.bad.clear()
            return None
        readable = good.nonzero()[:, 0]
        for index in self.bad:
            pixels[index] = pixels[readable[torch.searchsorted(readable, index) % len(readable)]]
        return pixels

    def _note(self, bad: dict[int, str]) -> None:
        """Remember and report images that cannot be read."""
        for index, reason in bad.items():
            if self.on_bad_image == "error":
                raise ByolTimmError(f"image cannot be read: {reason}. mend or remove it, or use --on_bad_image skip")
            if index not in self.bad:
                self.bad[index] = reason
                if len(self.bad) % 1000 == 1:
                    logger.warning("image cannot be read, the next one takes its place (%d): %s", len(self.bad), reason)

    def _check(self, count: int, seen: int) -> None:
        """Stop when too many images cannot be read."""
        if count > MAX_BAD * max(seen, min(1000, len(self.images))):
            first = next(iter(self.bad.values()))
            raise ByolTimmError(
                f"{count} of {seen} images of {self.images.name} cannot be read; the first: {first}. check the files"
            )


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
    count, size = _worker_count(workers, len(chosen) * example.numel()), transform(example).numel()
    bad: dict[int, str] = {}
    answers = _stream(_ImageReader(images, transform), chosen.split(batch_size), count, size * batch_size)
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
    return next(_readable(images, 100, images.decode))


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

    def __init__(self, images: Images, cut: Callable[[Tensor, int], Tensor]) -> None:
        self.images, self.cut = images, cut
        self.known_bad: dict[int, str] = {}

    def __getitem__(self, ordinals: Tensor) -> tuple[Tensor, Tensor, dict[int, str]]:
        crops: list[Tensor] = []
        bad: dict[int, str] = {}
        for ordinal in ordinals.tolist():
            image = self._decode(ordinal % len(self.images), bad)
            if image is None:
                return torch.empty(0), ordinals, bad
            crops.append(self.cut(image, ordinal))
        return torch.stack(crops), ordinals, bad

    def _decode(self, index: int, bad: dict[int, str]) -> Tensor | None:
        for candidate in range(index, index + int(MAX_BAD * len(self.images)) + 2):
            candidate %= len(self.images)
            if candidate not in self.known_bad:
                try:
                    return self.images.decode(candidate)
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


def _stream(reader: Any, requests: Iterable[Any], workers: int, request_bytes: int) -> Generator[Any]:
    """The reader's answers to the requests, in their order, prepared by worker processes."""
    if workers:
        _check_shared_memory(request_bytes * (workers * PREFETCH + 1))
    loader: DataLoader[Any] = DataLoader(
        reader,
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        timeout=WORKER_POLL if workers else 0,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    answers, waited = _started(loader), 0.0
    fault = f"data loading gave nothing for {WORKER_TIMEOUT:.0f} s"
    while waited < WORKER_TIMEOUT:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader timed out" in str(error):
                waited += WORKER_POLL
                continue
            death = re.match(r"DataLoader (worker \(pid.*(killed by signal: [\w ]+|exited unexpectedly))", str(error))
            if not death:
                raise
            fault = f"data loading {death[1]}"
            break
        waited = 0.0
        yield answer
    # Now that the error of the loader is gone nothing else holds it: this ends the other workers.
    del answers
    raise WorkerError(f"{fault}. often out of (shared) memory or a broken image: retry with --workers 0 to find it")


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """An iterator whose workers' deaths show when it is asked for more, not in whatever the process is doing then."""
    handler = signal.getsignal(signal.SIGCHLD)
    answers = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return answers


def _start_worker(_: int) -> None:
    # A group of its own: Ctrl-C and the launcher's signals are for the main process, which ends the workers.
    os.setpgid(0, 0)


def _check_shared_memory(needed: int, folder: str = "/dev/shm") -> None:
    if not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ByolTimmError(
            f"workers need about {needed / 2**20:.0f} MB of shared memory, {folder} has {free / 2**20:.0f} MB free. "
            "use --workers 0, fewer workers, or docker --shm-size"
        )


def _worker_count(workers: int | None, num_bytes: float = math.inf) -> int:
    """As many as asked for; else one per core of this process, at most 8, or none for few bytes of decoded images."""
    if workers is not None:
        return workers
    if num_bytes < FEW_BYTES:
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _spread(n: int, count: int) -> list[int]:
    """At most `count` of the indices below `n`, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int)).tolist()


def _readable(images: Images, count: int, read: Callable[[int], T]) -> Iterator[T]:
    """What `read` gives of at most `count` images, evenly spread, without those that it cannot read; `ByolTimmError`
    if that leaves none."""
    found, reason = False, "there is none"
    for index in _spread(len(images), count):
        try:
            result = read(index)
        except BadImage as error:
            reason = f"{images.describe(index)}: {error}"
        else:
            found = True
            yield result
    if not found:
        raise ByolTimmError(f"no image of {images.name} can be read ({reason}). check the files")


# Decoding


def decode(file: BinaryIO, channels: int) -> Array:
    """The image in an open file, uint8 [channels, H, W], upright; alpha on white unless `channels` is 4.

    Of an animation the first frame. 16-bit values are scaled to 8. Anything else that does not give that many channels,
    or that is not whole, is a `BadImage`.
    """
    with _opened(file) as image:
        if isinstance(image, np.ndarray):
            return from_array(image, channels)
        return _pixels(image, channels) if channels in (1, 3, 4) else _stack(image, channels)


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image | Array]:
    """The image or array in a file, by its content; whatever happens to it inside the context is a `BadImage`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            magic = file.read(6)
            file.seek(0)
            if magic == b"\x93NUMPY":
                yield np.load(file, allow_pickle=False)
            else:
                with Image.open(file, formats=_formats()) as image:
                    yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image in a known format" if magic else "the file is empty") from None
    except Exception as error:
        # Decoders raise all kinds: OSError, SyntaxError, ValueError, struct.error, MemoryError, ...
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error


def from_array(array: Array, channels: int) -> Array:
    """Uint8 [channels, H, W] of an array [H, W], [H, W, C] or [C, H, W], uint8 or uint16."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim != 3:
        raise BadImage(f"array of shape {array.shape} is no image")
    elif array.shape[2] == channels or array.shape[0] not in (1, channels):
        array = array.transpose(2, 0, 1)
    if array.dtype == np.uint16:
        array = _from_16_bit(array)
    if array.dtype != np.uint8:
        raise BadImage(f"{array.dtype} values, not uint8 or uint16")
    if len(array) == 1 and channels == 3:
        array = array.repeat(3, axis=0)
    if len(array) != channels:
        raise BadImage(f"{len(array)} channels, not {channels}")
    if not array.size:
        raise BadImage("no pixels")
    return np.ascontiguousarray(array)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _from_16_bit(values: Array) -> Array:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _gray_16_bit(image: Image.Image) -> bool:
    # Older releases of PIL, and PPM in all of them, hold 16 bits in a mode of 32.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _pixels(image: Image.Image, channels: int) -> Array:
    ImageOps.exif_transpose(image, in_place=True)
    if _gray_16_bit(image):
        image = Image.fromarray(_from_16_bit(np.asarray(image)))
    elif image.mode in ("I", "F"):
        raise BadImage(f"32-bit values (mode {image.mode}) of unknown range, not 8 or 16 bits")
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def _stack(image: Image.Image, channels: int) -> Array:
    """The frames of a grey stack as channels."""
    frames = []
    for frame in itertools.islice(ImageSequence.Iterator(image), channels + 1):
        if not (frame.mode == "L" or _gray_16_bit(frame)):
            raise BadImage(f"frames of mode {frame.mode}, not grey ones for {channels} channels")
        pixels = np.array(frame)
        frames.append(pixels if frame.mode == "L" else _from_16_bit(pixels))
    if len(frames) != channels or len({frame.shape for frame in frames}) != 1:
        raise BadImage(f"not a stack of {channels} frames of one size, for {channels} channels")
    return np.stack(frames)


def _longer_side(file: BinaryIO) -> int:
    with _opened(file) as image:
        return max(image.shape if isinstance(image, np.ndarray) else image.size)


# Sources


@dataclass(frozen=True)
class _Pixels:
    """Grey images in memory, uint8 [N, H, W]."""

    pixels: Array

    def read(self, row: int, channels: int) -> Array:
        return self.pixels[row][None].repeat(channels, axis=0)

    def side(self, row: int) -> int:
        return max(self.pixels.shape[1:])

    def describe(self, row: int) -> str:
        return f"image {row}"

    def identity(self, rows: Array) -> Iterable[bytes]:
        return [self.pixels[rows].tobytes()]


@dataclass(frozen=True)
class _Files:
    """Image files below a folder, by their paths from there."""

    folder: Path
    names: tuple[str, ...]

    def read(self, row: int, channels: int) -> Array:
        with self._open(row) as file:
            return decode(file, channels)

    def side(self, row: int) -> int:
        with self._open(row) as file:
            return _longer_side(file)

    def describe(self, row: int) -> str:
        return _printable(self.names[row])

    def identity(self, rows: Array) -> Iterable[bytes]:
        yield "\n".join(self.names[row] for row in rows.tolist()).encode(errors="surrogateescape")
        for place in _spread(len(rows), 1000):
            with contextlib.suppress(OSError):
                yield f" {os.path.getsize(self.folder / self.names[rows[place]])}".encode()

    def _open(self, row: int) -> BinaryIO:
        try:
            return open(self.folder / self.names[row], "rb")
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error


class _Rows:
    """Images in a column of a table: encoded files (bytes, or the paths of files) or arrays."""

    def __init__(self, table: "datasets.Dataset", column: str, split: str) -> None:
        import datasets

        self.column, self.split = column, split
        kind, table = table.features[column], table.select_columns([column])
        self.arrays = isinstance(kind, (datasets.Array2D, datasets.Array3D))
        self.table = table.with_format("numpy", dtype=kind.dtype) if self.arrays else table.with_format("arrow")
        self._cells: pyarrow.ChunkedArray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Memory-mapped tables travel to workers by path, their cells would as bytes.
        return self.__dict__ | {"_cells": None}

    def read(self, row: int, channels: int) -> Array:
        cell = self._cell(row)
        return decode(io.BytesIO(cell), channels) if isinstance(cell, bytes) else from_array(cell, channels)

    def side(self, row: int) -> int:
        cell = self._cell(row)
        return _longer_side(io.BytesIO(cell)) if isinstance(cell, bytes) else max(cell.shape)

    def describe(self, row: int) -> str:
        return f"row {row} of {self.split}"

    def identity(self, rows: Array) -> Iterable[bytes]:
        for place in _spread(len(rows), 200):
            with contextlib.suppress(BadImage):
                cell = self._cell(int(rows[place]))
                yield cell if isinstance(cell, bytes) else cell.tobytes()

    def _cell(self, row: int) -> bytes | Array:
        if self.arrays:
            cell = self.table[row][self.column]
        else:
            if self._cells is None:
                self._cells = self.table[:].column(self.column)
            cell = self._cells[row].as_py()
            if isinstance(cell, dict):
                cell = _file_content(cell["path"]) if cell["bytes"] is None and cell["path"] else cell["bytes"]
        if cell is None:
            raise BadImage("the cell is empty")
        return cell


def _file_content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{_printable(path)}: {error.strerror}") from error


@dataclass(frozen=True)
class _Part:
    """One split as its source has it; `classes` are the names of its images' classes, None where unlabelled."""

    source: _Source
    size: int
    classes: Sequence[str | None] | None
    class_names: tuple[str, ...] = ()


def _choose(parts: dict[str, _Part], name: str, split: str | None, channels: int, seed: int, held_out: float) -> Splits:
    """Training images and, where there are labels, test images."""
    if split is None and TRAIN not in parts and len(parts) > 1:
        raise ByolTimmError(f"dataset {name} has no split train, only {', '.join(parts)}. choose one with --split")
    train_name = split or (TRAIN if TRAIN in parts else next(iter(parts)))
    if train_name not in parts:
        raise ByolTimmError(f"dataset {name} has no split {train_name}. choose one with --split: {', '.join(parts)}")
    train = _images(parts[train_name], name, channels, parts[train_name].class_names)
    if not len(train):
        raise ByolTimmError(f"dataset {name} has no rows in split {train_name}. check --dataset and --split")
    source = f"{len(train):,} images of {name}" + (f", split {train_name}" if len(parts) > 1 else "")
    if train.labels is None:
        return Splits(train, None, f"{source}, unlabelled: no evaluation")
    source += f", {len(train.class_names)} classes"
    for test_name in TEST_NAMES:
        if test_name in parts and test_name != train_name:
            test = _images(parts[test_name], name, channels, train.class_names)
            if test.labels is not None:
                return Splits(train, test, f"{source}; evaluation on split {test_name} ({len(test):,} images)")
    test_rows = _hold_out(train.labels, held_out, seed)
    if not len(test_rows):
        return Splits(train, None, f"{source}; no class has two images: no evaluation")
    kept = np.setdiff1d(np.arange(len(train)), test_rows)
    note = f"{source}; {len(test_rows):,} of them, {held_out:.0%} of every class, held out for evaluation"
    return Splits(train.subset(kept), train.subset(test_rows), note)


def _images(part: _Part, name: str, channels: int, class_names: tuple[str, ...]) -> Images:
    labels = None
    if part.classes is not None:
        numbers: dict[str | None, int] = {label: number for number, label in enumerate(class_names)}
        labels = np.array([numbers.get(label, -1) for label in part.classes], dtype=np.int64)
        if not (labels >= 0).any():
            labels = None
    return Images(name, channels, labels, class_names if labels is not None else (), part.source, np.arange(part.size))


def _hold_out(labels: Array, share: float, seed: int) -> Array:
    """Sorted indices of that share of every class, at least one where a class has more."""
    random = np.random.default_rng(seed % 2**64)
    chosen = [np.empty(0, dtype=np.int64)]
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen.append(random.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def _digits() -> dict[str, _Part]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    classes = [str(label) for label in digits.target]
    return {TRAIN: _Part(_Pixels(pixels), len(pixels), classes, tuple(map(str, range(10))))}


# Folders


class _Listing(NamedTuple):
    """Files below a folder: image files by their paths, in natural order, and the number of others by suffix."""

    images: list[str]
    others: Counter[str]

    @property
    def tables(self) -> int:
        return sum(self.others[suffix] for suffix in TABLES)


def _folder(folder: Path, files: _Listing, split: str | None) -> dict[str, _Part]:
    """The splits of a folder of images; one if its folders are not named as splits are."""
    names = files.images
    if not names:
        found = ", ".join(f"{count} {suffix}" for suffix, count in files.others.most_common(3)) or "no file"
        raise ByolTimmError(f"no images found in {folder} (looked for {' '.join(EXTENSIONS)}; found {found})")
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(name.partition("/")[0] if "/" in name else "", []).append(name)
    splits = [name for name in (TRAIN, *TEST_NAMES) if name in inside]
    if split in inside:
        return {name: _labelled_by_folder(folder, inside[name], 1) for name in dict.fromkeys([split, *splits])}
    # Next to other folders and without a split to test on, `train` is a class.
    if TRAIN in splits and (len(splits) > 1 or len(inside) == 1):
        return {name: _labelled_by_folder(folder, inside[name], 1) for name in splits}
    return {TRAIN: _labelled_by_folder(folder, names, 0)}


def _labelled_by_folder(folder: Path, names: list[str], depth: int) -> _Part:
    """Images whose class is the folder at that depth of their path, if all lie in one and there are several."""
    classes = [parts[depth] if len(parts := name.split("/")) > depth + 1 else None for name in names]
    class_names = tuple(dict.fromkeys(label for label in classes if label is not None))
    source = _Files(folder, tuple(names))
    if None in classes or len(class_names) < 2:
        return _Part(source, len(names), None)
    return _Part(source, len(names), classes, class_names)


def _scan(folder: Path) -> _Listing:
    names: list[str] = []
    others: Counter[str] = Counter()
    walk = [(str(folder), "", frozenset[tuple[int, int]]())]
    while walk:
        path, prefix, above = walk.pop()
        try:
            status = os.stat(path)
            with os.scandir(path) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            raise ByolTimmError(f"folder {_printable(path)} cannot be read ({error.strerror})") from error
        if (status.st_dev, status.st_ino) in above:
            continue
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                walk.append((entry.path, f"{prefix}{entry.name}/", above | {(status.st_dev, status.st_ino)}))
            elif suffix in EXTENSIONS:
                names.append(prefix + entry.name)
            else:
                others[suffix or "without extension"] += 1
    return _Listing(sorted(names, key=_natural), others)


def _natural(name: str) -> tuple[Any, ...]:
    """Numbers in names by value: a sort key that does not depend on the machine."""
    pieces = re.split(r"([0-9]+)", name)
    return tuple(int(piece) if place % 2 else piece for place, piece in enumerate(pieces)), name


def _printable(name: str) -> str:
    return " ".join(name.encode(errors="backslashreplace").decode().split())


# Tables


def _load_tables(dataset: str, path: Path, config: str | None) -> "dict[str, datasets.Dataset]":
    """The splits of parquet or arrow files, of what `save_to_disk` wrote, or of a data set on the Hub."""
    import datasets

    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    if config is not None and (saved or path.is_file()):
        raise ByolTimmError(
            f"--dataset_config ({config}) is for data sets with several and {dataset} is one. leave it out"
        )
    try:
        with _quiet(datasets):
            if saved:
                loaded = datasets.load_from_disk(str(path))
            elif path.suffix in TABLES and not path.is_dir():
                loaded = datasets.load_dataset(path.suffix[1:], data_files=str(path))
            else:
                loaded = datasets.load_dataset(str(path) if path.is_dir() else dataset, config)
    except Exception as error:
        # Of many kinds: no network, no such data set, no such configuration, broken files, a full disk.
        reason = " ".join(str(error).split()) or type(error).__name__
        what = "cannot be loaded" if path.exists() else "is no folder here and cannot be loaded from the Hub"
        raise ByolTimmError(f"dataset {dataset} {what} ({reason}). check --dataset and --dataset_config") from error
    return dict(loaded) if isinstance(loaded, dict) else {TRAIN: loaded}


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars where nobody sees them move, and no log of every attempt to reach the Hub."""
    hub, bars = logging.getLogger("huggingface_hub"), not datasets.are_progress_bars_disabled()
    level = hub.level
    hub.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _columns(
    tables: "dict[str, datasets.Dataset]", name: str, image_column: str | None, label_column: str | None
) -> dict[str, _Part]:
    """The images and classes of every split of a table, from the columns named or the only ones of their types."""
    import datasets

    features = next(iter(tables.values())).features
    for flag, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            raise ByolTimmError(f"no column {column} in {name}; columns: {', '.join(features)}. check --{flag}")
    if image_column is None:
        found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        found = found or [column for column, kind in features.items() if _holds_images(kind)]
        if len(found) != 1:
            what = "several image columns" if found else "no image column"
            raise ByolTimmError(
                f"{what} in {name}; columns: {', '.join(found or features)}. choose with --image_column"
            )
        image_column = found[0]
    elif not _holds_images(features[image_column]):
        raise ByolTimmError(f"column {image_column} of {name} holds no images. choose another with --image_column")
    if label_column is None:
        found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        label_column = found[0] if len(found) == 1 else None
        if len(found) > 1:
            logger.warning("several label columns, none is used; choose with --label_column: %s", ", ".join(found))
    return {
        split: _Part(_Rows(table, image_column, split), len(table), *_classes(table, label_column))
        for split, table in tables.items()
    }


def _holds_images(kind: Any) -> bool:
    """Whether cells of that type can be images: files as bytes, alone or with a path, or arrays."""
    import datasets

    if isinstance(kind, (datasets.Image, datasets.Array2D, datasets.Array3D)):
        return True
    if isinstance(kind, dict):
        return {"bytes", "path"} <= kind.keys()
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _classes(table: "datasets.Dataset", column: str | None) -> tuple[list[str | None] | None, tuple[str, ...]]:
    """The class of every row by name, and all classes in their order."""
    import datasets

    if column is None or column not in table.features:
        return None, ()
    values = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    kind = table.features[column]
    if isinstance(kind, datasets.ClassLabel):
        return [kind.names[v] if v is not None and v >= 0 else None for v in values], tuple(kind.names)
    if not all(v is None or isinstance(v, (int, str)) for v in values):
        raise ByolTimmError(
            f"column {column} holds neither class labels, whole numbers nor texts. check --label_column"
        )
    classes = [None if v is None or v == -1 else str(v) for v in values]
    return classes, tuple(sorted({c for c in classes if c is not None}, key=_natural))
