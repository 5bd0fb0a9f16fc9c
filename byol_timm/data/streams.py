"""Read parquet, arrow and tar files, local or on the Hub, in sequence."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import fsspec
import numpy as np
from numpy.typing import NDArray

from ..errors import ByolTimmError, one_line
from .decoding import BadImage, ValueRange
from .folders import scan
from .images import TEST_NAMES, Encoded, Images, printable, spread
from .opening import HUB_ID, check_value_range, train_split
from .tables import choose_columns, loading, name_classes

if TYPE_CHECKING:
    import datasets

Array = NDArray[Any]
T = TypeVar("T")
U = TypeVar("U")
FORMATS = {"parquet": ".parquet", "arrow": ".arrow", "webdataset": ".tar"}
# Images to evaluate on (labelled) or to look at (unlabelled) are the first rows of at most SAMPLED_SHARDS shards.
QUERIES, BANK, UNLABELLED, SAMPLED_SHARDS = 2_000, 8_000, 256, 64
# Rows and bytes of a shard to read at a time, and shards to open at a time.
READ_ROWS, READ_BYTES, READ_THREADS = 16, 2**20, 8
HELD_ROWS = 128
# The number of a row is its shard, shifted by these bits, plus its place in the shard.
ROW_BITS = 32


class Shards:
    """Files whose rows are read in sequence; `counts` is the number of rows of each (int64), None if unknown.

    Nothing of a tar is written to disk, and names in it are not used as paths.
    """

    def __init__(self, kind: str, files: list[str], table: "datasets.IterableDataset") -> None:
        self.files, self.table = files, table
        self.parquet = kind == "parquet"
        self.counts: Array | None = None
        if self.parquet or (kind == "arrow" and not any("://" in file for file in files)):
            self.counts = np.array(_in_threads(_parquet_rows if self.parquet else _arrow_rows, files), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def cells(self, shard: int, start: int, column: str) -> Iterator[Any]:
        """Yield the cells of a shard from row `start` on; whatever goes wrong is a `ByolTimmError`."""
        try:
            yield from (self._parquet_cells if self.parquet else self._other_cells)(shard, start, column)
        except Exception as error:
            # Broken or missing files, no network, and others.
            place, reason = self.describe(shard, start), one_line(error)
            raise ByolTimmError(f"reading stopped at {place} ({reason}). Check the file, then use --resume") from error

    def _parquet_cells(self, shard: int, start: int, column: str) -> Iterator[Any]:
        import pyarrow.parquet

        with fsspec.open(self.files[shard], "rb") as file:
            # Without a buffer, a whole row group would be in memory.
            table = pyarrow.parquet.ParquetFile(file, buffer_size=READ_BYTES)
            for batch in table.iter_batches(READ_ROWS, columns=[column], use_threads=False):
                for cell in batch.column(0)[start:]:
                    yield cell.as_py()
                start = max(0, start - len(batch))

    def _other_cells(self, shard: int, start: int, column: str) -> Iterator[Any]:
        rows = self.table.select_columns([column]).shard(len(self.files), shard).skip(start)
        # Row by row, `datasets` would give each worker process other shards.
        for batch in rows.iter(READ_ROWS):
            yield from batch[column]

    def describe(self, shard: int, row: int) -> str:
        return f"row {row} of {_name(self.files[shard])}"

    def identity(self) -> Iterable[bytes]:
        sizes = _in_threads(_file_size, self.files)
        return [f"{_name(file)} {size} ".encode() for file, size in zip(self.files, sizes, strict=True)]


def _parquet_rows(path: str) -> int:
    import pyarrow.parquet

    with fsspec.open(path, "rb") as file:
        return int(pyarrow.parquet.read_metadata(file).num_rows)


def _arrow_rows(path: str) -> int:
    """Return the number of rows of a local arrow file, reading little of it."""
    import pyarrow

    with pyarrow.memory_map(path) as file:
        try:
            return sum(len(batch) for batch in pyarrow.ipc.open_stream(file))
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            return sum(len(reader.get_batch(number)) for number in range(reader.num_record_batches))


def _file_size(path: str) -> int:
    files, name = fsspec.url_to_fs(path)
    return int(files.size(name))


def _in_threads(read: Callable[[T], U], items: Iterable[T]) -> list[U]:
    with ThreadPoolExecutor(READ_THREADS) as threads:
        return list(threads.map(read, items))


def _name(path: str) -> str:
    return printable(path.rpartition("/")[2])


@dataclass(frozen=True, eq=False)
class Stream:
    """The training images of one split: of every shard the rows from `first` (int64, one per shard) on."""

    name: str
    channels: int
    shards: Shards = field(repr=False)
    column: str
    first: Array = field(repr=False)
    size: int
    value_range: ValueRange = None

    def __len__(self) -> int:
        return self.size

    @property
    def held_out(self) -> int:
        """Return how many images of the same shards are not trained on."""
        return int(self.first.sum())

    @property
    def has_counts(self) -> bool:
        """Return True if the number of rows of each shard is known, so that reading can start anywhere."""
        return self.shards.counts is not None

    def rows(self, order: Array, start: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield number and encoded image of the rows of the shards in that order, from row `start` on."""
        if self.shards.counts is None:
            return itertools.islice(self._rows(order, 0), start, None)
        ends = np.cumsum((self.shards.counts - self.first)[order])
        passed = int(np.searchsorted(ends, start, side="right"))
        return self._rows(order[passed:], start - (int(ends[passed - 1]) if passed else 0))

    def _rows(self, order: Array, start: int) -> Iterator[tuple[int, bytes | None]]:
        for shard in order.tolist():
            first = int(self.first[shard]) + start
            for row, cell in enumerate(self.shards.cells(shard, first, self.column), first):
                yield shard << ROW_BITS | row, _content(cell)
            start = 0

    def describe(self, number: int) -> str:
        """Return the file and row of an image, so that a user can find it."""
        return self.shards.describe(number >> ROW_BITS, number & (1 << ROW_BITS) - 1)

    def identity(self) -> Iterable[bytes]:
        """Return what distinguishes these images from others."""
        return [*self.shards.identity(), self.first.tobytes()]


@dataclass(frozen=True)
class StreamSplits:
    """A stream to train on, images of it that can be read in any order, labelled held-out images, and a note."""

    train: Stream
    bank: Images
    test: Images | None
    note: str


def open_stream(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    in_chans: int = 3,
    value_range: ValueRange = None,
    num_images: int | None = None,
) -> StreamSplits:
    """Open parquet, arrow or webdataset (tar) shards: a file, a folder of them, or a Hub dataset id.

    Labelled images to evaluate on come from a test split. Without one they are the first rows of evenly spread shards,
    a tenth of all and at most 2,000, which are never trained on. Raises `ByolTimmError`.

    num_images: the number of images of the training split, where its files do not say.
    """
    import datasets

    path = Path(dataset).expanduser()
    check_value_range(dataset, value_range)
    _check(dataset, path, config)
    builder, tables = _open(dataset, path, config)
    name = train_split(tables, dataset, split)
    features = tables[name].features
    images, labels = choose_columns(features, dataset, image_column, label_column)
    if isinstance(features[images], (datasets.Array2D, datasets.Array3D)):
        raise ByolTimmError(f"column {images} of {dataset} holds arrays; --streaming needs image files. Remove it")
    with loading(dataset, path):
        shards = _open_shards(builder, name, tables[name], images)
    total = _total(shards, builder.info.splits or {}, name, dataset, num_images)

    sampled = _heads(shards, labels or images, BANK + QUERIES if labels else UNLABELLED)
    if not sampled:
        raise ByolTimmError(f"dataset {dataset} has no rows in split {name}. Check --dataset and --split")
    first = np.zeros(len(shards), dtype=np.int64)
    if labels is None:
        train = Stream(dataset, in_chans, shards, images, first, total, value_range)
        bank_images = _Sample(shards, images, sampled).images(train, None, ())
        note = f"streamed from {len(shards):,} shards, unlabelled: no evaluation"
        return StreamSplits(train, bank_images, None, note)

    test_name, test_shards, held_out = None, shards, list[_Cell]()
    for other in TEST_NAMES:
        if not held_out and other != name and other in tables and labels in tables[other].features:
            with loading(dataset, path):
                test_shards = _open_shards(builder, other, tables[other], images)
            cells = _heads(test_shards, labels, QUERIES)
            if any(name_classes([cell.value for cell in cells], features[labels], labels)[0]):
                test_name, held_out = other, cells
    if test_name is None:
        test_shards, held_out = shards, _held_out(sampled, total)
        first = np.bincount([cell.shard for cell in held_out], minlength=len(shards))
    bank = [cell for cell in sampled if cell.row >= first[cell.shard]]
    train = Stream(dataset, in_chans, shards, images, first, total - int(first.sum()), value_range)
    classes, class_names = name_classes([cell.value for cell in bank + held_out], features[labels], labels)
    bank_images = _Sample(shards, images, bank).images(train, classes[: len(bank)], class_names)
    test_images = _Sample(test_shards, images, held_out).images(train, classes[len(bank) :], class_names)
    note = f"streamed from {len(shards):,} shards"
    if bank_images.labels is None or test_images.labels is None:
        return StreamSplits(train, bank_images, None, f"{note}; too few labels: no evaluation")
    place = f"of split {test_name}" if test_name else "held out"
    note += f", {len(class_names)} classes; evaluation on {len(test_images):,} images {place}"
    return StreamSplits(train, bank_images, test_images, note)


def _check(dataset: str, path: Path, config: str | None) -> None:
    """Raise `ByolTimmError` for what cannot be streamed, judging by names."""
    suffixes = " ".join(FORMATS.values())
    if dataset == "digits":
        raise ByolTimmError("--streaming does not work with digits. Remove it")
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise ByolTimmError(f"dataset {dataset} of save_to_disk is read from disk without --streaming. Remove it")
    if path.is_file():
        if path.suffix not in FORMATS.values():
            raise ByolTimmError(f"dataset {dataset} is not a shard ({suffixes}). Check --dataset")
        if config is not None:
            raise ByolTimmError(f"--dataset_config ({config}) needs a dataset with several configurations. Remove it")
    elif path.is_dir():
        files = scan(path)
        found = {suffix: files.others[suffix] for suffix in FORMATS.values() if files.others[suffix]}
        if not found and files.images:
            raise ByolTimmError(f"the image files of {dataset} are read one by one without --streaming. Remove it")
        if not found:
            raise ByolTimmError(f"no shards found in {dataset} (looked for {suffixes}). Check --dataset")
        if len(found) > 1 or files.images:
            kinds = " and ".join(f"{count} {kind}" for kind, count in {**found, "images": len(files.images)}.items())
            raise ByolTimmError(f"data folder {dataset} holds {kinds}. Give the folder of one kind")
    elif not re.fullmatch(HUB_ID, dataset):
        raise ByolTimmError(f"data folder {dataset} does not exist. Check --dataset")


def _open(dataset: str, path: Path, config: str | None) -> "tuple[Any, dict[str, datasets.IterableDataset]]":
    """Return the builder of `datasets`, which lists the files, and the splits."""
    import datasets

    with loading(dataset, path):
        if path.is_file():
            kind = next(kind for kind, suffix in FORMATS.items() if suffix == path.suffix)
            builder = datasets.load_dataset_builder(kind, data_files=str(path))
        else:
            builder = datasets.load_dataset_builder(str(path) if path.is_dir() else dataset, config)
        known = builder.name in FORMATS
        tables = {str(name): table for name, table in builder.as_streaming_dataset().items()} if known else {}
    if not known:
        wanted = " ".join(FORMATS.values())
        raise ByolTimmError(f"dataset {dataset} is {builder.name}; --streaming reads {wanted} shards. Remove it")
    return builder, tables


def _open_shards(builder: Any, split: str, table: "datasets.IterableDataset", column: str) -> Shards:
    import datasets

    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    return Shards(builder.name, [str(file) for file in builder.config.data_files[split]], table)


def _total(shards: Shards, infos: Mapping[str, Any], split: str, dataset: str, num_images: int | None) -> int:
    """Return the number of images of a split: of its shards, else as the user says, else of the dataset's card."""
    if shards.counts is not None:
        total = int(shards.counts.sum())
        if num_images not in (None, total):
            raise ByolTimmError(f"--num_images ({num_images}) is wrong: {dataset} has {total} rows. Remove it")
    elif num_images is not None:
        total = num_images
    elif split in infos:
        total = infos[split].num_examples
    else:
        raise ByolTimmError(f"the number of images of {dataset} in split {split} is unknown. Give --num_images")
    if not total:
        raise ByolTimmError(f"dataset {dataset} has no rows in split {split}. Check --dataset and --split")
    return total


# Cells and samples of them


def _content(cell: Any) -> bytes | None:
    """Return the encoded image in a cell. A path in it leads out of the shard and is not followed."""
    content: bytes | None = cell["bytes"] if isinstance(cell, dict) else cell
    return content


def open_content(content: bytes | None) -> io.BytesIO:
    """Return the file in a row, or raise `BadImage` if it is empty."""
    if content is None:
        raise BadImage("the row has no image")
    return io.BytesIO(content)


class _Cell(NamedTuple):
    shard: int
    row: int
    value: Any


def _heads(shards: Shards, column: str, count: int) -> list[_Cell]:
    """Return the first cells of evenly spread shards, `count` in all where there are as many."""
    chosen = spread(len(shards), SAMPLED_SHARDS)
    rows = -(-count // len(chosen))

    def head(shard: int) -> list[_Cell]:
        values = itertools.islice(shards.cells(shard, 0, column), rows)
        return [_Cell(shard, row, value) for row, value in enumerate(values)]

    return [cell for cells in _in_threads(head, chosen) for cell in cells]


def _held_out(sampled: Sequence[_Cell], total: int) -> list[_Cell]:
    """Return the first cells of each sampled shard: a tenth of all, at most `QUERIES` and half of the sample."""
    sizes = Counter(cell.shard for cell in sampled)
    share = -(-min(QUERIES, total // 10) // len(sizes))
    return [cell for cell in sampled if cell.row < min(share, sizes[cell.shard] // 2)]


class _Sample(Encoded):
    """Rows of some shards, read in any order; rows after the last one read are kept, because they are likely next."""

    def __init__(self, shards: Shards, column: str, cells: Sequence[_Cell]) -> None:
        self.shards, self.column = shards, column
        self.places = np.array([(cell.shard, cell.row) for cell in cells], dtype=np.int64).reshape(-1, 2)
        self._held: dict[tuple[int, int], bytes | None] = {}

    def images(self, train: Stream, classes: Sequence[str | None] | None, class_names: tuple[str, ...]) -> Images:
        """Return these rows as images, with labels if they have any."""
        labels = None
        if classes is not None and any(classes):
            labels = np.array([class_names.index(name) if name is not None else -1 for name in classes])
        rows = np.arange(len(self.places))
        class_names = class_names if labels is not None else ()
        return Images(train.name, train.channels, labels, class_names, self, rows, train.value_range)

    def content(self, row: int) -> io.BytesIO:
        return open_content(self._find(row))

    def describe(self, row: int) -> str:
        return self.shards.describe(*self.places[row].tolist())

    def identity(self, rows: Array) -> Iterable[bytes]:
        return [*self.shards.identity(), self.places[rows].tobytes()]

    def _find(self, row: int) -> bytes | None:
        shard, place = self.places[row].tolist()
        if (shard, place) not in self._held:
            rows = self.places[row:][:HELD_ROWS]
            keys = [(shard, later) for other, later in rows.tolist() if other == shard]
            cells = itertools.islice(self.shards.cells(shard, place, self.column), len(keys))
            self._held = dict(zip(keys, map(_content, cells), strict=True))
        return self._held[shard, place]
