"""Was pretraining worth it: classifiers on random, pretrained and BYOL encoders, by share of the labels."""

import csv
import dataclasses
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import nn

from .config import PretrainConfig, check
from .data import Images, Splits, fingerprint
from .encoders import create_encoder, fit_backbone, has_convolutions, has_residual_init, normalization
from .errors import ByolTimmError
from .evaluation import (
    PROTOCOLS,
    Preparation,
    Protocol,
    classification_metrics,
    dataset_features,
    fit_linear,
    label_subset,
    train_classifier,
)
from .files import write_json
from .pretraining import MAY_CHANGE, initial_encoder, open_images, pretrain, resolve_images, resolve_training
from .report import save_bars, save_label_efficiency
from .training import compare_config, lock_folder, prepare_output_dir
from .views import EvaluationTransform, crop_pct

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
# What may be added to a comparison, or differ when it goes on.
EXTENSIBLE = MAY_CHANGE - {"batch_size"} | {"label_shares", "image_shares", "seeds"}
COLUMNS = (
    *("start", "images", "mode", "labels", "seed", "train_images", "test_images"),
    *("top1", "top1_low", "top1_high", "mean_per_class", "chosen", "seconds", "zero_init_last"),
)
# Light where the encoder is frozen, dark where it is fine-tuned.
COLORS = {"random": ("#a8a8a8", "#4d4d4d"), "pretrained": ("#7cc29a", "#21683f"), "BYOL": ("#7fb0e0", "#1d4f8a")}


@dataclass(frozen=True)
class Comparison:
    """What is compared, with how many labels, and how often.

    pretraining: of the BYOL encoders; the seed is that of the repetition. Its backbone is a timm name.
    label_shares: of the labelled training images that classifiers learn from.
    image_shares: of the training images that further BYOL encoders see, for as many steps as the one that sees all;
        these are compared with the largest share of the labels.
    seeds: of the initial weights, BYOL, the labels that are chosen and the classifiers, one repetition each.
    linear, finetune: for frozen encoders, without augmentation, so that features are extracted once; for the others.
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
        return f"byol-{_percent(self.images)}" if self.start == "byol" else self.start

    @property
    def title(self) -> str:
        if self.start != "byol":
            return self.start
        return "BYOL" if self.images == 1 else f"BYOL on {_percent(self.images)} % of the images"


class Cell(NamedTuple):
    """One classifier of the comparison."""

    origin: Origin
    frozen: bool
    labels: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.origin.file}-{self.mode}-{_percent(self.labels)}-seed{self.seed}.json"

    @property
    def mode(self) -> str:
        return "frozen" if self.frozen else "fine-tuned"


def compare(comparison: Comparison, folder: str | Path) -> list[dict[str, Any]]:
    """The figures of every cell, as in `results.csv`; in the folder also the pictures and `conclusion.md`.

    `labelled/` has the rows of the data set whose labels were used, by share and seed.

    What an earlier call finished there is taken as it is, and an interrupted pretraining goes on from its checkpoint.
    The encoders before pretraining are those that BYOL started from; timm's pretrained weights are left out, with a
    warning, where they cannot be had. Raises `ByolTimmError`, for a folder of another comparison among other things.
    """
    folder = Path(folder)
    _check(comparison)
    prepare_output_dir(folder, resume=True, overwrite=False)
    with lock_folder(folder):
        for name in ("cells", "labelled"):
            (folder / name).mkdir(exist_ok=True)
        _claim(folder, comparison, open_images(comparison.pretraining))
        for seed in comparison.seeds:
            config = dataclasses.replace(comparison.pretraining, seed=seed)
            splits = open_images(config)
            settings = _resolve(comparison, config, splits)
            for share in comparison.label_shares:
                chosen = label_subset(np.asarray(splits.train.labels), share, seed)
                _save(folder / "labelled" / f"{_percent(share)}-seed{seed}.json", splits.train.rows[chosen].tolist())
            for origin in _origins(comparison):
                _fill(folder, comparison, settings, origin, splits)
        rows = list(_finished(folder, comparison))
        _write(folder, comparison, rows)
    return rows


def cells(comparison: Comparison, origin: Origin, seed: int) -> list[Cell]:
    """All cells of one encoder, in the order in which they are computed."""
    shares = comparison.label_shares
    if origin.start == "byol" and origin.images < 1:
        shares = (max(shares),)
    return [Cell(origin, frozen, labels, seed) for frozen in (True, False) for labels in shares]


def conclusion(rows: Sequence[Row]) -> str:
    """What the figures say, in three sentences: BYOL against random weights, frozen and fine-tuned; what to choose.

    A difference counts where its 95 % interval leaves out zero: Student's over the seeds, each of which gives both
    encoders the same labels, and that of so many test images. One seed tells no difference.
    """
    table = _Table(rows)
    sentences = [
        f"With the encoder frozen, BYOL {_verdict(table, 'frozen')}.",
        f"With the encoder fine-tuned, BYOL {_verdict(table, 'fine-tuned')}.",
    ]
    best = []
    for labels in dict.fromkeys((table.shares[0], table.shares[-1])):
        title, mode = table.best(labels)
        best.append(f"with {_labels(labels)} from {title}, {mode} ({100 * table.mean(title, mode, labels):.1f} %)")
    last = f"The highest accuracy comes {', and '.join(best)}"
    if table.fewest:
        few, all_images = (table.mean(title, "frozen", table.shares[-1]) for title in (table.fewest, "BYOL"))
        last += f"; {table.fewest} instead of all changes its frozen accuracy by {100 * (few - all_images):+.1f} points"
    return " ".join([*sentences, f"{last}."])


def results_table(rows: Sequence[Row]) -> str:
    """Mean accuracies in percent, with standard deviations over the seeds, as a table in Markdown."""
    table = _Table(rows)
    lines = [
        f"| encoder | | {' | '.join(f'{_percent(share)} % of the labels' for share in table.shares)} |",
        "|---|---|" + "--:|" * len(table.shares),
    ]
    for title in table.titles:
        for mode in ("frozen", "fine-tuned"):
            figures = [_figure(table.runs.get((title, mode, share), {})) for share in table.shares]
            lines.append(f"| {title} | {mode} | {' | '.join(figures)} |")
    return "\n".join(lines)


# The encoders and their cells


def _check(comparison: Comparison) -> None:
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


def _resolve(comparison: Comparison, config: PretrainConfig, splits: Splits) -> Any:
    """The settings of pretraining on all images, with nothing left to choose."""
    settings = resolve_images(config, splits.train.side())
    settings = resolve_training(settings, initial_encoder(settings), len(splits.train), 1)
    for share in comparison.image_shares:
        count = round(share * len(splits.train))
        if count < settings.batch_size:
            raise ByolTimmError(
                f"{_percent(share)} % of the images are {count}, fewer than the batch of {settings.batch_size}. "
                "Lower --batch_size, or leave that share out of --image_shares"
            )
    return settings


def _claim(folder: Path, comparison: Comparison, splits: Splits) -> None:
    """Refuse a folder in which other things were compared."""
    if splits.test is None:
        raise ByolTimmError(f"{comparison.pretraining.dataset} has no labels to compare with. Name their column")
    path = folder / "comparison.json"
    settings = dataclasses.asdict(comparison)
    asked = {
        **settings.pop("pretraining"),
        **settings,
        "images": [fingerprint(part) for part in (splits.train, splits.test)],
    }
    if path.exists():
        saved = json.loads(path.read_text("utf-8"))
        compare_config(saved, asked, may_change=EXTENSIBLE, checkpoint=f"the comparison in {folder}")
    write_json(path, asked)


def _origins(comparison: Comparison) -> list[Origin]:
    shares = sorted({*comparison.image_shares, 1.0}, reverse=True)
    return [Origin("random"), Origin("pretrained"), *(Origin("byol", share) for share in shares)]


def _fill(folder: Path, comparison: Comparison, settings: Any, origin: Origin, splits: Splits) -> None:
    """Compute the cells of one encoder that are not there yet."""
    missing = [c for c in cells(comparison, origin, settings.seed) if not (folder / "cells" / c.file).exists()]
    if not missing:
        return
    encoder = _encoder(folder, settings, origin)
    if encoder is None:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device).eval()
    preparation = Preparation(
        EvaluationTransform(settings.image_size, crop_pct=crop_pct(settings.image_size)),
        *normalization(encoder, settings.in_chans),
        channels_last=has_convolutions(encoder),
        workers=settings.workers,
        memory_limit=settings.memory_limit * 2**30,
    )
    start = time.monotonic()
    for cell, metrics in _evaluate(encoder, missing, splits, preparation, comparison):
        now = time.monotonic()
        row = {**cell.origin._asdict(), "mode": cell.mode, "labels": cell.labels, "seed": cell.seed}
        _save(folder / "cells" / cell.file, {**row, "seconds": now - start, "metrics": metrics})
        logger.info(
            "%s, %s, %s, seed %d: %.1f %%",
            origin.title, cell.mode, _labels(cell.labels), cell.seed, 100 * metrics["top1"],
        )  # fmt: skip
        start = now


def _encoder(folder: Path, settings: Any, origin: Origin) -> nn.Module | None:
    """The encoder, None for pretrained weights that cannot be had."""
    if origin.start == "byol":
        # As many steps as on all images, so that it is the images that tell.
        run = folder / f"{origin.file}-seed{settings.seed}"
        if not (run / "results.json").exists():
            pretrain(
                dataclasses.replace(
                    settings,
                    image_share=origin.images,
                    epochs=round(settings.epochs / origin.images),
                    warmup_epochs=settings.warmup_epochs / origin.images,
                    output_dir=str(run),
                    resume=True,
                )
            )
        return create_encoder(f"local-dir:{run}/encoder", image_size=settings.image_size)
    try:
        return initial_encoder(dataclasses.replace(settings, pretrained=origin.start == "pretrained"))
    except ByolTimmError as error:
        if origin.start == "random":
            raise
        logger.warning("timm's pretrained weights are left out: %s", error)
        return None


def _evaluate(
    encoder: nn.Module, missing: Sequence[Cell], splits: Splits, preparation: Preparation, comparison: Comparison
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    train, test = splits.train, _test(splits)
    frozen = [cell for cell in missing if cell.frozen]
    if frozen:
        yield from _probe(encoder, frozen, train, test, preparation, comparison.linear)
    for cell in missing:
        if not cell.frozen:
            protocol = dataclasses.replace(comparison.finetune, labels=cell.labels)
            settings: Any = dict(frozen=False, protocol=protocol, seed=cell.seed)
            yield cell, train_classifier(encoder, train, test, preparation, **settings).metrics


def _probe(
    encoder: nn.Module,
    frozen: Sequence[Cell],
    train: Images,
    test: Images,
    preparation: Preparation,
    protocol: Protocol,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Linear classifiers for all shares of the labels, from features that are extracted once."""
    train_labels: Any = train.labels
    test_labels: Any = test.labels
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


def _test(splits: Splits) -> Images:
    test: Any = splits.test
    return test


# Files


def _save(path: Path, values: Any) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    write_json(temporary, values)
    os.replace(temporary, path)


def _finished(folder: Path, comparison: Comparison) -> Iterator[dict[str, Any]]:
    residual_init = _residual_init(comparison)
    for origin in _origins(comparison):
        for seed in comparison.seeds:
            for cell in cells(comparison, origin, seed):
                path = folder / "cells" / cell.file
                if path.exists():
                    row = json.loads(path.read_text("utf-8"))
                    metrics = row.pop("metrics")
                    row["train_images"], row["test_images"] = metrics["train_images"], metrics["images"]
                    row["zero_init_last"] = residual_init if row["start"] != "pretrained" else None
                    row["top1_low"], row["top1_high"] = metrics["top1_interval"]
                    row["chosen"] = " ".join(f"{name}={value:g}" for name, value in metrics["chosen"].items())
                    yield {name: row.get(name, metrics.get(name)) for name in COLUMNS}


def _write(folder: Path, comparison: Comparison, rows: Sequence[Row]) -> None:
    with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    table = _Table(rows)
    all_labels = table.shares[-1]
    bars: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[float, list[float]]] = {}
    colors = {}
    for title, mode, labels in table.runs:
        accuracies = list(table.runs[title, mode, labels].values())
        if labels == all_labels:
            bars.setdefault(mode, {})[title] = accuracies
        if title in COLORS:
            curves.setdefault(f"{title}, {mode}", {})[labels] = accuracies
            colors[f"{title}, {mode}"] = COLORS[title][mode == "fine-tuned"]
    dataset, backbone = comparison.pretraining.dataset, comparison.pretraining.backbone
    name = f"{backbone} on {Path(dataset).name}"
    save_bars(bars, folder / "bars.png", title=f"{name}: a classifier of {_labels(all_labels)}")
    save_label_efficiency(
        curves, folder / "label_efficiency.png", title=f"{name}: accuracy by share of the labels", colors=colors
    )
    pictures = "![bars](bars.png)\n\n![accuracy by share of the labels](label_efficiency.png)"
    note = f"Accuracy in percent on {rows[0]['test_images']:,} test images"
    if len(comparison.seeds) > 1:
        note += f", mean and standard deviation over {len(comparison.seeds)} seeds"
    else:
        note += "; one seed, which tells no difference from chance"
    note += ". Random weights, from which BYOL starts too, are as timm draws them"
    residual_init = _residual_init(comparison)
    if residual_init is not None:
        start, flag = (0, "zero_init_last") if residual_init else (1, "no_zero_init_last")
        note += f", residual branches starting at {start} (--{flag})"
    text = f"{conclusion(rows)}\n\n{results_table(rows)}\n\n{note}.\n\n{pictures}\n"
    (folder / "conclusion.md").write_text(text, encoding="utf-8")


def _residual_init(comparison: Comparison) -> bool | None:
    """Whether residual branches start at zero; None where the backbone leaves no choice."""
    config = comparison.pretraining
    return config.zero_init_last if has_residual_init(fit_backbone(config.backbone).encoder) else None


# Words and numbers


class _Table:
    """Accuracies (0 to 1) by encoder, mode, share of the labels and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.runs: dict[tuple[str, str, float], dict[int, float]] = {}
        for row in rows:
            title = Origin(row["start"], row["images"]).title
            self.runs.setdefault((title, row["mode"], row["labels"]), {})[row["seed"]] = row["top1"]
            self.test_images = row["test_images"]
        self.titles = list(dict.fromkeys(title for title, _, _ in self.runs))
        fewer = [row["images"] for row in rows if 0 < row["images"] < 1]
        self.fewest = Origin("byol", min(fewer)).title if fewer else None
        self.shares = sorted({labels for _, _, labels in self.runs})

    def mean(self, title: str, mode: str, labels: float) -> float:
        return statistics.fmean(self.runs[title, mode, labels].values())

    def best(self, labels: float) -> tuple[str, str]:
        title, mode, _ = max((key for key in self.runs if key[2] == labels), key=lambda key: self.mean(*key))
        return title, mode

    def gain(self, mode: str, labels: float) -> tuple[float, bool]:
        """BYOL's mean minus that of random weights, and whether it can be told from chance."""
        byol, random = (self.runs[title, mode, labels] for title in ("BYOL", "random"))
        differences = [byol[seed] - random[seed] for seed in byol.keys() & random.keys()]
        gain, count = statistics.fmean(differences), len(differences)
        if count < 2:
            return gain, False
        seeds = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
        means = [statistics.fmean(runs.values()) for runs in (byol, random)]
        images = stats.norm.ppf(0.975) * math.sqrt(sum(mean * (1 - mean) for mean in means) / self.test_images)
        return gain, abs(gain) > math.hypot(seeds, images)


def _verdict(table: _Table, mode: str) -> str:
    """How BYOL does against random weights, by share of the labels."""
    gains = {share: table.gain(mode, share) for share in table.shares}
    groups = {
        "is better than random weights": [s for s, (gain, clear) in gains.items() if clear and gain > 0],
        "is worse than random weights": [s for s, (gain, clear) in gains.items() if clear and gain <= 0],
        "makes no measurable difference": [s for s, (_, clear) in gains.items() if not clear],
    }
    parts: list[str] = []
    for what, shares in groups.items():
        if shares:
            listed = [f"{_percent(share)} % ({100 * gains[share][0]:+.1f} points)" for share in shares]
            parts.append(f"{what} with {_listed(listed)}" + ("" if parts else " of the labels"))
    return _listed(parts)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _labels(share: float) -> str:
    return "all labels" if share == 1 else f"{_percent(share)} % of the labels"


def _percent(share: float) -> str:
    return f"{100 * share:.6g}"


def _figure(runs: Mapping[int, float]) -> str:
    values = [100 * value for value in runs.values()]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
