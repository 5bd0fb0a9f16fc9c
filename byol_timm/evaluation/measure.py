"""Evaluate an encoder on a data set: from names or objects to metrics, files and lines to print."""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from ..cli import output_folder
from ..config import ClassifierConfig, EvaluationConfig, KnnConfig, check_seed, data_settings
from ..data import Images, Splits, hold_out, open_dataset, warn_of_few_levels
from ..encoders import create_encoder, fetch_encoder, has_convolutions, read_record
from ..errors import ByolTimmError, nearest
from ..files import write_json
from ..report import save_confusion
from .classifier import train_classifier
from .features import Preparation, RawPixels, dataset_features
from .metrics import classification_metrics, labels_of
from .neighbours import knn_scores

logger = logging.getLogger(__name__)


def evaluate(
    encoder: nn.Module | str,
    dataset: Images | Splits | str = "digits",
    method: Literal["knn", "linear", "finetune"] = "knn",
    **options: Any,
) -> dict[str, Any]:
    """Measure on held-out images how well an encoder's features predict labels, and return the metrics.

    encoder: a timm model without classifier, which is not changed; or local-dir:FOLDER, hf-hub:user/name, a timm name.
    dataset: what --dataset takes, or images of `open_dataset`; a tenth of them is held out if they are not split.
    method: nearest neighbours, a linear classifier on the frozen encoder, or one trained with a copy of the encoder.
    options: fields of `KnnConfig` for knn, else of `ClassifierConfig`, such as k, protocol, image_size, workers, seed.
        With `output`, a folder, the results are also saved. A saved encoder knows the `split_seed` of its training; of
        others, give it if it was not 0, since the split decides which images were held out.

    The result has the metrics of `classification_metrics`, and what was evaluated and how.
    """
    config = _config(encoder, dataset, method, options)
    folder = _evaluation_folder(Path(config.output)) if config.output else None
    network, split_seed = _open_encoder(config) if isinstance(encoder, str) else (encoder, config.split_seed or 0)
    splits, preparation = _open_images(config, network, dataset, split_seed)
    if splits.test is None:
        raise ByolTimmError(f"{config.dataset} has no labels to evaluate with. Name their column with --label_column")
    rows = None
    if isinstance(config, KnnConfig):
        metrics = _knn(config, network, splits.train, splits.test, preparation)
    else:
        settings: Any = dict(frozen=method == "linear", protocol=config.protocol, seed=config.seed)
        _, metrics, rows = train_classifier(network, splits.train, splits.test, preparation, **settings)
    about = {"encoder": config.encoder, "dataset": config.dataset, "split_seed": split_seed, "method": method}
    metrics = {**about, **metrics, "class_names": list(splits.train.class_names)}
    if folder:
        write_json(folder / "results.json", metrics)
        save_confusion(metrics["confusion"], splits.train.class_names, folder / "confusion.png")
        if rows is not None:
            write_json(folder / "labelled.json", rows.tolist())
    return metrics


def metrics_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the metrics of `evaluate` as lines to print: accuracies, and the least accurate classes."""
    subject = f"{metrics['encoder']} on {metrics['dataset']}"
    if metrics["method"] == "knn":
        lines = [f"{metrics['k']}-NN accuracy of {subject}, {metrics['bank_images']:,} images in the bank"]
    else:
        kind = "linear probe" if metrics["frozen"] else "fine-tuning"
        lines = [f"{kind} ({metrics['protocol']}) of {subject}"]
    low, high = metrics["top1_interval"]
    images = f"{metrics['images']:,} image" + "s" * (metrics["images"] != 1)
    lines += [f"  top-1 {metrics['top1']:6.1%} of {images} (95 % interval {low:.1%} to {high:.1%})"]
    if metrics["top5"] is not None:
        lines += [f"  top-5 {metrics['top5']:6.1%}"]
    shares = zip(metrics["per_class"], metrics["class_names"], strict=False)
    lowest = sorted((share, name) for share, name in shares if share is not None)[:3]
    listed = ", ".join(f"{name} {share:.1%}" for share, name in lowest)
    lines += [f"  mean per class {metrics['mean_per_class']:.1%}; lowest: {listed}"]
    if "raw_pixels_top1" in metrics:
        lines += [f"  raw pixels {metrics['raw_pixels_top1']:.1%}"]
    return lines


def open_evaluation(config: EvaluationConfig, *, labelled: bool = True) -> tuple[nn.Module, Splits, Preparation]:
    """Return the encoder, on a GPU if there is one, its images, and how they become its input.

    labelled: False puts all images of the split into `train`, with or without labels.
    """
    _check(config)
    encoder, split_seed = _open_encoder(config)
    splits, preparation = _open_images(config, encoder, config.dataset, split_seed, labelled=labelled)
    return encoder, splits, preparation


def _config(
    encoder: nn.Module | str, dataset: Images | Splits | str, method: str, options: Mapping[str, Any]
) -> KnnConfig | ClassifierConfig:
    """Return the options as a config with all defaults, after checking their names and values."""
    if method not in ("knn", "linear", "finetune"):
        raise ByolTimmError(f"method must be knn, linear or finetune ({method})")
    kind = KnnConfig if method == "knn" else ClassifierConfig
    names = [field.name for field in fields(kind)]
    for_names = [] if isinstance(encoder, str) else ["pretrained", "image_size", "in_chans"]
    if not isinstance(dataset, str):
        for_names += ["dataset_config", "split", "image_column", "label_column", "value_range"]
        dataset = dataset.name if isinstance(dataset, Images) else dataset.train.name
    for name in options:
        if name not in names:
            raise ByolTimmError(f"{method} has no option {name!r}. {nearest(name, names)}")
        if name in for_names:
            raise ByolTimmError(f"{name} ({options[name]}) needs encoder and dataset given by name. Leave it out")
    called = encoder if isinstance(encoder, str) else type(encoder).__name__
    config = kind(encoder=called, dataset=dataset, **options)
    _check(config)
    return config


def _check(config: EvaluationConfig) -> None:
    check_seed(config.seed)
    if config.workers is not None and config.workers < 0:
        raise ByolTimmError(f"--workers must not be negative ({config.workers})")
    for name, value in vars(config).items():
        if name in ("k", "temperature") and not value > 0:
            raise ByolTimmError(f"--{name} must be positive ({value})")


def _open_encoder(config: EvaluationConfig) -> tuple[nn.Module, int]:
    """Return the encoder, and the seed that held out test images when it was trained, unless the user gave another."""
    name, record = config.encoder, {}
    if name.startswith("hf-hub:"):
        name = f"local-dir:{fetch_encoder(name)}"
    # Draws the weights of a timm name without --pretrained.
    torch.manual_seed(config.seed)
    encoder = create_encoder(name, image_size=config.image_size, in_chans=config.in_chans, pretrained=config.pretrained)
    if torch.cuda.is_available():
        encoder.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    if name.startswith("local-dir:"):
        record = read_record(name.removeprefix("local-dir:"))
    trained: Any = record.get("config")
    # Before there was a split_seed, the seed split the images.
    used = trained.get("split_seed", trained.get("seed")) if isinstance(trained, dict) else None
    used = used if isinstance(used, int) else None
    if used is not None and config.split_seed not in (None, used):
        logger.warning("%s was trained with split_seed %d: it may have seen some of the test images", name, used)
    return encoder.eval(), config.split_seed if config.split_seed is not None else used or 0


def _open_images(
    config: EvaluationConfig,
    encoder: nn.Module,
    dataset: Images | Splits | str,
    split_seed: int,
    *,
    labelled: bool = True,
) -> tuple[Splits, Preparation]:
    channels = resolve_model_data_config(encoder)["input_size"][0]
    if isinstance(dataset, Images):
        dataset = hold_out(dataset, split_seed)
    elif isinstance(dataset, str):
        settings = data_settings(config)
        dataset = open_dataset(**settings, in_chans=channels, split_seed=split_seed, hold_out=labelled)
    warn_of_few_levels(dataset.train)
    layout = has_convolutions(encoder)
    return dataset, Preparation.of(encoder, channels, channels_last=layout, workers=config.workers)


def _knn(
    config: KnnConfig, encoder: nn.Module, train: Images, test: Images, preparation: Preparation
) -> dict[str, Any]:
    """Measure kNN accuracy with all training images in the bank."""
    labels, test_labels = labels_of(train, "learn from"), labels_of(test, "classify")
    settings: Any = dict(k=config.k, temperature=config.temperature, center=config.center)

    def measure(network: nn.Module, preparation: Preparation) -> dict[str, Any]:
        bank, banked = dataset_features(network, train, preparation)
        queries, queried = dataset_features(network, test, preparation)
        scores = knn_scores(bank, labels[banked], queries, num_classes=len(train.class_names), **settings)
        return {"bank_images": len(bank), **classification_metrics(scores, test_labels[queried])}

    metrics = {**settings, **measure(encoder, preparation)}
    if config.raw_pixels:
        # Without centring, an offset would change the cosines.
        metrics["raw_pixels_top1"] = measure(RawPixels(), replace(preparation, mean=(0.0,), std=(1.0,)))["top1"]
    return metrics


def _evaluation_folder(folder: Path) -> Path:
    """Create the folder of --output, unless it is a pretraining run, whose results.json would be overwritten."""
    for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
        if (folder / name).exists():
            raise ByolTimmError(
                f"--output {folder} is a pretraining run ({name}) with results of its own. "
                f"Choose another folder, such as {folder}-evaluation"
            )
    return output_folder(folder)
