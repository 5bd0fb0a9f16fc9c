"""Layouts of other BYOL projects' checkpoints, for convert.py: read their online encoders without running any code."""

import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import timm
import torch
from convert_haiku import NOTE, ExperimentState, haiku_encoder, read_arrays
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from byol_timm.encoders import create_encoder, save_encoder
from byol_timm.errors import ByolTimmError, one_line

logger = logging.getLogger(__name__)

Source = Literal["haiku", "lightly", "solo-learn", "mmpretrain", "byol-pytorch", "moco-v3", "torchvision"]


class Layout(NamedTuple):
    """Prefixes of a project's online encoder, and of the keys that identify the project: mostly its target's."""

    online: tuple[str, ...]
    known_by: tuple[str, ...]


LAYOUTS = {
    "lightly": Layout(("backbone.",), ("teacher_backbone.", "backbone_momentum.")),
    "solo-learn": Layout(("backbone.", "encoder."), ("momentum_projector.",)),
    "mmpretrain": Layout(("backbone.",), ("target_net.",)),
    "byol-pytorch": Layout(("online_encoder.net.",), ("target_encoder.net.",)),
    "moco-v3": Layout(("base_encoder.",), ("momentum_encoder.",)),
    "torchvision": Layout(("",), ("layer1.0.conv1.weight",)),
}
# Keys of a file that can hold its weights, and prefixes that wrappers add to every name.
CONTAINERS = ("state_dict", "model", "model_state_dict")
WRAPPERS = ("module.", "model.", "_orig_mod.")
CLASSIFIERS = ("fc.", "head.")
# The children of torchvision's ResNet as `nn.Sequential(*children)` counts them.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)
# The small one has 12 heads where timm's has 6, which no tensor shows.
MOCO_VITS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {"num_heads": 12},
    "vit_base_patch16_224": {},
    "vit_large_patch16_224": {},
}
# BatchNorm counts its batches, which not every checkpoint keeps.
COUNTER = "num_batches_tracked"
TORCH_BEFORE_1_6 = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    source: Source | None = None,
    backbone: str | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    image_size: int = 224,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    license: str | None = None,
) -> Path:
    """Save the online encoder of another project's checkpoint as `save_encoder` does, and return the folder.

    checkpoint: a torch or safetensors file, or a pickle of the authors' JAX release. source: the project; None: found
        by its names. backbone, backbone_kwargs: the timm model; None: found by its shapes, for ResNets and MoCo v3's
        ViTs. image_size, mean, std: how the project prepares images; the default is ImageNet's.

    Executes nothing of the checkpoint. Raises `ByolTimmError` for files that hold more than weights in plain
    containers, for an unknown or ambiguous layout, and for weights that do not fit the timm model.
    """
    checkpoint = Path(checkpoint)
    contents = read_checkpoint(checkpoint)
    arguments: dict[str, Any]
    notes: list[str] = []
    if isinstance(contents.get("experiment_state"), ExperimentState):
        if source not in (None, "haiku") or backbone or backbone_kwargs:
            raise ByolTimmError(
                f"{checkpoint} is of the JAX release (haiku), whose weights name the backbone. Leave out --backbone, "
                "--backbone_kwargs and --source"
            )
        source = "haiku"
        backbone, arguments, tensors = haiku_encoder(contents["experiment_state"])
        notes.append(NOTE)
        logger.warning(NOTE)
    else:
        if source == "haiku":
            raise ByolTimmError(f"{checkpoint} is not a checkpoint of the JAX release (haiku). Leave out --source")
        source, tensors = _online_tensors(contents, source, checkpoint)
        backbone = backbone or _guess_backbone(tensors, source, checkpoint)
        arguments = {**(MOCO_VITS.get(backbone, {}) if source == "moco-v3" else {}), **(backbone_kwargs or {})}
    encoder = create_encoder(backbone, image_size=image_size, in_chans=_channels(tensors, backbone), **arguments)
    _load(encoder, tensors, backbone, checkpoint)
    record = {
        "backbone": backbone,
        "backbone_kwargs": arguments,
        "converted_from": f"{source} checkpoint {checkpoint.name}",
        "notes": notes,
    }
    preparation: dict[str, Any] = dict(image_size=image_size, mean=mean, std=std, crop_pct=0.875)
    tag = f"byol_{source.replace('-', '_')}"
    return save_encoder(encoder, folder, **preparation, tag=tag, license=license, record=record)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the contents of a checkpoint: names and tensors of a torch or safetensors file, arrays of a haiku pickle.

    torch files are read by `torch.load(weights_only=True)`, pickles by a reader that knows arrays and containers only.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if path.suffix == ".safetensors":
            contents = load_file(path)
        elif start.startswith((b"PK", TORCH_BEFORE_1_6)):
            contents = torch.load(path, map_location="cpu", weights_only=True)
        elif start.startswith(b"\x80"):
            contents = read_arrays(path)
        else:
            raise ByolTimmError(f"{path} is neither a torch file, nor safetensors, nor a pickle of the JAX release")
    except OSError as error:
        raise ByolTimmError(f"{path} cannot be read ({error.strerror or one_line(error)})") from error
    except ByolTimmError:
        raise
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"other Python objects than weights ({asked_for[1]})" if asked_for else f"no weights ({one_line(error)})"
        raise ByolTimmError(f"{path} holds {what} and is not read. Ask its author for the weights alone") from error
    # Whatever numpy, torch and pickle raise on damaged bytes.
    except (SafetensorError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ByolTimmError(f"{path} is damaged ({one_line(error)}). Fetch it again") from error
    if not isinstance(contents, dict):
        raise ByolTimmError(f"{path} holds a {type(contents).__name__}, not weights by name")
    return contents


def _online_tensors(
    contents: Mapping[str, Any], source: Source | None, checkpoint: Path
) -> tuple[Source, dict[str, Tensor]]:
    """Return the project of a checkpoint, and its online encoder with the names of timm."""
    for key in CONTAINERS:
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
            break
    tensors = {str(name): value for name, value in contents.items() if isinstance(value, Tensor)}
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    if source is None:
        source = _detect(tensors, checkpoint)
    for prefix in LAYOUTS[source].online:
        online = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if online:
            return source, _timm_names(online)
    raise ByolTimmError(f"{checkpoint} has no encoder where {source} keeps it ({_names(LAYOUTS[source].online)})")


def _detect(tensors: Mapping[str, Tensor], checkpoint: Path) -> Source:
    def has(prefixes: Sequence[str]) -> bool:
        return any(name.startswith(tuple(prefixes)) for name in tensors)

    found = [s for s, layout in LAYOUTS.items() if has(layout.online) and has(layout.known_by)]
    if len(found) == 1:
        return cast("Source", found[0])
    if found:
        raise ByolTimmError(f"{checkpoint} has the layout of {_names(found)}. Say which with --source")
    if not tensors:
        raise ByolTimmError(f"{checkpoint} holds no weights by name")
    begins = sorted({name.partition(".")[0] for name in tensors})[:6]
    raise ByolTimmError(
        f"{checkpoint} does not have the layout of a known project (its names begin with {_names(begins)}). "
        f"Say which with --source: {_names(get_args(Source))}"
    )


def _timm_names(online: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in online.items():
        child, _, rest = name.partition(".")
        name = f"{CHILDREN.get(child, child)}.{rest}" if rest else child
        if not name.startswith(CLASSIFIERS):
            tensors[name] = value
    return tensors


def _guess_backbone(tensors: Mapping[str, Tensor], source: Source, checkpoint: Path) -> str:
    if "conv1.weight" in tensors and tensors["conv1.weight"].shape[2:] == (3, 3):
        raise ByolTimmError(
            f"{checkpoint} is a ResNet for small images (3 x 3 stem without pooling), which plain timm does not have"
        )
    candidates: dict[str, dict[str, Any]] = {name: {} for name in RESNETS} | (MOCO_VITS if source == "moco-v3" else {})
    own = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    for name, arguments in candidates.items():
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=0, in_chans=_channels(tensors, name), **arguments)
        if own == _weights(network):
            return name
    raise ByolTimmError(f"{checkpoint} is not a ResNet that its shapes identify. Name the timm model with --backbone")


def _channels(tensors: Mapping[str, Tensor], backbone: str) -> int:
    """Return the channels of the images: the input of the first convolution."""
    known = timm.models.get_pretrained_cfg(backbone.partition(".")[0])
    stem = tensors.get(f"{known.first_conv}.weight") if known else None
    return 3 if stem is None else stem.shape[1]


def _weights(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}


def _load(encoder: nn.Module, tensors: Mapping[str, Tensor], backbone: str, checkpoint: Path) -> None:
    wanted = _weights(encoder)
    classifiers = encoder.pretrained_cfg["classifier"]
    left_out = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers or []))
    for name, shape in wanted.items():
        if name not in tensors:
            raise ByolTimmError(f"{checkpoint} lacks {name} of {backbone}. Name another timm model with --backbone")
        if tensors[name].shape != shape:
            both = f"{tuple(tensors[name].shape)}, {backbone} has {tuple(shape)}"
            raise ByolTimmError(f"{checkpoint} has {name} in another shape ({both})")
        if not tensors[name].isfinite().all():
            raise ByolTimmError(f"{checkpoint} has weights that are not finite ({name})")
    for name in tensors:
        if name not in wanted and not name.startswith(left_out) and not name.endswith(COUNTER):
            raise ByolTimmError(f"{checkpoint} has {name}, which timm's {backbone} does not have")
    encoder.load_state_dict(tensors, strict=False)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)
