"""Open a run: its processes, its locked folder, its signals."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import PretrainConfig, check, output_dir
from ..encoders import check_push
from ..errors import ByolTimmError
from ..training import (
    Accelerator,
    Checkpoint,
    Interruption,
    Processes,
    check_resumable,
    choose_kernels,
    claim_folder,
    create_accelerator,
    load_latest,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The processes and the folder of one training.

    earlier: the checkpoint to resume from, without its tensors; None for a new run. commit: deletes the run that an
    overwrite replaces. stack: contexts that end with the run.
    """

    folder: Path
    processes: Processes
    interruption: Interruption
    earlier: Checkpoint | None
    commit: Callable[[], None]
    stack: contextlib.ExitStack

    @property
    def accelerator(self) -> Accelerator:
        return self.processes.accelerator


@contextlib.contextmanager
def open_run(config: PretrainConfig) -> Iterator[Run]:
    """Check the config, start the processes, and lock the folder until the end; a dry run needs no folder."""
    check(config)
    folder = output_dir(config)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(Processes(create_accelerator(config.report_to, folder)))
        choose_kernels(processes.accelerator.device, deterministic=config.deterministic)
        earlier = None
        # Only the main process holds the folder.
        commits: list[Callable[[], None]] = []
        if not config.dry_run:
            processes.on_main(lambda: commits.append(_claim(folder, config, stack)))
            earlier = _earlier(folder, processes) if config.resume else None
        interruption = stack.enter_context(Interruption(max_minutes=config.max_time))
        yield Run(folder, processes, interruption, earlier, commits[0] if commits else lambda: None, stack)


def _claim(folder: Path, config: PretrainConfig, stack: contextlib.ExitStack) -> Callable[[], None]:
    if config.push_to_hub:
        check_push(config.push_to_hub, public=config.public)
    if config.resume and not config.overwrite:
        check_resumable(folder)
    return stack.enter_context(claim_folder(folder, resume=config.resume, overwrite=config.overwrite))


def _earlier(folder: Path, processes: Processes) -> Checkpoint | None:
    checkpoint = load_latest(folder / "checkpoints", groups=())
    # At once: processes that resume from different steps, or from none, would wait for each other.
    other_steps = f"finds other checkpoints in {folder} than process 0. Give all hosts one shared --output_dir"
    processes.check_same(str(checkpoint and checkpoint.step), other_steps)
    if checkpoint is None and (folder / "encoder").exists():
        raise ByolTimmError(
            f"{folder} has an encoder but no checkpoint to resume from. Replace it with --overwrite, or choose another "
            "--output_dir"
        )
    return checkpoint
