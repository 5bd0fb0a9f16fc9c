"""Runs on digits that something makes collapse, and healthy ones: what becomes of them, and what the alarm says.

    python tests/helpers/collapse.py
    python tests/helpers/collapse.py --backbones test_vit --runs healthy "lr x1000" --epochs 6

Prints a table in Markdown. A run is an ordinary `pretrain` in batches of 64, on views strong enough that a collapse
comes soon: with SGD where there is BatchNorm, else with what byol_timm chooses; `tau 0` holds the target at the online
network throughout.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState
from torch import nn

from byol_timm import BYOL, ByolTimmError, PretrainConfig, pretrain
from byol_timm.encoders import create_encoder, has_batch_norm
from byol_timm.pretraining import plan, resolve_training
from byol_timm.training import optim, read_metrics

BACKBONES = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit")
RUNS = ("healthy", "no predictor", "tau 0", "lr x1000")
HEADER = """| backbone | run | loss | projection std | effective rank | 20-NN | alarm |
|---|---|---|---|---|---|---|"""


class WithoutPredictor(BYOL):
    def __init__(self, encoder: nn.Module, **settings: Any) -> None:
        super().__init__(encoder, **settings)
        self.predictor = nn.Identity()


def measure(backbone: str, run: str, epochs: int) -> tuple[list[dict[str, Any]], str]:
    """The rows of metrics.jsonl of a run, and what was heard of a collapse or another end."""
    views = dict(crop_scale=(0.5, 1.0), rotate=12.0, jitter=0.8)
    config: Any = PretrainConfig(backbone=backbone, epochs=epochs, batch_size=64, hidden_dim=512, **views)
    if has_batch_norm(create_encoder(backbone, image_size=32)):
        config = dataclasses.replace(config, opt="sgd", lr=0.4, weight_decay=1e-4, target_decay=0.95, num_head_layers=2)
    if run.startswith("lr x"):
        lr = resolve_training(config, create_encoder(backbone, image_size=32), 64, 1).lr
        config = dataclasses.replace(config, lr=lr * float(run.removeprefix("lr x")))
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("byol_timm").addHandler(listener)
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if "no predictor" in run:
            stack.enter_context(patch.object(plan, "BYOL", WithoutPredictor))
        if "tau 0" in run:
            stack.enter_context(patch.object(optim, "target_decay", lambda *_: 0.0))
        try:
            pretrain(dataclasses.replace(config, output_dir=folder))
        except ByolTimmError as error:
            heard.append(str(error))
        rows = read_metrics(Path(folder) / "metrics.jsonl")
    logging.getLogger("byol_timm").removeHandler(listener)
    said = (re.search(r"collapsed by (step \d+)|(not finite at step \d+)", line) for line in heard)
    return rows, ", ".join(found[1] or found[2] for found in said if found) or "none"


def line(backbone: str, run: str, rows: list[dict[str, Any]], alarm: str) -> str:
    """A row of the table: the figures of the last line of metrics, accuracy before and after, the alarm."""
    last = next((row for row in reversed(rows) if "loss" in row), None)
    figures = (
        [f"{last['loss']:.2f}", f"{last['projection_std']:.2f}", f"{last['effective_rank']:.1f}"] if last else [""] * 3
    )
    accuracies = [f"{row['knn']:.0%}" for row in rows if "knn" in row]
    return f"| {' | '.join([backbone, run, *figures, f'{accuracies[0]} to {accuracies[-1]}', alarm])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--epochs", type=int, default=12)
    asked = parser.parse_args()
    print(HEADER)
    for backbone in asked.backbones:
        for run in asked.runs:
            print(line(backbone, run, *measure(backbone, run, asked.epochs)), flush=True)


if __name__ == "__main__":
    main()
