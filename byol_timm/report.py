"""Pictures of a run that say at a glance what happened, and one page that holds them all."""

import base64
import html
import io
import json
import math
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .errors import ByolTimmError

Array = NDArray[Any]
Row = Mapping[str, Any]
Image = Tensor | Array
INK, QUIET, GRID = "#262626", "#858585", "#e6e6e6"
BLUE, ORANGE, GREEN, RED = "#2f6db3", "#dd8434", "#3c9a62", "#c44e52"
SERIES = (QUIET, BLUE, ORANGE, GREEN, RED, "#8063a8", "#4aa3b5", "#a6764c")
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    # A class may be called $1.
    "text.parse_math": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
}
# More images than this are thinned out before t-SNE, which takes minutes otherwise.
TSNE_IMAGES = 3000
# Classes and cells that can still be told apart.
NAMED_CLASSES, WRITTEN_CELLS = 20, 12
# Longer values stay in their file.
LONGEST_VALUE = 300
# Pictures of a run in the order of its page.
CAPTIONS = {
    "curves.png": "How training went",
    "views.png": "What the networks see",
    "embedding.png": "Where the encoder puts the images",
    "neighbours.png": "What the encoder finds alike",
    "confusion.png": "What is mistaken for what",
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #262626; max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.6em; margin: 0; }}
figure {{ margin: 2em 0; }}
figcaption {{ font-weight: 600; margin-bottom: .4em; }}
img {{ max-width: 100%; height: auto; }}
details {{ margin: 1.2em 0; }}
summary {{ font-weight: 600; cursor: pointer; }}
table {{ border-collapse: collapse; margin-top: .5em; font-size: .93em; }}
th, td {{ text-align: left; vertical-align: top; padding: .15em 1.5em .15em 0; border-bottom: 1px solid #e6e6e6; }}
th {{ font-weight: 400; color: #666; white-space: nowrap; }}
td {{ overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def save_curves(rows: Sequence[Row], path: str | Path, *, baselines: Mapping[str, float] | None = None) -> Path:
    """How a run went: loss, kNN accuracy, health of the representation, schedules and speed.

    rows: of metrics.jsonl; any figure may be missing or nan. baselines: kNN accuracies (0 to 1) to compare with, by
    name, drawn as horizontal lines.
    """
    with _figure(10.5, 5.4) as figure:
        loss, accuracy, spread, rank, schedule, speed = figure.subplots(2, 3).ravel()
        _curve(loss, rows, "loss", "Loss")
        _curve(spread, rows, "feature_std", "")
        _curve(spread, rows, "projection_std", "Spread", color=ORANGE)
        _curve(rank, rows, "effective_rank", "Dimensions in use")
        _curve(speed, rows, "images_per_second", "Images per second")
        for axes in (loss, spread, rank, speed):
            axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
        _note(spread, {"features": BLUE, "projections": ORANGE})
        spread.text(0.02, 0.03, "0: all images alike", color=QUIET, transform=spread.transAxes)
        if _points(rows, "knn"):
            linear = _points(rows, "linear")
            _curve(accuracy, rows, "knn", "" if linear else "kNN accuracy", percent=True)
            if linear:
                _curve(accuracy, rows, "linear", "", color=ORANGE, percent=True)
                accuracy.set_title("Accuracy")
                last = {"kNN": _points(rows, "knn"), "linear": linear}
                knn, probe = (f"{name} {points[-1][1]:.1%}" for name, points in last.items())
                _note(accuracy, {knn: BLUE, probe: ORANGE})
            _levels(accuracy, baselines or {})
        else:
            _curve(accuracy, rows, "agreement", "Cosine of online and target")
        _curve(schedule, rows, "lr", "")
        other = schedule.twinx()
        _curve(other, rows, "target_decay", "", color=ORANGE)
        other.grid(False)
        other.spines["right"].set_visible(True)
        schedule.set_title("Schedule")
        _note(schedule, {"lr": BLUE, "tau (right)": ORANGE})
        for axes in (rank, schedule, speed):
            axes.set_xlabel(_time(rows))
        return _save(figure, path)


def save_views(images: Sequence[Image] | Image, view1: Image, view2: Image, path: str | Path) -> Path:
    """Up to 8 images (uint8 [C, H, W] each, of any size) above their two views (float in 0..1).

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


def save_embedding(
    features: Image,
    labels: Image | None,
    class_names: Sequence[str],
    path: str | Path,
    *,
    method: Literal["pca", "tsne"] = "pca",
) -> Path:
    """A map of features [N, d] in two dimensions, coloured by label (int [N], -1 for none; None for no labels).

    pca is there at once; tsne takes a minute and shows neighbourhoods rather than distances.
    """
    rows = np.nan_to_num(np.asarray(features, dtype=np.float64), nan=0, posinf=0, neginf=0)
    labels = np.full(len(rows), -1) if labels is None else np.asarray(labels)
    if method == "tsne":
        kept = np.unique(np.linspace(0, len(rows) - 1, TSNE_IMAGES).astype(int))
        rows, labels = rows[kept], labels[kept]
        places, title = _tsne(rows), "t-SNE of the representation"
    else:
        places, share = _principal_components(rows)
        title = f"The representation's two principal components ({share:.0%} of the variance)"
    with _figure(7.5, 6.2) as figure:
        axes = figure.subplots()
        unlabelled = places[labels < 0]
        color = GRID if len(unlabelled) < len(places) else QUIET
        axes.scatter(*unlabelled.T, s=_dot(places), color=color, linewidths=0)
        present = np.unique(labels[labels >= 0])
        # In one shuffled scatter no class covers another.
        order = np.random.default_rng(0).permutation(np.flatnonzero(labels >= 0))
        palette = _class_colors(len(present))
        colors = palette[np.searchsorted(present, labels[order])]
        axes.scatter(*places[order].T, s=_dot(places), c=colors, linewidths=0, alpha=0.75)
        if len(present) <= NAMED_CLASSES:
            for label, color in zip(present, palette, strict=True):
                x, y = np.median(places[labels == label], axis=0)
                name = class_names[label] if label < len(class_names) else str(label)
                _text(axes, x, y, name, color=color * (0.7, 0.7, 0.7, 1), fontweight="bold", fontsize=11, ha="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        _title(figure, f"{title}, {len(places):,} images")
        return _save(figure, path)


def save_neighbours(
    queries: Sequence[Image] | Image,
    neighbours: Sequence[Sequence[Image]],
    path: str | Path,
    *,
    query_labels: Sequence[int] | None = None,
    neighbour_labels: Sequence[Sequence[int]] | None = None,
    class_names: Sequence[str] = (),
) -> Path:
    """Up to 8 images, each a row with its up to 8 nearest neighbours, the nearest first, framed by agreement of labels.

    Images are uint8 [C, H, W], of any size. Label -1 frames nothing.
    """
    rows, columns = min(8, len(queries)), min(8, max(len(line) for line in neighbours))
    same = total = 0
    with _figure(0.95 * columns + 1.9, 0.95 * rows + 0.7) as figure:
        lines = figure.subplots(rows, columns + 1, squeeze=False)
        for row, line in enumerate(lines):
            own = -1 if query_labels is None else int(query_labels[row])
            _show(line[0], queries[row])
            line[0].set_ylabel(class_names[own] if 0 <= own < len(class_names) else "", rotation=0, ha="right")
            for column, axes in enumerate(line[1:]):
                axes.set_axis_off()
                if column < len(neighbours[row]):
                    axes.set_axis_on()
                    _show(axes, neighbours[row][column])
                    label = -1 if neighbour_labels is None else int(neighbour_labels[row][column])
                    if own >= 0 and label >= 0:
                        _frame(axes, GREEN if label == own else RED)
                        same, total = same + (label == own), total + 1
        lines[0][0].set_title("image")
        lines[0][1].set_title("nearest neighbours")
        verdict = f": {same} of {total} of the same class" if total else ""
        _title(figure, f"Nearest neighbours of {rows} images{verdict}")
        return _save(figure, path)


def save_confusion(confusion: Sequence[Sequence[int]] | Image, class_names: Sequence[str], path: str | Path) -> Path:
    """A confusion matrix: counts of test images [classes, classes], a row per true class, as shares of the row."""
    counts = np.asarray(confusion)
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    classes = len(counts)
    names = [class_names[i] if i < len(class_names) else str(i) for i in range(classes)]
    side = min(10.0, max(4.6, 0.5 * classes + 1.6))
    with _figure(side, side) as figure:
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if classes <= 2 * NAMED_CLASSES:
            axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 3 else 0)
            axes.set_yticks(range(classes), names)
        if classes <= WRITTEN_CELLS:
            for row, column in np.argwhere(counts > 0):
                color = "white" if shares[row, column] > 0.5 else INK
                axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color)
        axes.set(xlabel="predicted", ylabel="true")
        wrong = counts * ~np.eye(classes, dtype=bool)
        title = f"{np.trace(counts) / max(1, counts.sum()):.1%} of {counts.sum():,} images right"
        if wrong.any():
            row, column = np.unravel_index(wrong.argmax(), wrong.shape)
            title += f"\nmost often: {names[row]} taken for {names[column]} ({wrong[row, column]:,} times)"
        _title(figure, title)
        return _save(figure, path)


def save_bars(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    title: str,
    colors: Mapping[str, str] | None = None,
) -> Path:
    """Bars to compare by: groups side by side, in each a bar per series, its mean accuracy (0 to 1) over runs.

    Whiskers are standard deviations where there are several runs. colors: of series.
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.82 / len(series)
    inches = max(5.0, 1.2 + 0.62 * len(groups) * len(series))
    # A legend's entry is about 0.6 inches and 0.09 for each letter.
    columns = max(1, min(4, len(series), int(inches / (0.6 + 0.09 * max(map(len, series))))))
    with _figure(inches, 4.2) as figure:
        axes = figure.subplots()
        for number, (name, color) in enumerate(_colors(series, colors).items()):
            places = [p + (number - (len(series) - 1) / 2) * width for p, g in enumerate(groups.values()) if name in g]
            runs = [group[name] for group in groups.values() if name in group]
            means, spreads = [statistics.fmean(r) for r in runs], [_spread(r) for r in runs]
            axes.bar(places, means, 0.92 * width, color=color, label=name)
            axes.errorbar(places, means, spreads, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            for place, mean, spread in zip(places, means, spreads, strict=True):
                axes.annotate(
                    f"{100 * mean:.1f}", (place, mean + spread), (0, 2), textcoords="offset points", ha="center"
                )
        axes.set_xticks(range(len(groups)), list(groups))
        axes.tick_params("x", length=0)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(ylabel=_accuracy_of(groups), ylim=(0, min(1.1, 1.12 * axes.dataLim.y1) or 1))
        figure.legend(loc="outside lower center", ncols=columns)
        _title(figure, title)
        return _save(figure, path)


def save_costs(groups: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str) -> Path:
    """Costs to compare, shorter is better: a heading per group, and below it a bar for each of its members."""
    rows = [row for name, costs in groups.items() for row in ((name, None), *costs.items())]
    highest = max(cost for _, cost in rows if cost is not None)
    with _figure(8.0, 0.8 + 0.26 * len(rows)) as figure:
        axes = figure.subplots()
        for place, (name, cost) in enumerate(rows):
            if cost is None:
                axes.text(0, place + 0.1, name, fontweight="bold", va="center")
            else:
                axes.barh(place, cost, 0.75, color=BLUE if name.startswith("byol_timm") else QUIET)
                axes.annotate(f"{name}  {cost:.2f}", (cost, place), (4, 0), textcoords="offset points", va="center")
        axes.set(ylim=(len(rows) - 0.4, -0.8), xlim=(0, 1.6 * highest))
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        _title(figure, title)
        return _save(figure, path)


def save_label_efficiency(
    series: Mapping[str, Mapping[float, Sequence[float]]],
    path: str | Path,
    *,
    title: str = "Accuracy by share of labels",
    colors: Mapping[str, str] | None = None,
) -> Path:
    """A line per series: accuracies of runs (0 to 1) by the share of the labels (0 to 1) that they had, on a log axis.

    Lines go through the means; whiskers are standard deviations where there are several runs.
    """
    shares = sorted({share for line in series.values() for share in line})
    with _figure(7.5, 4.4) as figure:
        axes = figure.subplots()
        for name, color in _colors(list(series), colors).items():
            x, runs = zip(*sorted(series[name].items()), strict=True)
            means, spreads = [statistics.fmean(r) for r in runs], [_spread(r) for r in runs]
            axes.errorbar(x, means, spreads, color=color, marker="o", markersize=4, capsize=2, label=name)
        axes.set_xscale("log")
        axes.set_xticks(shares, _share_names(shares))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(xlabel="share of the labels", ylabel=_accuracy_of(series))
        # The legend in the order of the lines' right ends.
        handles, names = axes.get_legend_handles_labels()
        ends = [statistics.fmean(series[name][max(series[name])]) for name in names]
        order = np.argsort(ends)[::-1]
        figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside right center")
        _title(figure, title)
        return _save(figure, path)


def save_report(folder: str | Path) -> Path:
    """`report.html` in a run folder: its pictures, numbers, settings and environment on one page that needs no other.

    Takes whatever of `*.png`, results.json, config.yaml and environment.json is there. Raises `ByolTimmError` for a
    folder without any of them.
    """
    # Imported here, as it brings the Hub's client along.
    from .errors import redact

    folder = Path(folder)
    pictures = {path.name: path for path in sorted(folder.glob("*.png")) if not path.name.startswith(".")}
    results, environment = _read(folder / "results.json"), _read(folder / "environment.json")
    settings = folder / "config.yaml"
    if not (pictures or results or settings.exists()):
        raise ByolTimmError(f"{folder} is not the folder of a run. Give one with results.json or pictures")
    config = results.pop("config", {})
    name = folder.resolve().name
    parts = [f"<h1>{html.escape(name)}</h1>"]
    subject = [str(redact(config[key])) for key in ("backbone", "dataset") if config.get(key)]
    if subject:
        parts.append(f"<p>BYOL pretraining of {html.escape(' on '.join(subject))}</p>")
    for file in sorted(pictures, key=lambda file: [*CAPTIONS, file].index(file)):
        parts.append(_figure_html(pictures[file], CAPTIONS.get(file, Path(file).stem.replace("_", " "))))
    if results:
        parts.append(_details_html("Results", _table_html(redact(results)), opened=True))
    if settings.exists():
        parts.append(
            _details_html("Settings", f"<pre>{html.escape(redact(settings.read_text('utf-8', 'replace')))}</pre>")
        )
    if environment:
        parts.append(_details_html("Environment", _table_html(redact(environment))))
    page = PAGE.format(title=html.escape(name), body="\n".join(parts))
    return _write(folder / "report.html", page.encode(errors="backslashreplace"))


# Figures


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that size in inches, in this module's style, outside of pyplot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> Path:
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that matplotlib's font lacks become boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(content, format="png", metadata={"Software": None})
    return _write(Path(path), content.getvalue())


def _write(path: Path, content: bytes) -> Path:
    """A whole file or none."""
    partial = path.with_name(f".tmp-{path.name}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise ByolTimmError(f"cannot write {path} ({error.strerror})") from error
    return path


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _text(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text with a white rim, readable on top of anything."""
    from matplotlib.patheffects import withStroke

    axes.text(x, y, text, path_effects=[withStroke(linewidth=3, foreground="white")], **style)


def _note(axes: Any, names: Mapping[str, str]) -> None:
    """What is drawn in which colour, at the right end of the title's line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name) for name, color in names.items()]
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=2, handlelength=1, columnspacing=1
    )


def _colors(names: Sequence[str], chosen: Mapping[str, str] | None) -> dict[str, str]:
    return {name: (chosen or {}).get(name, SERIES[number % len(SERIES)]) for number, name in enumerate(names)}


def _spread(runs: Sequence[float]) -> float:
    return statistics.stdev(runs) if len(runs) > 1 else 0.0


def _accuracy_of(groups: Mapping[Any, Mapping[Any, Sequence[float]]]) -> str:
    """The name of an axis of accuracies, with what the whiskers are."""
    counts = sorted({len(runs) for group in groups.values() for runs in group.values()})
    if counts[-1] == 1:
        return "accuracy"
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"accuracy (mean and s.d. of {number} runs)"


def _share_names(shares: Sequence[float]) -> list[str]:
    """Shares as percentages, left empty where the next one on a log axis is too near."""
    places = np.log([*shares, math.inf])
    gap = 0.07 * (places[-2] - places[0])
    near = np.diff(places) < gap
    return ["" if close else f"{100 * share:.3g}%" for share, close in zip(shares, near, strict=True)]


# Curves


def _time(rows: Sequence[Row]) -> str:
    return "epoch" if all("epoch" in row for row in rows) else "step"


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Time and value of a figure wherever it is a finite number."""
    return [(row[_time(rows)], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _curve(axes: Any, rows: Sequence[Row], name: str, title: str, *, color: str = BLUE, percent: bool = False) -> None:
    """A line, with its first and last value at the right end of the title's line."""
    points = _points(rows, name)
    marker = "o" if len(points) == 1 else "." if len(points) <= 30 else ""
    if points:
        axes.plot(*zip(*points, strict=True), color=color, marker=marker)
    broken = [row[_time(rows)] for row in rows if not math.isfinite(row.get(name, 0.0))]
    if broken:
        axes.plot(broken, [0.02] * len(broken), "|", color=RED, transform=axes.get_xaxis_transform(), clip_on=False)
        axes.text(0.98, 0.08, "not a number", color=RED, transform=axes.transAxes, ha="right")
    if title:
        axes.set_title(title)
    if percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.get_major_locator().set_params(integer=False, steps=[1, 2, 5, 10], min_n_ticks=2)
    if points and title and color == BLUE:
        ends = dict.fromkeys(_number(value, percent) for _, value in (points[0], points[-1]))
        axes.set_title(" \N{RIGHTWARDS ARROW} ".join(ends), loc="right", fontweight="normal")


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Horizontal lines with their names on them: the highest name above its line, the others below theirs."""
    for number, (name, level) in enumerate(sorted(levels.items(), key=lambda pair: -pair[1])):
        axes.axhline(level, color=QUIET, linestyle="--", linewidth=1.1)
        transform = axes.get_yaxis_transform()
        va = "top" if number else "bottom"
        _text(axes, 0.99, level, f"{name} {level:.1%}", transform=transform, ha="right", va=va, color=QUIET)
    axes.margins(y=0.12)


# Maps


def _principal_components(rows: Array) -> tuple[Array, float]:
    """Rows [N, d] in their two principal components, and the share of the variance that these have."""
    centred = rows - rows.mean(0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    # The sign that makes the largest weight positive, as the decomposition leaves it open.
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    places = np.zeros((len(rows), 2))
    places[:, : len(values)] = (left * values * signs)[:, :2]
    return places, float((values[:2] ** 2).sum() / max((values**2).sum(), 1e-30))


def _tsne(rows: Array) -> Array:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
    return TSNE(perplexity=perplexity, metric="cosine", random_state=0).fit_transform(rows)


def _dot(places: Array) -> float:
    return float(np.clip(20000 / max(1, len(places)), 3, 30))


def _class_colors(classes: int) -> Array:
    """RGBA colours [classes, 4]."""
    import matplotlib

    if classes <= 10:
        return matplotlib.colormaps["tab10"](np.arange(classes))
    return matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, classes))


# Images


def _show(axes: Any, image: Image) -> None:
    axes.imshow(_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _frame(axes: Any, color: str) -> None:
    axes.spines[:].set_visible(True)
    axes.spines[:].set(color=color, linewidth=2.5)


def _picture(image: Image) -> Array:
    """An image [C, H, W], uint8 or float in 0..1, as matplotlib draws it: [H, W, 3] of colours or [H, W] of grey."""
    pixels = np.asarray(image)
    pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels.clip(0, 1)
    return pixels[0] if len(pixels) < 3 else pixels[:3].transpose(1, 2, 0)


def _channel_note(image: Image) -> str:
    channels = len(image)
    if channels in (1, 3):
        return ""
    return f" (the first of {channels} channels)" if channels < 3 else f" (the first 3 of {channels} channels)"


# The page of a run


def _read(path: Path) -> dict[str, Any]:
    """The values of a JSON file; none where there is no file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ByolTimmError(f"{path} is not JSON ({error}). Remove it, or write it again") from error
    return values if isinstance(values, dict) else {}


def _figure_html(path: Path, caption: str) -> str:
    caption, source = html.escape(caption), "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{source}"></figure>'


def _details_html(title: str, content: str, *, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{title}</summary>{content}</details>"


def _table_html(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in _flat(values))
    return f"<table>{rows}</table>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as pairs of a dotted name and a text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
            continue
        text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        cut = len(text) > LONGEST_VALUE
        yield f"{prefix}{key}", f"{text[:LONGEST_VALUE]} ... ({len(text):,} characters)" if cut else text
