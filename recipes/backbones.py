"""Print a table of timm backbones and the image sizes that they train on.

    python recipes/backbones.py --filter 'convnext*' resnet18
    python recipes/backbones.py --filter 'vit_tiny*' --sizes 28 64 --in_chans 1 --output grey.csv
    python recipes/backbones.py --output recipes/backbones.md

Builds each network without weights, on torch's meta device, and runs two images of every size through it in training
mode.
"""

import csv
import io
import os
import shlex
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from tqdm import tqdm

from byol_timm.cli import output_file, parse, run
from byol_timm.encoders import Fit, closest_backbones, encoder_width, fit_backbone, small_image_kwargs
from byol_timm.errors import ByolTimmError

LEGEND = """\
**32 px** and so on: height and width of the final map, or grid of tokens, for training images of that size; empty where
the backbone does not take them. **own size**: the same for the image size that the backbone was made for.
**set**: arguments of the timm model that byol_timm sets by itself; for a backbone that is refused, the reason.
**auto**: what `--backbone_kwargs auto` adds for images of the first size, and the map that it leads to.
"""


@dataclass(frozen=True)
class Backbones:
    """Print a table of timm backbones and the image sizes that they train on."""

    filter: tuple[str, ...] = ("*",)
    """Names and patterns, as timm.list_models takes them."""
    sizes: tuple[int, ...] = (32, 64, 96)
    """Sizes of the square images to try, in addition to the backbone's own."""
    in_chans: int = 3
    """Channels of the images."""
    output: str | None = None
    """File to write, .md or .csv; None: print Markdown."""
    processes: int = os.cpu_count() or 1
    """Worker processes."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> None:
    config = parse(Backbones)
    form = Path(config.output).suffix if config.output else ".md"
    if form not in (".md", ".csv"):
        raise ByolTimmError(f"the table is written as .md or .csv ({config.output}). Choose one of them for --output")
    output = output_file(config.output) if config.output else None
    names = sorted({name for pattern in config.filter for name in matching(pattern)})
    with ProcessPoolExecutor(config.processes, initializer=prepare_process) as pool:
        rows = pool.map(partial(table_row, config=config), names)
        rows = list(tqdm(rows, total=len(names), unit="backbone", mininterval=1.0))
    text = as_csv(rows, config) if form == ".csv" else as_markdown(rows, config)
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def prepare_process() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal: these end silently, the first one reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def matching(pattern: str) -> list[str]:
    names = timm.list_models(pattern)
    if not names:
        near = ", ".join(closest_backbones(pattern)) or "see timm.list_models()"
        raise ByolTimmError(f"no timm backbone matches {pattern!r}. Nearest names: {near}")
    return names


def columns(config: Backbones) -> list[str]:
    sizes = [f"{size} px" for size in config.sizes]
    return ["backbone", "width", "parameters", *sizes, "own size", "set", "auto"]


def table_row(name: str, config: Backbones) -> dict[str, str]:
    """Return the columns of one backbone, or the reason why it is refused."""
    try:
        own = fit_backbone(name, in_chans=config.in_chans)
    except ByolTimmError as error:
        return {"backbone": name, "set": f"refused: {error}"}
    fits = {size: attempt(name, size, config) for size in config.sizes}
    given = [key for fit in (own, *fits.values()) if fit for key in ("img_size", "global_pool") if key in fit.arguments]
    auto = small_image_kwargs(name, image_size=config.sizes[0], in_chans=config.in_chans) if config.sizes else {}
    fit = attempt(name, config.sizes[0], config, **auto) if auto else None
    return {
        "backbone": name,
        "width": str(encoder_width(own.encoder)),
        "parameters": f"{sum(parameter.numel() for parameter in own.encoder.parameters()) / 1e6:.1f} M",
        **{f"{size} px": map_size(fit) for size, fit in fits.items()},
        "own size": f"{'x'.join(map(str, own.input_size[1:]))}: {map_size(own)}",
        "set": ", ".join(sorted({f"{key}={own.arguments.get(key, 'SIZE')}" for key in given})),
        "auto": ", ".join(f"{key}={value}: {map_size(fit)}" for key, value in auto.items()),
    }


def attempt(name: str, size: int, config: Backbones, **kwargs: int) -> Fit | None:
    try:
        return fit_backbone(name, image_size=size, in_chans=config.in_chans, **kwargs)
    except ByolTimmError:
        return None


def map_size(fit: Fit | None) -> str:
    return "x".join(map(str, fit.map_size)) if fit else ""


def as_csv(rows: list[dict[str, str]], config: Backbones) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(config), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[dict[str, str]], config: Backbones) -> str:
    names = columns(config)
    trained = {
        name: sum(bool(row.get(name)) for row in rows) for name in (*names[3 : 3 + len(config.sizes)], "own size")
    }
    counts = ", ".join(f"{count:,} at {name.replace('own', 'their own')}" for name, count in trained.items())
    lines = [
        "# timm backbones and the images that they train on\n",
        f"    {shlex.join(['python', 'recipes/backbones.py', *sys.argv[1:]])}\n",
        f"timm {version('timm')}, torch {version('torch')}. Of {len(rows):,} backbones train {counts}.\n",
        LEGEND,
        f"| {' | '.join(names)} |",
        "|---|" + "--:|" * 2 + "---|" * (len(names) - 3),
        *(f"| {' | '.join(row.get(name, '').replace('|', '/') for name in names)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
