"""What frozen_vs_unfrozen.py writes from its metrics: a table, a conclusion in three sentences, and two pictures."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from byol_timm.files import write_whole
from byol_timm.report import BLUE, INK, QUIET, new_figure, save_figure, write_title

Row = Mapping[str, Any]
# Light where the encoder is frozen, dark where it is fine-tuned.
COLORS = {"random": ("#a8a8a8", "#4d4d4d"), "pretrained": ("#7cc29a", "#21683f"), "BYOL": ("#7fb0e0", "#1d4f8a")}
SERIES = (QUIET, BLUE, "#dd8434", "#3c9a62", "#c44e52", "#8063a8", "#4aa3b5", "#a6764c")


def save_results(folder: Path, rows: Sequence[Row], name: str, residual_init: bool | None) -> None:
    """Write results.csv, conclusion.md and the pictures. residual_init: None where the backbone leaves no choice."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "results.csv", file.getvalue().encode("utf-8"))
    draw(folder, Table(rows), name)
    seeds = len({row["seed"] for row in rows})
    note = f"Accuracy in percent on {rows[0]['test_images']:,} test images"
    if seeds > 1:
        note += f", mean and standard deviation over {seeds} seeds"
    else:
        note += "; a single seed cannot show that a difference is more than chance"
    note += ". Random weights, from which BYOL starts too, are as timm draws them"
    if residual_init is not None:
        start, flag = (0, "zero_init_last") if residual_init else (1, "no_zero_init_last")
        note += f", residual branches starting at {start} (--{flag})"
    pictures = "![bars](bars.png)\n\n![accuracy by share of the labels](label_efficiency.png)"
    text = f"{conclusion(rows)}\n\n{results_table(rows)}\n\n{note}.\n\n{pictures}\n"
    write_whole(folder / "conclusion.md", text.encode("utf-8"))


def conclusion(rows: Sequence[Row]) -> str:
    """Return three sentences: BYOL against random weights, frozen and fine-tuned; then what to choose.

    A difference counts where its 95 % interval leaves out zero. The interval joins Student's over the seeds, each of
    which gives both encoders the same labels, with that of the number of test images. One seed shows no difference.
    """
    table = Table(rows)
    sentences = [
        f"With the encoder frozen, BYOL {verdict(table, 'frozen')}.",
        f"With the encoder fine-tuned, BYOL {verdict(table, 'fine-tuned')}.",
    ]
    best = []
    for labels in dict.fromkeys((table.shares[0], table.shares[-1])):
        title, mode = table.best(labels)
        best.append(f"with {label_words(labels)} from {title}, {mode} ({100 * table.mean(title, mode, labels):.1f} %)")
    last = f"The highest accuracy comes {', and '.join(best)}"
    if table.fewest:
        few, all_images = (table.mean(title, "frozen", table.shares[-1]) for title in (table.fewest, "BYOL"))
        last += f"; {table.fewest} instead of all changes its frozen accuracy by {100 * (few - all_images):+.1f} points"
    return " ".join([*sentences, f"{last}."])


def results_table(rows: Sequence[Row]) -> str:
    """Return mean accuracies in percent, with standard deviations over the seeds, as a table in Markdown."""
    table = Table(rows)
    lines = [
        f"| encoder | | {' | '.join(f'{percent(share)} % of the labels' for share in table.shares)} |",
        "|---|---|" + "--:|" * len(table.shares),
    ]
    for title in table.titles:
        for mode in ("frozen", "fine-tuned"):
            accuracies = [mean_and_deviation(table.runs.get((title, mode, share), {})) for share in table.shares]
            lines.append(f"| {title} | {mode} | {' | '.join(accuracies)} |")
    return "\n".join(lines)


class Table:
    """Accuracies (0 to 1) by encoder, mode, share of the labels and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.runs: dict[tuple[str, str, float], dict[int, float]] = {}
        for row in rows:
            title = encoder_title(row["start"], row["images"])
            self.runs.setdefault((title, row["mode"], row["labels"]), {})[row["seed"]] = row["top1"]
            self.test_images = row["test_images"]
        self.titles = list(dict.fromkeys(title for title, _, _ in self.runs))
        fewer = [row["images"] for row in rows if 0 < row["images"] < 1]
        self.fewest = encoder_title("byol", min(fewer)) if fewer else None
        self.shares = sorted({labels for _, _, labels in self.runs})

    def mean(self, title: str, mode: str, labels: float) -> float:
        return statistics.fmean(self.runs[title, mode, labels].values())

    def best(self, labels: float) -> tuple[str, str]:
        title, mode, _ = max((key for key in self.runs if key[2] == labels), key=lambda key: self.mean(*key))
        return title, mode

    def gain(self, mode: str, labels: float) -> tuple[float, bool]:
        """Return BYOL's mean minus that of random weights, and whether that is more than chance."""
        byol, random = (self.runs[title, mode, labels] for title in ("BYOL", "random"))
        differences = [byol[seed] - random[seed] for seed in byol.keys() & random.keys()]
        gain, count = statistics.fmean(differences), len(differences)
        if count < 2:
            return gain, False
        seeds = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
        means = [statistics.fmean(runs.values()) for runs in (byol, random)]
        images = stats.norm.ppf(0.975) * math.sqrt(sum(mean * (1 - mean) for mean in means) / self.test_images)
        return gain, abs(gain) > math.hypot(seeds, images)


def verdict(table: Table, mode: str) -> str:
    """Say how BYOL compares with random weights, by share of the labels."""
    gains = {share: table.gain(mode, share) for share in table.shares}
    groups = {
        "is better than random weights": [s for s, (gain, clear) in gains.items() if clear and gain > 0],
        "is worse than random weights": [s for s, (gain, clear) in gains.items() if clear and gain <= 0],
        "makes no measurable difference": [s for s, (_, clear) in gains.items() if not clear],
    }
    parts: list[str] = []
    for what, shares in groups.items():
        if shares:
            points = [f"{percent(share)} % ({100 * gains[share][0]:+.1f} points)" for share in shares]
            parts.append(f"{what} with {listed(points)}" + ("" if parts else " of the labels"))
    return listed(parts)


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def encoder_title(start: str, images: float) -> str:
    if start != "byol":
        return start
    return "BYOL" if images == 1 else f"BYOL on {percent(images)} % of the images"


def label_words(share: float) -> str:
    return "all labels" if share == 1 else f"{percent(share)} % of the labels"


def percent(share: float) -> str:
    return f"{100 * share:.6g}"


def mean_and_deviation(runs: Mapping[int, float]) -> str:
    values = [100 * value for value in runs.values()]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


# Pictures


def draw(folder: Path, table: Table, name: str) -> None:
    all_labels = table.shares[-1]
    bars: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[float, list[float]]] = {}
    colors = {}
    for (title, mode, labels), runs in table.runs.items():
        accuracies = list(runs.values())
        if labels == all_labels:
            bars.setdefault(mode, {})[title] = accuracies
        if title in COLORS:
            curves.setdefault(f"{title}, {mode}", {})[labels] = accuracies
            colors[f"{title}, {mode}"] = COLORS[title][mode == "fine-tuned"]
    save_bars(bars, folder / "bars.png", title=f"{name}: a classifier of {label_words(all_labels)}")
    title = f"{name}: accuracy by share of the labels"
    save_label_efficiency(curves, folder / "label_efficiency.png", title=title, colors=colors)


def save_bars(groups: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, title: str) -> None:
    """Draw groups of bars, a bar per series: its mean accuracy (0 to 1) over runs, with the standard deviation."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.82 / len(series)
    inches = max(5.0, 1.2 + 0.62 * len(groups) * len(series))
    # An entry of the legend takes about 0.6 inches, and 0.09 for each letter.
    columns = max(1, min(4, len(series), int(inches / (0.6 + 0.09 * max(map(len, series))))))
    with new_figure(inches, 4.2) as figure:
        axes = figure.subplots()
        for number, name in enumerate(series):
            places = [p + (number - (len(series) - 1) / 2) * width for p, g in enumerate(groups.values()) if name in g]
            runs = [group[name] for group in groups.values() if name in group]
            means, spreads = [statistics.fmean(r) for r in runs], [spread(r) for r in runs]
            axes.bar(places, means, 0.92 * width, color=SERIES[number % len(SERIES)], label=name)
            axes.errorbar(places, means, spreads, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            for place, mean, above in zip(places, means, spreads, strict=True):
                end = (place, mean + above)
                axes.annotate(f"{100 * mean:.1f}", end, (0, 2), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(groups)), list(groups))
        axes.tick_params("x", length=0)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(ylabel=accuracy_label(groups), ylim=(0, min(1.1, 1.12 * axes.dataLim.y1) or 1))
        figure.legend(loc="outside lower center", ncols=columns)
        write_title(figure, title)
        save_figure(figure, path)


def save_label_efficiency(
    series: Mapping[str, Mapping[float, Sequence[float]]], path: Path, *, title: str, colors: Mapping[str, str]
) -> None:
    """Draw a line per series: mean accuracy (0 to 1) over runs by the share of the labels (0 to 1), on a log axis."""
    shares = sorted({share for line in series.values() for share in line})
    with new_figure(7.5, 4.4) as figure:
        axes = figure.subplots()
        for name, line in series.items():
            x, runs = zip(*sorted(line.items()), strict=True)
            means, spreads = [statistics.fmean(r) for r in runs], [spread(r) for r in runs]
            axes.errorbar(x, means, spreads, color=colors[name], marker="o", markersize=4, capsize=2, label=name)
        axes.set_xscale("log")
        axes.set_xticks(shares, share_names(shares))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set(xlabel="share of the labels", ylabel=accuracy_label(series))
        # The legend in the order of the lines' right ends.
        handles, names = axes.get_legend_handles_labels()
        ends = [statistics.fmean(series[name][max(series[name])]) for name in names]
        order = np.argsort(ends)[::-1]
        figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside right center")
        write_title(figure, title)
        save_figure(figure, path)


def spread(runs: Sequence[float]) -> float:
    return statistics.stdev(runs) if len(runs) > 1 else 0.0


def accuracy_label(groups: Mapping[Any, Mapping[Any, Sequence[float]]]) -> str:
    """Return the label of an axis of accuracies, which says what the whiskers are."""
    counts = sorted({len(runs) for group in groups.values() for runs in group.values()})
    if counts[-1] == 1:
        return "accuracy"
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"accuracy (mean and s.d. of {number} runs)"


def share_names(shares: Sequence[float]) -> list[str]:
    """Return shares as percentages, empty where the next one on a log axis is too near."""
    places = np.log([*shares, math.inf])
    gap = 0.07 * (places[-2] - places[0])
    near = np.diff(places) < gap
    return ["" if close else f"{100 * share:.3g}%" for share, close in zip(shares, near, strict=True)]
