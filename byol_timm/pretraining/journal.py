"""What a run writes: checkpoints, pictures, the encoder, and its results at the end."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..config import to_yaml, without_orders
from ..data import Batch
from ..encoders import push_encoder
from ..errors import ByolTimmError, redact
from ..files import write_json, write_whole
from ..training import Checkpoint, CheckpointWriter, Interrupted
from .launch import Run
from .learner import Learner
from .monitor import Monitor
from .plan import Plan
from .reading import StepReader
from .resolve import backbone_kwargs
from .results import save_example_views, write_results
from .summary import environment

logger = logging.getLogger(__name__)

# In the run folder: a line for each image that could not be read, with the reason. It is never pushed.
BAD_IMAGES = "bad_images.txt"
# What a process says instead of the number of a signal, all of which are lower, after a failure of its own.
FAILED = 1000


class Journal:
    """Write down a run: process 0 writes, all processes must call the same methods.

    checkpoint: the one that the run was resumed from.
    """

    def __init__(
        self, plan: Plan, learner: Learner, reader: StepReader, run: Run, checkpoint: Checkpoint | None
    ) -> None:
        self.plan, self.learner, self.reader, self.run = plan, learner, reader, run
        # Do not delete an earlier run for step 0, which has learned nothing.
        self._writer = CheckpointWriter(run.folder / "checkpoints", saved=lambda step: run.commit() if step else None)
        self._bad_before: list[str] = []
        if run.processes.is_main:
            write_whole(run.folder / "config.yaml", to_yaml(plan.settings).encode())
            write_json(run.folder / "environment.json", environment(run.accelerator))
            if checkpoint is not None:
                self._bad_before = self._read_bad_images() or checkpoint.state.get("bad_images", [])
        config = {name: str(value) for name, value in redact(dataclasses.asdict(plan.settings)).items()}
        run.accelerator.init_trackers("byol_timm", config=config)
        self.monitor = Monitor(plan, learner, run, checkpoint)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.monitor.log is not None:
            self.monitor.log.close()
        self._writer.__exit__(*error)

    def evaluate_if_due(self, step: int) -> None:
        """Log accuracies where the schedule asks for it."""
        self.monitor.evaluate_if_due(step)

    def check_stop(self, step: int, failure: ByolTimmError | None) -> None:
        """Save a checkpoint and raise if any process failed to read its images or was asked to stop."""
        stop = self.run.processes.agree(FAILED if failure else self.run.interruption.requested)
        if stop is None:
            return
        self.learner.check()
        self.save(step)
        self._writer.close()
        self.run.processes.raise_first(failure)
        raise Interrupted(stop, step)

    def after_step(self, step: int, metrics: dict[str, Tensor], batches: Sequence[Batch]) -> None:
        """Log metrics and save a checkpoint where they are due after `step` steps."""
        self.monitor.after_step(step, metrics, batches, self.reader.bad)
        views = self.run.folder / "views.png"
        if self.monitor.log is not None and not views.exists():
            # Not before the first step: importing matplotlib takes longer than many a step.
            with self.monitor.log.aside():
                save_example_views(self.plan, views)
        if step % self.plan.settings.save_every == 0 or step == self.plan.schedule.total_steps:
            self.save(step)

    def save(self, step: int) -> None:
        """Write a checkpoint in the background."""
        self._note_bad_images()
        if not self.run.processes.is_main:
            return
        state = {
            "config": without_orders(self.plan.settings),
            "data": self.plan.data,
            "global_batch": self.plan.schedule.global_batch,
            "samples_seen": step * self.plan.schedule.global_batch,
            **self.monitor.state(),
        }
        if self.run.accelerator.scaler is not None:
            state["scaler"] = self.run.accelerator.scaler.state_dict()
        self._writer.save(step, {**self.learner.tensors(), **self.monitor.tensors()}, state)

    def finish(self) -> nn.Module:
        """Write the encoder, the results and the pictures; push the encoder if asked; return it in eval mode."""
        bad, settings, folder = self._note_bad_images(), self.plan.settings, self.run.folder
        if bad:
            logger.warning(
                "%d images could not be read and were replaced. The first: %s. All are in %s",
                len(bad),
                bad[0],
                folder / BAD_IMAGES,
            )
        if self.monitor.log is not None:
            self._writer.close()
            self.monitor.log.close()
            record = {
                "backbone": settings.backbone,
                "backbone_kwargs": backbone_kwargs(settings),
                "config": without_orders(settings),
                "data": self.plan.data,
                "epochs": settings.epochs,
                "steps": self.plan.schedule.total_steps,
                "global_batch": self.plan.schedule.global_batch,
                "bad_images": len(bad),
                "seconds": self.monitor.log.seconds,
                **environment(self.run.accelerator),
            }
            write_results(self.plan, self.learner.encoder, folder, record, self.monitor.held_out)
            if settings.push_to_hub:
                url = push_encoder(folder, settings.push_to_hub, public=settings.public)
                logger.info("pushed to %s", url)
        self.run.processes.wait()
        return self.learner.encoder.eval()

    def _note_bad_images(self) -> list[str]:
        """Return and write why images could not be read, in all processes and before the run was resumed."""
        reasons = [self._bad_before, *self.run.processes.gather(list(self.reader.bad.values()))]
        bad = list(dict.fromkeys(itertools.chain.from_iterable(reasons)))
        if bad and self.run.processes.is_main:
            write_whole(self.run.folder / BAD_IMAGES, "".join(f"{reason}\n" for reason in bad).encode())
        return bad

    def _read_bad_images(self) -> list[str]:
        path = self.run.folder / BAD_IMAGES
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
