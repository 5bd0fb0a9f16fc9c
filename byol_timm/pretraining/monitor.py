"""Watch a training run: metrics, the collapse alarm, kNN accuracy and the online linear probe."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import Batch, Splits
from ..encoders import encoder_width, has_batch_norm
from ..errors import ByolTimmError
from ..evaluation import Examples, LinearProbe
from ..training import METRICS, Checkpoint, CollapseAlarm, MetricsLog, effective_rank, read_metrics
from .launch import Run
from .learner import Learner
from .plan import Plan

logger = logging.getLogger(__name__)


class Monitor:
    """Average the metrics between two lines, log them, and evaluate the encoder when due.

    held_out: images for kNN, and `log`, on the main process only.
    """

    def __init__(self, plan: Plan, learner: Learner, run: Run, checkpoint: Checkpoint | None) -> None:
        self.plan, self.learner, self.run = plan, learner, run
        schedule, accelerator = plan.schedule, run.accelerator
        state: dict[str, Any] = checkpoint.state if checkpoint else {}
        self.alarm = CollapseAlarm(
            opt=plan.settings.opt,
            lr=plan.settings.lr,
            batch_size=schedule.global_batch,
            num_rows=schedule.global_batch // accelerator.num_processes,
            batch_norm=has_batch_norm(plan.encoder),
            color=plan.views.augmentation.jitter > 0,
            target_decay=plan.settings.target_decay,
        )
        # Sums of the metrics since the last line, then the number of steps. Apple's GPUs have no float64.
        precision = torch.float32 if accelerator.device.type == "mps" else torch.float64
        sums = state.get("since_log", [])
        if len(sums) != len(METRICS) + 1:
            # A checkpoint without the number of steps.
            sums = [0.0] * (len(METRICS) + 1)
        self._sums = torch.tensor(sums, dtype=precision, device=accelerator.device)
        self.log: MetricsLog | None = None
        self.held_out: Examples | None = None
        self.probe: LinearProbe | None = None
        self._evaluated: set[int] = set()
        if not run.processes.is_main:
            return
        self.log = MetricsLog(
            run.folder,
            total_steps=schedule.total_steps,
            images_per_step=schedule.global_batch,
            resume_step=checkpoint.step if checkpoint else 0,
            seconds=state.get("seconds", 0.0),
            tracker=accelerator.log,
        )
        self._evaluated = {row["step"] for row in read_metrics(run.folder / "metrics.jsonl") if "knn" in row}
        if plan.splits.test is not None:
            self.held_out = plan.examples()
            if isinstance(plan.splits, Splits):
                self.probe = LinearProbe(encoder_width(plan.encoder), plan.splits.train, accelerator.device)
                if checkpoint is not None:
                    self.probe.restore(checkpoint.tensors["probe"])

    def evaluate_if_due(self, step: int) -> None:
        """Log the kNN accuracy, and that of the probe, where the schedule asks for it."""
        due = self.plan.schedule.evaluates(step, self.plan.settings.knn_every) and step not in self._evaluated
        if self.held_out is None or self.log is None or not due:
            return
        with self.log.aside():
            probe = self.probe if step else None
            accuracies = self.held_out.evaluate(self.learner.encoder, probe, self.run.interruption)
        if accuracies is not None:
            self.log.log({"step": step, "epoch": self.plan.schedule.epoch(step), **accuracies})

    def after_step(self, step: int, metrics: dict[str, Tensor], batches: Sequence[Batch], bad: Collection[int]) -> None:
        """Add the metrics of the step before `step`; log their means and check for collapse where it is due."""
        if self.probe is not None and not self.learner.skipped:
            ordinals = torch.cat([batch.ordinals for batch in batches])
            self.probe.learn(metrics["representation"], ordinals, bad)
        reduce = self.run.accelerator.reduce
        this_step = torch.stack([metrics[name].to(self._sums.dtype) for name in METRICS])
        self._sums += torch.cat([reduce(this_step, "mean"), this_step.new_ones(1)])
        if step % self.plan.settings.log_every == 0 or step == self.plan.schedule.total_steps:
            self._log_means(step, reduce(effective_rank(metrics["representation"]), "mean").item())
        if self.log is not None:
            self.log.advance(step)

    def _log_means(self, step: int, rank: float) -> None:
        schedule, last = self.plan.schedule, step - 1
        row = {"step": step, "epoch": schedule.epoch(step)}
        row |= {"lr": schedule.lr(last), "target_decay": schedule.target_decay(last)}
        row |= dict(zip(METRICS, (self._sums[:-1] / self._sums[-1]).tolist(), strict=True))
        row["effective_rank"] = rank
        self._sums.zero_()
        if self.log is not None:
            self.log.log(row)
        warning = self.alarm.check(row)
        if warning and self.plan.settings.on_collapse == "stop":
            raise ByolTimmError(f"{warning}. Stopped because of --on_collapse stop")
        if warning:
            logger.warning(warning)

    def state(self) -> dict[str, Any]:
        """Return the sums and the seconds so far, for a checkpoint."""
        return {"since_log": self._sums.tolist(), "seconds": self.log.seconds if self.log else 0.0}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of the probe, for a checkpoint."""
        return {"probe": self.probe.tensors()} if self.probe else {}
