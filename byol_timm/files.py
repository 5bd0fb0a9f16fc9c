"""Files that are either whole or absent, and JSON that people can read."""

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from .errors import ByolTimmError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either its old content or all of the new one.

    Raises `ByolTimmError` where the disk is full or the file cannot be written; the old content stays.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ByolTimmError(
                f"disk full while writing {path}. Free some space, then run the command again"
            ) from error
        raise ByolTimmError(f"cannot write {path} ({error.strerror}). Choose a folder that you can write to") from error


def write_json(path: Path, values: Any) -> None:
    """Write values as a JSON file that people can read. Numbers must be finite."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
