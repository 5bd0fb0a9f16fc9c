"""The dry run: a few steps of a copy, and what the run will take."""

import contextlib
import copy
import logging
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..byol import BYOL
from ..cli import counted
from ..data import Images, Splits, StreamSplits, copied_ahead
from ..errors import ByolTimmError
from ..training import (
    DeviceViews,
    Processes,
    Schedule,
    _create_optimizer,
    _lay_out,
    _open_batches,
    _read,
    prepare,
    train_step,
)
from ..views import TwoViews
from .fidelity import ALWAYS, Point, nearest_schedule, points
from .journal import _save_example_views
from .summary import _duration, _millions

logger = logging.getLogger(__name__)

# A dry run measures up to so many steps after the first, or five seconds of them.
REHEARSED_STEPS, REHEARSAL_SECONDS = 10, 5


def _rehearse(
    config: Any,
    schedule: Schedule,
    splits: Splits | StreamSplits,
    views: TwoViews,
    byol: BYOL,
    optimizer: torch.optim.Optimizer,
    frozen: Sequence[str],
    processes: Processes,
) -> None:
    """Say what of the paper the run keeps, and what it takes, by a few steps with a copy of the networks."""
    accelerator = processes.accelerator
    # On GPUs, BatchNorm sees what all processes have.
    sharing = accelerator.num_processes if accelerator.device.type == "cuda" else 1
    compared = points(
        config,
        schedule,
        views.augmentation,
        byol,
        optimizer,
        batch_norm_images=config.batch_size * sharing,
        frozen=frozen,
    )
    copied = copy.deepcopy(byol)
    _lay_out(copied, config, accelerator)
    model, optimizer = prepare(accelerator, copied, _create_optimizer(config, copied, schedule.peak_lr))
    two_views = DeviceViews(views, accelerator.device, config.channels_last)
    seconds: list[float] = []
    count = 1
    with contextlib.closing(_open_batches(config, schedule, splits, views, accelerator, 0)) as batches:
        stream = copied_ahead(iter(batches), accelerator.device)
        while len(seconds) < count:
            start = time.perf_counter()
            micro_batches, failure = _read(stream, accelerator.gradient_accumulation_steps)
            processes.raise_first(failure)
            pairs = map(two_views, micro_batches)
            figures = train_step(
                accelerator, model, optimizer, pairs, target_decay=1.0, recomputes=config.grad_checkpointing
            )
            # Waits for the device.
            figures["loss"].item()
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                count = processes.on_main(lambda: 1 + min(REHEARSED_STEPS, int(REHEARSAL_SECONDS / seconds[0])))
    for line in [*paper_lines(compared, schedule, config.epochs), "", *rehearsal(schedule, byol, accelerator, seconds)]:
        logger.info(line)


def _rehearsed_views(folder: Path, images: Images, views: TwoViews) -> Path:
    """Where the views are: beside the folder of the run, which stays free for it, or as it is."""
    rehearsed = Path(f"{folder if folder.name else folder.absolute()}-dry_run")
    try:
        rehearsed.mkdir(parents=True, exist_ok=True)
        _save_example_views(images, views, rehearsed / "views.png")
    except OSError as error:
        raise ByolTimmError(f"cannot write to {rehearsed} ({error.strerror}). Choose another --output_dir") from error
    return rehearsed / "views.png"


def rehearsal(schedule: Any, byol: BYOL, accelerator: Accelerator, seconds: Sequence[float]) -> list[str]:
    """Lines that say what a run takes, by steps that were just made; seconds: that each of them took."""
    online = [parameter for parameter in byol.parameters() if parameter.requires_grad]
    # The first step prepares what later ones find ready.
    step = statistics.median(seconds[1:] or seconds)
    measured = f"measured over {counted(len(seconds), 'step')}"
    lines = [
        (
            "parameters",
            f"{sum(p.numel() for p in online) / 1e6:.1f} M trained, {_millions(byol)} with the target network",
        ),
        ("speed", f"{schedule.global_batch / step:,.0f} images/s, {step:.3g} s a step, {measured}"),
        (
            "time",
            f"{_duration(step * schedule.total_steps)} for {counted(schedule.total_steps, 'step')}; "
            "evaluation comes on top",
        ),
        ("memory", f"{peak_memory(accelerator.device)}, measured"),
    ]
    return [f"  {name:<10} {text}" for name, text in lines]


def paper_lines(points: Sequence[Point], schedule: Any, epochs: int) -> list[str]:
    """Every point of the paper: kept, or what the run has in its place."""
    compared, batch = nearest_schedule(epochs, schedule.global_batch)
    width = max(len(point.name) for point in points)
    lines = ["", f"beside the paper's ResNet-50 ({compared} epochs, batch {batch})"]
    for point in points:
        verdict = "same   " if point.same else "changed"
        lines.append(
            f"  {verdict}  {point.name:<{width}}  {point.here}" + f" (paper: {point.paper})" * (not point.same)
        )
    return [*lines, f"  always   {ALWAYS}"]


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has had on its device so far."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        return (
            f"{torch.cuda.max_memory_reserved(device) / 2**30:.1f} GB of the GPU's {whole / 2**30:.0f} GB at its peak"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.1f} GB at this process's peak"
