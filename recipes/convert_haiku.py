"""Read checkpoints of the authors' JAX release, for convert.py: numpy arrays out of a pickle, as a network of timm."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from byol_timm.errors import ByolTimmError

# timm's networks for the ResNets of the release, by their depths.
BACKBONES: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50_clip_gap", (3, 4, 23, 3): "resnet101_clip_gap"}
BYOB_LAYERS = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}
NOTE = (
    "The JAX release pads its first convolution and pooling on one side, timm on both: this encoder computes what the "
    "original computes on images moved by 3 pixels down and to the right, except at the edges. All other layers are "
    "exact for images with height and width divisible by 32."
)


class ExperimentState(NamedTuple):
    """What the release trains: parameters and BatchNorm statistics by module, `{module: {name: array}}`."""

    online_params: Mapping[str, Any]
    target_params: Mapping[str, Any]
    online_state: Mapping[str, Any]
    target_state: Mapping[str, Any]
    opt_state: Any


def read_arrays(path: Path) -> Any:
    """Return the numpy arrays of a pickle in plain containers; raise UnpicklingError if it asks for anything else."""
    with path.open("rb") as file:
        return _ArrayUnpickler(file).load()


def haiku_encoder(state: ExperimentState) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the backbone of the online encoder, its arguments, and its tensors with the names of that backbone."""
    tensors = _resnet_tensors(state)
    stem = tensors["conv1.weight"].shape[0]
    depths = tuple(sum(f"layer{n}.{block}.conv3.weight" in tensors for block in range(99)) for n in (1, 2, 3, 4))
    if depths not in BACKBONES:
        raise ByolTimmError(
            f"timm cannot hold a ResNet of the JAX release with {depths} bottleneck blocks. ResNet-50 and 101 can be "
            "converted"
        )
    plain = dict(stem_type="7x7", stem_pool="maxpool", stem_chs=64, downsample="conv1x1", aa_layer="")
    arguments = {**plain, "block_kwargs": {"kernel_size": 5}, "width_factor": stem / 64}
    return BACKBONES[depths], arguments, _byobnet_tensors(tensors)


def _resnet_tensors(state: ExperimentState) -> dict[str, Tensor]:
    """Return the online encoder with the names of timm's ResNet."""
    stems = [module for module in state.online_params if module.endswith("/~/initial_conv")]
    if len(stems) != 1:
        raise ByolTimmError(f"the checkpoint holds {len(stems)} ResNets of haiku instead of one")
    root = stems[0].removesuffix("initial_conv")
    tensors: dict[str, Tensor] = {}
    for module, values in state.online_params.items():
        if not module.startswith(root):
            continue  # projector, predictor and classifier
        name = _resnet_name(module.removeprefix(root))
        if "w" in values:
            tensors[f"{name}.weight"] = _tensor(values["w"]).permute(3, 2, 0, 1).contiguous()
        else:
            mean, variance = (state.online_state[f"{module}/~/{kind}_ema"]["average"] for kind in ("mean", "var"))
            arrays = dict(weight=values["scale"], bias=values["offset"], running_mean=mean, running_var=variance)
            tensors |= {f"{name}.{key}": _tensor(array).flatten() for key, array in arrays.items()}
    return tensors


def _resnet_name(module: str) -> str:
    """Return `layer1.2.bn3` for `block_group_0/~/block_2/~/batchnorm_2`."""
    match = re.fullmatch(
        r"(?:block_group_(\d+)/~/block_(\d+)/~/)?(initial_|shortcut_)?(conv|batchnorm)(?:_(\d))?", module
    )
    if match is None:
        raise ByolTimmError(f"the checkpoint does not hold a ResNet of the first version (it has {module})")
    group, block, place, kind, number = match.groups()
    layer = ("conv" if kind == "conv" else "bn") + str(int(number or 0) + 1)
    if place == "shortcut_":
        layer = "downsample.0" if kind == "conv" else "downsample.1"
    return layer if group is None else f"layer{int(group) + 1}.{block}.{layer}"


def _byobnet_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and pad for timm's ByobNet with 5 x 5 kernels, which hold the 3 x 3 ones in a corner.

    On even sizes, 'SAME' padding makes a 3 x 3 kernel of stride 2 read rows 2i to 2i + 2; a 5 x 5 kernel of timm reads
    rows 2i - 2 to 2i + 2.
    """
    renamed = {}
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
        renamed[name] = tensor
    return renamed


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


class _Values(tuple[Any, ...]):
    """Stands for a named tuple of the optimizer."""

    def __new__(cls, *values: Any) -> "_Values":
        return super().__new__(cls, values)


def _named_tuple(name: str, *_: Any) -> type:
    """Replace dill's way to name the class of a named tuple."""
    return ExperimentState if name == "_ByolExperimentState" else _Values


def _latin1(text: str, encoding: str) -> bytes:
    """Return bytes as pickles of protocol 2 hold them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode(encoding)


def _array(make: Callable[..., Any], arguments: tuple[Any, ...], state: tuple[Any, ...], _: object = None) -> Any:
    """Unwrap what dill and JAX put around an array of numpy."""
    array = make(*arguments)
    array.__setstate__(state)
    return array


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
    """Reads numpy arrays in plain containers and refuses anything else that a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if path in ALLOWED:
            return ALLOWED[path]
        if path.startswith(("optax.", "byol.utils.optimizers.")):
            return _Values
        raise pickle.UnpicklingError(f"GLOBAL {path}")
