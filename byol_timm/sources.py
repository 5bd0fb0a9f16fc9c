"""Images in: digits, folders, tables and data sets of the Hub as images in a fixed order, with labels if there are."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decoding import BadImage, Reduction, ValueRange, decode, from_array, highest_of, highest_value, longer_side
from .errors import ByolTimmError, one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

Array = NDArray[Any]
T = TypeVar("T")

TRAIN, TEST_NAMES = "train", ("test", "validation", "valid", "val")
HELD_OUT, DIGITS_HELD_OUT = 0.1, 0.2
# Of 16-bit images whose values all lie below, fewer than 64 grey levels of 256 are left.
FEW_LEVELS = 1 << 14
EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .j2k .avif .npy".split()
)
TABLES, TARS = (".parquet", ".arrow"), (".tar",)
HUB_ID = r"(?!.*\.(parquet|arrow|tar)$)[\w-][\w.-]*(/[\w-][\w.-]*)?"


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


def open_dataset(
    dataset: str = "digits",
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    in_chans: int = 3,
    value_range: ValueRange = None,
    seed: int = 0,
    hold_out: bool = True,
) -> Splits:
    """The images that `dataset` names: `digits`, a folder of images, parquet or arrow files, or a Hub dataset id.

    `digits` are scikit-learn's 1,797 scans. The classes of a folder are its first-level folders, its splits folders
    `train` and `test` (or `validation`, `valid`, `val`). Without a labelled test split, a tenth of every class is held
    out by `seed`; without labels nothing is, nor with `hold_out` False, which takes no other split to test on either.
    `in_chans` is 1 (grey), 3 (RGB), 4 (RGBA), or as many channels as TIFF stacks and arrays have. `value_range` is what
    becomes black and white of images of more than 8 bits. Raises `ByolTimmError`.
    """
    check_value_range(dataset, value_range)
    path = Path(dataset).expanduser()
    files = scan(path) if path.is_dir() and dataset != "digits" else None
    held_out = HELD_OUT
    if files and files.tables and files.images:
        count = f"{files.tables} tables and {len(files.images)} images"
        raise ByolTimmError(f"data folder {dataset} holds {count}. Give the folder of one kind")
    if dataset == "digits" or (files and not files.tables):
        for flag, value in dict(dataset_config=config, image_column=image_column, label_column=label_column).items():
            if value is not None:
                raise ByolTimmError(f"--{flag} ({value}) is for tables and {dataset} is none. Leave it out")
    if dataset == "digits":
        parts, held_out = _digits(), DIGITS_HELD_OUT
    elif files and not files.tables:
        parts = _folder(path, files, split)
    elif path.is_file() and path.suffix not in TABLES:
        raise ByolTimmError(f"dataset {dataset} is a file. Give a folder of images, or a .parquet or .arrow file")
    elif path.exists() or re.fullmatch(HUB_ID, dataset):
        parts = _columns(_load_tables(dataset, path, config), dataset, image_column, label_column)
    else:
        raise ByolTimmError(f"data folder {dataset} does not exist. Check --dataset")
    splits = _choose(parts, dataset, split, in_chans, seed, held_out if hold_out else None)
    test = replace(splits.test, value_range=value_range) if splits.test else None
    return Splits(replace(splits.train, value_range=value_range), test, splits.note)


def check_value_range(dataset: str, value_range: ValueRange) -> None:
    if value_range is None:
        return
    low, high = value_range
    if not 0 < high - low < math.inf:
        raise ByolTimmError(f"--value_range takes what becomes black and what becomes white ({low:g} {high:g})")
    if dataset == "digits":
        raise ByolTimmError(f"--value_range ({low:g} {high:g}) is for more than 8 bits, digits have 4. Leave it out")


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


def hub_id(dataset: str) -> str | None:
    """`dataset` where `open_dataset` takes it for the id of a data set on the Hub."""
    here = dataset == "digits" or Path(dataset).expanduser().exists()
    return dataset if not here and re.fullmatch(HUB_ID, dataset) else None


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


# Sources


@dataclass(frozen=True)
class _Pixels:
    """Grey images in memory, uint8 [N, H, W]."""

    pixels: Array

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array:
        return self.pixels[row][None].repeat(channels, axis=0)

    def side(self, row: int) -> int:
        return max(self.pixels.shape[1:])

    def highest(self, row: int) -> int | None:
        return None

    def describe(self, row: int) -> str:
        return f"image {row}"

    def identity(self, rows: Array) -> Iterable[bytes]:
        return [self.pixels[rows].tobytes()]


@dataclass(frozen=True)
class _Files:
    """Image files below a folder, by their paths from there."""

    folder: Path
    names: tuple[str, ...]

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array:
        with self._open(row) as file:
            return decode(file, channels, reduction, value_range)

    def side(self, row: int) -> int:
        with self._open(row) as file:
            return longer_side(file)

    def highest(self, row: int) -> int | None:
        with self._open(row) as file:
            return highest_value(file)

    def describe(self, row: int) -> str:
        return printable(self.names[row])

    def identity(self, rows: Array) -> Iterable[bytes]:
        yield "\n".join(self.names[row] for row in rows.tolist()).encode(errors="surrogateescape")
        for place in spread(len(rows), 1000):
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

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array:
        cell = self._cell(row)
        if isinstance(cell, bytes):
            return decode(io.BytesIO(cell), channels, reduction, value_range)
        return from_array(cell, channels, value_range)

    def side(self, row: int) -> int:
        cell = self._cell(row)
        return longer_side(io.BytesIO(cell)) if isinstance(cell, bytes) else max(cell.shape)

    def highest(self, row: int) -> int | None:
        cell = self._cell(row)
        return highest_value(io.BytesIO(cell)) if isinstance(cell, bytes) else highest_of(cell)

    def describe(self, row: int) -> str:
        return f"row {row} of {self.split}"

    def identity(self, rows: Array) -> Iterable[bytes]:
        for place in spread(len(rows), 200):
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
        raise BadImage(f"{printable(path)}: {error.strerror}") from error


@dataclass(frozen=True)
class _Part:
    """One split as its source has it; `classes` are the names of its images' classes, None where unlabelled."""

    source: _Source
    size: int
    classes: Sequence[str | None] | None
    class_names: tuple[str, ...] = ()


def _choose(
    parts: dict[str, _Part], name: str, split: str | None, channels: int, seed: int, held_out: float | None
) -> Splits:
    """Training images and, where there are labels and a share to hold out, test images."""
    train_name = train_split(parts, name, split)
    train = _images(parts[train_name], name, channels, parts[train_name].class_names)
    if not len(train):
        raise ByolTimmError(f"dataset {name} has no rows in split {train_name}. Check --dataset and --split")
    note = f"split {train_name}, " if len(parts) > 1 else ""
    if train.labels is None:
        return Splits(train, None, f"{note}unlabelled: no evaluation")
    note += f"{len(train.class_names)} classes"
    if held_out is None:
        return Splits(train, None, note)
    for test_name in TEST_NAMES:
        if test_name in parts and test_name != train_name:
            test = _images(parts[test_name], name, channels, train.class_names)
            if test.labels is not None:
                return Splits(train, test, f"{note}; evaluation on split {test_name} ({len(test):,} images)")
    test_rows = _hold_out(train.labels, held_out, seed)
    if not len(test_rows):
        return Splits(train, None, f"{note}; no class has two images: no evaluation")
    kept = np.setdiff1d(np.arange(len(train)), test_rows)
    note += f"; {len(test_rows):,} more, {held_out:.0%} of every class, held out for evaluation"
    return Splits(train.subset(kept), train.subset(test_rows), note)


def train_split(parts: Collection[str], name: str, split: str | None) -> str:
    """The split to train on: as asked, or `train`, or the only one; raises `ByolTimmError`."""
    if split is None and TRAIN not in parts and len(parts) > 1:
        raise ByolTimmError(f"dataset {name} has no split train, only {', '.join(parts)}. Choose one with --split")
    chosen = split or (TRAIN if TRAIN in parts else next(iter(parts)))
    if chosen not in parts:
        raise ByolTimmError(f"dataset {name} has no split {chosen}. Choose one with --split: {', '.join(parts)}")
    return chosen


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
    # Not through scikit-learn, whose import takes as long as torch's.
    [package] = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
    table = np.loadtxt(Path(package, "datasets", "data", "digits.csv.gz"), delimiter=",")
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = [str(label) for label in table[:, -1].astype(int)]
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
        tars = any(files.others[suffix] for suffix in TARS)
        hint = ". Only pretraining reads tar shards, with --streaming" if tars else ""
        raise ByolTimmError(f"no images found in {folder} (looked for {' '.join(EXTENSIONS)}; found {found}){hint}")
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


def scan(folder: Path) -> _Listing:
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
            raise ByolTimmError(f"folder {printable(path)} cannot be read ({error.strerror})") from error
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


def printable(name: str) -> str:
    """A file name in one line, whatever is in it."""
    return " ".join(name.encode(errors="backslashreplace").decode().split())


# Tables


def _load_tables(dataset: str, path: Path, config: str | None) -> "dict[str, datasets.Dataset]":
    """The splits of parquet or arrow files, of what `save_to_disk` wrote, or of a data set on the Hub."""
    import datasets

    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    if config is not None and (saved or path.is_file()):
        raise ByolTimmError(
            f"--dataset_config ({config}) is for data sets with several and {dataset} is one. Leave it out"
        )
    with loading(dataset, path):
        if saved:
            loaded = datasets.load_from_disk(str(path))
        elif path.suffix in TABLES and not path.is_dir():
            loaded = datasets.load_dataset(path.suffix[1:], data_files=str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else dataset, config)
    return dict(loaded) if isinstance(loaded, dict) else {TRAIN: loaded}


@contextlib.contextmanager
def loading(dataset: str, path: Path) -> Iterator[None]:
    """`datasets` at work in silence; whatever goes wrong is a `ByolTimmError`."""
    import datasets

    from .network import cache_alone_without_network

    with contextlib.nullcontext() if path.exists() else cache_alone_without_network() as unreachable:
        try:
            with _quiet(datasets):
                yield
        except Exception as error:
            # Of many kinds: no network, no such data set, no such configuration, broken files, a full disk.
            reason = f"{unreachable}; {one_line(error)}" if unreachable else one_line(error)
            what = "cannot be loaded" if path.exists() else "is no folder here and cannot be loaded from the Hub"
            raise ByolTimmError(f"dataset {dataset} {what} ({reason}). Check --dataset and --dataset_config") from error


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
    """The images and classes of every split of a table."""
    features = next(iter(tables.values())).features
    images, labels = choose_columns(features, name, image_column, label_column)
    return {
        split: _Part(_Rows(table, images, split), len(table), *_classes(table, labels))
        for split, table in tables.items()
    }


def choose_columns(
    features: "datasets.Features", name: str, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """The columns of images and labels: those named, or the only ones of their types; raises `ByolTimmError`."""
    import datasets

    for flag, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            raise ByolTimmError(f"no column {column} in {name}; columns: {', '.join(features)}. Check --{flag}")
    if image_column is None:
        found = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        found = found or [column for column, kind in features.items() if _holds_images(kind)]
        if len(found) != 1:
            what = "several image columns" if found else "no image column"
            raise ByolTimmError(
                f"{what} in {name}; columns: {', '.join(found or features)}. Choose with --image_column"
            )
        image_column = found[0]
    elif not _holds_images(features[image_column]):
        raise ByolTimmError(f"column {image_column} of {name} holds no images. Choose another with --image_column")
    if label_column is None:
        found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        label_column = found[0] if len(found) == 1 else None
        if len(found) > 1:
            logger.warning("several label columns, none is used; choose with --label_column: %s", ", ".join(found))
    return image_column, label_column


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
    if column is None or column not in table.features:
        return None, ()
    values = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return name_classes(values, table.features[column], column)


def name_classes(values: list[Any], kind: Any, column: str) -> tuple[list[str | None], tuple[str, ...]]:
    """The names of the classes that cells of that type stand for, and all classes in their order."""
    import datasets

    if isinstance(kind, datasets.ClassLabel):
        return [kind.names[v] if v is not None and v >= 0 else None for v in values], tuple(kind.names)
    if not all(v is None or isinstance(v, (int, str)) for v in values):
        raise ByolTimmError(
            f"column {column} holds neither class labels, whole numbers nor texts. Check --label_column"
        )
    classes = [None if v is None or v == -1 else str(v) for v in values]
    return classes, tuple(sorted({c for c in classes if c is not None}, key=_natural))
