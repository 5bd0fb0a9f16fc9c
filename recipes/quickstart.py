"""From images to an encoder and what it is worth, in one script that can be pasted into a notebook cell.

    pip install -e . && python recipes/quickstart.py

Change BACKBONE to any timm name and DATASET to a folder of your images. It runs on a GPU where there is one.
"""

from pathlib import Path

import timm

from byol_timm import PretrainConfig, pretrain
from byol_timm.config import run

BACKBONE, DATASET, FOLDER = "resnet18", "digits", Path("runs/quickstart")


def main() -> None:
    pretrain(PretrainConfig(backbone=BACKBONE, dataset=DATASET, output_dir=str(FOLDER), overwrite=True))

    # From here on plain timm: ready to be fine-tuned on ten classes.
    classifier = timm.create_model(f"local-dir:{FOLDER}/encoder", pretrained=True, num_classes=10)
    print(f"{type(classifier).__name__} with {sum(p.numel() for p in classifier.parameters()):,} parameters")
    print("look at", *sorted(str(path) for path in FOLDER.glob("*.png")))


if __name__ == "__main__":
    run(main)
