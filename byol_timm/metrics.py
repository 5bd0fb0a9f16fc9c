"""What a run says while it trains: figures of health without labels, metrics.jsonl, progress, the collapse alarm."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import ByolTimmError

logger = logging.getLogger(__name__)

# Name in a row, name on the line, format.
_SHOWN = (
    ("epoch", "epoch", "{:.2f}"),
    ("loss", "loss", "{:.4f}"),
    ("lr", "lr", "{:.3g}"),
    ("target_decay", "tau", "{:.5f}"),
    ("feature_std", "std", "{:.3f}"),
    ("effective_rank", "rank", "{:.1f}"),
    ("knn", "kNN", "{:.1%}"),
    ("linear", "linear", "{:.1%}"),
    ("images_per_second", "images/s", "{:.0f}"),
)


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Spread of features [B, d] over the batch, scalar: 1 when directions are isotropic, 0 when all are the same.

    The standard deviation of each dimension of the l2-normalised rows, averaged and multiplied by sqrt(d), as in
    SimSiam (Chen & He 2020, section 4.1). float32 also under autocast; nothing waits for the device.
    """
    rows = torch.nn.functional.normalize(features.float(), dim=1)
    return rows.std(0, correction=0).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Number of dimensions that centred features [B, d] fill, scalar from 1 to min(B - 1, d); nan for infinite ones.

    The exponential of the entropy of the normalised singular values (Roy & Vetterli 2007; RankMe, Garrido et al. 2023,
    which does not centre). float32 also under autocast. Scale-free, so it tells nothing of features that are all the
    same: rounding noise has full rank. On CUDA the decomposition waits for the device.
    """
    with torch.autocast(features.device.type, enabled=False):
        centred = features.float() - features.float().mean(0)
        finite = centred.isfinite().all()
        values = torch.linalg.svdvals(centred.nan_to_num(0, 0, 0))
        shares = values / values.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(finite, torch.exp(-torch.xlogy(shares, shares).sum()), torch.nan)


class MetricsLog:
    """Writes each row of figures to `folder/metrics.jsonl` and shows progress: a bar on a terminal, lines elsewhere.

    images_per_step: images of one optimizer step over all processes, for images/s.
    resume_step: rows after this step are of work that was lost, and are dropped; 0 starts a new file.
    seconds: that the run has taken up to that step.
    tracker: called with each row's figures and step besides.
    stream: where progress goes; stdout when None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        images_per_step: int,
        resume_step: int = 0,
        seconds: float = 0.0,
        tracker: Callable[[dict[str, float], int], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
        if resume_step and not rows:
            logger.warning(f"{path} has no figures of steps 1 to {resume_step}: curves and results go without")
        temporary = path.with_name(".tmp-metrics.jsonl")
        temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        os.replace(temporary, path)
        self._path = path
        self._file = open(path, "ab", buffering=0)
        self._tracker = tracker
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._stream = sys.stdout if stream is None else stream
        self._seconds_before = seconds
        self._start = time.monotonic()
        self._aside = 0.0
        self._first_time = self._last_time = self._trained()
        self._start_step = self._last_step = resume_step
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total_steps, initial=resume_step, file=self._stream, unit="step", dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """That the run has taken so far, those before it was resumed included."""
        return self._seconds_before + time.monotonic() - self._start

    def advance(self, step: int) -> None:
        """Move the bar to `step`; costs nothing where there is none."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Keep what is done meanwhile, evaluations and pictures, out of images/s and of the time that is left."""
        start = time.monotonic()
        yield
        self._aside += time.monotonic() - start

    def log(self, row: Mapping[str, float]) -> dict[str, float]:
        """Write a row (`step` and any figures) with `seconds` of the run; rows of training with `images_per_second`.

        That is since the last such row. Returns the row as written. Numbers that are not finite are written as null.
        """
        now, step = self._trained(), int(row["step"])
        full = dict(row)
        if step > self._last_step and "loss" in row:
            images = (step - self._last_step) * self._images_per_step
            full["images_per_second"] = images / max(now - self._last_time, 1e-9)
            self._last_time, self._last_step = now, step
        full["seconds"] = self.seconds
        self._write(_line(full).encode())
        if self._tracker is not None:
            self._tracker({name: value for name, value in full.items() if name != "step"}, step)
        self._show(full, step, now)
        return full

    def close(self) -> None:
        """Close the file and leave the bar as it stands."""
        self._file.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _trained(self) -> float:
        """A clock that stands still aside."""
        return time.monotonic() - self._aside

    def _write(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
        except OSError as error:
            raise ByolTimmError(f"cannot write {self._path} ({error.strerror})") from error
        if written != len(line):
            raise ByolTimmError(f"cannot write {self._path} (No space left on device)")

    def _show(self, row: Mapping[str, float], step: int, now: float) -> None:
        figures = [(label, form.format(row[name])) for name, label, form in _SHOWN if name in row]
        if self._bar is not None:
            self.advance(step)
            self._bar.set_postfix_str(" ".join(f"{label} {value}" for label, value in figures))
            return
        line = f"step {step}/{self._total_steps}  " + "  ".join(f"{label} {value}" for label, value in figures)
        if step > self._start_step:
            left = (self._total_steps - step) * (now - self._first_time) / (step - self._start_step)
            line += f"  ETA {_clock(left)}"
        print(line, file=self._stream, flush=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, null as nan; a last line that a killed run left unfinished is dropped.

    An absent file has no rows. Raises `ByolTimmError` for anything else that is no row.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError):
            # Every whole line ends in a newline, so what follows the last one is torn, or nothing.
            if number == len(lines):
                break
            raise ByolTimmError(f"{path} line {number} is not a row of metrics. Remove that line") from None
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def write_json(path: Path, values: Any) -> None:
    """Write values as a JSON file that people can read; numbers in it must be finite."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


class CollapseAlarm:
    """Watches for a network that gives every image the same output, or all of them a few, and says so in one line.

    Built with the settings of the run, which its advice names; opt, lr (base) and batch_size (global) as in the config,
    num_rows: of representations whose effective rank is taken, color: whether the augmentation changes colours. A
    representation that gets worse but stays diverse raises no alarm: kNN accuracy tells that.
    """

    # A missing predictor shows in the projections long before it reaches the representation, whose spread differs from
    # one family to the next. Lowest `projection_std` of 15 healthy runs of 5 families (SGD, AdamW, LARS; 50 to 1,500
    # steps on digits): 0.29. Highest of 10 runs without predictor, after 40 steps: 0.16. Lowest `feature_std` of the
    # healthy runs: 0.008, a ViT under LARS; a network that a huge learning rate has killed: below 0.0005.
    MIN_PROJECTION_STD = 0.2
    MIN_FEATURE_STD = 0.002
    CHECKS = 3
    # A huge learning rate leaves the representation a few dimensions, and may leave both spreads alone. In healthy runs
    # `effective_rank` dips too, and comes back: its highest of any ten lines on end was 6.1 or more in 13 of them (the
    # lowest are ViTs on Fashion-MNIST), and fell to 4.0 where the learning rate was a thousand times too high.
    MIN_RANK = 5.0
    RANK_CHECKS = 10

    def __init__(
        self,
        *,
        opt: str,
        lr: float,
        batch_size: int,
        num_rows: int,
        batch_norm: bool,
        color: bool,
        target_decay: float,
    ) -> None:
        self._likely = _likely_cause(opt, lr, batch_size, batch_norm, color, target_decay)
        # Few rows fill few dimensions.
        self._min_rank = min(self.MIN_RANK, num_rows / 8)
        self._narrow = self._low = 0

    def check(self, row: Mapping[str, float]) -> str | None:
        """A one-line warning when rows have looked collapsed for long enough; once per collapse.

        That is three rows on end for the spreads, ten for the rank. row: `step`, `feature_std`, `projection_std`, which
        is `feature_std` of the online projections, `effective_rank` of the representations, and `agreement`, which is
        only told: it is as high in a healthy run as in a collapsed one.
        """
        # Written so that nan counts as collapsed.
        wide = row["projection_std"] >= self.MIN_PROJECTION_STD and row["feature_std"] >= self.MIN_FEATURE_STD
        high = row["effective_rank"] >= self._min_rank
        before = self._sounds
        self._narrow = 0 if wide else self._narrow + 1
        self._low = 0 if high else self._low + 1
        if before or not self._sounds:
            return None
        return (
            f"the network has collapsed by step {int(row['step'])}: projection std {row['projection_std']:.3f} "
            f"(healthy: above {self.MIN_PROJECTION_STD}), feature std {row['feature_std']:.4f} "
            f"(above {self.MIN_FEATURE_STD}), effective rank {row['effective_rank']:.1f} (above {self._min_rank:g}), "
            f"agreement of online and target {row['agreement']:.2f}. Likely cause: {self._likely}"
        )

    @property
    def _sounds(self) -> bool:
        return self._narrow >= self.CHECKS or self._low >= self.RANK_CHECKS


def _likely_cause(opt: str, lr: float, batch_size: int, batch_norm: bool, color: bool, target_decay: float) -> str:
    if opt in ("lars", "sgd") and lr >= 10:
        return f"--lr {lr:g} is far too high for {opt}; try 1 or less"
    if opt not in ("lars", "sgd") and lr >= 0.01:
        return f"--lr {lr:g} is of a size for LARS, and --opt is {opt}; try 1e-3 or less"
    if target_decay < 0.9:
        return f"--target_decay {target_decay:g} lets the target follow at once; try 0.99"
    if batch_norm and batch_size < 32:
        return f"{batch_size} images a step are few for BatchNorm; try a --batch_size of 64 or more"
    if not color:
        return "the augmentation leaves colours alone, so that a colour histogram solves the task; try --jitter 0.8"
    return f"--lr {lr:g} is too high for this run; try a tenth"


def _line(row: Mapping[str, float]) -> str:
    strict = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(strict, allow_nan=False) + "\n"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
