"""Metrics of a run: metrics.jsonl, progress on the screen, trackers."""

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..errors import ByolTimmError
from ..files import write_whole

logger = logging.getLogger(__name__)

# Name in a row, name on the screen, format.
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


class MetricsLog:
    """Write rows of metrics to `folder/metrics.jsonl` and show progress: a bar on a terminal, otherwise lines.

    images_per_step: images of an optimizer step over all processes. resume_step: later rows are of lost work and are
    dropped; 0 starts a new file. seconds: the run's time up to that step. tracker: called with the metrics and the step
    of each row. stream: where progress goes (default: stdout).
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
        self._path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self._path) if row["step"] <= resume_step] if resume_step else []
        if resume_step and not rows:
            logger.warning(f"{self._path} has no metrics of steps 1 to {resume_step}; curves and results omit them")
        write_whole(self._path, "".join(map(_line, rows)).encode())
        self._file = open(self._path, "ab", buffering=0)
        self._tracker, self._total_steps, self._images_per_step = tracker, total_steps, images_per_step
        self._stream = sys.stdout if stream is None else stream
        on_terminal = dict(file=self._stream, dynamic_ncols=True, disable=not self._stream.isatty())
        self._bar = tqdm(total=total_steps, initial=resume_step, unit="step", **on_terminal)
        self._seconds_before, self._start, self._paused = seconds, time.monotonic(), 0.0
        self._first_time = self._last_time = self._training_clock()
        self._start_step = self._last_step = resume_step

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, including those before it was resumed."""
        return self._seconds_before + time.monotonic() - self._start

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the body, such as an evaluation, from images/s and from the remaining time."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def log(self, row: Mapping[str, float]) -> dict[str, float]:
        """Write a row of `step` and metrics with `seconds`, and `images_per_second` since the last row of training.

        Return the row as written. Numbers that are not finite are written as null.
        """
        now, step, full = self._training_clock(), int(row["step"]), dict(row)
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
        self._file.close()
        self._bar.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _training_clock(self) -> float:
        return time.monotonic() - self._paused

    def _write(self, line: bytes) -> None:
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ByolTimmError(f"cannot write {self._path} ({error.strerror})") from error

    def _show(self, row: Mapping[str, float], step: int, now: float) -> None:
        shown = [f"{label} {form.format(row[name])}" for name, label, form in _SHOWN if name in row]
        line = f"step {step}/{self._total_steps}  " + "  ".join(shown)
        if self._bar.disable:
            if step > self._start_step:
                left = (self._total_steps - step) * (now - self._first_time) / (step - self._start_step)
                line += f"  ETA {tqdm.format_interval(left)}"
            print(line, file=self._stream, flush=True)
        elif "loss" in row:
            self.advance(step)
            self._bar.set_postfix_str(" ".join(shown))
        else:
            # Evaluations stay on the screen above the bar.
            tqdm.write(line, file=self._stream)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, null as nan, without a last line that a killed run has left unfinished.

    A missing file has no rows. Raises `ByolTimmError` for any other line that is not a row.
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
            # Every complete line ends in a newline, so the last one is empty or incomplete.
            if number == len(lines):
                break
            raise ByolTimmError(f"{path} line {number} is not a row of metrics. Remove that line") from None
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _line(row: Mapping[str, float]) -> str:
    strict = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(strict, allow_nan=False) + "\n"
