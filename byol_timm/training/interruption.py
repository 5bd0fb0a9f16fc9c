"""Requests to stop a run early: signals, the launcher's death, a deadline."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ..errors import ByolTimmError

# A launcher forwards the Ctrl-C that the terminal has sent to its processes already. That is not a second one.
_ONE_PRESS_SECONDS = 2.0
_REASONS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the launcher died",
    signal.SIGALRM: "--max_time is up",
}


class Interrupted(ByolTimmError):
    """The run stopped early and can be resumed; the exit code is 128 + the signal number, as in a shell."""

    agreed = True

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"{_REASONS[signal.Signals(signal_number)]}, stopped at step {step}. Continue with --resume")
        self.exit_code = 128 + signal_number


class Interruption:
    """Record SIGINT and SIGTERM as a context manager; the training loop reads `requested` at every step.

    max_minutes: from now until the deadline. A second Ctrl-C ends the process at once.
    """

    def __init__(self, *, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        # Set by accelerate launch and torchrun, and by nobody by hand.
        launched = "ACCELERATE_DYNAMO_MODE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid() if launched else None
        self._signal: int | None = None
        self._signal_time = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> int | None:
        """The signal to stop for, or None: SIGINT, SIGTERM, SIGHUP (the launcher died), SIGALRM (the deadline)."""
        if self._signal is not None:
            return self._signal
        if self._parent is not None and os.getppid() != self._parent:
            return signal.SIGHUP
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return signal.SIGALRM
        return None

    def __enter__(self) -> "Interruption":
        # Python lets no other thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signal_time = number, now
        elif number == signal.SIGINT and (self._parent is None or now - self._signal_time > _ONE_PRESS_SECONDS):
            os._exit(128 + number)
