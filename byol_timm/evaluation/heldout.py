"""Measure the encoder during pretraining: kNN and an online linear probe on held-out images, and pictures."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import Images, load_pixels, subset_indices
from ..report import save_confusion, save_embedding, save_neighbours
from ..training import Interruption, optimizer_tensors, restore_optimizer
from .classifier import zero_linear
from .features import Preparation, RawPixels, extract_features
from .metrics import classification_metrics
from .neighbours import knn, knn_scores, nearest_neighbours

Array = NDArray[np.int64]
NEIGHBOURS = 20
# A fixed subset shows the course of training; recipes/knn.py takes all images.
BANK_IMAGES, QUERY_IMAGES, EVALUATION_BYTES = 20_000, 5_000, 2**30
PICTURED_IMAGES = 2000
# Of Adam: learns within a hundred steps from features of any scale between 0.1 and 10.
PROBE_LR = 3e-2


class LinearProbe:
    """Train a linear classifier online on representations of view 1, without gradients to the encoder.

    It starts at zero and draws no random numbers, so the encoder is the same with and without it. width: of the
    representation. images: the labelled training images.
    """

    def __init__(self, width: int, images: Images, device: torch.device) -> None:
        self.labels, self.device = torch.as_tensor(images.labels), device
        self.classifier = zero_linear(width, len(images.class_names)).to(device)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), lr=PROBE_LR)

    def learn(self, representation: Tensor, ordinals: Tensor, bad: Collection[int] = ()) -> None:
        """Take one step on a batch [B, width]. ordinals: of its images. bad: indices of images that were replaced."""
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
        """Return the accuracy, 0 to 1, on features [N, width] with labels int64 [N], -1 for unlabelled."""
        predicted = self.classifier(features.to(self.device).float()).argmax(1)
        return float((predicted == labels.to(self.device)).sum() / (labels >= 0).sum().clamp(min=1))

    def tensors(self) -> dict[str, Tensor]:
        """Return all of its state, for a checkpoint."""
        weights = {f"classifier.{name}": tensor for name, tensor in self.classifier.state_dict().items()}
        return {**weights, **optimizer_tensors(self.optimizer)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `tensors` returned."""
        names = {f"classifier.{name}": name for name in self.classifier.state_dict()}
        self.classifier.load_state_dict({name: tensors[saved] for saved, name in names.items()})
        restore_optimizer(self.optimizer, {name: tensors[name] for name in tensors.keys() - names.keys()})


@dataclass(frozen=True)
class Examples:
    """Images in memory that an encoder is measured on: a bank, and queries that are not part of it.

    bank, queries: uint8 [N, C, H, W]. Labels are -1 for unlabelled images.
    """

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    class_names: tuple[str, ...]
    preparation: Preparation

    @classmethod
    def load(cls, train: Images, test: Images | None, preparation: Preparation, *, seed: int) -> "Examples":
        """Choose labelled images, balanced over the classes: the bank from `train`, the queries from `test`.

        Where `test` is None, both are a few of the training images, for pictures only.
        """
        if test is None:
            chosen = np.random.default_rng(seed % 2**64).permutation(len(train))[:PICTURED_IMAGES]
            count = max(1, len(chosen) // 4)
            test, bank, queries = train, chosen[count:], chosen[:count]
        else:
            room = EVALUATION_BYTES // (train.channels * int(np.prod(preparation.transform.size)))
            bank = subset_indices(np.asarray(train.labels), min(BANK_IMAGES, room * 4 // 5), seed)
            queries = subset_indices(np.asarray(test.labels), min(QUERY_IMAGES, room // 5), seed)
        return cls(*_load(train, bank, preparation), *_load(test, queries, preparation), train.class_names, preparation)

    @property
    def protocol(self) -> str:
        """Describe how the accuracies are measured."""
        return (
            f"{NEIGHBOURS}-NN by cosine, features centred, {len(self.queries):,} held-out images against "
            f"{len(self.bank):,} training images; labels are only used to measure accuracy"
        )

    def evaluate(
        self, encoder: nn.Module, probe: LinearProbe | None = None, interruption: Interruption | None = None
    ) -> dict[str, float] | None:
        """Return the accuracies, 0 to 1, of `knn` and, with a probe, `linear`; None if interrupted."""

        def poll() -> None:
            if interruption is not None and interruption.requested is not None:
                raise _Stop

        try:
            bank, queries = self._features(encoder, poll)
        except _Stop:
            return None
        accuracies = {"knn": knn(bank, self.bank_labels, queries, self.query_labels, k=NEIGHBOURS)}
        return accuracies if probe is None else {**accuracies, "linear": probe.accuracy(queries, self.query_labels)}

    def knn_of_pixels(self) -> float:
        """Return the kNN accuracy of the raw pixels, averaged to 32x32 if images are larger."""
        bank, queries = (RawPixels()(images) for images in (self.bank, self.queries))
        return knn(bank, self.bank_labels, queries, self.query_labels, k=NEIGHBOURS)

    def save_pictures(self, encoder: nn.Module, folder: Path, *, method: Literal["pca", "tsne"] = "pca") -> None:
        """Save a map of the queries, the nearest neighbours of eight of them and, with labels, a confusion matrix."""
        bank, queries = self._features(encoder)
        save_embedding(queries, self.query_labels, self.class_names, folder / "embedding.png", method=method)
        if self.class_names and (self.bank_labels >= 0).any() and (self.query_labels >= 0).any():
            scores = knn_scores(bank, self.bank_labels, queries, k=NEIGHBOURS, num_classes=len(self.class_names))
            confusion = classification_metrics(scores, self.query_labels)["confusion"]
            save_confusion(confusion, self.class_names, folder / "confusion.png")
        # Spread over the queries, which may be sorted by class.
        chosen = torch.linspace(0, len(queries) - 1, min(8, len(queries))).long()
        _, places = nearest_neighbours(bank, queries[chosen], k=8)
        save_neighbours(
            self.queries[chosen],
            [list(self.bank[row]) for row in places],
            folder / "neighbours.png",
            query_labels=self.query_labels[chosen].tolist(),
            neighbour_labels=self.bank_labels[places].tolist(),
            class_names=self.class_names,
        )

    def _features(self, encoder: nn.Module, poll: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        mean, std, channels_last = self.preparation.mean, self.preparation.std, self.preparation.channels_last
        bank, queries = (
            extract_features(encoder, images, mean=mean, std=std, channels_last=channels_last, poll=poll)
            for images in (self.bank, self.queries)
        )
        return bank, queries


def _load(images: Images, indices: Array, preparation: Preparation) -> tuple[Tensor, Tensor]:
    pixels, read = load_pixels(images, preparation.transform, workers=preparation.workers, indices=indices)
    labels = torch.full((len(images),), -1) if images.labels is None else torch.as_tensor(images.labels)
    return pixels, labels[read]


class _Stop(Exception):
    """Raised to end an evaluation that was asked to stop."""
