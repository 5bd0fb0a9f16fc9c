"""Check the folder of an encoder of any origin before timm builds a network from it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models._pretrained import PretrainedCfg
from torch import nn

from ..errors import ByolTimmError, one_line

CONFIG, WEIGHTS, RECORD = "config.json", "model.safetensors", "byol.json"
# Keys that make timm read weights from elsewhere, or in another file format.
FOREIGN_SOURCES = ("file", "state_dict", "hf_hub_filename")
# Arguments of timm's factory, not of a network.
FACTORY_ARGUMENTS = re.compile(r"pretrained.*|checkpoint_path|cache_dir|features_only|feature_cfg|model_.*|pruned")


def check_encoder_folder(folder: str | Path) -> dict[str, Any]:
    """Return the config of an encoder folder after checking that timm can be trusted with it.

    Requires a known architecture, only arguments of a network, no other source of weights, and a safetensors file
    that has every tensor of the network, in its shape and finite. Raises `ByolTimmError` otherwise.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ByolTimmError(f"{folder} has no {WEIGHTS}. Convert weights in other formats with recipes/convert.py")
    try:
        wanted = shapes(build_on_meta(folder))
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ByolTimmError(f"{folder / CONFIG} does not describe a network of timm ({one_line(error)})") from error
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            names = set(weights.keys())
            for name, shape in wanted.items():
                if name not in names:
                    raise ByolTimmError(f"{folder / WEIGHTS} lacks {name} of {config['architecture']}")
                stored = weights.get_tensor(name)
                if stored.shape != shape:
                    both = f"{tuple(stored.shape)}, {config['architecture']} has {tuple(shape)}"
                    raise ByolTimmError(f"{folder / WEIGHTS} has {name} in another shape ({both})")
                if stored.is_floating_point() and not stored.isfinite().all():
                    raise ByolTimmError(f"{folder / WEIGHTS} has weights that are not finite ({name})")
    except (SafetensorError, OSError) as error:
        raise ByolTimmError(f"{folder / WEIGHTS} is damaged ({one_line(error)}). Fetch or save it again") from error
    return config


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return how the encoder of a folder was trained, from its byol.json; empty if it has no such file."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ByolTimmError(f"{path} is not JSON ({one_line(error)}). Delete it, or save the encoder again") from error
    if not isinstance(record, dict):
        raise ByolTimmError(f"{path} is not a JSON object. Delete it, or save the encoder again")
    return record


def input_channels(config: dict[str, Any]) -> int:
    """Return the channels of the images that a checked encoder was trained on."""
    return (config["pretrained_cfg"].get("input_size") or (3,))[0]


def build_on_meta(folder: str | Path, num_classes: int | None = None) -> nn.Module:
    """Build the network of an encoder folder without its weights."""
    with torch.device("meta"):
        return timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=num_classes)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of each tensor of a network, by name."""
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of an encoder folder in timm's current layout, after checking its keys and types."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ByolTimmError(f"{path} cannot be read ({error.strerror}). Is it an encoder folder?") from error
    except ValueError as error:
        raise ByolTimmError(f"{path} is not JSON ({one_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ByolTimmError(f"{path} does not name an architecture: not a timm model")
    if "pretrained_cfg" not in config:
        flat = {key: value for key, value in config.items() if key not in ("architecture", "num_features")}
        config = {"architecture": config["architecture"], "pretrained_cfg": flat}
    architecture, facts, arguments = config["architecture"], config["pretrained_cfg"], config.get("model_args", {})
    if not timm.is_model(architecture):
        raise ByolTimmError(f"{path}: timm {timm.__version__} has no architecture {architecture!r}. Update timm?")
    if not isinstance(facts, dict) or not isinstance(arguments, dict):
        raise ByolTimmError(f"{path}: pretrained_cfg and model_args must be objects")
    _check_facts(path, facts)
    for key, value in arguments.items():
        if FACTORY_ARGUMENTS.fullmatch(key) or not _is_plain(value):
            raise ByolTimmError(f"{path}: {key!r} in model_args is not an argument of a network")
    return config


def _check_facts(path: Path, facts: dict[str, Any]) -> None:
    unknown = facts.keys() - {field.name for field in dataclasses.fields(PretrainedCfg)} - {"labels"}
    if unknown:
        raise ByolTimmError(f"{path}: pretrained_cfg has the unknown key {min(unknown)!r}")
    for key in FOREIGN_SOURCES:
        if facts.get(key):
            raise ByolTimmError(f"{path}: pretrained_cfg.{key} names another source of weights. Remove it")
    if facts.get("custom_load") not in (None, False, True):
        raise ByolTimmError(f"{path}: pretrained_cfg.custom_load asks for another file format. Remove it")
    size = facts.get("input_size")
    if size is not None and not (_are_numbers(size, int) and len(size) == 3 and min(size) > 0):
        raise ByolTimmError(f"{path}: input_size must be three positive numbers ({size!r})")
    for key in ("mean", "std"):
        if facts.get(key) is not None and not _are_numbers(facts[key], int | float):
            raise ByolTimmError(f"{path}: {key} must be numbers ({facts[key]!r})")


def _are_numbers(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)
