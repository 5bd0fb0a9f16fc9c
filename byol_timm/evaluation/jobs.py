"""Evaluations from settings to printed lines and files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli import counted, output_folder
from ..config import EvaluationConfig
from ..errors import ByolTimmError
from ..files import write_json
from ..report import save_confusion
from .classifier import train_classifier
from .features import open_evaluation


def evaluate_classifier(config: EvaluationConfig, protocol: str = "quick", *, frozen: bool) -> None:
    """Say what `train_classifier` makes of the encoder and images of the settings, and write it to their `output`."""
    folder = evaluation_folder(config.output) if config.output else None
    encoder, splits, preparation = open_evaluation(config)
    assert splits.test is not None
    trained = train_classifier(
        encoder, splits.train, splits.test, preparation, frozen=frozen, protocol=protocol, seed=config.seed
    )
    metrics, class_names = trained.metrics, splits.train.class_names
    kind = "linear probe" if frozen else "fine-tuning"
    print(f"{kind} ({metrics['protocol']}) of {config.encoder} on {config.dataset}")
    print(*accuracy_lines(metrics, class_names), sep="\n")
    if folder:
        record = {"encoder": config.encoder, "dataset": config.dataset, **metrics}
        save_evaluation(folder, record, class_names, rows=trained.rows)


def accuracy_lines(metrics: Mapping[str, Any], class_names: Sequence[str]) -> list[str]:
    """`classification_metrics` for people: accuracies in percent, and the classes that go wrong most."""
    low, high = metrics["top1_interval"]
    images = counted(metrics["images"], "image")
    lines = [f"  top-1 {metrics['top1']:6.1%} of {images} (95 % interval {low:.1%} to {high:.1%})"]
    if metrics["top5"] is not None:
        lines += [f"  top-5 {metrics['top5']:6.1%}"]
    known = [(share, name) for share, name in zip(metrics["per_class"], class_names, strict=False) if share is not None]
    worst = ", ".join(f"{name} {share:.1%}" for share, name in sorted(known)[:3])
    return [*lines, f"  mean per class {metrics['mean_per_class']:.1%}; lowest: {worst}"]


def evaluation_folder(path: str | Path) -> Path:
    """An `output_folder` for `save_evaluation`; a pretraining run is refused, whose results.json would be lost."""
    folder = Path(path)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
        if (folder / name).exists():
            raise ByolTimmError(
                f"--output {folder} is a pretraining run ({name}) with results of its own. "
                f"Choose another folder, such as {folder}-evaluation"
            )
    return output_folder(folder)


def save_evaluation(
    folder: Path, record: Mapping[str, Any], class_names: Sequence[str], *, rows: Iterable[int] | None = None
) -> None:
    """`results.json` with the record, `confusion.png` of its `confusion`, and `labelled.json` with the rows if given.

    rows: of the images in their split whose labels a classifier learned from. Raises `ByolTimmError`.
    """
    try:
        write_json(folder / "results.json", record)
        if rows is not None:
            (folder / "labelled.json").write_text(json.dumps([int(row) for row in rows]) + "\n", encoding="utf-8")
    except OSError as error:
        raise ByolTimmError(f"cannot write to {folder} ({error.strerror}). Choose another --output") from error
    save_confusion(record["confusion"], class_names, folder / "confusion.png")
