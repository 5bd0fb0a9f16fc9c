"""Read tables of images: parquet and arrow files, datasets of the Hub."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ByolTimmError, one_line
from .decoding import BadImage
from .folders import TABLES, natural
from .images import TRAIN, Array, Encoded, Part, printable, spread

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)


class Rows(Encoded):
    """Images in a column of a table: encoded files or arrays. With `follow`, cells may also name files."""

    def __init__(self, table: "datasets.Dataset", column: str, split: str, *, follow: bool) -> None:
        import datasets

        self.column, self.split, self.follow = column, split, follow
        kind, table = table.features[column], table.select_columns([column])
        self.arrays = isinstance(kind, (datasets.Array2D, datasets.Array3D))
        self.table = table.with_format("numpy", dtype=kind.dtype) if self.arrays else table.with_format("arrow")
        self._cells: pyarrow.ChunkedArray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Memory-mapped tables are pickled as paths, but their cells would be as bytes.
        return self.__dict__ | {"_cells": None}

    def content(self, row: int) -> BinaryIO | Array:
        cell = self._cell(row)
        return io.BytesIO(cell) if isinstance(cell, bytes) else cell

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
                cell = self._named_file(cell["path"]) if cell["bytes"] is None and cell["path"] else cell["bytes"]
        if cell is None:
            raise BadImage("the cell is empty")
        content: bytes | Array = cell
        return content

    def _named_file(self, path: str) -> bytes:
        if not self.follow:
            raise BadImage("the cell names a file on this machine, which tables from the Hub must not")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise BadImage(f"{printable(path)}: {error.strerror}") from error


def load_tables(dataset: str, path: Path, config: str | None) -> "dict[str, datasets.Dataset]":
    """Return the splits of parquet or arrow files, of a `save_to_disk` folder, or of a dataset of the Hub."""
    import datasets

    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    if config is not None and (saved or path.is_file()):
        raise ByolTimmError(f"--dataset_config ({config}) needs a dataset with several configurations. Remove it")
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
    """Let `datasets` work silently; turn any error into `ByolTimmError`."""
    import datasets

    from ..encoders import cache_alone_without_network

    with contextlib.nullcontext() if path.exists() else cache_alone_without_network() as unreachable:
        try:
            with _quiet(datasets):
                yield
        except Exception as error:
            # No network, no such dataset or configuration, broken files, a full disk, and others.
            reason = f"{unreachable}; {one_line(error)}" if unreachable else one_line(error)
            what = "cannot be loaded" if path.exists() else "is not a folder here and cannot be loaded from the Hub"
            raise ByolTimmError(f"dataset {dataset} {what} ({reason}). Check --dataset and --dataset_config") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Show no progress bars outside a terminal, and do not log attempts to reach the Hub."""
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


def table_splits(
    tables: "dict[str, datasets.Dataset]",
    name: str,
    image_column: str | None,
    label_column: str | None,
    *,
    local: bool,
) -> dict[str, Part]:
    """Return the images and classes of every split of a table.

    Cells may name image files in local tables, and where `datasets` itself downloaded a folder of images from the Hub.
    """
    features = next(iter(tables.values())).features
    images, labels = choose_columns(features, name, image_column, label_column)
    return {
        split: Part(
            Rows(table, images, split, follow=local or table.info.builder_name == "imagefolder"),
            len(table),
            *_classes(table, labels),
        )
        for split, table in tables.items()
    }


def choose_columns(
    features: "datasets.Features", name: str, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """Return the columns of images and labels: the named ones, or the only ones of their types."""
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
        raise ByolTimmError(f"column {image_column} of {name} has no images. Choose another with --image_column")
    if label_column is None:
        found = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        label_column = found[0] if len(found) == 1 else None
        if len(found) > 1:
            logger.warning("several label columns, using none; choose with --label_column: %s", ", ".join(found))
    return image_column, label_column


def _holds_images(kind: Any) -> bool:
    """Return True if cells of that type can be images: files as bytes, alone or with a path, or arrays."""
    import datasets

    if isinstance(kind, (datasets.Image, datasets.Array2D, datasets.Array3D)):
        return True
    if isinstance(kind, dict):
        return {"bytes", "path"} <= kind.keys()
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _classes(table: "datasets.Dataset", column: str | None) -> tuple[list[str | None] | None, tuple[str, ...]]:
    """Return the class name of every row, and all class names in their order."""
    if column is None or column not in table.features:
        return None, ()
    values = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return name_classes(values, table.features[column], column)


def name_classes(values: list[Any], kind: Any, column: str) -> tuple[list[str | None], tuple[str, ...]]:
    """Return the class names of cells of that type, and all class names in their order."""
    import datasets

    if isinstance(kind, datasets.ClassLabel):
        return [kind.names[v] if v is not None and v >= 0 else None for v in values], tuple(kind.names)
    if not all(v is None or isinstance(v, (int, str)) for v in values):
        raise ByolTimmError(f"column {column} has neither class labels, whole numbers nor text. Check --label_column")
    classes = [None if v is None or v == -1 else str(v) for v in values]
    return classes, tuple(sorted({c for c in classes if c is not None}, key=natural))
