import os
import signal
import time

import pytest
from forking import CONTEXT, forked

from byol_timm.errors import ByolTimmError
from byol_timm.training import Interrupted, Interruption

LAUNCHED = {"ACCELERATE_DYNAMO_MODE": "default"}


def loop(pipe, environment=(), stubborn=False, seconds=30):
    """A training loop that sends "ready" and then the signal it stops for, unless it is stubborn."""
    for name in ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    with Interruption() as interruption:
        pipe.send("ready")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if interruption.requested and not stubborn:
                pipe.send(interruption.requested)
                raise SystemExit(Interrupted(interruption.requested, 7).exit_code)
            time.sleep(0.01)


def launcher(pipe, *arguments):
    """A process that starts a loop and does not end by itself."""
    if os.fork() == 0:
        try:
            loop(pipe, *arguments)
        finally:
            os._exit(0)
    pipe.close()
    time.sleep(60)


@pytest.fixture
def pipe():
    ours, theirs = CONTEXT.Pipe()
    with ours, theirs:
        yield ours, theirs


def ready(pipe):
    assert pipe[0].poll(60)
    return pipe[0].recv() == "ready"


def ended(process, seconds=10):
    process.join(seconds)
    return process.exitcode


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_becomes_a_request_and_the_shells_exit_code(pipe, number, code):
    with forked(loop, pipe[1]) as process:
        assert ready(pipe)
        os.kill(process.pid, number)
        assert ended(process) == code
        assert pipe[0].recv() == number


@pytest.mark.parametrize("environment, pause", [({}, 0.2), (LAUNCHED, 2.3)])
def test_a_second_ctrl_c_ends_the_process_at_once(pipe, environment, pause):
    with forked(loop, pipe[1], environment, True) as process:
        assert ready(pipe)
        os.kill(process.pid, signal.SIGINT)
        assert ended(process, pause) is None
        os.kill(process.pid, signal.SIGINT)
        assert ended(process) == 130


def test_a_ctrl_c_that_the_launcher_forwards_is_not_a_second_one(pipe):
    with forked(loop, pipe[1], LAUNCHED, True) as process:
        assert ready(pipe)
        os.kill(process.pid, signal.SIGINT)
        assert ended(process, 0.2) is None
        os.kill(process.pid, signal.SIGINT)
        assert ended(process, 0.5) is None


@pytest.mark.parametrize("environment", [LAUNCHED, {}])
def test_the_launchers_death_ends_a_run_that_it_started(pipe, environment):
    ours, theirs = pipe
    with forked(launcher, theirs, environment, False, 30 if environment else 2) as process:
        theirs.close()
        assert ready(pipe)
        process.kill()
        # The pipe closes when the orphan has ended too.
        assert ours.poll(20)
        if environment:
            assert ours.recv() == signal.SIGHUP
        with pytest.raises(EOFError):
            ours.recv()


def test_the_deadline_asks_to_stop():
    with Interruption(max_minutes=0.1 / 60) as interruption:
        assert interruption.requested is None
        time.sleep(0.15)
        assert interruption.requested == signal.SIGALRM


def test_old_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_error_says_what_happened_and_how_to_continue():
    error = Interrupted(signal.SIGTERM, 120)
    assert isinstance(error, ByolTimmError)
    assert (str(error), error.exit_code) == ("terminated, stopped at step 120. Continue with --resume", 143)
