"""The folder of a run: claimed, locked, compared."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ByolTimmError

_LOCK = ".lock"
_RUN_MARKS = (_LOCK, "checkpoints", "encoder", "comparison.json")


@contextlib.contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Hold `path/.lock` for this process, or raise `ByolTimmError` naming the process that does.

    The kernel lets go of the lock when the process ends, however it ends.
    """
    # A POSIX lock: forked data workers do not inherit it, so one that outlives its parent does not keep it.
    with open(path / _LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ByolTimmError(f"{path} is in use by {holder}. Wait for it or choose another --output_dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def prepare_output_dir(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Make `path` a folder that a run can write to; with `overwrite`, empty it of an earlier run.

    Raises `ByolTimmError` when it is a file, cannot be written, is in use, or holds something that neither `resume` nor
    `overwrite` allows for. `overwrite` refuses a folder that no run ever locked, `resume` one that holds no run.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".tmp-probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
        held = [entry for entry in path.iterdir() if entry.name != _LOCK and not entry.name.startswith(".tmp-probe")]
    except FileExistsError:
        raise ByolTimmError(f"{path} is a file. Choose another --output_dir") from None
    except OSError as error:
        shown = f"{path}" if len(str(path)) < 200 else f"{str(path)[:60]}..."
        raise ByolTimmError(f"cannot write to {shown} ({error.strerror}). Choose another --output_dir") from error
    if not held:
        return
    if resume and not overwrite:
        # A lock made here would let `overwrite` take a folder of photographs for a run. A copy of a run may lack it.
        if not any((path / mark).exists() for mark in _RUN_MARKS):
            raise ByolTimmError(f"{path} holds no run to go on with. Choose another --output_dir")
        return
    if not overwrite:
        raise ByolTimmError(
            f"{path} is not empty. Continue with --resume, discard it with --overwrite, or choose another"
        )
    if not (path / _LOCK).exists():
        raise ByolTimmError(
            f"--overwrite discards earlier runs only, and {path} holds none. Choose another --output_dir"
        )
    with lock_folder(path):
        for entry in held:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def compare_config(
    saved: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    may_change: Collection[str],
    checkpoint: str = "the checkpoint",
    otherwise: str = "Use another --output_dir",
) -> None:
    """Raise `ByolTimmError` for the first setting, outside `may_change`, that differs from what the checkpoint had.

    otherwise: what to do besides giving the setting as it was.
    A setting that only one of the two knows belongs to another version of byol_timm and is passed over.
    """
    for name, before in saved.items():
        if name in may_change or name not in asked:
            continue
        now = json.loads(json.dumps(asked[name]))
        if now != before:
            raise ByolTimmError(
                f"{checkpoint} was made with {name} {_shown(before)}, you asked for {_shown(now)}. "
                f"{otherwise} or {_flag(name, before)}"
            )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return str(value)


def _flag(name: str, value: Any) -> str:
    if value is None:
        return f"no --{name}"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name} {_shown(value)}"
