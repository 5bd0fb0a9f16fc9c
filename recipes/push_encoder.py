"""Push an encoder to the Hub, from where plain timm loads it.

    python recipes/push_encoder.py runs/resnet18-digits user/name --dry_run
    python recipes/push_encoder.py runs/resnet18-digits user/name --license cc-by-4.0
    python recipes/push_encoder.py runs/resnet18-digits/encoder user/name --public --revision v2

FOLDER is the folder of a run or of an encoder. A repository is private unless --public; pushing again makes one more
commit and leaves your own text in the card.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from byol_timm.cli import parse, run
from byol_timm.encoders import files_to_push, push_encoder


@dataclass(frozen=True)
class Push:
    """Push an encoder to the Hub, from where plain timm loads it: one commit, private unless --public."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")]
    """Folder of a run, or of an encoder in timm's format."""
    repo_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")]
    """user/name on the Hub."""
    public: bool = False
    """Make the repository public."""
    revision: str | None = None
    """Branch to push to, created when missing."""
    license: str | None = None
    """Licence of the weights as the Hub writes it, for example cc-by-4.0; the training images may restrict it."""
    dry_run: bool = False
    """Print what would be pushed, and stop."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> None:
    config = parse(Push)
    if config.dry_run:
        files = files_to_push(config.folder, config.repo_id, license=config.license)
        print(f"would push to {config.repo_id}, {'public' if config.public else 'private'}:")
        for name, content in files.items():
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            print(f"{size:>12,}  {name}")
        return
    url = push_encoder(
        config.folder, config.repo_id, public=config.public, revision=config.revision, license=config.license
    )
    repo_id = "/".join(url.split("/")[3:5]) + (f"@{config.revision}" if config.revision else "")
    print(f"pushed to {url}")
    print(f'timm.create_model("hf-hub:{repo_id}", pretrained=True, num_classes=0)')


if __name__ == "__main__":
    run(main)
