"""Save encoders as folders in timm's format."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_input_config
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..errors import ByolTimmError, one_line, redact
from .card import PICTURES, is_ours, merge_cards, model_card, own_text, read_card
from .check import CONFIG, RECORD, WEIGHTS, build_on_meta, read_config, read_record, shapes

CARD = "README.md"
PAPER = dict(
    paper_name="Bootstrap your own latent: A new approach to self-supervised Learning", paper_ids="arXiv:2006.07733"
)
# Facts of the architecture's default tag that are not true of new weights.
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
    """Save a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads bit for bit; return its path.

    encoder: a timm model with `num_classes=0`, bare or wrapped by DistributedDataParallel or torch.compile.
    image_size: (height, width), or one number for squares. mean, std, interpolation, crop_pct: how images are prepared.
    card: text of README.md; None: `model_card` of the record. record: what made the encoder, for byol.json, without
        secrets and paths of this machine. pictures: files to copy, `curves.png` and `embedding.png`.

    Writes config.json, model.safetensors, README.md and byol.json. Replaces an earlier encoder in one rename and keeps
    the user's own text in README.md. Raises `ByolTimmError` for a module that plain timm cannot build again.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ByolTimmError(f"{folder} exists and is not an encoder folder. Move it or choose another place")
    encoder = unwrap_model(encoder)
    _check_is_timm(encoder)
    with _replacing(folder) as new:
        preparation = dict(mean=tuple(mean), std=tuple(std), interpolation=interpolation, crop_pct=crop_pct)
        facts = {"tag": tag, "license": license, **PAPER, **dict.fromkeys(SOURCE_FACTS)}
        _save_config(encoder, new / CONFIG, image_size, preparation, facts)
        # Cloned and contiguous: safetensors refuses tied and channels_last weights.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.state_dict().items()}
        _check_rebuilds(new, tensors)
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        # safetensors lets nobody else read its file, whatever the umask allows.
        shutil.copymode(new / CONFIG, new / WEIGHTS)
        (new / RECORD).write_text(as_json(redact(dict(record or {}))), encoding="utf-8")
        for picture in map(Path, pictures):
            shutil.copyfile(picture, new / picture.name)
        if card is None:
            card = encoder_card(new, license=license, local=read_text(folder / CARD))
        (new / CARD).write_text(card, encoding="utf-8")
    return folder


def encoder_card(
    folder: Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    pictures: Iterable[str] | None = None,
    local: str | None,
    remote: str | None = None,
) -> str:
    """Return our card of the encoder in `folder`, with the user's text around it: that on the Hub, else the local one.

    pictures: names of those to show; None: those in the folder. A card that the user wrote as a whole stays.
    """
    if local is not None and not is_ours(local):
        return local
    base = local if remote is None or (local and own_text(local) and not own_text(remote)) else remote
    config = read_config(folder)
    stated = read_card(base).data.get("license") if base is not None else None
    shown = [name for name in PICTURES if (name in pictures if pictures is not None else (folder / name).is_file())]
    ours = model_card(
        read_record(folder),
        config=config,
        repo_id=repo_id,
        license=license or stated or config["pretrained_cfg"].get("license"),
        pictures=shown,
    )
    return ours if base is None else merge_cards(base, ours)


def read_text(path: Path) -> str | None:
    """Return the text of a file, or None if there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ByolTimmError(f"{path} is not UTF-8 text ({one_line(error)}). Fix or remove it") from error


def as_json(value: Any) -> str:
    """Return JSON that people can read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `folder` at the end, and is deleted after an error."""
    new, old = (folder.with_name(f".tmp-{what}-{folder.name}") for what in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # a kill came between the two renames
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
    encoder: nn.Module,
    path: Path,
    image_size: int | tuple[int, int],
    preparation: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    try:
        facts_of_input = get_model_input_config(encoder)
        channels, *own_size = facts_of_input["input_size"]
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        # A network of one size rescales all images by itself (CrossViT), and timm lets no other size describe it.
        size = own_size if facts_of_input["fixed_input_size"] else size
        preparation = {"input_size": (channels, *size), **preparation}
        save_config_for_hf(encoder, str(path), model_config={"pretrained_cfg": facts}, data_config=preparation)
    except ValueError as error:
        raise ByolTimmError(f"the encoder cannot be described to timm. {error}") from error


def _check_rebuilds(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse a network whose stem or layers were exchanged after `timm.create_model`: nobody could load the folder."""
    rebuilt, own = shapes(build_on_meta(folder)), {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(rebuilt.keys() | own.keys()):
        if rebuilt.get(name) != own.get(name):
            raise ByolTimmError(
                f"timm would build another network than this encoder (they differ in {name}): it was changed after "
                "timm.create_model. Ask for the change by arguments of create_model, or save its weights with torch"
            )
