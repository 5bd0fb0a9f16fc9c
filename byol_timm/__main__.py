"""`accelerate launch -m byol_timm --backbone resnet18`: what recipes/pretrain.py does, for users without a clone."""

from .cli import parse, run
from .config import PretrainConfig


def main() -> None:
    """Pretrain with the config of the command line."""
    config = parse(PretrainConfig)

    # Imported here: --help and a wrong flag need not wait for torch.
    from .pretraining import pretrain

    pretrain(config)


if __name__ == "__main__":
    run(main)
