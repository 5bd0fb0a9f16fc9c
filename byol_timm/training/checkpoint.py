"""Checkpoints that survive a kill at any moment: complete, verified by hash, and without pickle.

A checkpoint is a folder `step-N` of safetensors files, `state.json` and `manifest.json`, which holds the size and
SHA-256 of every file and its own. It is written under another name and renamed.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ByolTimmError
from ..files import sync_folder

logger = logging.getLogger(__name__)

FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors on the CPU by file and name, and the JSON state that was saved with them.

    skipped: newer checkpoints that are damaged, each as "step-120: reason".
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path
    skipped: tuple[str, ...]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Save `folder/step-N`, then remove all but the newest `keep` (at least 2) up to this step; return its path.

    tensors: one safetensors file for each key. state: any JSON values. A good `step-N` that exists already stays.
    Raises `ByolTimmError` if the disk is full or fails; earlier checkpoints are then unchanged.
    """
    return _write(folder, step, _on_host(tensors), json.dumps(state), keep)


def load_latest(folder: Path, groups: Collection[str] | None = None) -> Checkpoint | None:
    """Return the newest undamaged checkpoint in `folder`, or None; delete what killed saves have left.

    groups: the tensors to check and load; None: all. Raises `ByolTimmError` for a checkpoint of a newer byol_timm, and
    if all checkpoints are damaged.
    """
    if not folder.is_dir():
        return None
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # other processes may be doing the same
    skipped: list[str] = []
    for step in reversed(_steps(folder)):
        try:
            checkpoint = _load(folder / f"step-{step}", _files(groups))
        except _Damaged as error:
            skipped.append(f"step-{step}: {error}")
            continue
        return dataclasses.replace(checkpoint, skipped=tuple(skipped))
    if skipped:
        raise ByolTimmError(f"no good checkpoint in {folder} ({'; '.join(skipped)}). Start again with --overwrite")
    return None


def load_checkpoint(path: Path, groups: Collection[str]) -> Checkpoint:
    """Return these groups of tensors, and the state, of a checkpoint from any source.

    Raises `ByolTimmError` if they are damaged.
    """
    try:
        return _load(path, _files(groups))
    except _Damaged as error:
        raise ByolTimmError(f"{path} is not a good checkpoint ({error}). Name one as RUN/checkpoints/step-N") from error


class CheckpointWriter:
    """Save checkpoints in a background thread, one at a time; training waits only for the copy to host memory.

    saved: called in that thread with the step of each checkpoint on the disk. An error of the thread is raised by the
    next `save` or `close`. As a context manager it closes at the end.
    """

    def __init__(self, folder: Path, *, keep: int = 2, saved: Callable[[int], None] = lambda step: None) -> None:
        self._folder, self._keep, self._saved = folder, keep, saved
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Copy everything now and write it as `save_checkpoint` does, after the previous save has ended."""
        self.close()
        # A thread of its own for each save: an idle one would be in the way of data workers that fork.
        pool = ThreadPoolExecutor(1, f"save-step-{step}")
        self._pending = pool.submit(self._write, step, _on_host(tensors), json.dumps(state))
        pool.shutdown(wait=False)

    def _write(self, step: int, files: Mapping[str, dict[str, Tensor]], state: str) -> None:
        _write(self._folder, step, files, state, self._keep)
        self._saved(step)

    def close(self) -> None:
        """Wait until the last save is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except ByolTimmError as error:
            if kind is None:
                raise
            logger.warning("%s", error)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as named tensors; all other values are JSON in `layout` (uint8)."""
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_pack(optimizer.state_dict(), "", tensors)).encode()
    return {**tensors, "layout": torch.frombuffer(bytearray(layout), dtype=torch.uint8)}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load `optimizer_tensors` into an optimizer over the same parameters.

    Each tensor gets the memory format of its parameter and the device that torch keeps it on, so lay out and prepare
    the parameters first.
    """
    state_dict = _unpack(json.loads(bytes(tensors["layout"].tolist())), tensors)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = state_dict["state"]
    trained = sum(len(group["params"]) for group in state_dict["param_groups"])
    if trained != len(parameters):
        raise ByolTimmError(
            f"the checkpoint trained {trained} parameters, this run trains {len(parameters)}: something else is "
            "frozen. Use another --output_dir"
        )
    for index, state in saved.items():
        for name, value in state.items():
            # Reductions over the state depend on its memory order to the last bit.
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                state[name] = torch.empty_like(parameters[index], dtype=value.dtype, device="cpu").copy_(value)
    optimizer.load_state_dict(state_dict)
    for index, state in saved.items():
        live = optimizer.state[parameters[index]]
        for name, value in state.items():
            # torch has cast the state to the dtype of the parameter.
            if isinstance(value, Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device)


class _Damaged(Exception):
    """The reason why a checkpoint cannot be used."""


def _on_host(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    # Copies: safetensors takes neither shared memory nor strides, and training changes the originals.
    return {
        f"{file}.safetensors": {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in group.items()
        }
        for file, group in tensors.items()
    }


def _write(folder: Path, step: int, files: Mapping[str, dict[str, Tensor]], state: str, keep: int) -> Path:
    final, temporary = folder / f"step-{step}", folder / f".tmp-step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if final.exists():
            if _is_good(final):
                return final
            _remove(final)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            entries = {name: _write_file(temporary / name, safetensors.torch.save(t)) for name, t in files.items()}
            entries[_STATE] = _write_file(temporary / _STATE, state.encode())
            manifest = {"format": FORMAT, "step": step, "files": entries}
            _write_file(temporary / _MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}).encode())
            sync_folder(temporary)
        except OSError:
            shutil.rmtree(temporary)
            raise
        os.rename(temporary, final)
        sync_folder(folder)
        for old in [s for s in _steps(folder) if s <= step][: -max(keep, 2)]:
            _remove(folder / f"step-{old}")
    except OSError as error:
        raise ByolTimmError(_failure(error, folder, step, files)) from error
    return final


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write one file of an unfinished folder; return its entry in the manifest."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    # Renamed first, so that a kill leaves no incomplete checkpoint under a good name.
    doomed = path.with_name(f".tmp-removed-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _files(groups: Collection[str] | None) -> set[str] | None:
    return None if groups is None else {_STATE, *(f"{name}.safetensors" for name in groups)}


def _load(path: Path, names: Collection[str] | None = None) -> Checkpoint:
    step, files = _read(path, names)
    try:
        state = json.loads(files.pop(_STATE))
        tensors = {Path(name).stem: safetensors.torch.load(data) for name, data in files.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    return Checkpoint(step=step, tensors=tensors, state=state, path=path, skipped=())


def _read(path: Path, names: Collection[str] | None = None) -> tuple[int, dict[str, bytes]]:
    """Return the step and the verified contents of the files of a checkpoint, or of those among `names`."""
    try:
        manifest = json.loads(_bytes(path / _MANIFEST))
        digest = manifest.pop("sha256")
        step, version = int(manifest["step"]), int(manifest["format"])
        files = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _Damaged(f"{_MANIFEST} is damaged") from None
    if digest != _digest(manifest):
        raise _Damaged(f"{_MANIFEST} is damaged")
    if version > FORMAT:
        raise ByolTimmError(f"{path} has checkpoint format {version}, newer than {FORMAT}. Upgrade byol_timm")
    contents = {}
    for name, (size, sha256) in files.items():
        if names is None or name in names:
            contents[name] = data = _bytes(path / name)
            if len(data) != size:
                raise _Damaged(f"{name} has {len(data):,} of {size:,} bytes")
            if hashlib.sha256(data).hexdigest() != sha256:
                raise _Damaged(f"{name} does not have the contents that were saved (sha256)")
    return step, contents


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from error


def _is_good(path: Path) -> bool:
    try:
        _read(path)
    except _Damaged:
        return False
    return True


def _steps(folder: Path) -> list[int]:
    matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _failure(error: OSError, folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]]) -> str:
    try:
        good = [s for s in _steps(folder) if s != step and _is_good(folder / f"step-{s}")]
        free = shutil.disk_usage(folder).free
    except OSError:
        good, free = [], 0
    last = f"last good checkpoint: step-{good[-1]}" if good else "no earlier checkpoint"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot save step {step} in {folder} ({error.strerror}); {last}"
    need = sum(tensor.nbytes for group in files.values() for tensor in group.values())
    unit, scale = ("GB", 1e9) if need > 5e7 else ("MB", 1e6)
    space = f"needs {need / scale:.1f} {unit}, {free / scale:.1f} free in {folder}/"
    return f"disk full while saving step {step} ({space}); {last}"


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; its tensors go to `tensors` under their path in it."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ByolTimmError(
        f"optimizer state {name} is a {type(value).__name__}, which checkpoints cannot hold. Choose another --opt"
    )


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    [(kind, value)] = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value}
    items = [_unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
