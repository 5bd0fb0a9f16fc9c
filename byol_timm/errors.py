"""The one error that byol_timm raises for faults its user can mend, and the text of others in one line."""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}")
REDACTED = "[redacted]"


class ByolTimmError(ValueError):
    """A fault of the input, the settings or the machine, told in one line: what, which value, what to do.

    Recipes print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2
    # Whether all processes of a launch stop for it, so that one of them is enough to tell it.
    agreed = False


# Seconds after which a process other than the first tells an error of its own: had the first met it too, the launcher
# would have ended this one by then.
ALONE_SECONDS = 10.0


def one_line(error: object) -> str:
    """What an error says, on one line of at most 200 characters and without tokens of the Hub."""
    text = " ".join(SECRET_VALUE.sub(REDACTED, str(error)).split())
    return text[:200] or type(error).__name__


def nearest(name: str, names: Collection[str]) -> str:
    """Return the sentence for an unknown name: the most similar one of `names`, or all of them."""
    # Nobody reads a list of a hundred names.
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5 if len(names) < 100 else 0.0)
    return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}"


SECRET_KEY = re.compile(r"token|secret|password|(^|_)key(_|$)", re.IGNORECASE)


def redact(value: Any) -> Any:
    """`value` (JSON-like) without secrets and folders of this machine: neither tokens nor home or user names."""
    if isinstance(value, Mapping):
        # Numbers under such names, as `reg_tokens` of a network, are no secrets.
        secret = {k for k, v in value.items() if SECRET_KEY.search(str(k)) and v and not isinstance(v, int | float)}
        return {k: REDACTED if k in secret else redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        # Names that Python could not decode in the locale of the run, which JSON cannot hold.
        value = value.encode(errors="surrogateescape").decode(errors="replace")
        if Path(value).is_absolute():
            value = f".../{Path(value).name}"
        value = SECRET_VALUE.sub(REDACTED, value)
        return re.sub(r"(/home|/Users)/[^/\s]+", "~", value.replace(str(Path.home()) + "/", "~/"))
    return value
