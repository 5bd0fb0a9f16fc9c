"""What tells during pretraining how good the representation is, where there are labels."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import Images, load_pixels, subset_indices
from ..report import save_confusion, save_embedding, save_neighbours
from ..training import Interruption, optimizer_tensors, restore_optimizer
from ..views import EvaluationTransform, crop_pct
from .classifier import zero_linear
from .features import extract_features, raw_pixels
from .metrics import classification_metrics
from .neighbours import knn, knn_scores, nearest_neighbours

Array = NDArray[np.int64]
NEIGHBOURS = 20
# A fixed part of the images is enough to see where training goes; `recipes/knn.py` takes all.
BANK_IMAGES, QUERY_IMAGES, EVALUATION_BYTES = 20_000, 5_000, 2**30
PICTURED_IMAGES = 2000
# Of Adam: learns within a hundred steps from features of any scale between 0.1 and 10.
PROBE_LR = 3e-2


class LinearProbe:
    """A linear classifier that learns from the representations of view 1 as they come, without a say in them.

    Starts at zero and draws nothing, so that the encoder is the same with it and without it. width: of the
    representation. images: those trained on, with labels.
    """

    def __init__(self, width: int, images: Images, device: torch.device) -> None:
        self.labels, self.device = torch.as_tensor(images.labels), device
        self.classifier = zero_linear(width, len(images.class_names)).to(device)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), lr=PROBE_LR)

    def learn(self, representation: Tensor, ordinals: Tensor, bad: Collection[int] = ()) -> None:
        """One step on a batch [B, width]; ordinals: of its images. Other images stand in for those that are bad."""
        indices = ordinals % len(self.labels)
        labels = self.labels[indices].masked_fill(torch.isin(indices, torch.tensor(list(bad), dtype=torch.int64)), -1)
        labels = labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        logits = self.classifier(representation.detach().float()).float()
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the features [N, width] with a label, int64 [N] with -1 for none, that are classified right."""
        found = self.classifier(features.to(self.device).float()).argmax(1)
        return ((found == labels.to(self.device)).sum() / (labels >= 0).sum().clamp(min=1)).item()

    def tensors(self) -> dict[str, Tensor]:
        """All of its state, for a checkpoint."""
        weights = {f"classifier.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        return {**weights, **optimizer_tensors(self.optimizer)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back, bit for bit."""
        names = {f"classifier.{name}": name for name in self.classifier.state_dict()}
        self.classifier.load_state_dict({name: tensors[saved] for saved, name in names.items()})
        restore_optimizer(self.optimizer, {name: tensors[name] for name in tensors.keys() - names.keys()})


@dataclass(frozen=True)
class Examples:
    """Images in memory that tell what the encoder's features are like: a bank, and queries that are not in it.

    bank, queries: uint8 [N, C, H, W], as the encoder takes them. Labels are -1 where there are none. settings: of
    `extract_features`.
    """

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    class_names: tuple[str, ...]
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: Any, train: Images, test: Images | None, **settings: Any) -> "Examples":
        """Images held out where there are any, else a few of those that are trained on."""
        if test is None:
            return cls.of_training(config, train, **settings)
        return cls.held_out(config, train, test, **settings)

    @classmethod
    def held_out(cls, config: Any, train: Images, test: Images, **settings: Any) -> "Examples":
        """Labelled images, of every class as nearly equally many as there are: the queries held out from training."""
        room = EVALUATION_BYTES // (config.in_chans * config.image_size**2)
        labels, test_labels = np.asarray(train.labels), np.asarray(test.labels)
        bank = _load(train, subset_indices(labels, min(BANK_IMAGES, room * 4 // 5), config.seed), config)
        queries = _load(test, subset_indices(test_labels, min(QUERY_IMAGES, room // 5), config.seed), config)
        return cls(*bank, *queries, train.class_names, settings)

    @classmethod
    def of_training(cls, config: Any, images: Images, **settings: Any) -> "Examples":
        """A few of the images that are trained on, for pictures where nothing is held out."""
        chosen = np.random.default_rng(config.seed % 2**64).permutation(len(images))[:PICTURED_IMAGES]
        count = max(1, len(chosen) // 4)
        bank, queries = (_load(images, rows, config) for rows in (chosen[count:], chosen[:count]))
        return cls(*bank, *queries, images.class_names, settings)

    @property
    def protocol(self) -> str:
        """How the accuracies come about, in words."""
        return (
            f"{NEIGHBOURS}-NN by cosine, features centred, {len(self.queries):,} images held out against "
            f"{len(self.bank):,} training images; labels serve evaluation only"
        )

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
        """20-NN accuracy of the pixels themselves, averaged to 32x32 where images are larger."""
        bank, queries = (raw_pixels(images) for images in (self.bank, self.queries))
        return knn(bank, self.bank_labels, queries, self.query_labels, k=NEIGHBOURS)

    def save_pictures(self, encoder: nn.Module, folder: Path, *, method: Literal["pca", "tsne"] = "pca") -> None:
        """`embedding.png`, the queries on a map; `neighbours.png`, what the bank has nearest to eight of them.

        Where both have labels, also `confusion.png`: what the nearest neighbours mistake for what.
        """
        features, found = (extract_features(encoder, images, **self.settings) for images in (self.bank, self.queries))
        save_embedding(found, self.query_labels, self.class_names, folder / "embedding.png", method=method)
        if self.class_names and (self.bank_labels >= 0).any() and (self.query_labels >= 0).any():
            scores = knn_scores(features, self.bank_labels, found, k=NEIGHBOURS, num_classes=len(self.class_names))
            confusion = classification_metrics(scores, self.query_labels)["confusion"]
            save_confusion(confusion, self.class_names, folder / "confusion.png")
        # All over the queries, which may be in the order of their classes.
        chosen = torch.linspace(0, len(found) - 1, min(8, len(found))).long()
        _, places = nearest_neighbours(features, found[chosen], k=8)
        save_neighbours(
            self.queries[chosen],
            [list(self.bank[row]) for row in places],
            folder / "neighbours.png",
            query_labels=self.query_labels[chosen].tolist(),
            neighbour_labels=self.bank_labels[places].tolist(),
            class_names=self.class_names,
        )


def _load(images: Images, indices: Array, config: Any) -> tuple[Tensor, Tensor]:
    transform = EvaluationTransform(config.image_size, crop_pct=crop_pct(config.image_size))
    pixels, read = load_pixels(images, transform, workers=config.workers, indices=indices)
    labels = torch.full((len(images),), -1) if images.labels is None else torch.as_tensor(images.labels)
    return pixels, labels[read]


class _Stop(Exception):
    """An evaluation was asked to end."""
