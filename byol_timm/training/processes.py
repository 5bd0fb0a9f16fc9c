"""What `accelerate launch` gave the run: checked, and what its processes have to agree on."""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .. import errors
from ..errors import ByolTimmError, one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# Of glibc's malloc.h: never hand large blocks back one by one; never trim the heap.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class LostProcess(ByolTimmError):
    """Another process of the run does not answer any more."""

    exit_code = 1


def create_accelerator(trackers: Sequence[str], folder: Path) -> Accelerator:
    """The Accelerator of this process, with trackers that write below `folder`.

    Raises `ByolTimmError` for engines and precisions that cannot train BYOL, processes that do not see each other, and
    trackers that are unknown or not installed.
    """
    for variable, engine in _ENGINES.items():
        if _is_set(variable):
            raise ByolTimmError(f"{engine} splits what BYOL averages; launch with plain multi-GPU instead ({variable})")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp8":
        raise ByolTimmError("mixed precision fp8 is not supported. Use bf16")
    _check_trackers(trackers)
    world = int(os.environ.get("WORLD_SIZE", 1))
    unseen = f"{world} processes were started but they do not see each other. On a CPU set ACCELERATE_USE_CPU=true"
    # Accelerate would wait for the others here, and then train without them.
    if world > 1 and not torch.accelerator.is_available() and not _is_set("ACCELERATE_USE_CPU"):
        raise ByolTimmError(unseen)
    accelerator = Accelerator(
        log_with=list(trackers) or None,
        project_dir=str(folder),
        # Gradients lie in the buckets that travel, not beside them. Buckets keep their 25 MB: ResNet-50 has six, of
        # which all but the last travel behind the backward pass. No static graph: torch's count of its passes does not
        # survive those that keep their gradients to themselves, which every step has.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if world > 1 and accelerator.num_processes == 1:
        raise ByolTimmError(unseen)
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
        if accelerator.mixed_precision == "fp16":
            raise ByolTimmError("mixed precision fp16 needs a GPU. Use bf16 or no")
        if accelerator.mixed_precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
            logger.warning("this CPU has no bf16 instructions: expect bf16 to be several times slower than no")
        if accelerator.num_processes == 1 and _threads_are_left_open():
            torch.set_num_threads(_cores())
    elif accelerator.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ByolTimmError("this GPU has no bf16. Use fp16 or no")
    return accelerator


def _keep_freed_memory() -> None:
    """Let glibc keep what activations leave for the next step, instead of asking Linux for zeroed pages every time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def _threads_are_left_open() -> bool:
    """Whether the one thread that Accelerate's launcher gives a process on a CPU is its default and nobody's wish."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        launcher = psutil.Process().parent()
        return (
            launcher is not None
            and "OMP_NUM_THREADS" not in launcher.environ()
            and not any(word.startswith("--num_cpu_threads_per_process") for word in launcher.cmdline())
        )
    except psutil.Error:
        return False


def _cores() -> int:
    """Cores that this process may use, by affinity and container, not counting the second thread of one."""
    import joblib

    return joblib.cpu_count(only_physical_cores=True)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _check_trackers(trackers: Sequence[str]) -> None:
    available = {str(tracker) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker not in {str(known) for known in LOGGER_TYPE_TO_CLASS}:
            known = ", ".join(sorted(str(name) for name in LOGGER_TYPE_TO_CLASS))
            raise ByolTimmError(f"unknown tracker {tracker!r} in --report_to. Known: {known}")
        if tracker not in available:
            raise ByolTimmError(
                f"--report_to {tracker} needs a package that is not installed. Run pip install {tracker}"
            )


def prepare(
    accelerator: Accelerator, byol: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """The network, in DistributedDataParallel where there are several processes, and its optimizer, on the device."""
    model, optimizer = accelerator.prepare(byol, optimizer)
    if isinstance(model, DistributedDataParallel):
        # Every process keeps batch statistics of its own, or all share them; copying those of the first is neither.
        # Set here because torch 2.14 warns of the argument of that name and older ones do not know its successor.
        model.broadcast_buffers = False
    return model, optimizer


@contextlib.contextmanager
def losing_processes_told() -> Iterator[None]:
    """A `LostProcess` in place of the error that another process's end, or a cut cable, is to torch."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no type of their own; every step has a question that goes over gloo, on GPUs too.
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        # If that one met an error, it tells it only now, and the launcher ends it when this one ends.
        time.sleep(errors.ALONE_SECONDS + 1)
        raise LostProcess(
            "another process of this run is gone, or its host or the network; the log of that one says why. "
            "Start anew with --resume"
        ) from error


def on_main_process(accelerator: Accelerator, act: Callable[[], Result]) -> Result:
    """What `act` returns on the main process, on every process; a `ByolTimmError` of it is raised on all of them."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except ByolTimmError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_first(failure: ByolTimmError | None) -> None:
    """Raise, on every process, the first failure that any process met; every process must call it."""
    failures = [known for known in gather_object([failure]) if known is not None]
    if failures:
        raise failures[0]


@contextlib.contextmanager
def exhaustion_told(batch_size: int, image_size: int) -> Iterator[None]:
    """A `ByolTimmError` for a full disk, and for full memory, where a smaller batch would be another training."""
    try:
        yield
    except RuntimeError as error:
        # On a CPU the error has no type of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = one_line(error)[:120]
        raise ByolTimmError(
            f"out of memory with {batch_size} images of {image_size}x{image_size} at once ({reason}). Lower "
            "--batch_size and make up for it with ACCELERATE_GRADIENT_ACCUMULATION_STEPS=N before the command, or try "
            "--grad_checkpointing or accelerate launch --mixed_precision bf16"
        ) from error
    except (OSError, SafetensorError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise ByolTimmError(f"disk full ({one_line(error)}). Make room and go on with --resume") from error


def check_same(what: str, fault: str) -> None:
    """Raise `ByolTimmError` unless every process has the same text; `fault` says what the odd one does."""
    digests = gather_object([hashlib.sha256(what.encode()).hexdigest()])
    if len(set(digests)) > 1:
        odd = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise ByolTimmError(f"process {odd} {fault}")


@torch.no_grad()
def average_batch_statistics(module: nn.Module) -> None:
    """Give every process the mean of all processes' running statistics; every process must call it.

    For devices other than CUDA's, where BatchNorms are not synchronised. One of our own would stand in for those of
    torch and of timm and wait for an exchange per layer and pass (ResNet-50: 328 a step). Processes on CPUs are for
    trying a launch, and there the statistics of each one's own batch do.
    """
    statistics = [
        buffer
        for norm in module.modules()
        if isinstance(norm, _BatchNorm)
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    if not statistics:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for buffer, mean in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(mean.view_as(buffer))
