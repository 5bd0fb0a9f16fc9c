"""Open digits, folders, tables and datasets of the Hub as images in a fixed order, with labels if they have any."""

import importlib.util
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import ByolTimmError
from .decoding import Reduction, ValueRange
from .folders import TABLES, folder_splits, scan
from .images import TEST_NAMES, TRAIN, Array, Images, Part, Splits
from .sampling import class_share_indices
from .tables import load_tables, table_splits

HELD_OUT, DIGITS_HELD_OUT = 0.1, 0.2
HUB_ID = r"(?!.*\.(parquet|arrow|tar)$)[\w-][\w.-]*(/[\w-][\w.-]*)?"


def open_dataset(
    dataset: str = "digits",
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    in_chans: int = 3,
    value_range: ValueRange = None,
    split_seed: int = 0,
    hold_out: bool = True,
) -> Splits:
    """Open `digits`, a folder of images, parquet or arrow files, or a dataset of the Hub.

    `digits` are scikit-learn's 1,797 scans. The classes of a folder are its first-level folders, its splits folders
    `train` and `test` (or `validation`, `valid`, `val`). Raises `ByolTimmError`.

    in_chans: 1 (grey), 3 (RGB), 4 (RGBA), or as many channels as TIFF stacks and arrays have.
    value_range: the values of images of more than 8 bits that become black and white.
    split_seed: the seed that holds out a tenth of every class if the dataset has no labelled test split.
    hold_out: False keeps all images of the split in `train` and gives no test images.
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
                raise ByolTimmError(f"--{flag} ({value}) needs a table, which {dataset} is not. Remove it")
    if dataset == "digits":
        parts, held_out = _digits(), DIGITS_HELD_OUT
    elif files and not files.tables:
        parts = folder_splits(path, files, split)
    elif path.is_file() and path.suffix not in TABLES:
        raise ByolTimmError(f"dataset {dataset} is a file. Give a folder of images, or a .parquet or .arrow file")
    elif path.exists() or re.fullmatch(HUB_ID, dataset):
        tables = load_tables(dataset, path, config)
        parts = table_splits(tables, dataset, image_column, label_column, local=path.exists())
    else:
        raise ByolTimmError(f"data folder {dataset} does not exist. Check --dataset")
    splits = _choose(parts, dataset, split, in_chans, split_seed, held_out if hold_out else None)
    test = replace(splits.test, value_range=value_range) if splits.test else None
    return Splits(replace(splits.train, value_range=value_range), test, splits.note)


def check_value_range(dataset: str, value_range: ValueRange) -> None:
    if value_range is None:
        return
    low, high = value_range
    if not 0 < high - low < math.inf:
        raise ByolTimmError(f"--value_range takes the values of black and of white, black first ({low:g} {high:g})")
    if dataset == "digits":
        raise ByolTimmError(f"--value_range ({low:g} {high:g}) needs more than 8 bits, digits have 4. Remove it")


def hub_id(dataset: str) -> str | None:
    """Return `dataset` if `open_dataset` takes it as the id of a dataset on the Hub, else None."""
    here = dataset == "digits" or Path(dataset).expanduser().exists()
    return dataset if not here and re.fullmatch(HUB_ID, dataset) else None


@dataclass(frozen=True)
class _Pixels:
    """Grey images in memory, uint8 [N, H, W]."""

    pixels: Array

    def read(self, row: int, channels: int, reduction: Reduction | None, value_range: ValueRange) -> Array:
        image: Array = self.pixels[row][None].repeat(channels, axis=0)
        return image

    def side(self, row: int) -> int:
        return int(max(self.pixels.shape[1:]))

    def highest(self, row: int) -> int | None:
        return None

    def describe(self, row: int) -> str:
        return f"image {row}"

    def identity(self, rows: Array) -> Iterable[bytes]:
        return [self.pixels[rows].tobytes()]


def _choose(
    parts: dict[str, Part], name: str, split: str | None, channels: int, seed: int, held_out: float | None
) -> Splits:
    """Return training images and, where there are labels and a share to hold out, test images."""
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
    splits = hold_out(train, seed, share=held_out)
    return replace(splits, note=f"{note}; {splits.note}")


def hold_out(images: Images, split_seed: int, *, share: float = HELD_OUT) -> Splits:
    """Split labelled images: hold out that share of every class for evaluation, drawn by the seed."""
    # One generator for all classes, in their order.
    generator = np.random.default_rng(split_seed % 2**64)
    labels = np.zeros(0) if images.labels is None else images.labels
    test_rows = class_share_indices(labels, share, lambda _: generator, leave_one=True)
    if not len(test_rows):
        return Splits(images, None, "no class has two images: no evaluation")
    kept = np.setdiff1d(np.arange(len(images)), test_rows)
    note = f"{len(test_rows):,} more, {share:.0%} of every class, held out for evaluation"
    return Splits(images.subset(kept), images.subset(test_rows), note)


def train_split(parts: Collection[str], name: str, split: str | None) -> str:
    """Return the split to train on: as asked, or `train`, or the only one."""
    if split is None and TRAIN not in parts and len(parts) > 1:
        raise ByolTimmError(f"dataset {name} has no split train, only {', '.join(parts)}. Choose one with --split")
    chosen = split or (TRAIN if TRAIN in parts else next(iter(parts)))
    if chosen not in parts:
        raise ByolTimmError(f"dataset {name} has no split {chosen}. Choose one with --split: {', '.join(parts)}")
    return chosen


def _images(part: Part, name: str, channels: int, class_names: tuple[str, ...]) -> Images:
    labels = None
    if part.classes is not None:
        numbers: dict[str | None, int] = {label: number for number, label in enumerate(class_names)}
        labels = np.array([numbers.get(label, -1) for label in part.classes], dtype=np.int64)
        if not (labels >= 0).any():
            labels = None
    return Images(name, channels, labels, class_names if labels is not None else (), part.source, np.arange(part.size))


def _digits() -> dict[str, Part]:
    # Importing scikit-learn takes as long as importing torch.
    [package] = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
    table = np.loadtxt(Path(package, "datasets", "data", "digits.csv.gz"), delimiter=",")
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = [str(label) for label in table[:, -1].astype(int)]
    return {TRAIN: Part(_Pixels(pixels), len(pixels), classes, tuple(map(str, range(10))))}
