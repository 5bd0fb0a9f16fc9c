"""Pictures of a run that say at a glance what happened, as PNG files."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Row = Mapping[str, Any]
Image = Tensor | NDArray[Any]

INK, QUIET, GRID = "#262626", "#8c8c8c", "#e4e4e4"
BLUE, ORANGE, GREEN, RED = "#2f6db3", "#dd8434", "#3c9a62", "#c44e52"
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
}


def save_curves(rows: Sequence[Row], path: str | Path, *, baselines: Mapping[str, float] | None = None) -> Path:
    """A picture of how a run went: loss, kNN accuracy, health of the representation, schedules and speed.

    rows: of metrics.jsonl; any figure may be missing or nan. baselines: kNN accuracies (0 to 1) to compare with, by
    name, drawn as horizontal lines.
    """
    with _figure(10.5, 5.6) as figure:
        loss, accuracy, spread, rank, schedule, speed = figure.subplots(2, 3).ravel()
        _curves(loss, rows, {"loss": "Loss"})
        if _points(rows, "knn"):
            _curves(accuracy, rows, {"knn": "kNN accuracy"}, percent=True)
            _levels(accuracy, baselines or {})
        else:
            _curves(accuracy, rows, {"agreement": "Cosine of online and target"})
        _curves(spread, rows, {"feature_std": "features", "projection_std": "projections"}, "Spread (0: collapsed)")
        _curves(rank, rows, {"effective_rank": "Dimensions in use (effective rank)"})
        _curves(schedule, rows, {"lr": "learning rate"}, "Learning rate and tau")
        _second_scale(schedule, rows, "target_decay", "tau")
        _curves(speed, rows, {"images_per_second": "Images per second"})
        for axes in (loss, spread, rank, speed):
            axes.set_ylim(bottom=0)
        for axes in (rank, schedule, speed):
            axes.set_xlabel(_time(rows))
        return _save(figure, path)


def save_views(images: Sequence[Image] | Image, view1: Image, view2: Image, path: str | Path) -> Path:
    """A picture of up to 8 images (uint8 [C, H, W] each, of any size) above their two views (float in 0..1).

    Of images with 2 or more than 3 channels, the first one or three are shown.
    """
    count = min(8, len(view1))
    with _figure(1.3 * count + 0.5, 4.4) as figure:
        lines = figure.subplots(3, count, squeeze=False)
        for line, name, pictures in zip(lines, ("image", "view 1", "view 2"), (images, view1, view2), strict=True):
            for axes, picture in zip(line, pictures, strict=False):
                _show(axes, picture)
            line[0].set_ylabel(name)
        _title(figure, "Images and their two views" + _channel_note(view1[0]))
        return _save(figure, path)


# Figures


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that size in inches, in this module's style, outside of pyplot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    partial = path.with_name(f".tmp-{path.name}")
    figure.savefig(partial, format="png", metadata={"Software": None})
    os.replace(partial, path)
    return path


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


# Curves


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Time and value of a figure wherever it is a finite number."""
    return [(row[_time(rows)], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _time(rows: Sequence[Row]) -> str:
    return "epoch" if all("epoch" in row for row in rows) else "step"


def _curves(axes: Any, rows: Sequence[Row], names: Mapping[str, str], title: str = "", percent: bool = False) -> None:
    """A line per figure, named by a legend when there are several, else by the title with first and last value."""
    for (name, label), color in zip(names.items(), (BLUE, ORANGE), strict=False):
        points = _points(rows, name)
        axes.plot(*zip(*points, strict=True) if points else ([], []), color=color, label=label, marker=_marker(points))
        broken = [row[_time(rows)] for row in rows if not math.isfinite(row.get(name, 0.0))]
        if broken:
            axes.plot(broken, [0.02] * len(broken), "x", color=RED, transform=axes.get_xaxis_transform(), ms=5)
            axes.text(0.98, 0.06, "x  not a number", color=RED, transform=axes.transAxes, ha="right")
    if title:
        axes.legend()
    elif points:
        form = "{:.1%}" if percent else "{:.4g}"
        ends = dict.fromkeys(form.format(points[end][1]) for end in (0, -1))
        title = f"{label}: {', then '.join(ends)}"
    axes.set_title(title or label)
    if percent:
        axes.yaxis.set_major_formatter("{x:.0%}")


def _marker(points: Sequence[Any]) -> str:
    return "o" if len(points) == 1 else "." if len(points) <= 30 else ""


def _levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Horizontal lines with their names on them."""
    for name, level in levels.items():
        axes.axhline(level, color=QUIET, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{name} {level:.1%}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            color=QUIET,
        )


def _second_scale(axes: Any, rows: Sequence[Row], name: str, label: str) -> None:
    """One more line, with its own scale on the right."""
    other = axes.twinx()
    points = _points(rows, name)
    other.plot(*zip(*points, strict=True) if points else ([], []), color=ORANGE, marker=_marker(points))
    other.grid(False)
    other.spines["right"].set_visible(True)
    other.set_ylabel(label, color=ORANGE)
    axes.set_ylabel(axes.get_lines()[0].get_label(), color=BLUE)


# Images


def _show(axes: Any, image: Image) -> None:
    axes.imshow(_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _picture(image: Image) -> NDArray[Any]:
    """An image [C, H, W], uint8 or float in 0..1, as matplotlib draws it: [H, W, 3] of colours or [H, W] of grey."""
    pixels = np.asarray(image)
    pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels.clip(0, 1)
    return pixels[0] if len(pixels) < 3 else pixels[:3].transpose(1, 2, 0)


def _channel_note(image: Image) -> str:
    channels = len(image)
    if channels in (1, 3):
        return ""
    return f" (the first of {channels} channels)" if channels < 3 else f" (the first 3 of {channels} channels)"
