"""Read folders of image files."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import ByolTimmError
from .decoding import BadImage
from .images import TEST_NAMES, TRAIN, Array, Encoded, Part, printable, spread

EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .jp2 .j2k .avif .npy".split()
)
TABLES, TARS = (".parquet", ".arrow"), (".tar",)


@dataclass(frozen=True)
class Files(Encoded):
    """Image files below a folder, by their paths from there."""

    folder: Path
    names: tuple[str, ...]

    def content(self, row: int) -> BinaryIO:
        try:
            return open(self.folder / self.names[row], "rb")
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error

    def describe(self, row: int) -> str:
        return printable(self.names[row])

    def identity(self, rows: Array) -> Iterable[bytes]:
        yield "\n".join(self.names[row] for row in rows.tolist()).encode(errors="surrogateescape")
        for place in spread(len(rows), 1000):
            with contextlib.suppress(OSError):
                yield f" {os.path.getsize(self.folder / self.names[rows[place]])}".encode()


class Listing(NamedTuple):
    """Files below a folder: the paths of image files, in natural order, and the number of others by suffix."""

    images: list[str]
    others: Counter[str]

    @property
    def tables(self) -> int:
        return sum(self.others[suffix] for suffix in TABLES)


def folder_splits(folder: Path, files: Listing, split: str | None) -> dict[str, Part]:
    """Return the splits of a folder of images; one if its folders do not have the names of splits."""
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
    # Among other folders, without a split to test on, `train` is a class.
    if TRAIN in splits and (len(splits) > 1 or len(inside) == 1):
        return {name: _labelled_by_folder(folder, inside[name], 1) for name in splits}
    return {TRAIN: _labelled_by_folder(folder, names, 0)}


def _labelled_by_folder(folder: Path, names: list[str], depth: int) -> Part:
    """Return images whose class is the folder at that depth of their paths, if all have one and there are several."""
    classes = [parts[depth] if len(parts := name.split("/")) > depth + 1 else None for name in names]
    class_names = tuple(dict.fromkeys(label for label in classes if label is not None))
    source = Files(folder, tuple(names))
    if None in classes or len(class_names) < 2:
        return Part(source, len(names), None)
    return Part(source, len(names), classes, class_names)


def scan(folder: Path) -> Listing:
    """List the files below a folder without hidden ones; follow links, but not in circles."""
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
    return Listing(sorted(names, key=natural), others)


def natural(name: str) -> tuple[Any, ...]:
    """Return a sort key that takes numbers in names by value and does not depend on the machine."""
    pieces = re.split(r"([0-9]+)", name)
    return tuple(int(piece) if place % 2 else piece for place, piece in enumerate(pieces)), name
