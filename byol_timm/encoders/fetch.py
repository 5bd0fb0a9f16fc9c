"""Fetch encoders from the Hub, and find out quickly if the Hub can be reached: its own client retries for a minute."""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import ByolTimmError, one_line
from .check import CONFIG, RECORD, WEIGHTS

logger = logging.getLogger(__name__)

PROBE_SECONDS = 3.0
REMEMBERED_SECONDS = 60.0
# When and why addresses could not be reached.
_unreached: dict[str, tuple[float, str]] = {}
_turn = threading.RLock()
# What it means that a repository lacks a file.
WITHOUT = {CONFIG: "is it a timm model?", WEIGHTS: "its weights are in another, possibly unsafe, format"}


def fetch_encoder(name: str) -> Path:
    """Return the cached folder of `user/name` or `user/name@revision`, not checked yet.

    Downloads config, weights and byol.json, by name; without a network, warns and uses the cached copy. Raises
    `ByolTimmError` when there is none, and for a repository that is missing, private, gated or not a timm model.
    """
    repo_id, _, revision = name.removeprefix("hf-hub:").partition("@")
    check_repo_name(repo_id)
    unreachable = why_unreachable()
    if unreachable:
        logger.warning(f"{unreachable}; using the cached copy of {repo_id}")
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision or None,
                allow_patterns=[CONFIG, WEIGHTS, RECORD],
                local_files_only=unreachable is not None,
            )
        )
    except RepositoryNotFoundError as error:
        raise ByolTimmError(
            f"{repo_id} is not on the Hub, or private, or gated. Check the name, run `hf auth login`, or accept "
            f"its terms at {constants.ENDPOINT}/{repo_id}"
        ) from error
    except RevisionNotFoundError as error:
        raise ByolTimmError(f"{repo_id} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        reason = unreachable or f"the Hub did not deliver it ({one_line(error.__cause__ or error)})"
        raise ByolTimmError(f"{repo_id} is not in the cache and {reason}. Try again later") from error
    except (HTTPError, OSError) as error:
        raise ByolTimmError(f"{repo_id} could not be fetched ({one_line(error)}). Try again later") from error
    for file, meaning in WITHOUT.items():
        if not (folder / file).is_file():
            raise ByolTimmError(f"{repo_id} has no {file}" + (" in the cache" if unreachable else f": {meaning}"))
    return folder


def check_repo_name(repo_id: str) -> None:
    """Raise `ByolTimmError` for what cannot be the name of a Hub repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ByolTimmError(
            f"{repo_id!r} is not the name of a Hub repository. Use user/name with letters, digits, '-', '_' and '.'"
        ) from None


def why_unreachable() -> str | None:
    """Return why the Hub cannot be reached, within 5 seconds; None if it can."""
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
    """Restrict the Hub's client to its cache while the Hub cannot be reached; yield the reason, or None.

    Asks an unreachable Hub again after a minute. Only one thread at a time can be inside.
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
