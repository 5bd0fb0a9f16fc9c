"""Read the batches of each optimizer step."""

import dataclasses
from typing import Any

from ..data import Batch, Cache, Splits, StreamBatches, StreamSplits, TrainingBatches, copied_ahead, open_cache
from ..errors import ByolTimmError
from ..training import Interrupted
from .launch import Run
from .plan import Plan


class StepReader:
    """Read the batches of this process, step by step from `start`, and copy them ahead to a GPU.

    caches: False writes no cache on disk, for a dry run. As a context manager, it ends its workers.
    """

    def __init__(self, plan: Plan, run: Run, start: int = 0, *, caches: bool = True) -> None:
        self._plan, self._run = plan, run
        self._count = run.accelerator.gradient_accumulation_steps
        cache = "none" if plan.settings.cache == "disk" and not caches else plan.settings.cache
        self._batches = self._open(self._cached(cache, start), start)
        self._stream = copied_ahead(iter(self._batches), run.accelerator.device)

    @property
    def bad(self) -> dict[int, str]:
        """Images that could not be read so far, by index, each with the reason."""
        return self._batches.bad

    def read(self, step: int) -> tuple[list[Batch], ByolTimmError | None]:
        """Return the micro-batches of a step, none after the last step, and the failure if they cannot be read.

        A failure is returned because the other processes must know before this one ends.
        """
        count = self._count if step < self._plan.schedule.total_steps else 0
        try:
            return [next(self._stream) for _ in range(count)], None
        except ByolTimmError as error:
            return [], error

    def __enter__(self) -> "StepReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    def _open(self, splits: Splits | StreamSplits, start: int) -> TrainingBatches | StreamBatches:
        settings, views = self._plan.settings, self._plan.views
        arguments: dict[str, Any] = dict(
            batch_size=settings.batch_size,
            global_batch=self._plan.schedule.global_batch,
            rank=self._run.accelerator.process_index,
            world=self._run.processes.count,
            seed=settings.seed,
            start_step=start,
            cut=views.cut,
            reduction=views.reduction if settings.fast_jpeg else None,
            workers=settings.workers,
            on_bad_image=settings.on_bad_image,
            pin=self._run.accelerator.device.type == "cuda",
        )
        if isinstance(splits, StreamSplits):
            return StreamBatches(splits.train, splits.bank, shuffle_buffer=settings.shuffle_buffer or 0, **arguments)
        return TrainingBatches(splits.train, **arguments)

    def _cached(self, cache: Cache | None, start: int) -> Splits | StreamSplits:
        """Return the splits, the training images from that cache."""
        settings, splits = self._plan.settings, self._plan.splits
        if isinstance(splits, StreamSplits):
            return splits

        def poll() -> None:
            if self._run.interruption.requested is not None:
                raise Interrupted(self._run.interruption.requested, start)

        train = open_cache(
            splits.train,
            cache,
            settings.cache_dir,
            workers=settings.workers,
            on_bad_image=settings.on_bad_image,
            poll=poll,
        )
        return dataclasses.replace(splits, train=train)
