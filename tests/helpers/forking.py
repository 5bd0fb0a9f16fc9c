"""Start processes from a server that has imported byol_timm already, which saves them the seconds of the imports."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import subprocess
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["byol_timm.pretraining", "sklearn.datasets"])


@contextlib.contextmanager
def forked(function, *arguments):
    """A process that runs `function`, ended at the exit if it has not ended by itself."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def exit_code_of(function, *arguments):
    with forked(function, *arguments) as process:
        process.join(120)
        return process.exitcode


def run_together(folder, function, *arguments, processes=2):
    """Run `function` in processes that make up a launch; like torchrun, end all of them when one fails.

    Their working directory is `folder`. Returns what `subprocess.run` would.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = CONTEXT.Barrier(processes)
    with contextlib.ExitStack() as stack:
        group = [
            stack.enter_context(forked(_member, folder, rank, processes, port, start, function, arguments))
            for rank in range(processes)
        ]
        waiting = list(group)
        while waiting:
            multiprocessing.connection.wait([process.sentinel for process in waiting], 300)
            ended = [process for process in waiting if process.exitcode is not None]
            assert ended, "nothing has ended in 300 s"
            waiting = [process for process in waiting if process.exitcode is None]
            if any(process.exitcode for process in ended):
                break
        code = max((abs(process.exitcode) for process in group if process.exitcode is not None), default=0)
    outputs = ["".join((folder / f"{rank}.{kind}").read_text() for rank in range(processes)) for kind in ("out", "err")]
    return subprocess.CompletedProcess(function.__name__, code, *outputs)


def _member(folder, rank, world, port, start, function, arguments):
    os.chdir(folder)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{world}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(Path(f"{rank}.{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    start.wait(120)
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
