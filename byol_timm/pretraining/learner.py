"""BYOL on the device: the networks, their optimizer, and the step."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ..data import Batch, Images
from ..errors import ByolTimmError
from ..files import write_json
from ..training import (
    Checkpoint,
    DeviceViews,
    GraphedStep,
    LateCheck,
    create_optimizer,
    load_latest,
    optimizer_tensors,
    prepare,
    recovers,
    restore_optimizer,
    synchronize_batch_norms,
    train_step,
    triton_kernels,
)
from .launch import Run
from .plan import Plan

logger = logging.getLogger(__name__)


class Learner:
    """The networks of a plan, laid out on the device, with their optimizer.

    skipped: steps in a row that float16 skipped because gradients overflowed.
    """

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run, self.accelerator = plan, run, run.accelerator
        self.byol, settings = plan.byol, plan.settings
        # Lay out, create the optimizer, prepare, then restore: the optimizer's state follows the parameters' layout.
        self.byol.to(memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format)
        if run.processes.count > 1 and settings.sync_batch_norm:
            synchronize_batch_norms(self.byol)
        elif run.processes.count > 1 and self.accelerator.device.type == "cuda":
            # In place, except for a module that is itself a BatchNorm. torch's own drops activations of timm's layers.
            convert_sync_batchnorm(self.byol)
        if settings.compile:
            for network in self.byol.children():
                network.compile()
        optimizer = create_optimizer(
            settings.opt,
            self.byol,
            lr=plan.schedule.peak_lr,
            weight_decay=settings.weight_decay,
            no_weight_decay=self.byol.no_weight_decay(),
        )
        self.model, self.optimizer = prepare(self.accelerator, self.byol, optimizer)
        self.skipped = 0
        # A GPU's step is checked when the next one is queued, so that the GPU never waits.
        self._unchecked: list[tuple[LateCheck, int, dict[str, Tensor], Sequence[Batch]]] = []
        place = plan.views, self.accelerator.device, settings.channels_last
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        kernels = triton_kernels(*place, wanted=settings.triton_views, channels=settings.in_chans, dtype=dtype)
        self._views = DeviceViews(*place, kernels=kernels)
        self._graphed = GraphedStep(self.accelerator, self.model, self.optimizer) if settings.cuda_graph else None

    @property
    def encoder(self) -> nn.Module:
        return self.byol.encoder

    def step(self, step: int, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Train on the micro-batches of one step and return its metrics, as `train_step` does.

        Raises `ByolTimmError` for a loss or gradient that is not finite.
        """
        settings, pairs = self.plan.settings, map(self._views, batches)
        lr, decay = self.plan.schedule.lr(step), self.plan.schedule.target_decay(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _seed(settings.seed, step, self.accelerator.process_index)
        if self._graphed is not None:
            metrics = self._graphed(pairs, lr=lr, target_decay=decay)
        else:
            recomputes = settings.grad_checkpointing
            metrics = train_step(
                self.accelerator, self.model, self.optimizer, pairs, target_decay=decay, recomputes=recomputes
            )
        self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
        self._unchecked.append((LateCheck(metrics["grad_norm"]), step, metrics, batches))
        if self.accelerator.scaler is not None and recovers(self.accelerator, metrics["loss"], self.skipped):
            self._unchecked.clear()
        self.check(late=1 if self._may_check_late(step + 1) else 0)
        return metrics

    def check(self, late: int = 0) -> None:
        """Raise `ByolTimmError` if a gradient was not finite, in all steps but the last `late` ones."""
        while len(self._unchecked) > late:
            norm, step, metrics, batches = self._unchecked.pop(0)
            if not norm.is_finite():
                raise self._not_finite(step, metrics, batches)

    def _may_check_late(self, done: int) -> bool:
        """Return True if nothing of the `done` steps is measured or saved before the next step is queued on the GPU."""
        settings, schedule = self.plan.settings, self.plan.schedule
        due = any(done % every == 0 for every in (settings.log_every, settings.save_every))
        due |= schedule.evaluates(done, settings.knn_every) or self.accelerator.scaler is not None
        return self.accelerator.device.type == "cuda" and not due

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all networks and the state of the optimizer, for a checkpoint."""
        return {"byol": self.byol.state_dict(), "optimizer": optimizer_tensors(self.optimizer.optimizer)}

    def resume(self) -> Checkpoint | None:
        """Restore the newest good checkpoint and return it without the restored tensors; None for a new run."""
        if self.run.earlier is None:
            return None
        folder = self.run.folder
        checkpoint = load_latest(folder / "checkpoints")
        if checkpoint is None:
            raise ByolTimmError(f"the checkpoints in {folder} are gone. Start the run again")
        for reason in checkpoint.skipped:
            logger.warning("skipping a damaged checkpoint: %s", reason)
        self.byol.load_state_dict(checkpoint.tensors["byol"])
        restore_optimizer(self.optimizer.optimizer, checkpoint.tensors["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in checkpoint.state:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        logger.info("resumed from %s", checkpoint.path)
        rest = {name: group for name, group in checkpoint.tensors.items() if name not in ("byol", "optimizer")}
        return dataclasses.replace(checkpoint, tensors=rest)

    def _not_finite(self, step: int, metrics: dict[str, Tensor], batches: Sequence[Batch]) -> ByolTimmError:
        """Write what is known to `debug/step-N.json` and return the error for a gradient that is not finite."""
        images, lr = self.plan.splits.train, self.plan.schedule.lr(step)
        loss, norm = metrics["loss"].item(), metrics["grad_norm"].item()
        seen: list[Any] = [ordinal for batch in batches for ordinal in batch.ordinals.tolist()]
        if isinstance(images, Images):
            # Images of a stream have no fixed place in an epoch.
            seen = [images.describe(ordinal % len(images)) for ordinal in seen]
        seen = [name for names in self.run.processes.gather(seen) for name in names]
        path = self.run.folder / "debug" / f"step-{step}.json"
        if self.run.processes.is_main:
            facts = {"step": step, "lr": lr, "loss": loss, "grad_norm": norm}
            finite = {name: value if math.isfinite(value) else str(value) for name, value in facts.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**finite, "images": seen})
        return ByolTimmError(
            f"loss or gradient is not finite at step {step} (loss {loss:g}, gradient norm {norm:g}, lr {lr:g}). Lower "
            f"--lr and start again; see {path}. Checkpoints hold the last good step"
        )


def _seed(seed: int, step: int, process: int) -> None:
    """Make dropout and drop path of the online network a function of the step, like everything else."""
    digest = hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
