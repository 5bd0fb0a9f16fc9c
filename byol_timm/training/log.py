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

from tqdm import tqdm

from ..errors import ByolTimmError

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


def _line(row: Mapping[str, float]) -> str:
    strict = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(strict, allow_nan=False) + "\n"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
