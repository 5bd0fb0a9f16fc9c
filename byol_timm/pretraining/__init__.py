"""Pretraining: from a config to a trained encoder."""

from .fidelity import points as points
from .journal import MAY_CHANGE as MAY_CHANGE
from .journal import redraw as redraw
from .plan import (
    initial_encoder as initial_encoder,
)
from .plan import (
    open_images as open_images,
)
from .plan import (
    resolve_augmentation as resolve_augmentation,
)
from .plan import (
    resolve_images as resolve_images,
)
from .plan import (
    resolve_intervals as resolve_intervals,
)
from .plan import (
    resolve_training as resolve_training,
)
from .run import pretrain as pretrain
from .summary import closing as closing
