"""What a run keeps of the paper and what it changes, point by point, read off what will be trained."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..byol import BYOL, mlp, regression_loss, target_decay
from ..training import LARS
from ..views import AUGMENTATIONS, Augmentation, blur_taps, omitted_operations


class Point(NamedTuple):
    """One thing the paper (with its released code) fixes, and what the run has in its place."""

    name: str
    paper: str
    here: str

    @property
    def same(self) -> bool:
        return self.paper == self.here


class Published(NamedTuple):
    """A schedule of the authors: learning rate per 256 images, weight decay, tau at the first step."""

    lr: float
    weight_decay: float
    target_decay: float


# By epochs and batch: the released code's presets, and the paper's appendix G.
SCHEDULES = {
    (1000, 4096): Published(0.2, 1.5e-6, 0.996),
    (300, 4096): Published(0.3, 1e-6, 0.99),
    (100, 4096): Published(0.45, 1e-6, 0.99),
    (40, 4096): Published(0.45, 1e-6, 0.97),
    (1000, 512): Published(0.4, 1.5e-6, 0.9995),
}
# Of the paper, what no setting changes.
ALWAYS = (
    "draws per image and per view, order of the operations; a pass per view; l2 norms in float32; target moved once a "
    "step, parameters only; the online encoder evaluated and shipped"
)


def nearest_schedule(epochs: int, batch: int) -> tuple[int, int]:
    """Epochs and batch of the authors' run to compare with: the same ones, else the same epochs, else 1000 epochs."""
    return next(key for key in ((epochs, batch), (epochs, 4096), (1000, 4096)) if key in SCHEDULES)


def points(
    config: Any,
    schedule: Any,
    augmentation: Augmentation,
    byol: BYOL,
    optimizer: torch.optim.Optimizer,
    *,
    batch_norm_images: int,
    frozen: Sequence[str],
) -> list[Point]:
    """Every point of the paper for a run about to start: settings resolved, networks and optimizer as made.

    batch_norm_images: that a BatchNorm takes its statistics over in one forward pass, over all processes.
    """
    epochs, batch = nearest_schedule(config.epochs, schedule.global_batch)
    paper = SCHEDULES[epochs, batch]
    views = _views(augmentation, config.image_size, config.in_chans)
    worst = 2 * regression_loss(torch.ones(1, 2), -torch.ones(1, 2)).item()
    tau = "{:g} at first, {:g} halfway, {:g} at the end".format
    heads = mlp(2048, 4096, 256)
    return [
        Point("encoder", "resnet50", config.backbone),
        Point("images", "3 x 224 x 224", f"{config.in_chans} x {config.image_size} x {config.image_size}"),
        Point("cut from", "images as they are", _cut_from(config)),
        Point("start", "random", "given weights" if config.pretrained or ":" in config.backbone else "random"),
        Point("trained", "all", f"all but {', '.join(frozen)}" if frozen else "all"),
        Point("residual branches", "no BatchNorm at 0", f"{_norms_at_zero(byol.encoder) or 'no'} BatchNorm at 0"),
        Point("projector", _layers(heads), _layers(byol.projector)),
        Point("predictor", _layers(heads), _layers(byol.predictor)),
        Point("target at first", "a copy", "a copy" if _is_copy(byol) else "weights of its own"),
        Point("target in training", _TARGET_MODE, _target_mode(byol)),
        Point("BatchNorm", "over the whole batch", _share(batch_norm_images, schedule.global_batch)),
        Point("loss", "both directions, 0 to 8", f"both directions, 0 to {worst:g}"),
        Point(
            "tau",
            tau(*(target_decay(step, 2, paper.target_decay) for step in (0, 1, 2))),
            tau(*(schedule.target_decay(step) for step in (0, schedule.total_steps / 2, schedule.total_steps))),
        ),
        Point("optimizer", "LARS, momentum 0.9, eta 0.001", _optimizer(optimizer)),
        Point("weight decay", f"{paper.weight_decay:g}", f"{config.weight_decay:g}"),
        Point("without decay", "biases and norms", _without_decay(byol, optimizer)),
        Point("epochs", f"{epochs}", f"{config.epochs}"),
        Point("batch", f"{batch}", f"{schedule.global_batch}"),
        Point("learning rate", f"{paper.lr:g} per 256 images", f"{config.lr:g} per 256 images"),
        Point(
            "its schedule",
            "10 epochs of warm-up, cosine to 0",
            f"{config.warmup_epochs:g} epochs of warm-up, cosine to {schedule.lr(schedule.total_steps):g}",
        ),
        *(Point(name, text, views[name]) for name, text in _views(AUGMENTATIONS["paper"], 224, 3).items()),
    ]


def _cut_from(config: Any) -> str:
    if config.fast_jpeg:
        return "JPEG decoded smaller where crops are shrunk"
    side = config.decoded_side
    return f"images of at most {side} pixels' shorter side" if side else "images as they are"


def _norms_at_zero(encoder: nn.Module) -> int:
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm) and module.affine]
    return sum(not norm.weight.any() for norm in norms)


def _layers(head: nn.Sequential) -> str:
    return ", ".join(_layer(module) for module in head)


def _layer(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"Linear {module.out_features}" + (" without bias" if module.bias is None else "")
    return "BatchNorm" if isinstance(module, nn.BatchNorm1d) else type(module).__name__


def _is_copy(byol: BYOL) -> bool:
    pairs = ((byol.encoder, byol.target_encoder), (byol.projector, byol.target_projector))
    return all(
        torch.equal(p, q)
        for online, target in pairs
        for p, q in zip(online.parameters(), target.parameters(), strict=True)
    )


_TARGET_MODE = "BatchNorm by its own batches, nothing random"


def _target_mode(byol: BYOL) -> str:
    pairs = ((byol.encoder, byol.target_encoder), (byol.projector, byol.target_projector))
    # A frozen BatchNorm is in eval mode in both networks.
    kept = all(
        target.training == (online.training and isinstance(target, _BatchNorm))
        for networks in pairs
        for online, target in zip(*(network.modules() for network in networks), strict=True)
    )
    return _TARGET_MODE if kept else "otherwise"


def _share(images: int, batch: int) -> str:
    return "over the whole batch" if images == batch else f"over {images} of {batch} images"


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    settings = optimizer.param_groups[0]
    text = type(optimizer).__name__
    if "momentum" in settings:
        text += f", momentum {settings['momentum']:g}"
    return text + (f", eta {settings['eta']:g}" if isinstance(optimizer, LARS) else "")


def _without_decay(byol: BYOL, optimizer: torch.optim.Optimizer) -> str:
    if not any(group["weight_decay"] for group in optimizer.param_groups):
        return "everything"
    plain = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    others = [name for name, p in byol.named_parameters() if id(p) in plain and p.ndim > 1]
    missed = [name for name, p in byol.named_parameters() if p.requires_grad and p.ndim <= 1 and id(p) not in plain]
    text = "biases and norms" if not missed else "not all biases and norms"
    return text + "".join(f", {name}" for name in others)


def _views(augmentation: Augmentation, size: int, channels: int) -> dict[str, str]:
    """What makes the views of images of that side and that many channels, by operation."""
    a, omitted = augmentation, omitted_operations(augmentation, channels)
    jitters = zip(("brightness", "contrast", "saturation", "hue"), a.strengths, strict=True)
    kept = ", ".join(f"{name} {value:g}" for name, value in jitters if value and name not in omitted)
    (low, high), (narrow, wide), (weak, strong) = a.crop_scale, a.crop_ratio, a.blur_sigma
    return {
        "crop": f"area {low:g} to {high:g}, ratio {narrow:.2f} to {wide:.2f}, {a.interpolation}",
        "rotation": f"up to {a.rotate:g} degrees" if a.rotate else "none",
        "flip": f"{a.flip:g}",
        "colour jitter": f"{a.jitter:g}: {kept}" if a.jitter and kept else "none",
        "colour operations": f"as in the {a.colors}" if a.colors == "paper" else f"as in {a.colors}",
        "grayscale": "none" if "grayscale" in omitted else f"{a.grayscale:g}",
        "blur": f"{a.blur[0]:g} and {a.blur[1]:g}: sigma {weak:g} to {strong:g}, {blur_taps(size)} taps",
        "solarize": f"{a.solarize[0]:g} and {a.solarize[1]:g}",
    }
