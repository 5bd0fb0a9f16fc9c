"""Plot what happened in a run, and collect the pictures on one HTML page."""

import base64
import html
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .errors import ByolTimmError, redact
from .files import write_whole

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
# t-SNE of more images takes minutes.
TSNE_IMAGES = 3000
# More classes have no names on the map; larger confusion matrices no numbers.
NAMED_CLASSES, WRITTEN_CELLS = 20, 12
# Pictures of a run in the order of its page.
CAPTIONS = {
    "curves.png": "Training curves",
    "views.png": "Augmented views",
    "embedding.png": "Feature map",
    "neighbours.png": "Nearest neighbours",
    "confusion.png": "Confusion matrix (kNN)",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #262626; max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
figure, details {{ margin: 2em 0; }}
figcaption, summary {{ font-weight: 600; }}
img {{ max-width: 100%; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body>
{body}
</body></html>
"""


def save_curves(rows: Sequence[Row], path: str | Path, *, baselines: Mapping[str, float] | None = None) -> Path:
    """Plot loss, kNN accuracy, signs of collapse, schedules and speed over a run.

    rows: of metrics.jsonl; any metric may be missing or nan. baselines: names and kNN accuracies (0 to 1) to compare
    with, drawn as horizontal lines.
    """
    with new_figure(10.5, 5.4) as figure:
        loss, accuracy, spread, rank, schedule, speed = figure.subplots(2, 3).ravel()
        _curve(loss, rows, "loss", "Loss")
        _curve(spread, rows, "feature_std", "")
        _curve(spread, rows, "projection_std", "Feature std", color=ORANGE)
        _curve(rank, rows, "effective_rank", "Effective rank")
        _curve(speed, rows, "images_per_second", "Images per second")
        for axes in (loss, spread, rank, speed):
            axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
        _note(spread, {"features": BLUE, "projections": ORANGE})
        spread.text(0.02, 0.03, "0 = collapsed", color=QUIET, transform=spread.transAxes)
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
    """Plot up to 8 images (uint8 [C, H, W] each, of any size) above their two views (float in 0..1).

    Images with 2 channels show the first, images with more than 3 channels the first three.
    """
    count = min(8, len(view1))
    with new_figure(1.3 * count + 0.5, 4.4) as figure:
        lines = figure.subplots(3, count, squeeze=False)
        for line, name, pictures in zip(lines, ("image", "view 1", "view 2"), (images, view1, view2), strict=True):
            for axes, picture in zip(line, pictures, strict=False):
                _show(axes, picture)
            line[0].set_ylabel(name)
        shown, channels = 1 if len(view1[0]) == 2 else 3, len(view1[0])
        note = "" if channels in (1, 3) else f" (first {shown} of {channels} channels)"
        write_title(figure, f"Images and their two views{note}")
        return save_figure(figure, path)


def save_embedding(
    features: Image,
    labels: Image | None,
    class_names: Sequence[str],
    path: str | Path,
    *,
    method: Literal["pca", "tsne"] = "pca",
) -> Path:
    """Plot features [N, d] in two dimensions, coloured by label (int [N], -1 for unlabelled; None without labels).

    method: pca takes no time; tsne takes a minute and shows neighbourhoods rather than distances.
    """
    rows = np.nan_to_num(np.asarray(features, dtype=np.float64), nan=0, posinf=0, neginf=0)
    labels = np.full(len(rows), -1) if labels is None else np.asarray(labels)
    if method == "tsne":
        kept = np.unique(np.linspace(0, len(rows) - 1, TSNE_IMAGES).astype(int))
        rows, labels = rows[kept], labels[kept]
        from sklearn.manifold import TSNE

        perplexity = min(30.0, max(1.0, (len(rows) - 1) / 3))
        places = TSNE(perplexity=perplexity, metric="cosine", random_state=0).fit_transform(rows)
        title = "Feature map (t-SNE)"
    else:
        places, share = _principal_components(rows)
        title = f"Feature map (PCA, {share:.0%} of the variance)"
    with new_figure(7.5, 6.2) as figure:
        axes, size = figure.subplots(), np.clip(20000 / max(1, len(places)), 3, 30)
        unlabelled = places[labels < 0]
        color = GRID if len(unlabelled) < len(places) else QUIET
        axes.scatter(*unlabelled.T, s=size, color=color, linewidths=0)
        present = np.unique(labels[labels >= 0])
        # Shuffled, so that no class covers the others.
        order = np.random.default_rng(0).permutation(np.flatnonzero(labels >= 0))
        palette = _class_colors(len(present))
        colors = palette[np.searchsorted(present, labels[order])]
        axes.scatter(*places[order].T, s=size, c=colors, linewidths=0, alpha=0.75)
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
    """Plot up to 8 images and their 8 nearest neighbours, one row each, with a frame that compares their labels.

    Images are uint8 [C, H, W], of any size. Label -1 gives no frame.
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
                        axes.spines[:].set(visible=True, color=GREEN if label == own else RED, linewidth=2.5)
                        same, total = same + (label == own), total + 1
        lines[0][0].set_title("image")
        lines[0][1].set_title("nearest neighbours")
        verdict = f": {same} of {total} of the same class" if total else ""
        write_title(figure, f"Nearest neighbours of {rows} images{verdict}")
        return save_figure(figure, path)


def save_confusion(confusion: Sequence[Sequence[int]] | Image, class_names: Sequence[str], path: str | Path) -> Path:
    """Plot a confusion matrix, counts [classes, classes] with a row for every true class, as shares of the row."""
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
        title = f"{np.trace(counts) / max(1, counts.sum()):.1%} of {counts.sum():,} images correct"
        if wrong.any():
            row, column = np.unravel_index(wrong.argmax(), wrong.shape)
            title += f"\nmost frequent error: {names[row]} predicted as {names[column]} ({wrong[row, column]:,} times)"
        write_title(figure, title)
        return save_figure(figure, path)


def save_report(folder: str | Path) -> Path:
    """Write report.html in the folder of a run: its pictures, accuracy, settings and environment on one page.

    Uses those of `*.png`, results.json, config.yaml and environment.json that exist. Raises `ByolTimmError` if the
    folder has none of the first three.
    """
    folder = Path(folder)
    pictures = {path.name: path for path in sorted(folder.glob("*.png")) if not path.name.startswith(".")}
    results, environment = _read_json(folder / "results.json"), _read_json(folder / "environment.json")
    settings = folder / "config.yaml"
    if not (pictures or results or settings.exists()):
        raise ByolTimmError(f"{folder} is not the folder of a run. Give one with results.json or pictures")
    config, name = results.pop("config", {}), html.escape(folder.resolve().name)
    lines = _headlines(config, results)
    if (folder / "encoder").is_dir():
        lines.append(f'Load the encoder with timm.create_model("local-dir:{redact(folder)}/encoder", pretrained=True)')
    parts = [f"<h1>{name}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
    for file in sorted(pictures, key=lambda file: [*CAPTIONS, file].index(file)):
        caption = html.escape(CAPTIONS.get(file, Path(file).stem.replace("_", " ")))
        source = "data:image/png;base64," + base64.b64encode(pictures[file].read_bytes()).decode()
        parts.append(f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{source}"></figure>')
    texts = {
        "Results": json.dumps(redact(results), indent=2, ensure_ascii=False) if results else "",
        "Settings": redact(settings.read_text("utf-8", "replace")) if settings.exists() else "",
        "Environment": json.dumps(redact(environment), indent=2, ensure_ascii=False) if environment else "",
    }
    for title, text in texts.items():
        if text:
            parts.append(f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>")
    page = PAGE.format(title=name, body="\n".join(parts))
    write_whole(folder / "report.html", page.encode(errors="backslashreplace"))
    return folder / "report.html"


def _headlines(config: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """Return what was trained, and how accurate it is, as far as results.json has it."""
    subject = " on ".join(str(redact(config[key])) for key in ("backbone", "dataset") if config.get(key))
    lines = [f"BYOL pretraining of {subject}"] if subject else []
    measured = results.get("results", {})
    names = {"knn_byol": "after BYOL", "knn_random": "before training", "knn_raw_pixels": "raw pixels"}
    accuracies = [f"{name} {measured[key]:.1f} %" for key, name in names.items() if key in measured]
    if accuracies:
        lines.append(f"kNN accuracy: {', '.join(accuracies)}")
    if "linear_byol" in measured:
        lines.append(f"Online linear probe: {measured['linear_byol']:.1f} %")
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file, or none if it does not exist."""
    try:
        values = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ByolTimmError(f"{path} is not JSON ({error}). Delete it, or write it again") from error
    return values if isinstance(values, dict) else {}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib figure of that size in inches, without pyplot and with this module's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Save a figure as PNG, with the same bytes every time, and return its path."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that are not in matplotlib's font become boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(content, format="png", metadata={"Software": None})
    write_whole(Path(path), content.getvalue())
    return Path(path)


def write_title(figure: Any, text: str) -> None:
    """Write a bold title at the left end."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _text(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Write text with a white rim, readable on top of anything."""
    from matplotlib.patheffects import withStroke

    axes.text(x, y, text, path_effects=[withStroke(linewidth=3, foreground="white")], **style)


def _note(axes: Any, names: Mapping[str, str]) -> None:
    """Write a legend at the right end of the title's line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name) for name, color in names.items()]
    axes.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=2, handlelength=1, columnspacing=1
    )


def _time(rows: Sequence[Row]) -> str:
    return "epoch" if all("epoch" in row for row in rows) else "step"


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Return time and value of a metric wherever it is finite."""
    return [(row[_time(rows)], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _curve(axes: Any, rows: Sequence[Row], name: str, title: str, *, color: str = BLUE, percent: bool = False) -> None:
    """Plot a metric, with its first and last value at the right end of the title's line."""
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
        ends = dict.fromkeys(
            f"{value:.1%}" if percent else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            for _, value in (points[0], points[-1])
        )
        axes.set_title(" \N{RIGHTWARDS ARROW} ".join(ends), loc="right", fontweight="normal")


def _levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Draw horizontal lines with their names: the highest name above its line, the others below theirs."""
    for number, (name, level) in enumerate(sorted(levels.items(), key=lambda pair: -pair[1])):
        axes.axhline(level, color=QUIET, linestyle="--", linewidth=1.1)
        transform = axes.get_yaxis_transform()
        va = "top" if number else "bottom"
        _text(axes, 0.99, level, f"{name} {level:.1%}", transform=transform, ha="right", va=va, color=QUIET)
    axes.margins(y=0.12)


def _principal_components(rows: Array) -> tuple[Array, float]:
    """Return rows [N, d] in their two principal components, and the share of the variance that these explain."""
    from sklearn.decomposition import PCA

    places = np.zeros((len(rows), 2))
    if not rows.std(0).any():
        return places, 0.0
    pca = PCA(min(2, *rows.shape), svd_solver="full")
    places[:, : pca.n_components] = pca.fit_transform(rows)
    return places, float(pca.explained_variance_ratio_.sum())


def _class_colors(classes: int) -> Any:
    """Return RGBA colours [classes, 4]."""
    import matplotlib

    if classes <= 10:
        return matplotlib.colormaps["tab10"](np.arange(classes))
    return matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, classes))


def _show(axes: Any, image: Image) -> None:
    """Draw an image [C, H, W], uint8 or float in 0..1, in colour or, with fewer than 3 channels, in grey."""
    pixels = np.asarray(image)
    pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels.clip(0, 1)
    pixels = pixels[0] if len(pixels) < 3 else pixels[:3].transpose(1, 2, 0)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
