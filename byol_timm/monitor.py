"""What tells during pretraining how good the representation is, where there are labels."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import EvaluationTransform
from .checkpoint import optimizer_tensors, restore_optimizer
from .data import load_pixels, subset_indices
from .defaults import crop_pct
from .evaluation import OnlineProbe, extract_features, knn
from .interruption import Interruption
from .sources import Images

NEIGHBOURS = 20
# A fixed part of the images is enough to see where training goes; `recipes/knn.py` takes all.
BANK_IMAGES, QUERY_IMAGES, EVALUATION_BYTES = 20_000, 5_000, 2**30
RAW_PIXELS_SIDE = 32
# Of Adam: learns within a hundred steps from features of any scale between 0.1 and 10.
PROBE_LR = 3e-2


class LinearProbe:
    """A linear classifier that learns from the representations of view 1 as they come, without a say in them.

    Starts at zero and draws nothing, so that the encoder is the same with it and without it. width: of the
    representation. images: those trained on, with labels.
    """

    def __init__(self, width: int, images: Images, device: torch.device) -> None:
        self.labels, self.device = torch.as_tensor(images.labels), device
        self.classifier = OnlineProbe(width, len(images.class_names)).to(device)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), lr=PROBE_LR)

    def learn(self, representation: Tensor, ordinals: Tensor, bad: Collection[int] = ()) -> None:
        """One step on a batch [B, width]; ordinals: of its images. Other images stand in for those that are bad."""
        indices = ordinals % len(self.labels)
        labels = self.labels[indices].masked_fill(torch.isin(indices, torch.tensor(list(bad), dtype=torch.int64)), -1)
        self.optimizer.zero_grad()
        self.classifier(representation, labels.to(self.device))["loss"].backward()
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the labelled features [N, width] that are classified right."""
        return self.classifier(features.to(self.device), labels.to(self.device))["accuracy"].item()

    def tensors(self) -> dict[str, Tensor]:
        """All of its state, for a checkpoint."""
        return {**self.classifier.state_dict(), **optimizer_tensors(self.optimizer)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back, bit for bit."""
        names = self.classifier.state_dict()
        self.classifier.load_state_dict({name: tensors[name] for name in names})
        restore_optimizer(self.optimizer, {name: tensors[name] for name in tensors.keys() - names.keys()})


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

    def evaluate(
        self, encoder: nn.Module, probe: LinearProbe | None = None, interruption: Interruption | None = None
    ) -> dict[str, float] | None:
        """Accuracies of the encoder's features, 0 to 1: `knn`, the probe's as `linear`; None when asked to stop."""

        def poll() -> None:
            if interruption is not None and interruption.requested is not None:
                raise _Stop

        try:
            bank = extract_features(encoder, self.bank, poll=poll, **self.settings)
            queries = extract_features(encoder, self.queries, poll=poll, **self.settings)
        except _Stop:
            return None
        figures = {"knn": knn(bank, self.bank_labels, queries, self.query_labels, k=NEIGHBOURS)}
        return figures if probe is None else {**figures, "linear": probe.accuracy(queries, self.query_labels)}

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
