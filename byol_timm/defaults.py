"""What a setting left at None becomes, given the images and the encoder; and values that no run can have."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .augment import AUGMENTATIONS, Augmentation
from .config import PretrainConfig
from .encoder import has_batch_norm, has_convolutions, is_patch_transformer
from .errors import ByolTimmError

DIGITS = dict(epochs=14, batch_size=64, opt="lars", lr=2.5, target_decay=0.95, hidden_dim=2048, num_head_layers=3)
AUGMENTATION_FLAGS = ("crop_scale", "rotate", "flip", "jitter", "colors", "blur", "solarize")
# Evaluation takes at most this share of a run's forward passes, of which a training image needs eight: two views
# through two networks, and backward passes of twice a forward's cost through one of them.
EVALUATION_SHARE, FORWARDS_PER_IMAGE = 0.1, 8
SHUFFLE_BUFFER = 10_000
# Steps between lines of metrics, and checkpoints, at most: what the collapse alarm waits for, and what a kill may cost.
LOG_EVERY, SAVE_EVERY = 100, 2_000


def output_dir(config: PretrainConfig) -> Path:
    """The folder of the run: as asked, or `runs/BACKBONE-DATASET`."""
    return Path(config.output_dir or f"runs/{_file_name(config.backbone)}-{_file_name(config.dataset)}")


def resolve_images(config: PretrainConfig, image_side: int) -> Any:
    """`config` with image size and augmentation chosen; image_side: the longer side of a typical image, in pixels."""
    image_size = config.image_size
    if image_size is None:
        image_size = 32 * -(-image_side // 32) if image_side <= 64 else 224
    augmentation: Any = config.augmentation
    if augmentation == "auto":
        augmentation = "digits" if config.dataset == "digits" else "small" if image_size <= 64 else "paper"
    config = dataclasses.replace(config, image_size=image_size, augmentation=augmentation)
    if config.streaming and config.shuffle_buffer is None:
        config = dataclasses.replace(config, shuffle_buffer=SHUFFLE_BUFFER)
    return dataclasses.replace(config, output_dir=str(output_dir(config)))


def resolve_augmentation(config: PretrainConfig) -> Augmentation:
    """The named augmentation with the settings that flags change."""
    changes = {name: getattr(config, name) for name in AUGMENTATION_FLAGS if getattr(config, name) is not None}
    return dataclasses.replace(AUGMENTATIONS[config.augmentation], **changes)


def resolve_training(config: PretrainConfig, encoder: nn.Module, num_images: int, forwards: int) -> Any:
    """`config` with batch, optimizer and schedule chosen: LARS where the encoder has BatchNorm, else AdamW as MoCo v3.

    forwards: of one batch each that make up a step, over processes and accumulation.
    """
    chosen: dict[str, Any] = dict(DIGITS) if config.dataset == "digits" and has_batch_norm(encoder) else {}
    if config.opt is not None and config.opt != chosen.get("opt"):
        chosen = {}
    opt = config.opt or chosen.get("opt") or ("lars" if has_batch_norm(encoder) else "adamw")
    epochs = config.epochs or chosen.get("epochs", 100)
    patches = is_patch_transformer(encoder)
    fallback = dict(
        epochs=epochs,
        # A power of two, at least four steps an epoch.
        batch_size=max(2, min(256, 2 ** ((num_images // forwards).bit_length() - 3))),
        opt=opt,
        lr={"lars": 1.0, "sgd": 0.06}.get(opt, 1.5e-4),
        weight_decay={"lars": 1e-6, "sgd": 5e-4}.get(opt, 0.1),
        target_decay=0.99 if epochs <= 300 else 0.996,
        warmup_epochs=min(10.0, epochs / 10) if opt in ("lars", "sgd") else epochs * 40 / 300,
        hidden_dim=4096,
        num_head_layers=3 if patches else 2,
        freeze=("stem",) if patches and not config.pretrained and ":" not in config.backbone else (),
        channels_last=has_convolutions(encoder),
    )
    wanted = {**fallback, **chosen}
    return dataclasses.replace(config, **{k: v for k, v in wanted.items() if getattr(config, k) is None})


def resolve_intervals(config: PretrainConfig, steps_per_epoch: int) -> Any:
    """`config` with the steps between lines of metrics and checkpoints, and the epochs between kNN evaluations."""
    epochs = config.epochs or 1
    total_steps = epochs * steps_per_epoch
    affordable = EVALUATION_SHARE * FORWARDS_PER_IMAGE * epochs
    return dataclasses.replace(
        config,
        log_every=config.log_every or max(1, min(LOG_EVERY, total_steps // 50)),
        save_every=config.save_every or max(1, min(SAVE_EVERY, total_steps // 10)),
        knn_every=config.knn_every or -(-epochs // max(1, min(10, int(affordable)))),
    )


def normalization(encoder: Any, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in 0..1 that the backbone's pretrained weights expect, per channel."""
    mean, std = (tuple(encoder.pretrained_cfg[name]) for name in ("mean", "std"))
    return _for_channels(mean, in_chans), _for_channels(std, in_chans)


def crop_pct(image_size: int) -> float:
    """The share of an image that evaluation looks at: all of a small one, else the paper's 224 of 256 pixels."""
    return 1.0 if image_size <= 64 else 0.875


def check(config: PretrainConfig) -> None:
    """Refuse values that no run can have, before anything is read."""
    positive = ("image_size", "in_chans", "epochs", "batch_size", "hidden_dim", "projection_dim", "save_every")
    for name in (*positive, "log_every", "knn_every", "max_time", "shuffle_buffer", "num_images", "decoded_side"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ByolTimmError(f"--{name} must be positive ({value})")
    if config.batch_size == 1:
        raise ByolTimmError("--batch_size must be 2 or more (1): BatchNorm compares the images of a batch")
    for name in ("lr", "weight_decay", "warmup_epochs", "rotate", "workers", "memory_limit"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ByolTimmError(f"--{name} must be finite and not negative ({value})")
    for name in ("target_decay", "flip", "jitter", "blur", "solarize", "crop_scale"):
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not 0 <= number <= 1:
                raise ByolTimmError(f"--{name} must lie between 0 and 1 ({number})")
    check_seed(config.seed)
    if not 0 < config.image_share <= 1:
        raise ByolTimmError(f"--image_share must lie above 0 and be at most 1 ({config.image_share})")
    if config.crop_scale is not None and not 0 < config.crop_scale[0] <= config.crop_scale[1]:
        raise ByolTimmError(f"--crop_scale takes the lowest and the highest area {config.crop_scale}")
    for name in ("public", "push_training_state"):
        if getattr(config, name) and config.push_to_hub is None:
            raise ByolTimmError(f"--{name} is for --push_to_hub. Name a repository with that")
    if config.pretrained and config.training_state is not None:
        raise ByolTimmError(f"--training_state ({config.training_state}) replaces all weights. Leave out --pretrained")
    for name in ("shuffle_buffer", "num_images"):
        if getattr(config, name) is not None and not config.streaming:
            raise ByolTimmError(f"--{name} ({getattr(config, name)}) is for --streaming. Leave it out")
    if config.streaming and config.image_share != 1:
        raise ByolTimmError(f"--image_share ({config.image_share:g}) needs all images. Leave out --streaming")
    if config.streaming and config.memory_limit != PretrainConfig.memory_limit:
        raise ByolTimmError(
            f"--memory_limit ({config.memory_limit:g}) is for decoded images and --streaming holds none. "
            "Use --shuffle_buffer"
        )
    if config.streaming and config.decoded_cache is not None:
        raise ByolTimmError(f"--decoded_cache ({config.decoded_cache}) holds all images. Leave out --streaming")
    if config.fast_jpeg and config.decoded_cache is not None:
        raise ByolTimmError("--fast_jpeg saves nothing where images are decoded once. Leave out --decoded_cache")
    if config.decoded_side is not None and config.decoded_cache is None:
        raise ByolTimmError(f"--decoded_side ({config.decoded_side}) is for --decoded_cache. Name a folder with that")
    if config.num_head_layers not in (None, 2, 3):
        raise ByolTimmError(f"--num_head_layers is 2 or 3 ({config.num_head_layers})")


def check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ByolTimmError(f"--seed must fit into 64 bits ({seed})")


def _for_channels(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def _file_name(text: str) -> str:
    return Path(text.rpartition(":")[2]).name or "run"
