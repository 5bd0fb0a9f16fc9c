"""The one error that byol_timm raises for faults its user can mend, and the text of others in one line."""

import re

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
