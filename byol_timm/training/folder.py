"""The folder of a run: claimed by one process, kept until a new run replaces it, compared with what is asked."""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ByolTimmError, closest

logger = logging.getLogger(__name__)

_LOCK = ".lock"
# Contents that `overwrite` replaces: on their way into or out of `_EARLIER`, all there, and being deleted.
_MOVING, _EARLIER, _DISCARDED = ".earlier-moving", ".earlier", ".earlier-discarded"
_RUN_MARKS = (_LOCK, "checkpoints", "encoder", "comparison.json")


@contextlib.contextmanager
def claim_folder(path: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Callable[[], None]]:
    """Create `path` if needed and hold it for this process; yield the function that commits an overwrite.

    With `overwrite`, an earlier run is set aside inside the folder. `commit` deletes it; an error before that puts it
    back, also if the process was killed and the folder is claimed again. A folder that this call has created and that
    is still empty at an error is removed.

    Raises `ByolTimmError` for a path that is a file, cannot be written or is in use, and for contents that are not a
    run, or that neither `resume` nor `overwrite` allows.
    """
    is_new = not os.path.exists(path)
    _make_writable(path)
    if any((path / name).exists() for name in (_MOVING, _EARLIER, _DISCARDED)):
        with _locked(path):
            _put_back(path)
            shutil.rmtree(path / _DISCARDED, ignore_errors=True)
    _check_contents(path, resume, overwrite)
    with _locked(path):
        if overwrite:
            _set_aside(path)
        try:
            yield lambda: _discard_earlier(path)
        except BaseException:
            _put_back(path)
            if is_new and not _contents(path):
                shutil.rmtree(path, ignore_errors=True)
            raise
        _discard_earlier(path)


def check_resumable(path: Path) -> None:
    """Raise `ByolTimmError` if `path` looks like a mistyped name of a run; otherwise log that a new run starts.

    Clusters start a job with --resume from its first launch, so a missing folder alone is not an error.
    """
    exists = os.path.exists(path)
    if exists and _contents(path):
        return
    siblings = path.parent.iterdir() if path.parent.is_dir() and not exists else ()
    # Names that differ in a number are runs of their own: seed_0, seed_1.
    numbers = re.compile(r"\d+").findall
    runs = [entry.name for entry in siblings if numbers(entry.name) == numbers(path.name) and _holds_run(entry)]
    near = closest(path.name, runs, cutoff=0.9)
    if near:
        raise ByolTimmError(
            f"no run in {path} to resume. Did you mean {path.parent / near}? Leave out --resume to start a new run"
        )
    logger.info("no run in %s yet: starting from step 0", path)


def compare_config(
    saved: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    may_change: Collection[str],
    matters: Mapping[str, str] | None = None,
    checkpoint: str = "the checkpoint",
    otherwise: str = "Use another --output_dir",
) -> None:
    """Raise `ByolTimmError` for the first setting, outside `may_change`, that differs from the checkpoint's.

    matters: settings that may change with a warning, and what the change does. otherwise: what to do instead of
    repeating the setting. A setting that only one of the two has belongs to another version and is skipped.
    """
    for name, before in saved.items():
        if name not in asked:
            continue
        now = json.loads(json.dumps(asked[name]))
        if now == before:
            continue
        if matters and name in matters:
            logger.warning("--%s %s -> %s: %s", name, _shown(before), _shown(now), matters[name])
        elif name not in may_change:
            raise ByolTimmError(
                f"{checkpoint} was made with {name} {_shown(before)}, you asked for {_shown(now)}. "
                f"{otherwise} or {_flag(name, before)}"
            )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A POSIX lock: the kernel releases it when the process ends, and forked data workers do not inherit it.
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


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".tmp-probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except FileExistsError:
        raise ByolTimmError(f"{path} is a file. Choose another --output_dir") from None
    except OSError as error:
        shown = f"{path}" if len(str(path)) < 200 else f"{str(path)[:60]}..."
        raise ByolTimmError(f"cannot write to {shown} ({error.strerror}). Choose another --output_dir") from error


def _check_contents(path: Path, resume: bool, overwrite: bool) -> None:
    if not _contents(path):
        return
    if overwrite:
        if not (path / _LOCK).exists():
            raise ByolTimmError(
                f"--overwrite replaces earlier runs only, and {path} holds none. Choose another --output_dir"
            )
    elif not resume:
        raise ByolTimmError(
            f"{path} is not empty. Continue with --resume, replace it with --overwrite, or choose another"
        )
    # Without this, the lock would make a folder of photographs look like a run. A copy of a run may lack the lock.
    elif not _holds_run(path):
        raise ByolTimmError(f"{path} holds no run to resume. Choose another --output_dir")


def _contents(path: Path) -> list[Path]:
    hidden = (_LOCK, _MOVING, _EARLIER, _DISCARDED)
    return [entry for entry in path.iterdir() if entry.name not in hidden and not entry.name.startswith(".tmp-probe-")]


def _holds_run(path: Path) -> bool:
    return any((path / mark).exists() for mark in _RUN_MARKS)


def _set_aside(path: Path) -> None:
    """Move the contents to `_EARLIER`, which appears only when it is complete."""
    entries = _contents(path)
    if entries:
        (path / _MOVING).mkdir()
        for entry in entries:
            os.rename(entry, path / _MOVING / entry.name)
        os.rename(path / _MOVING, path / _EARLIER)


def _put_back(path: Path) -> None:
    """Replace the contents by what was set aside, if anything was; reports of `debug` stay."""
    earlier, moving = path / _EARLIER, path / _MOVING
    if earlier.exists():
        if (path / "debug").exists():
            shutil.copytree(path / "debug", earlier / "debug", dirs_exist_ok=True)
        for entry in _contents(path):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        os.rename(earlier, moving)
    if moving.exists():
        for entry in moving.iterdir():
            os.rename(entry, path / entry.name)
        moving.rmdir()


def _discard_earlier(path: Path) -> None:
    if (path / _EARLIER).exists():
        os.rename(path / _EARLIER, path / _DISCARDED)
        shutil.rmtree(path / _DISCARDED)


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
