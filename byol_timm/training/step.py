"""One step of BYOL on the device."""

import contextlib
import importlib.util
import logging
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..byol import HEALTH
from ..data import Batch
from ..errors import ByolTimmError
from ..views import TwoViews
from .processes import average_batch_statistics

if TYPE_CHECKING:
    from ..views import TritonViews

logger = logging.getLogger(__name__)


def enable_grad_checkpointing(encoder: Any) -> None:
    """Let the encoder recompute activations in the backward pass; raise `ByolTimmError` if timm does not support it."""
    try:
        encoder.set_grad_checkpointing(True)
    except AssertionError as error:
        raise ByolTimmError(
            f"{type(encoder).__name__} cannot recompute activations. Omit --grad_checkpointing, or use a smaller batch"
        ) from error


@contextlib.contextmanager
def statistics_held(encoder: nn.Module) -> Iterator[None]:
    """Freeze the running statistics of BatchNorms, for a backward pass that recomputes batches they have counted."""
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in held:
        if count is not None:
            # Not by eval mode or without statistics: a recomputation must save the same tensors as the first pass.
            norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(count)
    try:
        yield
    finally:
        for norm, momentum, count in held:
            norm.momentum, norm.num_batches_tracked = momentum, count


MAX_SKIPPED_STEPS = 20
# Metrics of a step that are averaged over processes, and over the steps between two rows of metrics.jsonl.
METRICS = ("loss", *HEALTH)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    target_decay: float | Tensor,
    recomputes: bool = False,
) -> dict[str, Tensor]:
    """Take one step of BYOL and return its metrics: gradients of every micro-batch, optimizer, target network.

    model: a `BYOL`, prepared by the accelerator as the optimizer is. pairs: the views of each of the launch's
    `gradient_accumulation_steps` micro-batches. recomputes: whether the encoder's backward pass recomputes activations.
    On a CPU, a gradient that is not finite leaves parameters and target unchanged. On other devices without a gradient
    scaler it does not, because the step never waits for the device: check `grad_norm` before anything is saved.
    Returns the metrics of `BYOL`, averaged over micro-batches, `grad_norm`, and `representation` of view 1, of all
    micro-batches.

    The two directions of the loss share no activations once both target projections are known, so each has a backward
    pass of its own: the same gradients for half the memory. Processes exchange gradients in the very last one.
    """
    byol = accelerator.unwrap_model(model)
    accumulation = accelerator.gradient_accumulation_steps
    totals: dict[str, Tensor] = {}
    representations = []
    for number, (view1, view2) in enumerate(pairs, start=1):
        with accelerator.autocast():
            target1, target2 = byol.target_projections(view1, view2)
        for view, target, last in ((view1, target2, False), (view2, target1, number == accumulation)):
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                metrics = model(view, target=target)
                with statistics_held(byol.encoder) if recomputes else contextlib.nullcontext():
                    accelerator.backward(metrics["loss"])
            if view is view1:
                representations.append(metrics["representation"])
            for name in METRICS:
                share = accumulation if name == "loss" else 2 * accumulation
                totals[name] = totals.get(name, 0) + metrics[name].detach() / share
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in byol.parameters() if p.grad is not None])
    if accelerator.scaler is not None or norm.device.type != "cpu" or norm.isfinite():
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            byol.update_target(target_decay)
    # With several processes, gradients share memory with the buckets that are sent, and must keep it.
    optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)
    if accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        # Without SyncBatchNorm, the processes would export and resume different statistics.
        average_batch_statistics(byol)
    return {**totals, "grad_norm": norm, "representation": torch.cat(representations)}


class LateCheck:
    """Ask whether a number of a step is finite after the next step was queued, so that the device never idles."""

    def __init__(self, number: Tensor) -> None:
        self.number = torch.empty((), dtype=number.dtype, pin_memory=number.is_cuda)
        self.number.copy_(number.detach(), non_blocking=True)
        self.copied = torch.cuda.Event() if number.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def is_finite(self) -> bool:
        """Return the answer; waits for the step that the number is of, not for later ones."""
        if self.copied is not None:
            self.copied.synchronize()
        return math.isfinite(self.number.item())


class DeviceViews:
    """Make the views of a batch on the device. They are valid until the next call, which uses their memory again.

    kernels: the same views computed by Triton. The first batch is computed both ways; if the two differ, one warning
    says so and all views are computed without the kernels.
    """

    def __init__(
        self, views: TwoViews, device: torch.device, channels_last: bool, *, kernels: "TritonViews | None" = None
    ) -> None:
        self.views, self.device, self.kernels = views, device, kernels
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.last: tuple[Tensor, Tensor] | None = None
        self._checked = False

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.device)
        if self.kernels is not None and not self._checked:
            self._check(self.kernels, batch)
        if self.kernels is not None:
            return _take(self.kernels, batch)
        self.last = _take(self.views, batch, out=self.last)
        view1, view2 = (view.contiguous(memory_format=self.layout) for view in self.last)
        return view1, view2

    def _check(self, kernels: "TritonViews", batch: Batch) -> None:
        """Compare the kernels with the reference; this waits for the device, once."""
        self._checked = True
        if not kernels.agree(_take(kernels, batch), _take(self.views, batch)):
            logger.warning("the Triton views differ from the reference on this GPU, so they are not used")
            self.kernels = None


def _take(views: "TwoViews | TritonViews", batch: Batch, **settings: Any) -> tuple[Tensor, Tensor]:
    if batch.images is not None:
        return views(batch.images, batch.ordinals, **settings)
    assert batch.crops is not None
    return views.finish(batch.crops, batch.ordinals, **settings)


def triton_kernels(
    views: TwoViews,
    device: torch.device,
    channels_last: bool,
    *,
    wanted: bool | None,
    channels: int,
    dtype: torch.dtype,
) -> "TritonViews | None":
    """Return the Triton kernels for these views if they are wanted; None: on a CUDA device with Triton, if they fit.

    dtype: the number type of the views. Raises `ByolTimmError` if they are wanted and there is no CUDA GPU.
    """
    if wanted and device.type != "cuda":
        raise ByolTimmError(f"--triton_views needs a CUDA GPU ({device.type}). Omit it")
    if wanted is None:
        wanted = device.type == "cuda" and channels in (1, 3) and importlib.util.find_spec("triton") is not None
    return views.with_triton(dtype=dtype, channels_last=channels_last) if wanted else None


def recovers(accelerator: Accelerator, loss: Tensor, skipped: int) -> bool:
    """Return True if float16 can make the gradient finite with a smaller scale of the loss.

    It cannot if activations overflow: then the loss is not finite either, and batch statistics are lost. All processes
    skip a step together and get the same answer. skipped: steps in a row so far.
    """
    return 0 < skipped <= MAX_SKIPPED_STEPS and bool(accelerator.reduce(loss.float(), "mean").isfinite())
