"""Pretrain a timm backbone with BYOL.

    accelerate launch recipes/pretrain.py --backbone resnet18
    accelerate launch recipes/pretrain.py --backbone vit_tiny_patch16_224 --dataset path/to/images --epochs 100
    accelerate launch recipes/pretrain.py --config cifar10 --dry_run

Without --dataset it trains on scikit-learn's digits, offline, in minutes on a CPU. --help lists all settings; --config
takes a YAML file or the name of one in recipes/presets, --dry_run says what a run would take.
"""

from byol_timm.__main__ import main
from byol_timm.cli import run

if __name__ == "__main__":
    run(main)
