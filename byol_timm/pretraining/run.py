"""`pretrain`: from a config to a trained encoder, top to bottom."""

import logging

from torch import nn

from ..config import PretrainConfig
from .dry_run import rehearse
from .journal import Journal
from .launch import open_run
from .learner import Learner
from .plan import make_plan
from .reading import StepReader
from .summary import banner

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> nn.Module:
    """Train an encoder with BYOL on the images of `config` and return it in eval mode.

    The run folder holds everything else. Devices, mixed precision and gradient accumulation come from
    `accelerate launch`. Raises `ByolTimmError` for faults that the user can fix, before anything slow where possible,
    and `Interrupted` when asked to stop.
    """
    with open_run(config) as run:
        plan = make_plan(config, run)
        for line in banner(plan, run):
            logger.info(line)
        if config.dry_run:
            return rehearse(plan, run)
        learner = Learner(plan, run)
        checkpoint = learner.resume()
        start = checkpoint.step if checkpoint else 0
        with StepReader(plan, run, start) as reader, Journal(plan, learner, reader, run, checkpoint) as journal:
            for step in range(start, plan.schedule.total_steps + 1):
                journal.evaluate_if_due(step)
                batches, failure = reader.read(step)
                journal.check_stop(step, failure)
                if batches:
                    metrics = learner.step(step, batches)
                    journal.after_step(step + 1, metrics, batches)
            return journal.finish()
