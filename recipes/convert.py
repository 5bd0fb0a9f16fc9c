"""Convert another project's BYOL encoder to timm's format, which push_encoder.py and the evaluation recipes take.

    python recipes/convert.py byol.ckpt encoders/byol-resnet50
    python recipes/convert.py pretrain_res50x1.pkl encoders/byol-jax
    python recipes/convert.py backbone.pth encoders/mine --source mmpretrain --backbone resnet50

CHECKPOINT is a torch or safetensors file of lightly, solo-learn, mmpretrain, byol-pytorch, MoCo v3, or with
torchvision's names, or a pickle of the authors' JAX release (haiku). Takes the online network. Executes nothing in
the file, and refuses one that holds more than weights and plain values.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from byol_timm.cli import parse, run


@dataclass(frozen=True)
class Convert:
    """Convert another project's BYOL encoder to timm's format."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """File of the other project."""
    folder: Annotated[str, tyro.conf.Positional]
    """Folder for the encoder."""
    source: Literal["haiku", "lightly", "solo-learn", "mmpretrain", "byol-pytorch", "moco-v3", "torchvision"] | None = (
        None
    )
    """The project; None: found by the names in the file."""
    backbone: str | None = None
    """The timm model; None: found by the shapes, for ResNets and MoCo v3's ViTs."""
    backbone_kwargs: tuple[str, ...] = ()
    """Arguments of the timm model as key=value."""
    image_size: int = 224
    """Size of the square images that the encoder was trained on."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each channel that the project subtracts from images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation that it then divides each channel by."""
    license: str | None = None
    """Licence of the weights as the Hub writes it."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> None:
    config = parse(Convert)

    from convert_layouts import convert_checkpoint

    from byol_timm.encoders import parse_kwargs

    folder = convert_checkpoint(
        config.checkpoint,
        config.folder,
        source=config.source,
        backbone=config.backbone,
        backbone_kwargs=parse_kwargs(config.backbone_kwargs),
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
        license=config.license,
    )
    print(f"encoder written to {folder}")
    print(f'timm.create_model("local-dir:{folder}", pretrained=True, num_classes=0)')
    print(f"python recipes/push_encoder.py {folder} user/name --dry_run")


if __name__ == "__main__":
    run(main)
