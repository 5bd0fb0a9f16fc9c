import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from byol_timm.errors import ByolTimmError
from byol_timm.training import Interrupted, Interruption

ALONE = {k: v for k, v in os.environ.items() if k not in ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")}
LAUNCHED = {**ALONE, "ACCELERATE_DYNAMO_MODE": "default"}
LOOP = """
    import sys, time
    from byol_timm.training import Interrupted, Interruption
    with Interruption() as interruption:
        print("ready", flush=True)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if interruption.requested and "stubborn" not in sys.argv:
                print(interruption.requested, flush=True)
                raise SystemExit(Interrupted(interruption.requested, 7).exit_code)
            time.sleep(0.01)
"""


def start_loop(*arguments, **kwargs):
    command = [sys.executable, "-c", textwrap.dedent(LOOP), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_becomes_a_question_and_the_shells_exit_code(number, code):
    with start_loop() as process:
        process.send_signal(number)
        assert process.stdout.read() == f"{int(number)}\n"
        assert process.wait(10) == code


@pytest.mark.parametrize("environment, pause", [(ALONE, 0.2), (LAUNCHED, 2.3)])
def test_a_second_ctrl_c_ends_the_process_at_once(environment, pause):
    with start_loop("stubborn", env=environment) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


def test_a_ctrl_c_that_the_launcher_passes_on_is_no_second_one():
    with start_loop("stubborn", env=LAUNCHED) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize("launched", [True, False])
def test_the_launchers_death_ends_a_run_that_it_started(tmp_path, launched):
    launcher = """
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", sys.argv[1]])
        sys.stdin.read()
    """
    environment = LAUNCHED if launched else ALONE
    code = textwrap.dedent(LOOP).replace("30", "2" if not launched else "30")
    command = [sys.executable, "-c", textwrap.dedent(launcher), code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        # The pipe closes when the orphan has ended too.
        assert process.stdout.read() == (f"{int(signal.SIGHUP)}\n" if launched else "")


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


def test_the_error_says_what_happened_and_how_to_go_on():
    error = Interrupted(signal.SIGTERM, 120)
    assert isinstance(error, ByolTimmError)
    assert (str(error), error.exit_code) == ("terminated, stopped at step 120. Continue with --resume", 143)
