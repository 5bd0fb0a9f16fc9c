"""What tells during pretraining how good the representation is, where there are labels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import EvaluationTransform
from .data import load_pixels, subset_indices
from .defaults import crop_pct
from .evaluation import extract_features, knn
from .interruption import Interruption
from .sources import Images

NEIGHBOURS = 20
# A fixed part of the images is enough to see where training goes; `recipes/knn.py` takes all.
BANK_IMAGES, QUERY_IMAGES, EVALUATION_BYTES = 20_000, 5_000, 2**30
RAW_PIXELS_SIDE = 32


class HeldOut:
    """Labelled images in memory that tell how good the encoder's features are: a bank, and queries held out."""

    def __init__(
        self, config: Any, train: Images, test: Images, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        transform = EvaluationTransform(config.image_size, crop_pct=crop_pct(config.image_size))
        room = EVALUATION_BYTES // (config.in_chans * config.image_size**2)
        self.bank, self.bank_labels = self._load(train, min(BANK_IMAGES, room * 4 // 5), transform, config)
        self.queries, self.query_labels = self._load(test, min(QUERY_IMAGES, room // 5), transform, config)
        self.settings = dict(mean=mean, std=std, channels_last=config.channels_last)
        self.protocol = (
            f"{NEIGHBOURS}-NN by cosine, features centred, {len(self.queries):,} images held out against "
            f"{len(self.bank):,} training images; labels serve evaluation only"
        )

    @staticmethod
    def _load(images: Images, limit: int, transform: EvaluationTransform, config: Any) -> tuple[Tensor, Tensor]:
        labels: Any = images.labels
        chosen = subset_indices(labels, limit, config.seed)
        pixels, indices = load_pixels(images, transform, workers=config.workers, indices=chosen)
        return pixels, torch.as_tensor(labels)[indices]

    def knn(self, encoder: nn.Module, interruption: Interruption | None = None) -> float | None:
        """20-NN accuracy of the encoder's features, 0 to 1; None when asked to stop in between."""

        def poll() -> None:
            if interruption is not None and interruption.requested is not None:
                raise _Stop

        try:
            bank = extract_features(encoder, self.bank, poll=poll, **self.settings)
            queries = extract_features(encoder, self.queries, poll=poll, **self.settings)
        except _Stop:
            return None
        return knn(bank, self.bank_labels, queries, self.query_labels, k=NEIGHBOURS)

    def knn_of_pixels(self) -> float:
        """The same of the pixels themselves, of images not larger than 32x32."""
        bank, queries = (_thumbnails(pixels).flatten(1) for pixels in (self.bank, self.queries))
        return knn(bank, self.bank_labels, queries, self.query_labels, k=NEIGHBOURS)


class _Stop(Exception):
    """An evaluation was asked to end."""


def _thumbnails(pixels: Tensor) -> Tensor:
    if pixels.shape[-1] <= RAW_PIXELS_SIDE:
        return pixels.float()
    return torch.cat([F.adaptive_avg_pool2d(part.float(), RAW_PIXELS_SIDE) for part in pixels.split(256)])
