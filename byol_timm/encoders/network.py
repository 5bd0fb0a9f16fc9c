"""Whether the Hub can be reached: asked once and briefly, where its client would try again for most of a minute."""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterator

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError

from ..errors import one_line

PROBE_SECONDS = 3.0
# When and why addresses could not be reached.
_unreached: dict[str, tuple[float, str]] = {}
REMEMBERED_SECONDS = 60.0
_turn = threading.RLock()


def why_unreachable() -> str | None:
    """Why the Hub cannot be reached, or None; known within 5 seconds."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answers: queue.Queue[str | None] = queue.Queue()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            answers.put(None)
        except (HTTPError, OSError) as error:
            answers.put(f"{constants.ENDPOINT} cannot be reached ({one_line(error)})")

    # In a thread, since the look-up of the name has no time limit of its own.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=PROBE_SECONDS + 1)
    except queue.Empty:
        return f"{constants.ENDPOINT} does not answer"


@contextlib.contextmanager
def cache_alone_without_network() -> Iterator[str | None]:
    """Inside, the client of the Hub looks into its cache alone if the Hub cannot be reached; gives the reason, or None.

    A Hub that could not be reached is asked for again after a minute. One thread at a time is inside.
    """
    with _turn:
        if constants.HF_HUB_OFFLINE:
            yield None
            return
        asked, reason = _unreached.get(constants.ENDPOINT, (-math.inf, None))
        if time.monotonic() - asked > REMEMBERED_SECONDS:
            reason = why_unreachable()
            if reason is not None:
                _unreached[constants.ENDPOINT] = (time.monotonic(), reason)
        constants.HF_HUB_OFFLINE = reason is not None
        try:
            yield reason
        finally:
            constants.HF_HUB_OFFLINE = False
