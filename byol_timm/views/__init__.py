"""Views: the augmentation that BYOL trains on and the transform of evaluation."""

from typing import TYPE_CHECKING

from .augmentation import AUGMENTATIONS as AUGMENTATIONS
from .augmentation import Augmentation as Augmentation
from .augmentation import omitted_operations as omitted_operations
from .operations import blur_taps as blur_taps
from .plain import EvaluationTransform as EvaluationTransform
from .plain import crop_pct as crop_pct
from .plain import normalize as normalize
from .two_views import TwoViews as TwoViews

if TYPE_CHECKING:
    # Triton is part of torch's CUDA builds only.
    from .triton import TritonViews as TritonViews
