"""Learning rate, target decay and epoch as functions of the step."""

import dataclasses
import math

from ..byol import target_decay
from ..config import Settings
from ..errors import ByolTimmError


def learning_rate(step: int, *, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the rate of a step: linear from 0 to `peak`, then a cosine to 0 (Grill et al. 2020, section 3.2)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate, target decay and epoch as functions of the step; one step is one global batch."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    global_batch: int
    peak_lr: float
    base_target_decay: float

    @classmethod
    def of(cls, settings: Settings, num_images: int, forwards: int) -> "Schedule":
        """Return the schedule of a run, whose steps have `forwards` batches, over processes and accumulation."""
        global_batch = settings.batch_size * forwards
        if num_images < global_batch:
            raise ByolTimmError(
                f"{num_images} images are fewer than the global batch of {global_batch} ({settings.batch_size} x "
                f"{forwards}). Lower --batch_size"
            )
        steps_per_epoch = num_images // global_batch
        total_steps = settings.epochs * steps_per_epoch
        warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
        if warmup_steps >= total_steps:
            raise ByolTimmError(
                f"--warmup_epochs {settings.warmup_epochs:g} leaves nothing of {settings.epochs} epochs"
            )
        return cls(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            warmup_steps=warmup_steps,
            global_batch=global_batch,
            peak_lr=settings.lr * global_batch / 256,
            base_target_decay=settings.target_decay,
        )

    def lr(self, step: int) -> float:
        return learning_rate(step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, peak=self.peak_lr)

    def target_decay(self, step: int) -> float:
        return target_decay(step, self.total_steps, self.base_target_decay)

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def evaluates(self, step: int, every: int) -> bool:
        """Return True if kNN is due after `step` steps: at the start, every so many epochs, at the end."""
        return step == self.total_steps or step % (every * self.steps_per_epoch) == 0
