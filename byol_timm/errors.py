"""The one error that byol_timm raises for faults its user can fix, how it is printed, and text without secrets."""

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}")
REDACTED = "[redacted]"


class ByolTimmError(ValueError):
    """A fault of the input, the settings or the machine, in one line: what, which value, what to do.

    Recipes print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2
    # True if all processes of a launch raise it.
    agreed = False
    # True if it only says that another process has ended, which may have reported why.
    follows_another = False
    reported = False


def report(error: ByolTimmError) -> None:
    """Print an error as one line on stderr, once for all processes of a launch."""
    if error.reported:
        return
    error.reported = True
    rank = int(os.environ.get("RANK", 0))
    earlier = count_failure(str(error))
    if earlier is None:
        # Without a common store, a process cannot know what the others print.
        prints, prefix = rank == 0 or not error.agreed, f"process {rank}: " if rank else ""
    else:
        prints, prefix = earlier[0 if error.follows_another else 1] == 0, ""
    if prints:
        text = " ".join(f"byol_timm: error: {prefix}{error}".split())
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def count_failure(message: str = "") -> tuple[int, int] | None:
    """Record a failure in the launcher's store; return how many came before it, of any message and of this one.

    None if the launcher offers no store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    place = f"byol_timm/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    digest = hashlib.sha256(message.encode(errors="replace")).hexdigest()
    try:
        port, patience = int(os.environ["MASTER_PORT"]), timedelta(seconds=5)
        store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=patience)
        return store.add(place, 1) - 1, store.add(f"{place}/{digest}", 1) - 1
    except RuntimeError:
        # The host of the store is gone.
        return None


def one_line(error: object) -> str:
    """What an error says, on one line of at most 200 characters and without tokens of the Hub."""
    text = " ".join(SECRET_VALUE.sub(REDACTED, str(error)).split())
    return text[:200] or type(error).__name__


def nearest(name: str, names: Collection[str]) -> str:
    """Return the sentence for an unknown name: the most similar one of `names`, or all of them."""
    # Nobody reads a list of a hundred names.
    near = closest(name, names, cutoff=0.5 if len(names) < 100 else 0.0)
    return f"Did you mean {near}?" if near else f"Known: {', '.join(names)}"


def closest(name: str, names: Collection[str], *, cutoff: float) -> str | None:
    """Return the most similar one of `names`, or None if no similarity reaches `cutoff` (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), None)


# An absolute path inside a text, without its last part.
LOCAL_PATH = re.compile(r"(?<![\w.~/\\-])/(?:[^/\s]+/)+(?=[^/\s])")
SECRET_KEY = re.compile(r"token|secret|password|(^|_)key(_|$)", re.IGNORECASE)


def redact(value: Any) -> Any:
    """Return a JSON-like value without secrets and without places on this machine: tokens, folders, user names."""
    if isinstance(value, Mapping):
        # Numbers under such names, such as `reg_tokens` of a network, are not secrets.
        secret = {k for k, v in value.items() if SECRET_KEY.search(str(k)) and v and not isinstance(v, int | float)}
        return {k: REDACTED if k in secret else redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str | Path):
        return _redact_text(str(value))
    return value


def _redact_text(text: str) -> str:
    # Names that Python could not decode in the locale of the run, which JSON cannot hold.
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    prefix = "local-dir:" if text.startswith("local-dir:") else ""
    path = text.removeprefix(prefix)
    if os.path.isabs(path) or (os.sep in path and os.path.exists(path)):
        text = f"{prefix}.../{Path(path).name}"
    text = SECRET_VALUE.sub(REDACTED, text).replace(f"{Path.home()}/", "~/")
    return LOCAL_PATH.sub(".../", re.sub(r"(/home|/Users)/[^/\s]+", "~", text))
