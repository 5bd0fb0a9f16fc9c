"""What comes out of a run: the encoder, results.json, pictures and the report."""

import contextlib
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..byol import HEALTH
from ..cli import read_config
from ..config import ORDERS, REPLACED, PretrainConfig
from ..data import BadImage
from ..encoders import create_encoder, normalization, save_encoder
from ..errors import redact
from ..evaluation import NEIGHBOURS, Examples, Preparation
from ..files import write_json
from ..report import save_curves, save_report, save_views
from ..training import read_metrics
from ..views import crop_pct
from .plan import Plan
from .resolve import open_splits
from .summary import closing

logger = logging.getLogger(__name__)


def write_results(
    plan: Plan, encoder: nn.Module, folder: Path, record: dict[str, Any], held_out: Examples | None
) -> None:
    """Write the encoder, results.json and the pictures, and log what came out.

    Metrics that the user has deleted with metrics.jsonl are left out.
    """
    settings = plan.settings
    rows = read_metrics(folder / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    record["health"] = {name: trained[-1][name] for name in (*HEALTH, "effective_rank")} if trained else {}
    baselines = {}
    if held_out is not None:
        accuracies = {row["step"]: row["knn"] for row in rows if "knn" in row}
        baselines = {"raw pixels": held_out.knn_of_pixels()}
        if 0 in accuracies:
            baselines["before training"] = accuracies[0]
        record["results"] = {
            "knn_raw_pixels": 100 * baselines["raw pixels"],
            **({"knn_random": 100 * accuracies[0]} if 0 in accuracies else {}),
            "knn_byol": 100 * accuracies[record["steps"]],
            "k": NEIGHBOURS,
            "protocol": held_out.protocol,
        }
        linear = [row["linear"] for row in rows if "linear" in row]
        if linear:
            record["results"]["linear_byol"] = 100 * linear[-1]
    (held_out or plan.examples()).save_pictures(encoder, folder)
    save_curves(rows, folder / "curves.png", baselines=baselines)
    save_encoder(
        encoder,
        folder / "encoder",
        image_size=settings.image_size,
        mean=plan.views.mean,
        std=plan.views.std,
        crop_pct=crop_pct(settings.image_size),
        license=settings.license,
        record=record,
        pictures=[folder / "curves.png", folder / "embedding.png"],
    )
    write_json(folder / "results.json", redact(record))
    save_report(folder)
    for line in closing(settings, folder, record):
        logger.info(line)


def save_example_views(plan: Plan, path: Path) -> None:
    """Draw a few training images with both of their views."""
    images, views = plan.splits.bank, plan.views
    examples: list[Tensor] = []
    for index in range(len(images)):
        with contextlib.suppress(BadImage):
            examples.append(images.decode(index * 7919 % len(images)))
        if len(examples) == 8:
            break
    ordinals = torch.arange(len(examples))
    crops = torch.stack([views.cut(image, ordinal) for ordinal, image in enumerate(examples)])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (views.mean, views.std))
    view1, view2 = ((view * std + mean).clamp(0, 1) for view in views.finish(crops, ordinals))
    save_views(examples, view1, view2, path)


def redraw(folder: str | Path, *, method: Literal["pca", "tsne"] = "tsne") -> None:
    """Draw `embedding.png`, `neighbours.png` and `confusion.png` of a finished run again, the map by `method`.

    Raises `ByolTimmError` for a folder without config.yaml or encoder, and for images that no longer exist.
    """
    folder = Path(folder)
    config = read_config(PretrainConfig, folder / "config.yaml", ignore={*ORDERS, *REPLACED})
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    encoder = create_encoder(f"local-dir:{folder}/encoder").to(memory_format=layout)
    mean, std = normalization(encoder, config.in_chans)
    splits = open_splits(config)
    settings: dict[str, Any] = dict(channels_last=bool(config.channels_last), workers=config.workers)
    preparation = Preparation.square(config.image_size or 0, mean, std, **settings)
    examples = Examples.load(splits.bank, splits.test, preparation, seed=config.split_seed)
    examples.save_pictures(encoder, folder, method=method)
