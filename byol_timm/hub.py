"""Encoders in timm's own format: a folder that plain timm loads, with or without byol_timm, and the Hub."""

import json
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_input_data_config
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from .errors import ByolTimmError

PAPER = dict(
    paper_name="Bootstrap your own latent: A new approach to self-supervised Learning", paper_ids="arXiv:2006.07733"
)
# Facts about the weights that the architecture's default tag brings along and that are not true of new weights.
SOURCE_FACTS = ("origin_url", "notes", "label_names", "label_descriptions")
REDACTED = "[redacted]"
SECRET_KEY = re.compile(r"token|secret|password|(^|_)key(_|$)", re.IGNORECASE)
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}")


def save_encoder(
    encoder: nn.Module,
    folder: str | Path,
    *,
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    tag: str = "byol",
    license: str | None = None,
    card: str | None = None,
    record: dict[str, Any] | None = None,
    pictures: Sequence[str | Path] = (),
) -> Path:
    """The folder in timm's format that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads to the same bits.

    encoder: a timm model with `num_classes=0`, bare or wrapped by DistributedDataParallel or torch.compile.
    image_size: (H, W) or the side of a square; with mean, std, interpolation and crop_pct how images are prepared.
    card: text of README.md. record: what made the encoder, written to byol.json without secrets and without the
        folders of this machine. pictures: image files to copy along.

    Holds config.json, model.safetensors, README.md, byol.json. Replaces an earlier folder of the same kind in one
    rename. Raises `ByolTimmError` for a module that plain timm cannot build again.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ByolTimmError(f"{folder} exists and is no encoder folder. Choose another place for the encoder")
    encoder = unwrap_model(encoder)
    _check_is_timm(encoder)
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        _save_config(
            encoder,
            partial / "config.json",
            input_size=_height_and_width(image_size),
            preparation=dict(mean=tuple(mean), std=tuple(std), interpolation=interpolation, crop_pct=crop_pct),
            facts={"tag": tag, "license": license, **PAPER, **dict.fromkeys(SOURCE_FACTS)},
        )
        # Cloned and contiguous: safetensors refuses tied and channels_last weights.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.state_dict().items()}
        _check_rebuilds(partial, tensors)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if record is not None:
            text = json.dumps(redact(record), indent=2, ensure_ascii=False)
            (partial / "byol.json").write_text(text + "\n", encoding="utf-8")
        for picture in pictures:
            shutil.copy(picture, partial / Path(picture).name)
        _swap(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def redact(value: Any) -> Any:
    """`value` (JSON-like) without secrets and folders of this machine: neither tokens nor home or user names."""
    if isinstance(value, dict):
        return {k: REDACTED if SECRET_KEY.search(str(k)) and v else redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        if Path(value).is_absolute():
            value = f".../{Path(value).name}"
        value = SECRET_VALUE.sub(REDACTED, value)
        return re.sub(r"(/home|/Users)/[^/\s]+", "~", value.replace(str(Path.home()) + "/", "~/"))
    return value


def _check_is_timm(encoder: nn.Module) -> None:
    try:
        architecture, num_classes = encoder.pretrained_cfg["architecture"], encoder.num_classes  # type: ignore[index]
    except (AttributeError, KeyError, TypeError):
        raise ByolTimmError(
            f"{type(encoder).__name__} was not built by timm, so timm could not load it again. "
            "Build it with timm.create_model(name, num_classes=0), or save its weights with torch"
        ) from None
    if num_classes != 0:
        raise ByolTimmError(
            f"{architecture} has a classifier (num_classes={num_classes}). Call encoder.reset_classifier(0) first"
        )


def _save_config(
    encoder: nn.Module, path: Path, *, input_size: tuple[int, int], preparation: dict[str, Any], facts: dict[str, Any]
) -> None:
    channels = resolve_input_data_config(encoder, preparation)["input_size"][0]
    preparation = {"input_size": (channels, *input_size), **preparation}
    try:
        save_config_for_hf(encoder, str(path), model_config={"pretrained_cfg": facts}, data_config=preparation)
    except ValueError as error:
        raise ByolTimmError(f"the encoder cannot be described to timm. {error}") from error


def _check_rebuilds(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A stem or layer exchanged after `timm.create_model` would only be noticed by whoever loads the folder."""
    with torch.device("meta"):
        rebuilt = timm.create_model(f"local-dir:{folder}", pretrained=False).state_dict()
    for name in sorted(rebuilt.keys() | tensors.keys()):
        if name not in rebuilt or name not in tensors or rebuilt[name].shape != tensors[name].shape:
            raise ByolTimmError(
                f"timm would build another network than this encoder (they differ in {name}): it was changed after "
                "timm.create_model. Ask for the change by arguments of create_model, or save its weights with torch"
            )


def _swap(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old)


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
