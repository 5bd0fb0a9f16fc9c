"""The page of a run: its pictures, numbers, settings and environment in one file that needs no other.

    python recipes/report.py runs/resnet18-digits
    python recipes/report.py runs/resnet18-digits --tsne

`pretrain` writes it at the end; this writes it again, with whatever pictures (*.png) lie in the folder by now.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from byol_timm.cli import parse, run
from byol_timm.report import save_report


@dataclass(frozen=True)
class Report:
    """Write report.html: the pictures, numbers, settings and environment of a run on one page."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    tsne: bool = False
    """Draw the map of the images anew, by t-SNE: a minute or more, and the images must still be there."""
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
