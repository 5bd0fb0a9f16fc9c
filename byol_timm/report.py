"""Pictures of a run that say at a glance what happened, and one page that holds them all."""

import base64
import html
import io
import json
import math
import os
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
    with new_figure(10.5, 5.4) as figure:
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
        return save_figure(figure, path)


def save_views(images: Sequence[Image] | Image, view1: Image, view2: Image, path: str | Path) -> Path:
    """Up to 8 images (uint8 [C, H, W] each, of any size) above their two views (float in 0..1).

    Of images with 2 or more than 3 channels, the first one or three are shown.
    """
    count = min(8, len(view1))
    with new_figure(1.3 * count + 0.5, 4.4) as figure:
        lines = figure.subplots(3, count, squeeze=False)
        for line, name, pictures in zip(lines, ("image", "view 1", "view 2"), (images, view1, view2), strict=True):
            for axes, picture in zip(line, pictures, strict=False):
                _show(axes, picture)
            line[0].set_ylabel(name)
        write_title(figure, "Images and their two views" + _channel_note(view1[0]))
        return save_figure(figure, path)


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
    with new_figure(7.5, 6.2) as figure:
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
        write_title(figure, f"{title}, {len(places):,} images")
        return save_figure(figure, path)


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
    with new_figure(0.95 * columns + 1.9, 0.95 * rows + 0.7) as figure:
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
        write_title(figure, f"Nearest neighbours of {rows} images{verdict}")
        return save_figure(figure, path)


def save_confusion(confusion: Sequence[Sequence[int]] | Image, class_names: Sequence[str], path: str | Path) -> Path:
    """A confusion matrix: counts of test images [classes, classes], a row per true class, as shares of the row."""
    counts = np.asarray(confusion)
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    classes = len(counts)
    names = [class_names[i] if i < len(class_names) else str(i) for i in range(classes)]
    side = min(10.0, max(4.6, 0.5 * classes + 1.6))
    with new_figure(side, side) as figure:
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
        write_title(figure, title)
        return save_figure(figure, path)


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
def new_figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that size in inches, in this module's style, outside of pyplot."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> Path:
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


def write_title(figure: Any, text: str) -> None:
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
