"""Encoder folders in timm's format."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_input_config
from timm.utils import unwrap_model
from torch import nn

from ..errors import ByolTimmError, one_line, redact
from .card import CARD_START, card_metadata, merge_cards, model_card, own_text
from .check import CONFIG, RECORD, WEIGHTS, build_on_meta, read_config, read_record, shapes

CARD = "README.md"
PICTURES = ("curves.png", "embedding.png")
PAPER = dict(
    paper_name="Bootstrap your own latent: A new approach to self-supervised Learning", paper_ids="arXiv:2006.07733"
)
# Facts that the architecture's default tag brings along and that are not true of new weights.
SOURCE_FACTS = ("origin_url", "notes", "label_names", "label_descriptions")


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
    record: Mapping[str, Any] | None = None,
    pictures: Iterable[str | Path] = (),
) -> Path:
    """The folder in timm's format that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads to the same bits.

    encoder: a timm model with `num_classes=0`, bare or wrapped by DistributedDataParallel or torch.compile.
    image_size: (H, W) or the side of a square, where the network takes more than one; with mean, std, interpolation and
        crop_pct how images are prepared.
    card: text of README.md; None: `model_card` of the record. record: what made the encoder, for byol.json; secrets
        and folders of this machine are taken out. pictures: files to copy along, `curves.png` and `embedding.png`.

    Holds config.json, model.safetensors, README.md, byol.json. Replaces an earlier folder of the same kind in one
    rename, where the user's own text in README.md stays. Raises `ByolTimmError` for a module that plain timm cannot
    build again.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ByolTimmError(f"{folder} exists and is no encoder folder. Move it away or choose another place")
    encoder = unwrap_model(encoder)
    _check_is_timm(encoder)
    partial, replaced = (folder.with_name(f".tmp-{what}-{folder.name}") for what in ("new", "old"))
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)  # a kill came between the two renames
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        preparation = dict(mean=tuple(mean), std=tuple(std), interpolation=interpolation, crop_pct=crop_pct)
        facts = {"tag": tag, "license": license, **PAPER, **dict.fromkeys(SOURCE_FACTS)}
        _save_config(encoder, partial / CONFIG, _height_and_width(image_size), preparation, facts)
        # Cloned and contiguous: safetensors refuses tied and channels_last weights.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.state_dict().items()}
        _check_rebuilds(partial, tensors)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / RECORD).write_text(_json(redact(dict(record or {}))), encoding="utf-8")
        for picture in pictures:
            shutil.copy(picture, partial / Path(picture).name)
        if card is None:
            shown = [name for name in PICTURES if (partial / name).is_file()]
            local = _text_of(folder / CARD)
            card = _card(partial, shown, repo_id=None, license=license, local=local, remote=None)
        (partial / CARD).write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


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
    encoder: nn.Module, path: Path, input_size: tuple[int, int], preparation: dict[str, Any], facts: dict[str, Any]
) -> None:
    try:
        facts_of_input = get_model_input_config(encoder)
        channels, *own_size = facts_of_input["input_size"]
        # A network of one size brings all others to it by itself (CrossViT), and timm lets it be described by no other.
        size = own_size if facts_of_input["fixed_input_size"] else input_size
        preparation = {"input_size": (channels, *size), **preparation}
        save_config_for_hf(encoder, str(path), model_config={"pretrained_cfg": facts}, data_config=preparation)
    except ValueError as error:
        raise ByolTimmError(f"the encoder cannot be described to timm. {error}") from error


def _check_rebuilds(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A stem or layer exchanged after `timm.create_model` would only be noticed by whoever loads the folder."""
    rebuilt = shapes(build_on_meta(folder))
    own = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(rebuilt.keys() | own.keys()):
        if rebuilt.get(name) != own.get(name):
            raise ByolTimmError(
                f"timm would build another network than this encoder (they differ in {name}): it was changed after "
                "timm.create_model. Ask for the change by arguments of create_model, or save its weights with torch"
            )


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def _card(
    folder: Path,
    pictures: Sequence[str],
    *,
    repo_id: str | None,
    license: str | None,
    local: str | None,
    remote: str | None,
) -> str:
    """Our card of the encoder in `folder`, around it the user's text: that on the Hub, else that in the folder."""
    if local is not None and CARD_START not in local:
        return local  # written by the user as a whole
    base = local if remote is None or (local and own_text(local) and not own_text(remote)) else remote
    config = read_config(folder)
    record = read_record(folder)
    stated = card_metadata(base)[0].get("license") if base is not None else None
    license = license or stated or config["pretrained_cfg"].get("license")
    ours = model_card(record, config=config, repo_id=repo_id, license=license, pictures=pictures)
    return ours if base is None else merge_cards(base, ours)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ByolTimmError(f"{path} is not UTF-8 text ({one_line(error)}). Mend or remove it") from error


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ByolTimmError(f"{path} is not JSON ({one_line(error)}). Remove it, or save the encoder again") from error


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
