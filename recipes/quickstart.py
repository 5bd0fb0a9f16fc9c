"""Train an encoder and load it with plain timm, in one process: paste it into a notebook cell, or run it.

    python recipes/quickstart.py

It takes no flags: the settings of pretrain.py are arguments here. It runs on a GPU where there is one.
"""

import sys

import timm

from byol_timm import PretrainConfig, pretrain
from byol_timm.cli import run

FOLDER = "runs/quickstart"


def main() -> None:
    pretrain(PretrainConfig(backbone="resnet18", dataset="digits", output_dir=FOLDER, overwrite=True))

    # From here on plain timm: ready to be fine-tuned on ten classes.
    classifier = timm.create_model(f"local-dir:{FOLDER}/encoder", pretrained=True, num_classes=10)
    print(f"{type(classifier).__name__} with {sum(p.numel() for p in classifier.parameters()):,} parameters")


if __name__ == "__main__":
    if sys.argv[0].endswith("quickstart.py") and sys.argv[1:]:
        # A notebook's kernel has arguments of its own, which are not for this recipe.
        raise SystemExit(f"quickstart.py takes no flags ({sys.argv[1]}). Use pretrain.py")
    run(main)
