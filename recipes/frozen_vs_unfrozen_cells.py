"""Compute the cells of the comparison: one classifier for each encoder, mode, share of the labels and seed."""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from frozen_vs_unfrozen_report import encoder_title, label_words, percent, save_results
from torch import nn

from byol_timm import create_encoder, pretrain
from byol_timm.config import PretrainConfig, Settings, check
from byol_timm.data import Images, Splits, fingerprint
from byol_timm.encoders import fit_backbone, has_convolutions, has_residual_init, normalization
from byol_timm.errors import ByolTimmError
from byol_timm.evaluation import (
    PROTOCOLS,
    Preparation,
    Protocol,
    classification_metrics,
    dataset_features,
    fit_linear,
    label_subset,
    train_classifier,
)
from byol_timm.files import write_json
from byol_timm.pretraining import MAY_CHANGE, initial_encoder, open_images, resolve_images, resolve_training
from byol_timm.training import claim_folder, compare_config

logger = logging.getLogger("byol_timm.frozen_vs_unfrozen")

# A finished comparison may be extended in these, and resumed with other values of the rest.
EXTENSIBLE = MAY_CHANGE - {"batch_size"} | {"label_shares", "image_shares", "seeds"}


@dataclass(frozen=True)
class Comparison:
    """What is compared, with how many labels, and how often.

    pretraining: settings of the BYOL encoders, seed apart. The backbone is a timm name.
    label_shares: shares of the labelled training images that classifiers learn from.
    image_shares: shares of the training images for further BYOL encoders, which train for as many steps as the one on
        all images; they are compared at the largest share of the labels.
    seeds: each decides initial weights, BYOL, the chosen labels and the classifiers of one repetition.
    linear, finetune: protocols for frozen encoders (without augmentation, so features are extracted once) and others.
    """

    pretraining: PretrainConfig
    label_shares: tuple[float, ...] = (0.01, 0.1, 0.5, 0.8, 1.0)
    image_shares: tuple[float, ...] = (0.1, 0.5, 0.8)
    seeds: tuple[int, ...] = (0, 1, 2)
    linear: Protocol = PROTOCOLS["quick-linear"]
    finetune: Protocol = PROTOCOLS["quick-finetune"]


class Origin(NamedTuple):
    """Where the weights of an encoder come from; images: the share of the training images that BYOL saw."""

    start: Literal["random", "pretrained", "byol"]
    images: float = 0.0

    @property
    def file(self) -> str:
        return f"byol-{percent(self.images)}" if self.start == "byol" else self.start


class Cell(NamedTuple):
    """One classifier of the comparison."""

    origin: Origin
    frozen: bool
    labels: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.origin.file}-{self.mode}-{percent(self.labels)}-seed{self.seed}.json"

    @property
    def mode(self) -> str:
        return "frozen" if self.frozen else "fine-tuned"


def compare(comparison: Comparison, folder: str | Path) -> list[dict[str, Any]]:
    """Compute every cell of the comparison and return their metrics, one row each, as in `results.csv`.

    The folder also gets the pictures, `conclusion.md`, and under `labelled/` the rows of the data set whose labels
    were used, by share and seed.
    Finished cells are kept, and an interrupted pretraining resumes from its checkpoint. Random encoders are those that
    BYOL started from. Where timm's pretrained weights cannot be loaded they are left out, with a warning. Raises
    `ByolTimmError`, for example for a folder of another comparison.
    """
    folder = Path(folder)
    check_comparison(comparison)
    with claim_folder(folder, resume=True):
        for name in ("cells", "labelled"):
            (folder / name).mkdir(exist_ok=True)
        check_same_comparison(folder, comparison, open_images(comparison.pretraining))
        for seed in comparison.seeds:
            config = dataclasses.replace(comparison.pretraining, seed=seed)
            splits = open_images(config)
            settings = resolve(comparison, config, splits)
            for share in comparison.label_shares:
                chosen = label_subset(np.asarray(splits.train.labels), share, seed)
                write_json(
                    folder / "labelled" / f"{percent(share)}-seed{seed}.json", splits.train.rows[chosen].tolist()
                )
            for origin in origins(comparison):
                fill(folder, comparison, settings, origin, splits)
        rows = list(finished(folder, comparison))
        config = comparison.pretraining
        save_results(folder, rows, f"{config.backbone} on {Path(config.dataset).name}", residual_init(config))
    return rows


def check_comparison(comparison: Comparison) -> None:
    """Refuse what cannot be compared, before anything slow."""
    config = comparison.pretraining
    check(config)
    if ":" in config.backbone:
        raise ByolTimmError(
            f"{config.backbone} has no random weights to compare with. Give the name of a timm backbone"
        )
    if config.streaming:
        raise ByolTimmError("a comparison takes shares of the images and of their labels. Leave --streaming out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ByolTimmError("a comparison runs in one process. Launch it with python")
    if comparison.linear.augmentation is not None:
        raise ByolTimmError("frozen encoders are compared without augmentation. Choose another linear protocol")
    for name in ("label_shares", "image_shares", "seeds"):
        values = getattr(comparison, name)
        if len(set(values)) < len(values) or (name != "image_shares" and not values):
            raise ByolTimmError(f"--{name} takes different values, at least one ({values})")
        if name != "seeds" and not all(0 < share <= 1 for share in values):
            raise ByolTimmError(f"--{name} lie above 0 and are at most 1 ({values})")


def check_same_comparison(folder: Path, comparison: Comparison, splits: Splits) -> None:
    """Refuse a folder in which other things were compared."""
    if splits.test is None:
        raise ByolTimmError(f"{comparison.pretraining.dataset} has no labels to compare with. Name their column")
    path = folder / "comparison.json"
    settings = dataclasses.asdict(comparison)
    pretraining = settings.pop("pretraining")
    asked = {**pretraining, **settings, "images": [fingerprint(part) for part in (splits.train, splits.test)]}
    if path.exists():
        saved = json.loads(path.read_text("utf-8"))
        compare_config(saved, asked, may_change=EXTENSIBLE, checkpoint=f"the comparison in {folder}")
    write_json(path, asked)


def resolve(comparison: Comparison, config: PretrainConfig, splits: Splits) -> Settings:
    """Return the settings of pretraining on all images, with every value decided."""
    config = resolve_images(config, splits.train.side())
    settings = resolve_training(config, initial_encoder(config), len(splits.train), 1)
    for share in comparison.image_shares:
        count = round(share * len(splits.train))
        if count < settings.batch_size:
            raise ByolTimmError(
                f"{percent(share)} % of the images are {count}, fewer than the batch of {settings.batch_size}. "
                "Lower --batch_size, or leave that share out of --image_shares"
            )
    return settings


def origins(comparison: Comparison) -> list[Origin]:
    shares = sorted({*comparison.image_shares, 1.0}, reverse=True)
    return [Origin("random"), Origin("pretrained"), *(Origin("byol", share) for share in shares)]


def cells(comparison: Comparison, origin: Origin, seed: int) -> list[Cell]:
    """Return all cells of one encoder, in the order in which they are computed."""
    shares = comparison.label_shares
    if origin.start == "byol" and origin.images < 1:
        shares = (max(shares),)
    return [Cell(origin, frozen, labels, seed) for frozen in (True, False) for labels in shares]


def fill(folder: Path, comparison: Comparison, settings: Settings, origin: Origin, splits: Splits) -> None:
    """Compute the missing cells of one encoder."""
    missing = [c for c in cells(comparison, origin, settings.seed) if not (folder / "cells" / c.file).exists()]
    encoder = find_encoder(folder, settings, origin) if missing else None
    if encoder is None:
        return
    encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    preparation = Preparation.square(
        settings.image_size,
        *normalization(encoder, settings.in_chans),
        channels_last=has_convolutions(encoder),
        workers=settings.workers,
    )
    start = time.monotonic()
    for cell, metrics in evaluate(encoder, missing, splits, preparation, comparison):
        now = time.monotonic()
        row = {**origin._asdict(), "mode": cell.mode, "labels": cell.labels, "seed": cell.seed}
        write_json(folder / "cells" / cell.file, {**row, "seconds": now - start, "metrics": metrics})
        title, labels = encoder_title(*origin), label_words(cell.labels)
        logger.info("%s, %s, %s, seed %d: %.1f %%", title, cell.mode, labels, cell.seed, 100 * metrics["top1"])
        start = now


def find_encoder(folder: Path, settings: Settings, origin: Origin) -> nn.Module | None:
    """Return the encoder, pretrained with BYOL where needed, or None where timm has no pretrained weights for it."""
    if origin.start == "byol":
        run_folder = folder / f"{origin.file}-seed{settings.seed}"
        if not (run_folder / "results.json").exists():
            # As many steps as on all images, so that only the images differ.
            pretrain(
                dataclasses.replace(
                    settings,
                    image_share=origin.images,
                    epochs=round(settings.epochs / origin.images),
                    warmup_epochs=settings.warmup_epochs / origin.images,
                    output_dir=str(run_folder),
                    resume=True,
                )
            )
        return create_encoder(f"local-dir:{run_folder}/encoder", image_size=settings.image_size)
    try:
        return initial_encoder(dataclasses.replace(settings, pretrained=origin.start == "pretrained"))
    except ByolTimmError as error:
        if origin.start == "random":
            raise
        logger.warning("timm's pretrained weights are left out: %s", error)
        return None


def evaluate(
    encoder: nn.Module, missing: Sequence[Cell], splits: Splits, preparation: Preparation, comparison: Comparison
) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    """Yield the missing cells with their metrics: the frozen ones from one extraction of features, then the others."""
    assert splits.test is not None
    frozen = [cell for cell in missing if cell.frozen]
    if frozen:
        yield from probe(encoder, frozen, splits.train, splits.test, preparation, comparison.linear)
    for cell in missing:
        if not cell.frozen:
            protocol = dataclasses.replace(comparison.finetune, labels=cell.labels)
            finetuned = train_classifier(
                encoder, splits.train, splits.test, preparation, frozen=False, protocol=protocol, seed=cell.seed
            )
            yield cell, finetuned.metrics


def probe(
    encoder: nn.Module,
    frozen: Sequence[Cell],
    train: Images,
    test: Images,
    preparation: Preparation,
    protocol: Protocol,
) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    train_labels, test_labels = np.asarray(train.labels), np.asarray(test.labels)
    features, read = dataset_features(encoder, train, preparation)
    queries, queried = dataset_features(encoder, test, preparation)
    classes = max(len(train.class_names), 1 + int(train_labels.max()))
    for cell in frozen:
        chosen = np.isin(read, label_subset(train_labels, cell.labels, cell.seed))
        head, record = fit_linear(
            features[chosen], train_labels[read[chosen]], protocol=protocol, num_classes=classes, seed=cell.seed
        )
        metrics = classification_metrics(head(queries.to(head.weight.dtype)), test_labels[queried])
        yield cell, {"train_images": int(chosen.sum()), **record, **metrics}


def finished(folder: Path, comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield one row for each finished cell."""
    zero_init_last = residual_init(comparison.pretraining)
    for origin in origins(comparison):
        for seed in comparison.seeds:
            for cell in cells(comparison, origin, seed):
                path = folder / "cells" / cell.file
                if not path.exists():
                    continue
                row = json.loads(path.read_text("utf-8"))
                metrics = row.pop("metrics")
                low, high = metrics["top1_interval"]
                yield {
                    **{name: row[name] for name in ("start", "images", "mode", "labels", "seed")},
                    "train_images": metrics["train_images"],
                    "test_images": metrics["images"],
                    "top1": metrics["top1"],
                    "top1_low": low,
                    "top1_high": high,
                    "mean_per_class": metrics["mean_per_class"],
                    "chosen": " ".join(f"{name}={value:g}" for name, value in metrics["chosen"].items()),
                    "seconds": row["seconds"],
                    "zero_init_last": zero_init_last if origin.start != "pretrained" else None,
                }


def residual_init(config: PretrainConfig) -> bool | None:
    """Return whether residual branches start at zero, None where the backbone leaves no choice."""
    return config.zero_init_last if has_residual_init(fit_backbone(config.backbone).encoder) else None
