"""What a setting left at None becomes, given the images and the encoder; and values that no run can have."""

import dataclasses
from typing import Any

import torch
from torch import nn

from ..config import PretrainConfig, data_settings, output_dir
from ..data import Splits, StreamSplits, open_cache, open_dataset, open_stream, share_indices, warn_of_few_levels
from ..encoders import (
    create_encoder,
    fetch_encoder,
    has_batch_norm,
    has_convolutions,
    is_patch_transformer,
    parse_kwargs,
    small_image_kwargs,
)
from ..training import Interrupted, Interruption
from ..views import AUGMENTATIONS, Augmentation

DIGITS = dict(epochs=14, batch_size=64, opt="lars", lr=2.5, target_decay=0.95, hidden_dim=2048, num_head_layers=3)
AUGMENTATION_FLAGS = ("crop_scale", "rotate", "flip", "jitter", "colors", "blur", "solarize")
# Evaluation takes at most this share of a run's forward passes, of which a training image needs eight: two views
# through two networks, and backward passes of twice a forward's cost through one of them.
EVALUATION_SHARE, FORWARDS_PER_IMAGE = 0.1, 8
SHUFFLE_BUFFER = 10_000
# Steps between lines of metrics, and checkpoints, at most: what the collapse alarm waits for, and what a kill may cost.
LOG_EVERY, SAVE_EVERY = 100, 2_000


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


MANY_TINY = 0.1


def open_images(config: PretrainConfig) -> Splits:
    """The images that the settings name, of those to train on the share that they name, and those held out."""
    splits = open_dataset(**data_settings(config), in_chans=config.in_chans, split_seed=config.split_seed)
    warn_of_few_levels(splits.train)
    if config.image_share == 1:
        return splits
    train = splits.train.subset(share_indices(len(splits.train), config.image_share, config.seed))
    return Splits(train, splits.test, f"{splits.note}; {config.image_share:.3g} of the images to train on are used")


def resolve_backbone_kwargs(config: Any) -> Any:
    """`config`, its image size chosen, with what `auto` stands for among the arguments of the backbone."""
    if "auto" not in config.backbone_kwargs:
        return config
    source, _, place = config.backbone.partition(":")
    backbone = f"local-dir:{fetch_encoder(place)}" if source == "hf-hub" else config.backbone
    given = tuple(pair for pair in config.backbone_kwargs if pair != "auto")
    fitted = dict(image_size=config.image_size, in_chans=config.in_chans, **parse_kwargs(given))
    chosen = small_image_kwargs(backbone, **fitted)
    pairs = (*given, *(f"{name}={value}" for name, value in chosen.items()))
    return dataclasses.replace(config, backbone_kwargs=pairs)


def initial_encoder(config: Any) -> nn.Module:
    """The encoder that training starts from: weights drawn by the seed of the settings, or pretrained ones.

    config: with the size of the images chosen. torch's random state goes on from there.
    """
    torch.manual_seed(config.seed)
    return create_encoder(
        config.backbone,
        image_size=config.image_size,
        in_chans=config.in_chans,
        pretrained=config.pretrained,
        auto_kwargs="auto" in config.backbone_kwargs,
        zero_init_last=config.zero_init_last,
        **_backbone_kwargs(config),
    )


def _open_stream(config: PretrainConfig) -> StreamSplits:
    splits = open_stream(**data_settings(config), in_chans=config.in_chans, num_images=config.num_images)
    warn_of_few_levels(splits.bank)
    return splits


def _backbone_kwargs(config: Any) -> dict[str, Any]:
    return parse_kwargs(tuple(pair for pair in config.backbone_kwargs if pair != "auto"))


def _decoded(
    config: Any, splits: Splits | StreamSplits, interruption: Interruption, step: int
) -> Splits | StreamSplits:
    """The same splits, the images to train on decoded already where the settings ask for it."""
    if config.decoded_cache is None or isinstance(splits, StreamSplits):
        return splits

    def poll() -> None:
        if interruption.requested is not None:
            raise Interrupted(interruption.requested, step)

    train = open_cache(
        splits.train,
        config.decoded_cache,
        side=config.decoded_side,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        poll=poll,
    )
    return dataclasses.replace(splits, train=train)
