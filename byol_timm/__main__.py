"""`accelerate launch -m byol_timm --backbone resnet18`: what recipes/pretrain.py does, for users without a clone."""

from .cli import parse, run
from .config import PretrainConfig


def main() -> None:
    """Pretrain as the command line asks."""
    config = parse(PretrainConfig)

    # Only now: --help and a wrong flag are answered without waiting for torch.
    from .pretraining import pretrain

    pretrain(config)


if __name__ == "__main__":
    run(main)
