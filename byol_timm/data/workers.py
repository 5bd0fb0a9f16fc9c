"""Worker processes that read and decode."""

import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal

from torch.utils.data import DataLoader

from ..errors import ByolTimmError

logger = logging.getLogger(__name__)

OnBadImage = Literal["skip", "error"]
MAX_BAD = 0.05
# Seconds between checks of silent workers, and until they count as hanging.
WORKER_POLL, WORKER_TIMEOUT = 5.0, 600.0
# Decoding images of so many bytes in all is faster than starting workers.
FEW_BYTES = 2**24
PREFETCH = 2


class WorkerError(ByolTimmError):
    """A data-loading worker died or hangs."""

    exit_code = 1


class BadImages(dict[int, str]):
    """Images of a dataset that cannot be read and were replaced, each with the reason; `quiet`: log none."""

    def __init__(self, name: str, num_images: int, on_bad_image: OnBadImage, *, quiet: bool = False) -> None:
        super().__init__()
        self.quiet = quiet
        self.name, self.num_images, self.on_bad_image = name, num_images, on_bad_image

    def note(self, bad: dict[int, str]) -> None:
        """Remember and report images that cannot be read."""
        for index, reason in bad.items():
            if self.on_bad_image == "error":
                raise ByolTimmError(f"image cannot be read: {reason}. Repair or delete it, or use --on_bad_image skip")
            if index not in self:
                self[index] = reason
                if len(self) % 1000 == 1 and not self.quiet:
                    logger.warning("unreadable image replaced (%d so far): %s", len(self), reason)

    def check(self, count: int, seen: int) -> None:
        """Stop when too many images cannot be read."""
        if count > MAX_BAD * max(seen, min(1000, self.num_images)):
            first = next(iter(self.values()))
            raise ByolTimmError(
                f"{count} of {seen} images of {self.name} cannot be read; the first: {first}. Check the files"
            )


def in_workers(
    reader: Any, requests: Iterable[Any], workers: int, request_bytes: int, pin: bool = False
) -> Generator[Any]:
    """Yield the reader's answers to the requests, in their order, prepared by worker processes.

    pin: put them into memory that CUDA copies from while other work runs.
    """
    if workers:
        _check_shared_memory(request_bytes * (workers * PREFETCH + 1))
    loader: DataLoader[Any] = DataLoader(
        reader,
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        timeout=WORKER_POLL if workers else 0,
        worker_init_fn=_start_worker,
        pin_memory=pin,
    )
    answers, waited = _started(loader), 0.0
    fault = f"no data from the workers for {WORKER_TIMEOUT:.0f} s"
    while waited < WORKER_TIMEOUT:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader timed out" in str(error):
                waited += WORKER_POLL
                continue
            death = re.match(r"DataLoader (worker \(pid.*(killed by signal: [\w ]+|exited unexpectedly))", str(error))
            if not death:
                raise
            fault = f"data loading {death[1]}"
            break
        except (EOFError, ConnectionError):
            # It was killed while it sent an answer.
            fault = "data loading worker exited unexpectedly"
            break
        waited = 0.0
        yield answer
    # The last reference to the loader: this ends the other workers.
    del answers
    raise WorkerError(f"{fault}. Often too little (shared) memory or a broken image: retry with --workers 0 to find it")


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return an iterator that reports dead workers when asked for more, and does not interrupt other code."""
    handler = signal.getsignal(signal.SIGCHLD)
    answers = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return answers


def _start_worker(_: int) -> None:
    # An own process group: Ctrl-C and the launcher's signals go to the main process only, which ends the workers.
    os.setpgid(0, 0)


def _check_shared_memory(needed: int, folder: str = "/dev/shm") -> None:
    if not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ByolTimmError(
            f"workers need about {needed / 2**20:.0f} MB of shared memory, {folder} has {free / 2**20:.0f} MB free. "
            "Use --workers 0, fewer workers, or docker --shm-size"
        )


def worker_count(workers: int | None, num_bytes: float = math.inf) -> int:
    """Return `workers`, else one per core of this process, at most 8, or 0 for few bytes of decoded images."""
    if workers is not None:
        return workers
    if num_bytes < FEW_BYTES:
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
