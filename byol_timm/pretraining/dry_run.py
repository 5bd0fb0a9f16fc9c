"""A dry run: a few steps, what the run will take, and how it differs from the paper's."""

import copy
import dataclasses
import functools
import logging
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cli import counted, presets, read_config
from ..config import PretrainConfig, Settings
from ..encoders import fit_backbone
from ..errors import ByolTimmError
from .launch import Run
from .learner import Learner
from .plan import Plan
from .reading import StepReader
from .resolve import AUGMENTATION_FLAGS, resolve_augmentation, resolve_images, resolve_training
from .results import save_example_views
from .start import MAY_CHANGE
from .summary import DATA, millions

logger = logging.getLogger(__name__)

# A dry run measures up to so many steps after the first, or five seconds of them.
REHEARSED_STEPS, REHEARSAL_SECONDS = 10, 5
# The authors' run, and the number of their training images and of batches of 64 in one of 4096.
PAPER, PAPER_IMAGES, PAPER_FORWARDS = "imagenet_1000", 1_281_167, 64
# Fields that do not change what is learned, or choose the images.
NOT_COMPARED = MAY_CHANGE | {*DATA, *AUGMENTATION_FLAGS}
NOT_COMPARED |= frozenset("dataset num_images streaming shuffle_buffer seed split_seed compile channels_last".split())
NOT_COMPARED |= frozenset("grad_checkpointing triton_views cuda_graph sync_batch_norm deterministic".split())


def rehearse(plan: Plan, run: Run) -> nn.Module:
    """Train a few steps, log what the run will take and how it differs from the paper; return the untrained encoder."""
    untrained = copy.deepcopy(plan.encoder)
    picture = run.processes.on_main(lambda: _save_views(plan, run.folder))
    seconds = _measure(plan, run)
    for line in [*_paper_lines(plan), "", *_cost_lines(plan, run, seconds)]:
        logger.info(line)
    logger.info("\nDry run finished. Nothing was saved except %s", picture)
    if plan.settings.cache == "disk":
        logger.info("The dry run decoded images itself; the run will read them from --cache_dir")
    return untrained.eval()


def compared(settings: Settings, global_batch: int) -> dict[str, tuple[Any, Any]]:
    """Return the value of each setting that changes what is learned, here and in the authors' preset."""
    paper = _paper()
    return {name: (value, paper[name]) for name, value in _values(settings, global_batch).items()}


@functools.cache
def _paper() -> dict[str, Any]:
    config = resolve_images(read_config(PretrainConfig, presets()[PAPER]), 224)
    encoder = fit_backbone(config.backbone, image_size=config.image_size, in_chans=config.in_chans).encoder
    settings = resolve_training(config, encoder, PAPER_IMAGES, PAPER_FORWARDS)
    return _values(settings, settings.batch_size * PAPER_FORWARDS)


def _values(settings: Settings, global_batch: int) -> dict[str, Any]:
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_COMPARED}
    return {**values, "global_batch": global_batch, **dataclasses.asdict(resolve_augmentation(settings))}


def _paper_lines(plan: Plan) -> list[str]:
    """Return a line for each setting: the same as in the authors' preset, or changed."""
    values = compared(plan.settings, plan.schedule.global_batch)
    width = max(map(len, values))
    lines = ["", f"compared with the paper's run (preset {PAPER})"]
    for name, (here, paper) in values.items():
        verdict, note = ("same   ", "") if here == paper else ("changed", f" (paper: {_shown(paper)})")
        lines.append(f"  {verdict}  {name:<{width}}  {_shown(here)}{note}")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def _save_views(plan: Plan, folder: Path) -> Path:
    """Save example views next to the run folder, which stays free for the run."""
    rehearsed = Path(f"{folder if folder.name else folder.absolute()}-dry_run")
    try:
        rehearsed.mkdir(parents=True, exist_ok=True)
        save_example_views(plan, rehearsed / "views.png")
    except OSError as error:
        raise ByolTimmError(f"cannot write to {rehearsed} ({error.strerror}). Choose another --output_dir") from error
    return rehearsed / "views.png"


def _measure(plan: Plan, run: Run) -> list[float]:
    """Return the seconds of each of a few steps."""
    learner, count = Learner(plan, run), 1
    seconds: list[float] = []
    with StepReader(plan, run, caches=False) as reader:
        while len(seconds) < count:
            start = time.perf_counter()
            batches, failure = reader.read(0)
            run.processes.raise_first(failure)
            # `item` waits for the device.
            learner.step(len(seconds) % plan.schedule.total_steps, batches)["loss"].item()
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                slowest = max(run.processes.gather(seconds[0]))
                count = 1 + min(REHEARSED_STEPS, int(REHEARSAL_SECONDS / slowest))
    return seconds


def _cost_lines(plan: Plan, run: Run, seconds: Sequence[float]) -> list[str]:
    """Return lines about parameters, speed, time and memory."""
    online = [parameter for parameter in plan.byol.parameters() if parameter.requires_grad]
    # The first step prepares what later ones reuse.
    step, schedule = statistics.median(seconds[1:] or seconds), plan.schedule
    trained = f"{sum(p.numel() for p in online) / 1e6:.1f} M trained"
    measured = f"measured over {counted(len(seconds), 'step')}"
    total = counted(schedule.total_steps, "step")
    lines = {
        "parameters": f"{trained}, {millions(plan.byol)} with the target network",
        "speed": f"{schedule.global_batch / step:,.0f} images/s, {step:.3g} s per step, {measured}",
        "time": f"{_duration(step * schedule.total_steps)} for {total}, plus evaluation",
        "memory": f"{_peak_memory(run.accelerator.device)}, measured",
    }
    return [f"  {name:<10} {text}" for name, text in lines.items()]


def _peak_memory(device: torch.device) -> str:
    """Return the peak memory of this process on its device."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        return f"peak of {torch.cuda.max_memory_reserved(device) / 2**30:.1f} GB of the GPU's {whole / 2**30:.0f} GB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"peak of {peak / 2**30:.1f} GB in this process"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"about {hours:,} h {minutes} min"
    return f"about {minutes} min" if minutes else f"about {seconds:.0f} s"
