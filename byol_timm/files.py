"""Files that are whole or not there, and JSON that people can read."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The content of manifest.json: `format`, `step` and `files`, and a hash over them."""
    return json.dumps({**manifest, "sha256": _digest(manifest)}).encode()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, values: Any) -> None:
    """Write values as a JSON file that people can read; numbers in it must be finite."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
