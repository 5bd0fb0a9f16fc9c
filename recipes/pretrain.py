"""Pretrain a timm backbone with BYOL.

    accelerate launch recipes/pretrain.py --backbone resnet18
    accelerate launch recipes/pretrain.py --backbone vit_tiny_patch16_224 --dataset path/to/images --epochs 100

Without --dataset it trains on scikit-learn's digits, offline, in minutes on a CPU. --help lists all settings.
"""

from byol_timm.config import PretrainConfig, parse, run


def main() -> None:
    config = parse(PretrainConfig)

    # Only now: --help and a wrong flag are answered without waiting for torch.
    from byol_timm import pretrain

    pretrain(config)


if __name__ == "__main__":
    run(main)
