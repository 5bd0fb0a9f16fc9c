"""From config to settings: what a field left at None becomes, given the images and the encoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import PretrainConfig, Settings, data_settings, output_dir
from ..data import Splits, StreamSplits, open_dataset, open_stream, share_indices, warn_of_few_levels
from ..encoders import (
    create_encoder,
    fetch_encoder,
    has_batch_norm,
    has_convolutions,
    is_patch_transformer,
    parse_kwargs,
    small_image_kwargs,
)
from ..errors import ByolTimmError
from ..training import check_optimizer
from ..views import AUGMENTATIONS, Augmentation

DIGITS = dict(epochs=14, batch_size=64, opt="lars", lr=2.5, target_decay=0.95, hidden_dim=2048, num_head_layers=3)
# Base learning rate and weight decay by optimizer.
OPTIMIZERS = {"lars": (1.0, 1e-6), "sgd": (0.06, 5e-4), "adamw": (1.5e-4, 0.1)}
AUGMENTATION_FLAGS = ("crop_scale", "rotate", "flip", "jitter", "colors", "blur", "solarize")
# Evaluation takes at most this share of a run's forward passes. A training image needs eight: two views through two
# networks, and backward passes of twice a forward's cost through one of them.
EVALUATION_SHARE, FORWARDS_PER_IMAGE = 0.1, 8
SHUFFLE_BUFFER = 10_000
# Most steps between lines of metrics, which the collapse alarm waits for, and between checkpoints, which a kill costs.
LOG_EVERY, SAVE_EVERY = 100, 2_000


def open_images(config: PretrainConfig) -> Splits:
    """Open the training images of the config, reduced to `image_share`, and those held out."""
    splits = open_dataset(**data_settings(config), in_chans=config.in_chans, split_seed=config.split_seed)
    warn_of_few_levels(splits.train)
    if config.image_share == 1:
        return splits
    train = splits.train.subset(share_indices(len(splits.train), config.image_share, config.seed))
    return Splits(train, splits.test, f"{splits.note}; training on {config.image_share:.3g} of the training images")


def open_splits(config: PretrainConfig) -> Splits | StreamSplits:
    """Open the images of the config, as a stream if it asks for one."""
    if not config.streaming:
        return open_images(config)
    splits = open_stream(**data_settings(config), in_chans=config.in_chans, num_images=config.num_images)
    warn_of_few_levels(splits.bank)
    return splits


def resolve_images(config: PretrainConfig, image_side: int) -> PretrainConfig:
    """Decide image size and augmentation; image_side: the longer side of a typical image, in pixels."""
    image_size = config.image_size
    if image_size is None:
        image_size = 32 * -(-image_side // 32) if image_side <= 64 else 224
    augmentation = config.augmentation
    if augmentation == "auto":
        augmentation = "digits" if config.dataset == "digits" else "small" if image_size <= 64 else "paper"
    buffer = config.shuffle_buffer or (SHUFFLE_BUFFER if config.streaming else None)
    return dataclasses.replace(
        config,
        image_size=image_size,
        augmentation=augmentation,
        shuffle_buffer=buffer,
        output_dir=str(output_dir(config)),
    )


def resolve_backbone_kwargs(config: PretrainConfig) -> PretrainConfig:
    """Replace `auto` in the backbone's arguments by those it stands for; the image size must be decided."""
    if "auto" not in config.backbone_kwargs:
        return config
    source, _, place = config.backbone.partition(":")
    backbone = f"local-dir:{fetch_encoder(place)}" if source == "hf-hub" else config.backbone
    given = tuple(pair for pair in config.backbone_kwargs if pair != "auto")
    fitted: dict[str, Any] = dict(image_size=config.image_size, in_chans=config.in_chans, **parse_kwargs(given))
    chosen = small_image_kwargs(backbone, **fitted)
    pairs = (*given, *(f"{name}={value}" for name, value in chosen.items()))
    return dataclasses.replace(config, backbone_kwargs=pairs)


def initial_encoder(config: PretrainConfig, *, weights: bool = True) -> nn.Module:
    """Return the encoder that training starts from: drawn by the seed, or with pretrained weights.

    The image size must be decided. weights: False leaves out pretrained weights, because a checkpoint follows.
    """
    torch.manual_seed(config.seed)
    return create_encoder(
        config.backbone,
        image_size=config.image_size,
        in_chans=config.in_chans,
        pretrained=config.pretrained and weights,
        auto_kwargs="auto" in config.backbone_kwargs,
        zero_init_last=config.zero_init_last,
        **backbone_kwargs(config),
    )


def backbone_kwargs(config: PretrainConfig) -> dict[str, Any]:
    """Return the backbone's arguments as a dict."""
    return parse_kwargs(tuple(pair for pair in config.backbone_kwargs if pair != "auto"))


def resolve_augmentation(config: PretrainConfig) -> Augmentation:
    """Return the named augmentation with the changes that flags make."""
    changes = {name: getattr(config, name) for name in AUGMENTATION_FLAGS if getattr(config, name) is not None}
    return dataclasses.replace(AUGMENTATIONS[config.augmentation], **changes)


def resolve_training(config: PretrainConfig, encoder: nn.Module, num_images: int, forwards: int) -> Settings:
    """Decide batch, optimizer and schedule: LARS for encoders with BatchNorm, else AdamW as in MoCo v3.

    config: from `resolve_images`. forwards: batches that make up a step, over processes and accumulation.
    """
    batch_norm, patches = has_batch_norm(encoder), is_patch_transformer(encoder)
    digits: Mapping[str, Any] = {}
    if config.dataset == "digits" and batch_norm and config.opt in (None, DIGITS["opt"]):
        digits = DIGITS
    opt = config.opt or ("lars" if batch_norm else "adamw")
    check_optimizer(opt)
    if config.lr is None and opt not in OPTIMIZERS:
        raise ByolTimmError(
            f"no default learning rate for --opt {opt}. Give --lr, and --weight_decay if 0.1 is not right for it"
        )
    lr, weight_decay = OPTIMIZERS.get(opt, (None, 0.1))
    epochs = config.epochs or digits.get("epochs", 100)
    chosen = dict(
        epochs=epochs,
        # A power of two, at least four steps an epoch.
        batch_size=max(2, min(256, 2 ** ((num_images // forwards).bit_length() - 3))),
        opt=opt,
        lr=lr,
        weight_decay=weight_decay,
        target_decay=0.99 if epochs <= 300 else 0.996,
        warmup_epochs=min(10.0, epochs / 10) if opt in ("lars", "sgd") else epochs * 40 / 300,
        hidden_dim=4096,
        num_head_layers=3 if patches else 2,
        freeze=("stem",) if patches and not config.pretrained and ":" not in config.backbone else (),
        channels_last=has_convolutions(encoder),
    )
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(PretrainConfig)}
    values = {**chosen, **digits, **{name: value for name, value in given.items() if value is not None}}
    intervals = resolve_intervals(epochs, num_images // (values["batch_size"] * forwards))
    return Settings(**{**given, **intervals, **values})


def resolve_intervals(epochs: int, steps_per_epoch: int) -> dict[str, int]:
    """Return the steps between lines of metrics and between checkpoints, and the epochs between kNN evaluations."""
    total_steps = epochs * steps_per_epoch
    affordable = int(EVALUATION_SHARE * FORWARDS_PER_IMAGE * epochs)
    return dict(
        log_every=max(1, min(LOG_EVERY, total_steps // 50)),
        save_every=max(1, min(SAVE_EVERY, total_steps // 10)),
        knn_every=-(-epochs // max(1, min(10, affordable))),
    )
