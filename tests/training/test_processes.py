import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from forking import run_together
from launching import errors_of, launch

from byol_timm.errors import ByolTimmError
from byol_timm.training import Processes


def work_longer_than_the_limit():
    if os.environ["RANK"] == "0":
        time.sleep(2.5)
    return f"prepared by {os.environ['RANK']}"


def message_of(act, *arguments):
    with pytest.raises(ByolTimmError) as caught:
        act(*arguments)
    return str(caught.value)


def fail():
    raise ByolTimmError(f"no token on {os.environ['RANK']}")


def talk():
    """Everything that processes say to each other, while the first of them is late."""
    rank = int(os.environ["RANK"])
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=2))
    with Processes(Accelerator(kwargs_handlers=[limit])) as processes:
        assert processes.on_main(work_longer_than_the_limit) == "prepared by 0"
        with processes.main_first():
            assert work_longer_than_the_limit() == f"prepared by {rank}"
            if rank == 0:
                Path("downloaded").touch()
            assert Path("downloaded").exists()
        work_longer_than_the_limit()
        assert processes.gather(rank) == [0, 1]
        assert processes.agree(15 if rank == 1 else None) == 15

        assert message_of(processes.on_main, fail) == "no token on 0"
        assert message_of(processes.raise_first, ByolTimmError("bad image") if rank == 1 else None) == "bad image"
        assert message_of(processes.check_same, str(rank), "has other files") == "process 1 has other files"
        processes.check_same("all", "differs")
        processes.raise_first(None)

        work_longer_than_the_limit()
        try:
            dist.barrier()
        except RuntimeError:
            Path(f"the ordinary group gave up on {rank}").touch()
        processes.wait()


FAIL = """
    import os
    from accelerate import Accelerator
    from byol_timm import cli
    from byol_timm.errors import ByolTimmError
    from byol_timm.training import Processes

    def main():
        rank = int(os.environ["RANK"])
        with Processes(Accelerator()) as processes:
            if rank > 0:
                raise ByolTimmError("no images in /data")
            processes.wait()

    cli.run(main)
"""


def test_the_first_process_may_work_longer_than_the_limit_of_ordinary_groups(tmp_path):
    result = run_together(tmp_path, talk)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "the ordinary group gave up on 1").exists()


@pytest.mark.slow
def test_an_error_of_two_of_three_processes_is_one_line_and_not_that_of_a_lost_one(tmp_path):
    result = launch(tmp_path, FAIL, processes=3)
    assert result.returncode != 0
    assert errors_of(result) == ["byol_timm: error: no images in /data"]


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Processes(Accelerator())
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_agrees_with_itself(processes):
    with processes.main_first():
        assert processes.on_main(lambda: 5) == 5
    assert (processes.agree(None), processes.agree(2), processes.gather("a")) == (None, 2, ["a"])
    processes.check_same("text", "differs")
    with pytest.raises(ByolTimmError, match="bad image"):
        processes.raise_first(ByolTimmError("bad image"))


@pytest.mark.parametrize(
    "error, message",
    [
        (
            torch.distributed.DistBackendError("NCCL error in: a.cpp:7, ncclInvalidUsage\nDuplicate GPU detected"),
            r"the processes cannot communicate \(Duplicate GPU detected\)",
        ),
        (
            RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            r"another process of this run is gone.*Connection closed by peer.*--resume",
        ),
    ],
)
def test_an_error_about_other_processes_keeps_its_last_line(processes, error, message):
    with pytest.raises(ByolTimmError, match=message) as caught, processes:
        raise error
    assert caught.value.exit_code == 1


def test_other_errors_pass(processes):
    with pytest.raises(RuntimeError, match="shapes differ"), processes:
        raise RuntimeError("shapes differ")
