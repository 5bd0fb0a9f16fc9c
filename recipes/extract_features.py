"""Write the features of all images of a data set to files.

    python recipes/extract_features.py --encoder local-dir:runs/resnet18-digits/encoder --dataset path/to/images
    python recipes/extract_features.py --encoder hf-hub:user/name --dataset user/images --form safetensors
    torchrun --nproc_per_node 4 recipes/extract_features.py --encoder resnet50 --pretrained --dataset path/to/images

Labels are not needed. Files are written in parts, and the same command again writes the missing ones.

    datasets.load_dataset("parquet", data_files="features/*.parquet", split="train").with_format("numpy")
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from byol_timm.cli import output_folder, parse, run
from byol_timm.config import EvaluationConfig
from byol_timm.errors import ByolTimmError


@dataclass(frozen=True)
class Extraction(EvaluationConfig):
    """Write the features of all images of a data set to files."""

    split: str | None = None
    """Split whose images are read, all of them; None: train."""
    output: str = "features"
    """Folder for the files."""
    form: Literal["parquet", "safetensors"] = "parquet"
    """Format of the files."""
    part_images: int = 10_000
    """Images in each file."""


def main() -> None:
    config = parse(Extraction)
    if config.part_images < 1:
        raise ByolTimmError(f"--part_images must be positive ({config.part_images})")
    output_folder(config.output)

    # Only now: --help and a wrong flag do not wait for torch.
    from extract_features_writer import save_features

    from byol_timm.evaluation import open_evaluation

    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    encoder, splits, preparation = open_evaluation(config, labelled=False)
    paths = save_features(
        encoder,
        splits.train,
        preparation,
        Path(config.output),
        form=config.form,
        part_images=config.part_images,
        rank=rank,
        world=world,
    )
    if rank == 0:
        print(f"features of {len(splits.train):,} images in {len(paths)} files in {config.output}")


if __name__ == "__main__":
    run(main)
