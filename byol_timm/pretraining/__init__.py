"""Pretraining: from a config to a trained encoder."""

from .resolve import initial_encoder as initial_encoder
from .resolve import open_images as open_images
from .resolve import resolve_augmentation as resolve_augmentation
from .resolve import resolve_images as resolve_images
from .resolve import resolve_intervals as resolve_intervals
from .resolve import resolve_training as resolve_training
from .results import redraw as redraw
from .run import pretrain as pretrain
from .start import MAY_CHANGE as MAY_CHANGE
from .summary import closing as closing
