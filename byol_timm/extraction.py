"""Features of a whole data set, written part by part, so that neither memory nor an interruption sets a limit."""

import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
import torch
from pyarrow.parquet import write_table
from safetensors.torch import save
from torch import Tensor, nn

from .data import Images, fingerprint
from .encoders import encoder_width
from .errors import ByolTimmError
from .evaluation import Preparation, dataset_features

logger = logging.getLogger(__name__)

RECORD = "features.json"


def save_features(
    encoder: nn.Module,
    images: Images,
    preparation: Preparation,
    folder: str | Path,
    *,
    form: Literal["parquet", "safetensors"] = "parquet",
    part_images: int = 10_000,
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    """The files `part-00000-of-N` and so on in which the features of all images are, in their order.

    A row of parquet has `image` (the name of its file, or its row), `row` (in the split), `label` (-1 for none) and
    `features`. safetensors has `rows`, `labels` and `features` [n, width], float32,
    and the names as a JSON list under `images` of its metadata. `features.json` says what they are features of. Images
    that cannot be read are left out, with a warning.
    A part is written whole or not at all, and those that are there are kept: called again, this goes on. Process `rank`
    of `world` writes every world-th part, the same bits as one process would, and needs nothing of the others.
    Raises `ByolTimmError` for a folder that holds features of other images, of another encoder, or in other parts.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, encoder, images, preparation, form, part_images, rank)
        count = -(-len(images) // part_images)
        paths = [folder / f"part-{number:05}-of-{count:05}.{form}" for number in range(count)]
        for number, path in enumerate(paths):
            if number % world == rank and not path.exists():
                indices = range(number * part_images, min(len(images), (number + 1) * part_images))
                features, read = dataset_features(encoder, images, preparation, indices=indices)
                _write(path, _content(images.subset(read), features, form), rank)
                logger.info("%s: features of %s images", path.name, f"{len(read):,}")
    except OSError as error:
        raise ByolTimmError(f"cannot write to {folder} ({error.strerror}). Choose another --output") from error
    return paths


def _claim(
    folder: Path, encoder: nn.Module, images: Images, preparation: Preparation, form: str, part_images: int, rank: int
) -> None:
    """Refuse a folder of other features."""
    facts = {
        "dataset": images.name,
        "images": len(images),
        "fingerprint": fingerprint(images),
        "class_names": list(images.class_names),
        "weights": _digest(encoder),
        "width": encoder_width(encoder),
        "image_size": list(preparation.transform.size),
        "mean": list(preparation.mean),
        "std": list(preparation.std),
        "form": form,
        "part_images": part_images,
    }
    path = folder / RECORD
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        for name, value in facts.items():
            if before.get(name) != value:
                raise ByolTimmError(
                    f"{folder} holds other features ({name} {before.get(name)} then, {value} now). "
                    "Choose another --output"
                )
        return
    _write(path, json.dumps(facts, indent=2, ensure_ascii=False).encode(), rank)


def _digest(encoder: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _content(images: Images, features: Tensor, form: str) -> bytes:
    """A part as a file."""
    names = [images.describe(index) for index in range(len(images))]
    labels = np.full(len(images), -1) if images.labels is None else images.labels
    if form == "safetensors":
        tensors = {"features": features, "labels": torch.as_tensor(labels), "rows": torch.as_tensor(images.rows)}
        return save(tensors, metadata={"images": json.dumps(names)})
    vectors = pyarrow.FixedSizeListArray.from_arrays(features.flatten().numpy(), features.shape[1])
    content = io.BytesIO()
    write_table(pyarrow.table({"image": names, "row": images.rows, "label": labels, "features": vectors}), content)
    return content.getvalue()


def _write(path: Path, content: bytes, rank: int) -> None:
    """A whole file or none."""
    temporary = path.with_name(f".tmp-{rank}-{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
