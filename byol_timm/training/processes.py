"""The processes of a launch: the Accelerator, what they must agree on, and how they report errors."""

import contextlib
import errno
import hashlib
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator as Accelerator
from accelerate import DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..errors import ByolTimmError, count_failure, one_line, report

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# How long processes wait for one that downloads, prepares images or pushes. torch's own limit is 10 minutes on GPUs.
PATIENCE = timedelta(hours=24)
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class LostProcess(ByolTimmError):
    """Another process of the run does not answer."""

    exit_code = 1
    follows_another = True


class Processes:
    """Let the processes of a launch exchange values and errors; every process must call the same methods.

    They talk over gloo, so nothing waits for a GPU, and wait up to `PATIENCE`. As a context manager, it reports an
    error before the other processes notice that this one is gone, then ends the training of the accelerator.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count = accelerator.num_processes
        self.is_main = accelerator.is_main_process
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None
        self._group = cast(dist.ProcessGroup | None, group)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            lost = _lost(error)
            if self.count > 1 and error is not None:
                self._report(lost or error)
            if lost is not None:
                raise lost from error
        finally:
            self.accelerator.end_training()

    def _report(self, error: BaseException) -> None:
        if isinstance(error, ByolTimmError):
            report(error)
            return
        if isinstance(error, Exception):
            # At once: the launcher ends this process soon after another one has ended.
            traceback.print_exception(error)
        count_failure()

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def on_main(self, act: Callable[[], Result]) -> Result:
        """Call `act` on the main process only; return its result, or raise its `ByolTimmError`, on all of them."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = act()
            except ByolTimmError as error:
                outcome[1] = error
        if self.count > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            outcome[1].agreed = True
            raise outcome[1]
        return cast(Result, outcome[0])

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on the main process, then on the others, which find what it has downloaded."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier(group=self._group)

    def agree(self, requested: int | None) -> int | None:
        """Return the largest signal number that any process was asked to stop for."""
        number = torch.tensor(requested or 0)
        if self.count > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return int(number) or None

    def raise_first(self, failure: ByolTimmError | None) -> None:
        """Raise, on every process, the first failure of any process."""
        failures = [known for known in self.gather(failure) if known is not None]
        if failures:
            failures[0].agreed = True
            raise failures[0]

    def check_same(self, text: str, fault: str) -> None:
        """Raise `ByolTimmError` unless all processes have the same text; `fault` says what the odd one does."""
        digests = self.gather(hashlib.sha256(text.encode()).hexdigest())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            error = ByolTimmError(f"process {odd[0]} {fault}")
            error.agreed = True
            raise error


def _lost(error: BaseException | None) -> LostProcess | None:
    """Turn torch's error about its connections into `LostProcess`, with the last line of it; None for another error."""
    # gloo's errors have no type of their own.
    by_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    if not by_gloo and not isinstance(error, dist.DistError):
        return None
    reason = one_line((str(error).strip().splitlines() or [""])[-1])
    if not by_gloo:
        return LostProcess(
            f"the processes cannot communicate ({reason}). Set NCCL_DEBUG=INFO to see more, continue with --resume"
        )
    return LostProcess(
        f"another process of this run is gone, or its host or the network ({reason}); see the log of that process. "
        "Continue with --resume"
    )


def create_accelerator(trackers: Sequence[str], folder: Path) -> Accelerator:
    """Create the Accelerator of this process, with trackers that write below `folder`.

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
    try:
        accelerator = Accelerator(
            log_with=list(trackers) or None,
            project_dir=str(folder),
            # Gradients share memory with the buckets that are sent. Buckets keep their 25 MB: all but the last of
            # ResNet-50's six are sent during the backward pass. No static graph: torch's count of passes does not
            # support passes that do not exchange gradients, and every step has one.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except dist.DistError as error:
        raise cast(LostProcess, _lost(error)) from error
    if world > 1 and accelerator.num_processes == 1:
        raise ByolTimmError(unseen)
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise ByolTimmError("mixed precision fp16 needs a GPU. Use bf16 or no")
        if accelerator.mixed_precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
            logger.warning("this CPU has no bf16 instructions: expect bf16 to be several times slower than no")
        if accelerator.num_processes == 1 and _launcher_limited_threads():
            torch.set_num_threads(_cores())
    elif accelerator.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ByolTimmError("this GPU has no bf16. Use fp16 or no")
    return accelerator


def choose_kernels(device: torch.device, *, deterministic: bool) -> None:
    """Let a CUDA GPU multiply float32 matrices as TF32; with `deterministic`, use only kernels that repeat exactly."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    if deterministic:
        # cuBLAS reads it at its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)


def _launcher_limited_threads() -> bool:
    """Return True if OMP_NUM_THREADS=1 was set by `accelerate launch` rather than by the user."""
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
    """Return the number of physical cores that affinity and container leave to this process."""
    import joblib

    return int(joblib.cpu_count(only_physical_cores=True))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _check_trackers(trackers: Sequence[str]) -> None:
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(tracker) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker not in known:
            raise ByolTimmError(f"unknown tracker {tracker!r} in --report_to. Known: {', '.join(known)}")
        if tracker not in available:
            raise ByolTimmError(
                f"--report_to {tracker} needs a package that is not installed. Run pip install {tracker}"
            )


def prepare(
    accelerator: Accelerator, byol: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Return the network, in DistributedDataParallel for several processes, and its optimizer, on the device."""
    model, optimizer = accelerator.prepare(byol, optimizer)
    if isinstance(model, DistributedDataParallel):
        # Processes either keep batch statistics of their own or share them; copying those of the first is neither.
        # Set here because torch 2.14 warns of the argument of that name and older ones do not know its successor.
        model.broadcast_buffers = False
    return model, optimizer


@contextlib.contextmanager
def explain_exhaustion(batch_size: int, image_size: int) -> Iterator[None]:
    """Turn errors about a full disk or full memory into `ByolTimmError` with advice."""
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
        raise ByolTimmError(f"disk full ({one_line(error)}). Free some space and continue with --resume") from error


@torch.no_grad()
def average_batch_statistics(module: nn.Module) -> None:
    """Give every process the mean of all processes' running statistics; every process must call it.

    For devices other than CUDA's, where BatchNorms are not synchronised.
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
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(mean.view_as(buffer))
