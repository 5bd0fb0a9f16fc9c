"""Write features to files, part by part, so that neither memory nor an interruption sets a limit."""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import torch
from pyarrow.parquet import write_table
from safetensors.torch import save
from torch import Tensor, nn

from byol_timm.data import Images, fingerprint
from byol_timm.encoders import encoder_width
from byol_timm.errors import ByolTimmError
from byol_timm.evaluation import Preparation, dataset_features
from byol_timm.files import write_json, write_whole

logger = logging.getLogger("byol_timm.extract_features")

Form = Literal["parquet", "safetensors"]
RECORD = "features.json"


def save_features(
    encoder: nn.Module,
    images: Images,
    preparation: Preparation,
    folder: Path,
    *,
    form: Form = "parquet",
    part_images: int = 10_000,
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    """Write the features of all images, in their order, to the files `part-00000-of-N` and so on. Return the paths.

    A parquet row has `image` (the name of its file, or its row), `row` (in the split), `label` (-1 for none) and
    `features`. safetensors has `rows`, `labels` and `features` [n, width] in float32; the names are a JSON list under
    `images` of its metadata. Unreadable images are left out, with a warning.
    Each part is written whole or not at all, and existing parts are kept. Process `rank` of `world` writes every
    world-th part, the same bytes as one process would, without waiting for the others.
    Raises `ByolTimmError` for a folder with features of other images, of another encoder, or in other parts.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ByolTimmError(f"cannot write to {folder} ({error.strerror}). Choose another --output") from error
    facts = describe(encoder, images, preparation, form, part_images)
    check_same_features(folder, facts)
    if rank == 0:
        write_json(folder / RECORD, facts)
    count = -(-len(images) // part_images)
    paths = [folder / f"part-{number:05}-of-{count:05}.{form}" for number in range(count)]
    for number, path in enumerate(paths):
        if number % world == rank and not path.exists():
            indices = range(number * part_images, min(len(images), (number + 1) * part_images))
            features, read = dataset_features(encoder, images, preparation, indices=indices)
            write_whole(path, content(images.subset(read), features, form))
            logger.info("%s: features of %s images", path.name, f"{len(read):,}")
    return paths


def describe(
    encoder: nn.Module, images: Images, preparation: Preparation, form: Form, part_images: int
) -> dict[str, Any]:
    """Return what decides the features and their files."""
    return {
        "dataset": images.name,
        "images": len(images),
        "fingerprint": fingerprint(images),
        "class_names": list(images.class_names),
        "weights": digest(encoder),
        "width": encoder_width(encoder),
        "image_size": list(preparation.transform.size),
        "mean": list(preparation.mean),
        "std": list(preparation.std),
        "form": form,
        "part_images": part_images,
    }


def check_same_features(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder whose features are others than these."""
    path = folder / RECORD
    before = json.loads(path.read_text("utf-8")) if path.exists() else facts
    for name, value in facts.items():
        if before.get(name) != value:
            raise ByolTimmError(
                f"{folder} holds other features ({name} {before.get(name)} then, {value} now). Choose another --output"
            )


def digest(encoder: nn.Module) -> str:
    """Return a hash of the encoder's weights."""
    sha256 = hashlib.sha256()
    for name, values in sorted(encoder.state_dict().items()):
        sha256.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        sha256.update(values.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def content(images: Images, features: Tensor, form: Form) -> bytes:
    """Return the content of the file of one part."""
    names = [images.describe(index) for index in range(len(images))]
    labels = np.full(len(images), -1) if images.labels is None else images.labels
    if form == "safetensors":
        tensors = {"features": features, "labels": torch.as_tensor(labels), "rows": torch.as_tensor(images.rows)}
        return save(tensors, metadata={"images": json.dumps(names)})
    vectors = pyarrow.FixedSizeListArray.from_arrays(features.flatten().numpy(), features.shape[1])
    file = io.BytesIO()
    write_table(pyarrow.table({"image": names, "row": images.rows, "label": labels, "features": vectors}), file)
    return file.getvalue()
