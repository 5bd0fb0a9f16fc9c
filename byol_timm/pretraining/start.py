"""What a run starts from: a training state, or the checkpoint that it resumes."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..byol import BYOL
from ..config import ORDERS, Settings
from ..errors import ByolTimmError
from ..training import Checkpoint, Schedule, compare_config, load_checkpoint
from .resolve import resolve_backbone_kwargs

logger = logging.getLogger(__name__)

# Fields that may differ between a run and its continuation; all others decide the weights.
MAY_CHANGE = ORDERS | frozenset("batch_size save_every log_every knn_every on_collapse report_to license".split())
MAY_CHANGE |= frozenset("workers cache cache_dir on_bad_image".split())
# Fields that decide the shapes of projector and predictor.
HEADS = ("hidden_dim", "projection_dim", "num_head_layers")


def read_training_state(path: str) -> Checkpoint:
    """Return the networks of the checkpoint folder that --training_state names."""
    checkpoint = load_checkpoint(Path(path), {"byol"})
    config = checkpoint.state.get("config") if isinstance(checkpoint.state, dict) else None
    if "byol" not in checkpoint.tensors or not isinstance(config, dict) or not config.keys() >= {*HEADS, "backbone"}:
        raise ByolTimmError(f"{path} is not a training state of byol_timm. Check --training_state")
    return checkpoint


def start_from(checkpoint: Checkpoint, settings: Settings, byol: BYOL) -> None:
    """Copy the networks of a training state into `byol`, or raise `ByolTimmError` if they do not fit."""
    made_with, tensors = checkpoint.state["config"], checkpoint.tensors["byol"]
    name, heads = f"the training state {settings.training_state}", {key: made_with[key] for key in HEADS}
    asked = dataclasses.asdict(settings)
    compare_config(heads, asked, may_change=(), checkpoint=name, otherwise="Give another --training_state")
    shapes = {key: tensor.shape for key, tensor in byol.state_dict().items()}
    for key in sorted(shapes.keys() | tensors.keys()):
        if key not in tensors or tensors[key].shape != shapes.get(key):
            raise ByolTimmError(
                f"{name} was made with {made_with['backbone']} and does not fit {settings.backbone} with the arguments "
                f"of this run (they differ in {key}). Use the --backbone, --backbone_kwargs and --in_chans of that run"
            )
    byol.load_state_dict(tensors)
    logger.info("all networks start from %s, step %d", settings.training_state, checkpoint.step)


def compare_checkpoint(
    checkpoint: Checkpoint, settings: Settings, schedule: Schedule, data: Mapping[str, Any], *, batch_norm: bool
) -> None:
    """Raise `ByolTimmError` unless the run of these settings and images continues that of the checkpoint.

    batch_norm: True if the networks have BatchNorm, whose statistics change with the batch size.
    """
    state, name = checkpoint.state, f"checkpoint {checkpoint.path.name}"
    saved = dict(state["config"])
    if "auto" in saved["backbone_kwargs"]:
        # As byol_timm 0.1 saved it.
        before = dataclasses.replace(settings, backbone_kwargs=tuple(saved["backbone_kwargs"]))
        saved["backbone_kwargs"] = list(resolve_backbone_kwargs(before).backbone_kwargs)
    matters = {"batch_size": "BatchNorm statistics differ from those of an uninterrupted run"} if batch_norm else {}
    compare_config(saved, dataclasses.asdict(settings), may_change=MAY_CHANGE, matters=matters, checkpoint=name)
    if state["data"]["fingerprint"] != data["fingerprint"]:
        raise ByolTimmError(
            f"{name} was made with other images ({state['data']['images']:,} then, {data['images']:,} now). "
            "Use another --output_dir"
        )
    if state["global_batch"] != schedule.global_batch:
        raise ByolTimmError(
            f"{name} was made with a global batch of {state['global_batch']}, this launch has {schedule.global_batch}. "
            "Change --batch_size so that --batch_size x processes x accumulation is the same"
        )
