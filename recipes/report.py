"""Write the report of a run: pictures, metrics, settings and environment in one HTML file.

    python recipes/report.py runs/resnet18-digits
    python recipes/report.py runs/resnet18-digits --tsne

`pretrain` writes it at the end. This recipe writes it again, with all pictures (*.png) that are now in the folder.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from byol_timm.cli import parse, run
from byol_timm.report import save_report


@dataclass(frozen=True)
class Report:
    """Write report.html: pictures, metrics, settings and environment of a run on one page."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    tsne: bool = False
    """Redraw the feature map with t-SNE. Takes a minute or more, and needs the images of the run."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> None:
    config = parse(Report)
    if config.tsne:
        from byol_timm.pretraining import redraw

        redraw(config.folder)
    print(save_report(config.folder))


if __name__ == "__main__":
    run(main)
