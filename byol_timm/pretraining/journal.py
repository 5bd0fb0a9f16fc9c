"""What a run writes and resumes from."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..byol import BYOL, HEALTH
from ..cli import read_config
from ..config import ORDERS, PretrainConfig
from ..data import BadImage, Batch, Images, Splits, Stream, StreamSplits
from ..encoders import create_encoder, has_batch_norm, normalization, save_encoder
from ..errors import ByolTimmError, redact
from ..evaluation import NEIGHBOURS, Examples, LinearProbe, Preparation
from ..files import write_json
from ..report import save_curves, save_report, save_views
from ..training import (
    Checkpoint,
    Processes,
    Schedule,
    compare_config,
    load_checkpoint,
    load_latest,
    read_metrics,
    restore_optimizer,
)
from ..views import TwoViews, crop_pct
from .plan import _open_stream, open_images, resolve_backbone_kwargs
from .summary import closing

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation; everything else decides what the weights become.
MAY_CHANGE = frozenset(
    "batch_size output_dir save_every log_every knn_every resume overwrite max_time on_collapse report_to "
    "push_to_hub public license dry_run debug workers memory_limit decoded_cache "
    "on_bad_image".split()
)
# What decides the shapes of projector and predictor.
HEADS = ("hidden_dim", "projection_dim", "num_head_layers")
# In the folder of a run: the images that others stood in for, each with the reason.
BAD_IMAGES = "bad_images.txt"


def redraw(folder: str | Path, *, method: Literal["pca", "tsne"] = "tsne") -> None:
    """`embedding.png`, `neighbours.png` and `confusion.png` of a finished run again, the map by that method.

    Raises `ByolTimmError` for a folder without config.yaml or encoder, and images that are no longer there.
    """
    folder = Path(folder)
    settings: Any = read_config(PretrainConfig, folder / "config.yaml", ignore=ORDERS)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    encoder = create_encoder(f"local-dir:{folder}/encoder").to(memory_format=layout)
    mean, std = normalization(encoder, settings.in_chans)
    splits = _open_stream(settings) if settings.streaming else open_images(settings)
    preparation = evaluation_preparation(settings, mean, std)
    examples = Examples.load(splits.bank, splits.test, preparation, seed=settings.split_seed)
    examples.save_pictures(encoder, folder, method=method)


def evaluation_preparation(settings: Any, mean: Sequence[float], std: Sequence[float]) -> Preparation:
    """Return how images are prepared for evaluation during the run."""
    layout = dict(channels_last=settings.channels_last, workers=settings.workers)
    return Preparation.square(settings.image_size, mean, std, **layout)


def _training_state(config: PretrainConfig) -> Checkpoint | None:
    """Return the networks to start from, of a checkpoint folder."""
    if config.training_state is None:
        return None
    checkpoint = load_checkpoint(Path(config.training_state), {"byol"})
    settings = checkpoint.state.get("config") if isinstance(checkpoint.state, dict) else None
    if (
        "byol" not in checkpoint.tensors
        or not isinstance(settings, dict)
        or not settings.keys() >= {*HEADS, "backbone"}
    ):
        raise ByolTimmError(f"{config.training_state} is no training state of byol_timm. Check --training_state")
    return checkpoint


def _start_from(checkpoint: Checkpoint, config: Any, byol: BYOL) -> None:
    made_with, tensors = checkpoint.state["config"], checkpoint.tensors["byol"]
    name, asked = f"the training state {config.training_state}", dataclasses.asdict(config)
    heads = {key: made_with[key] for key in HEADS}
    compare_config(heads, asked, may_change=(), checkpoint=name, otherwise="Give another --training_state")
    shapes = {key: tensor.shape for key, tensor in byol.state_dict().items()}
    for key in sorted(shapes.keys() | tensors.keys()):
        if key not in tensors or tensors[key].shape != shapes.get(key):
            raise ByolTimmError(
                f"{name} is of {made_with['backbone']} and does not fit {config.backbone} as it was asked for (they "
                f"differ in {key}). Give the --backbone, --backbone_kwargs and --in_chans that it was made with"
            )
    byol.load_state_dict(tensors)
    logger.info("all networks start from %s, step %d", config.training_state, checkpoint.step)


def _resume(
    config: Any,
    schedule: Schedule,
    data: dict[str, Any],
    folder: Path,
    byol: BYOL,
    optimizer: torch.optim.Optimizer,
    probe: LinearProbe | None,
) -> tuple[int, dict[str, Any]]:
    """The step and the state to go on from; networks and optimizers are put back. Step 0 where nothing was saved."""
    checkpoint = load_latest(folder / "checkpoints")
    if checkpoint is None:
        if (folder / "encoder").exists():
            raise ByolTimmError(
                f"{folder} has an encoder and no checkpoint to go on from. Discard both with --overwrite, or choose "
                "another --output_dir"
            )
        return 0, {}
    for reason in checkpoint.skipped:
        logger.warning("a damaged checkpoint is passed over: %s", reason)
    state, name = checkpoint.state, f"checkpoint {checkpoint.path.name}"
    if "auto" in state["config"]["backbone_kwargs"]:
        # A checkpoint without what it stood for.
        before = dataclasses.replace(config, backbone_kwargs=tuple(state["config"]["backbone_kwargs"]))
        state["config"]["backbone_kwargs"] = list(resolve_backbone_kwargs(before).backbone_kwargs)
    matters = {"batch_size": "BatchNorm statistics differ from the interrupted run's"} if has_batch_norm(byol) else {}
    compare_config(state["config"], dataclasses.asdict(config), may_change=MAY_CHANGE, matters=matters, checkpoint=name)
    if state["data"]["fingerprint"] != data["fingerprint"]:
        raise ByolTimmError(
            f"{name} was made of other images ({state['data']['images']:,} then, {data['images']:,} now). "
            "Use another --output_dir"
        )
    if state["global_batch"] != schedule.global_batch:
        raise ByolTimmError(
            f"{name} was made with a global batch of {state['global_batch']}, this launch has {schedule.global_batch}. "
            "Change --batch_size so that it times processes and accumulation gives the same"
        )
    byol.load_state_dict(checkpoint.tensors["byol"])
    restore_optimizer(optimizer, checkpoint.tensors["optimizer"])
    if probe is not None:
        probe.restore(checkpoint.tensors["probe"])
    logger.info("resumed from %s", checkpoint.path)
    return checkpoint.step, state


def _not_finite(
    folder: Path,
    step: int,
    lr: float,
    figures: dict[str, Tensor],
    batches: list[Batch],
    images: Stream | Images,
    processes: Processes,
) -> ByolTimmError:
    """The error for a gradient that is not finite, with what is known about it in `debug/step-N.json`."""
    loss, norm = figures["loss"].item(), figures["grad_norm"].item()
    seen: list[Any] = [ordinal for batch in batches for ordinal in batch.ordinals.tolist()]
    if isinstance(images, Images):
        # Those of a stream have no place of their own in an epoch.
        seen = [images.describe(ordinal % len(images)) for ordinal in seen]
    seen = [name for names in processes.gather(seen) for name in names]
    if processes.is_main:
        facts = {"step": step, "lr": lr, "loss": loss, "grad_norm": norm, "images": seen}
        (folder / "debug").mkdir(exist_ok=True)
        write_json(folder / "debug" / f"step-{step}.json", {name: _number(value) for name, value in facts.items()})
    return ByolTimmError(
        f"loss or gradient is not finite at step {step} (loss {loss:g}, gradient norm {norm:g}, lr {lr:g}). Lower --lr "
        f"and start anew; see {folder / 'debug' / f'step-{step}.json'}. Checkpoints hold the last good step"
    )


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _save_example_views(images: Images, views: TwoViews, path: Path) -> None:
    examples: list[Tensor] = []
    for index in range(len(images)):
        with contextlib.suppress(BadImage):
            examples.append(images.decode(index * 7919 % len(images)))
        if len(examples) == 8:
            break
    ordinals = torch.arange(len(examples))
    crops = torch.stack([views.cut(image, ordinal) for ordinal, image in enumerate(examples)])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (views.mean, views.std))
    view1, view2 = ((view * std + mean).clamp(0, 1) for view in views.finish(crops, ordinals))
    save_views(examples, view1, view2, path)


def _finish(
    config: Any,
    folder: Path,
    encoder: nn.Module,
    record: dict[str, Any],
    held_out: Examples | None,
    splits: Splits | StreamSplits,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write the encoder, results.json and the pictures, and say what came out.

    Figures that a user has deleted with metrics.jsonl are left out.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    record["health"] = {name: trained[-1][name] for name in (*HEALTH, "effective_rank")} if trained else {}
    baselines = {}
    if held_out is not None:
        accuracies = {row["step"]: row["knn"] for row in rows if "knn" in row}
        baselines = {"raw pixels": held_out.knn_of_pixels()}
        if 0 in accuracies:
            baselines["before training"] = accuracies[0]
        record["results"] = {
            "knn_raw_pixels": 100 * baselines["raw pixels"],
            **({"knn_random": 100 * accuracies[0]} if 0 in accuracies else {}),
            "knn_byol": 100 * accuracies[record["steps"]],
            "k": NEIGHBOURS,
            "protocol": held_out.protocol,
        }
        linear = [row["linear"] for row in rows if "linear" in row]
        if linear:
            record["results"]["linear_byol"] = 100 * linear[-1]
    preparation = evaluation_preparation(config, mean, std)
    examples = held_out or Examples.load(splits.bank, splits.test, preparation, seed=config.split_seed)
    examples.save_pictures(encoder, folder)
    save_curves(rows, folder / "curves.png", baselines=baselines)
    save_encoder(
        encoder,
        folder / "encoder",
        image_size=config.image_size,
        mean=mean,
        std=std,
        crop_pct=crop_pct(config.image_size),
        license=config.license,
        record=record,
        pictures=[folder / "curves.png", folder / "embedding.png"],
    )
    write_json(folder / "results.json", redact(record))
    save_report(folder)
    for line in closing(config, folder, record):
        logger.info(line)
