"""Pretrain a timm backbone with BYOL.

    accelerate launch recipes/pretrain.py --backbone resnet18
    accelerate launch recipes/pretrain.py --backbone vit_tiny_patch16_224 --dataset path/to/images --epochs 100

Without --dataset it trains on scikit-learn's digits, offline, in minutes on a CPU. --help lists all settings.
"""

from byol_timm.__main__ import main
from byol_timm.config import run

if __name__ == "__main__":
    run(main)
