"""Encoders of other BYOL projects in timm's format: the online network, read from a checkpoint that is never run."""

import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ByolTimmError, one_line
from .create import create_encoder
from .folder import save_encoder

logger = logging.getLogger(__name__)

Source = Literal["haiku", "lightly", "solo-learn", "mmpretrain", "byol-pytorch", "moco-v3", "torchvision"]


class Layout(NamedTuple):
    """Prefixes of a project's online encoder, and of the keys by which the project is known: its target's, mostly."""

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
# Under which key of a file its weights lie, and what wrappers put in front of every name.
CONTAINERS = ("state_dict", "model", "model_state_dict")
WRAPPERS = ("module.", "model.", "_orig_mod.")
CLASSIFIERS = ("fc.", "head.")
# The children of torchvision's ResNet as `nn.Sequential(*children)` counts them.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)
# The small one has 12 heads where timm's has 6, which no tensor tells.
MOCO_VITS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {"num_heads": 12},
    "vit_base_patch16_224": {},
    "vit_large_patch16_224": {},
}
# timm's networks for the ResNets of the JAX release, by their depths: for turned and for upright images.
ROTATED: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
    (3, 24, 36, 3): "resnet200",
}
UPRIGHT: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50_clip_gap", (3, 4, 23, 3): "resnet101_clip_gap"}
BYOB_LAYERS = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}
UPRIGHT_NOTE = (
    "The JAX release pads its first convolution and pooling at one end, timm at both: this encoder computes what the "
    "original does on images moved by 3 pixels down and to the right, but for the edges. Everything behind is exact on "
    "images whose sides are multiples of 32."
)
ROTATED_NOTE = (
    "This encoder computes exactly what the original does on images turned by 180 degrees, for sides that are "
    "multiples of 32: turn yours first."
)


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
    rotated: bool = False,
) -> Path:
    """The encoder folder, as `save_encoder` writes it, of the online encoder in another project's checkpoint.

    checkpoint: a torch or safetensors file, or a pickle of the authors' JAX release. source: whose; None: told by its
        names. backbone, backbone_kwargs: the timm model; None: told by its shapes, for ResNets and MoCo v3's ViTs.
    image_size, mean, std: how the project prepares images; the default is ImageNet's.
    rotated: for the JAX release, whose padding timm does not have: an encoder that is exact on images turned by 180
        degrees, instead of one for upright images that sees them moved by 3 pixels.

    Nothing in the checkpoint is executed. Raises `ByolTimmError` for files that hold more than weights in plain
    containers, for a layout that is not known or not the only one that fits, and for weights that timm cannot place.
    """
    checkpoint = Path(checkpoint)
    contents = read_checkpoint(checkpoint)
    notes = []
    if isinstance(contents.get("experiment_state"), ExperimentState):
        if source not in (None, "haiku") or backbone or backbone_kwargs:
            raise ByolTimmError(
                f"{checkpoint} is of the JAX release (haiku), whose backbone its weights tell: ask for none"
            )
        source = "haiku"
        tensors = _haiku_tensors(contents["experiment_state"])
        backbone, arguments = _haiku_backbone(tensors, rotated)
        tensors = _for_rotated_images(tensors) if rotated else _for_upright_images(tensors)
        notes.append(ROTATED_NOTE if rotated else UPRIGHT_NOTE)
        logger.warning(notes[0])
    else:
        if source == "haiku" or rotated:
            raise ByolTimmError(f"{checkpoint} is no checkpoint of the JAX release (haiku), which alone can be rotated")
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
    """What a checkpoint holds: of a torch or safetensors file names and tensors, of a haiku pickle numpy arrays.

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
            with path.open("rb") as file:
                contents = _ArrayUnpickler(file).load()
        else:
            raise ByolTimmError(f"{path} is neither a torch file, nor safetensors, nor a pickle of the JAX release")
    except OSError as error:
        raise ByolTimmError(f"{path} cannot be read ({error.strerror or one_line(error)})") from error
    except ByolTimmError:
        raise
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"Python objects besides weights ({asked_for[1]})" if asked_for else f"no weights ({one_line(error)})"
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
    """Whose checkpoint it is, and its online encoder with the names of timm."""
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

    found: list[Any] = [s for s, layout in LAYOUTS.items() if has(layout.online) and has(layout.known_by)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ByolTimmError(f"{checkpoint} has the layout of {_names(found)}. Say which with --source")
    if not tensors:
        raise ByolTimmError(f"{checkpoint} holds no weights by name")
    begins = sorted({name.partition(".")[0] for name in tensors})[:6]
    raise ByolTimmError(
        f"{checkpoint} has the layout of no known project (its names begin with {_names(begins)}). "
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
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    for name, arguments in candidates.items():
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=0, in_chans=_channels(tensors, name), **arguments)
        if shapes == _shapes(network):
            return name
    raise ByolTimmError(f"{checkpoint} holds no ResNet that is told by its shapes. Name the timm model with --backbone")


def _channels(tensors: Mapping[str, Tensor], backbone: str) -> int:
    """Channels of the images: the input of the first convolution."""
    known = timm.models.get_pretrained_cfg(backbone.partition(".")[0])
    stem = tensors.get(f"{known.first_conv}.weight") if known else None
    return 3 if stem is None else stem.shape[1]


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}


def _load(encoder: Any, tensors: Mapping[str, Tensor], backbone: str, checkpoint: Path) -> None:
    wanted = _shapes(encoder)
    classifiers = encoder.pretrained_cfg["classifier"]
    left_out = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers or []))
    for name, shape in wanted.items():
        if name not in tensors:
            raise ByolTimmError(f"{checkpoint} lacks {name} of {backbone}. Name another timm model with --backbone")
        if tensors[name].shape != shape:
            shapes = f"{tuple(tensors[name].shape)}, {backbone} has {tuple(shape)}"
            raise ByolTimmError(f"{checkpoint} has {name} in another shape ({shapes})")
        if not tensors[name].isfinite().all():
            raise ByolTimmError(f"{checkpoint} has weights that are not finite ({name})")
    for name in tensors:
        if name not in wanted and not name.startswith(left_out) and not name.endswith("num_batches_tracked"):
            raise ByolTimmError(f"{checkpoint} has {name}, for which timm's {backbone} has no place")
    encoder.load_state_dict(tensors, strict=False)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


# The pickles of the authors' JAX release


class ExperimentState(NamedTuple):
    """What the JAX release trains: parameters and BatchNorm statistics by module, `{module: {name: array}}`."""

    online_params: Mapping[str, Any]
    target_params: Mapping[str, Any]
    online_state: Mapping[str, Any]
    target_state: Mapping[str, Any]
    opt_state: Any


class _Values(tuple):
    """Takes the place of a named tuple of the optimizer."""

    def __new__(cls, *values: Any) -> "_Values":
        return super().__new__(cls, values)


def _named_tuple(name: str, *_: Any) -> type:
    """In place of dill's way to name the class of a named tuple."""
    return ExperimentState if name == "_ByolExperimentState" else _Values


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode(encoding)


def _array(make: Callable[..., Any], arguments: tuple[Any, ...], state: tuple[Any, ...], _: object = None) -> Any:
    """How dill and JAX wrap what numpy itself would have written."""
    array = make(*arguments)
    array.__setstate__(state)
    return array


TORCH_BEFORE_1_6 = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
ALLOWED = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": np.zeros(1).__reduce__()[0],
    "numpy.core.multiarray.scalar": np.float32(0).__reduce__()[0],
    "numpy.core.numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    "_codecs.encode": _latin1,
    "collections.OrderedDict": OrderedDict,
    "jax._src.array._reconstruct_array": _array,
    "jax._src.device_array.reconstruct_device_array": _array,
    "haiku._src.data_structures.FlatMapping": dict,
    "haiku._src.data_structures.FlatMap": dict,
    "haiku._src.data_structures.frozendict": dict,
    "byol.byol_experiment._ByolExperimentState": ExperimentState,
    "dill._dill._create_namedtuple": _named_tuple,
    "dill._dill._create_array": _array,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers and refuses whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if path in ALLOWED:
            return ALLOWED[path]
        if path.startswith(("optax.", "byol.utils.optimizers.")):
            return _Values
        raise pickle.UnpicklingError(f"GLOBAL {path}")


def _haiku_tensors(state: ExperimentState) -> dict[str, Tensor]:
    """The online encoder with timm's names."""
    stems = [module for module in state.online_params if module.endswith("/~/initial_conv")]
    if len(stems) != 1:
        raise ByolTimmError(f"the checkpoint holds {len(stems)} ResNets of haiku instead of one")
    root = stems[0].removesuffix("initial_conv")
    tensors: dict[str, Tensor] = {}
    for module, values in state.online_params.items():
        if not module.startswith(root):
            continue  # projector, predictor and classifier
        name = _haiku_name(module.removeprefix(root))
        if "w" in values:
            tensors[f"{name}.weight"] = _tensor(values["w"]).permute(3, 2, 0, 1).contiguous()
        else:
            mean, variance = (state.online_state[f"{module}/~/{kind}_ema"]["average"] for kind in ("mean", "var"))
            arrays = dict(weight=values["scale"], bias=values["offset"], running_mean=mean, running_var=variance)
            tensors |= {f"{name}.{key}": _tensor(array).flatten() for key, array in arrays.items()}
    return tensors


def _haiku_name(module: str) -> str:
    """`layer1.2.bn3` for `block_group_0/~/block_2/~/batchnorm_2`."""
    match = re.fullmatch(
        r"(?:block_group_(\d+)/~/block_(\d+)/~/)?(initial_|shortcut_)?(conv|batchnorm)(?:_(\d))?", module
    )
    if match is None:
        raise ByolTimmError(f"the checkpoint holds no ResNet of the first version (it has {module})")
    group, block, place, kind, number = match.groups()
    layer = ("conv" if kind == "conv" else "bn") + str(int(number or 0) + 1)
    if place == "shortcut_":
        layer = "downsample.0" if kind == "conv" else "downsample.1"
    return layer if group is None else f"layer{int(group) + 1}.{block}.{layer}"


def _haiku_backbone(tensors: Mapping[str, Tensor], rotated: bool) -> tuple[str, dict[str, Any]]:
    stem = tensors["conv1.weight"].shape[0]
    depths = tuple(sum(f"layer{n}.{block}.conv3.weight" in tensors for block in range(99)) for n in (1, 2, 3, 4))
    channels = [tensors[f"layer{n}.0.conv1.weight"].shape[0] for n in (1, 2, 3, 4)]
    name = (ROTATED if rotated else UPRIGHT).get(depths)
    if name is None or (rotated and stem != 64):
        raise ByolTimmError(
            f"timm has no place for a ResNet of the JAX release with {depths} bottleneck blocks and a stem of {stem} "
            "channels: ResNet-50 and 101 can be converted, and of single width with --rotated ResNet-152 and 200 too"
        )
    if rotated:
        single = channels == [64, 128, 256, 512]
        return name, {"down_kernel_size": 3} if single else {"down_kernel_size": 3, "channels": channels}
    plain = dict(stem_type="7x7", stem_pool="maxpool", stem_chs=64, downsample="conv1x1", aa_layer="")
    return name, {**plain, "block_kwargs": {"kernel_size": 5}, "width_factor": stem / 64}


# On even sizes, 'SAME' padding makes a 3 x 3 kernel of stride 2 read rows 2i to 2i + 2, where timm's reads 2i - 1 to
# 2i + 1; the shortcut beside it reads row 2i in both.


def _for_rotated_images(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For timm's ResNet with `down_kernel_size=3`, whose padding is the mirror image of 'SAME'.

    So every kernel is turned, and the shortcuts read row 2i + 1, which is the last corner of 3 x 3.
    """
    turned = {name: tensor.flip(2, 3) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if re.fullmatch(r"layer[2-4]\.0\.downsample\.0\.weight", name):
            turned[name] = functional.pad(tensor, (2, 0, 2, 0))
    return turned


def _for_upright_images(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For timm's ByobNet with 5 x 5 kernels, which read rows 2i - 2 to 2i + 2 and hold the 3 x 3 ones in a corner."""
    upright = {}
    for name, tensor in tensors.items():
        if tensor.shape[2:] == (3, 3):
            strided = re.match(r"layer[2-4]\.0\.", name)
            tensor = functional.pad(tensor, (2, 0, 2, 0) if strided else (1, 1, 1, 1))
        stage, _, rest = name.partition(".")
        if stage.startswith("layer"):
            block, layer, *_, value = rest.split(".")
            kind = "conv" if tensor.ndim == 4 else "bn"
            place = "shortcut" if layer == "downsample" else BYOB_LAYERS[layer[-1]]
            name = f"stages.{int(stage[-1]) - 1}.{block}.{place}.{kind}.{value}"
        else:
            name = f"stem.conv1.{stage.rstrip('1')}.{rest}"
        upright[name] = tensor
    return upright


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
