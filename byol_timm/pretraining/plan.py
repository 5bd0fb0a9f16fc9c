"""The plan of a run: images, networks, views and every setting, decided once before training."""

import dataclasses
import logging
from typing import Any

from torch import nn

from ..byol import BYOL
from ..config import PretrainConfig, Settings, to_yaml
from ..data import Splits, StreamSplits, fingerprint, hub_id
from ..encoders import freeze_parts, has_batch_norm, normalization
from ..evaluation import Examples, Preparation
from ..training import Schedule, enable_grad_checkpointing, explain_exhaustion
from ..views import TwoViews
from .launch import Run
from .resolve import (
    initial_encoder,
    open_splits,
    resolve_augmentation,
    resolve_backbone_kwargs,
    resolve_images,
    resolve_training,
)
from .start import HEADS, compare_checkpoint, read_training_state, start_from

logger = logging.getLogger(__name__)

# Share of the images, enlarged more than four times, above which a run warns.
MANY_TINY = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run decides before it trains.

    data: facts about the training images, for checkpoints and the model card. frozen: names of frozen parameters.
    """

    settings: Settings
    schedule: Schedule
    splits: Splits | StreamSplits
    data: dict[str, Any]
    views: TwoViews
    byol: BYOL
    frozen: list[str]

    @property
    def encoder(self) -> nn.Module:
        return self.byol.encoder

    @property
    def preparation(self) -> Preparation:
        """How images are prepared for evaluations during the run."""
        layout: dict[str, Any] = dict(channels_last=self.settings.channels_last, workers=self.settings.workers)
        return Preparation.square(self.settings.image_size, self.views.mean, self.views.std, **layout)

    def examples(self) -> Examples:
        """Load images for evaluations and pictures: those held out, if there are any."""
        seed = self.settings.split_seed
        return Examples.load(self.splits.bank, self.splits.test, self.preparation, seed=seed)


def make_plan(config: PretrainConfig, run: Run) -> Plan:
    """Open the images, create the networks, and decide every value that `config` leaves open."""
    processes = run.processes
    with processes.main_first():
        splits = open_splits(config)
        fitted = resolve_images(config, splits.bank.side())
        # A checkpoint has all weights: pretrained ones and a training state are not needed again.
        start = run.earlier
        if start is None and config.training_state is not None:
            start = read_training_state(config.training_state)
        if start is not None and config.training_state is not None:
            known = {name: start.state["config"][name] for name in HEADS if getattr(fitted, name) is None}
            fitted = dataclasses.replace(fitted, **known)
        fitted = resolve_backbone_kwargs(fitted)
        encoder = initial_encoder(fitted, weights=run.earlier is None)
    forwards = processes.count * run.accelerator.gradient_accumulation_steps
    settings = resolve_training(fitted, encoder, len(splits.train), forwards)
    schedule = Schedule.of(settings, len(splits.train), forwards)
    data: dict[str, Any] = {
        "name": splits.train.name,
        "images": len(splits.train),
        "channels": splits.train.channels,
        "fingerprint": fingerprint(splits.train),
        "hub_id": hub_id(settings.dataset),
    }
    processes.check_same(to_yaml(settings), "has other settings than process 0. Use the same command everywhere")
    other_images = f"sees other images in {settings.dataset} than process 0. Give all hosts the same files"
    processes.check_same(data["fingerprint"], other_images)
    if run.earlier is not None:
        compare_checkpoint(run.earlier, settings, schedule, data, batch_norm=has_batch_norm(encoder))

    run.stack.enter_context(explain_exhaustion(settings.batch_size, settings.image_size))
    mean, std = normalization(encoder, settings.in_chans)
    views = TwoViews(resolve_augmentation(settings), settings.image_size, seed=settings.seed, mean=mean, std=std)
    frozen = freeze_parts(encoder, settings.freeze)
    byol = BYOL(encoder, **{name: getattr(settings, name) for name in HEADS})
    if settings.grad_checkpointing:
        enable_grad_checkpointing(encoder)
    if start is not None and run.earlier is None:
        start_from(start, settings, byol)
    if "auto" in config.backbone_kwargs:
        logger.info("--backbone_kwargs auto: %s", " ".join(settings.backbone_kwargs) or "nothing to add")
    tiny = splits.bank.share_below(settings.image_size / 4)
    if tiny > MANY_TINY:
        logger.warning(
            "%.0f %% of the images are smaller than a quarter of --image_size %d. Lower --image_size if all are",
            100 * tiny,
            settings.image_size,
        )
    return Plan(settings, schedule, splits, data, views, byol, frozen)
