"""What a representation is worth: features of any encoder, and classifiers on them that are seeded and repeatable."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .augment import normalize as normalize_pixels
from .byol import normalize
from .errors import ByolTimmError

Labels = Tensor | NDArray[np.int64]

# Similarities computed at a time.
KNN_VALUES = 2**24


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    batches: Tensor | Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    channels_last: bool = False,
    batch_size: int = 256,
    poll: Callable[[], None] | None = None,
) -> Tensor:
    """Representations of images, float32 [N, width] on the CPU, of the encoder in eval mode; it is left as it was.

    batches: uint8 [B, C, H, W] each, or all images in one tensor, cut into batches of `batch_size`.
    mean, std: of pixels in 0..1, per channel or one for all.
    device: where the encoder is; None: asked from its parameters.
    poll: called before every batch, to interrupt by raising.
    """
    device = torch.device(device) if device is not None else next(encoder.parameters()).device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = []
    with evaluating(encoder), torch.autocast(device.type, enabled=False):
        for pixels in batches.split(batch_size) if isinstance(batches, Tensor) else batches:
            if poll is not None:
                poll()
            images = normalize_pixels(pixels.to(device), mean, std).contiguous(memory_format=layout)
            features.append(encoder(images).float().cpu())
    if not features:
        raise ByolTimmError("there are no images to extract features of")
    return torch.cat(features)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; afterwards every part is in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def knn(
    bank: Tensor,
    bank_labels: Labels,
    queries: Tensor,
    query_labels: Labels,
    *,
    k: int = 20,
    temperature: float = 0.07,
    center: bool = True,
) -> float:
    """Share of the queries, 0 to 1, that their nearest neighbours in the bank classify right; see `knn_scores`.

    Queries with label -1 do not count.
    """
    labels = torch.as_tensor(query_labels)
    known = labels >= 0
    if not known.any():
        raise ByolTimmError("no image to classify has a label. kNN accuracy needs some")
    num_classes = 1 + max(int(labels.max()), int(torch.as_tensor(bank_labels).max()))
    scores = knn_scores(
        bank, bank_labels, queries[known], k=k, temperature=temperature, center=center, num_classes=num_classes
    )
    return (scores.argmax(1) == labels[known]).double().mean().item()


@torch.no_grad()
def knn_scores(
    bank: Tensor,
    bank_labels: Labels,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    center: bool = True,
    num_classes: int | None = None,
) -> Tensor:
    """The logarithm of each class's votes, [Q, num_classes]: -inf for a class that none of the neighbours has.

    The k most similar (by cosine) of the bank's labelled images vote with weight exp(cosine / temperature) (Wu et al.
    2018); of equally similar ones, those that come first. A bank of fewer images votes as a whole.
    bank [N, d], queries [Q, d]: features; those that are not finite count as zeros.
    bank_labels: int64 [N], -1 for none.
    center: subtract the bank's mean from both, so that cosines are of what differs between images.
    """
    bank_labels = torch.as_tensor(bank_labels)
    known = bank_labels >= 0
    if not known.any():
        raise ByolTimmError("no image of the bank has a label. kNN needs some")
    labels = bank_labels[known].cpu()
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    bank = bank[known.to(bank.device)].float().nan_to_num(0, 0, 0)
    queries = queries.to(bank.device).float().nan_to_num(0, 0, 0)
    if center:
        mean = bank.mean(0)
        bank, queries = bank - mean, queries - mean
    bank, k = normalize(bank), min(k, len(bank))
    scores = []
    for part in normalize(queries).split(max(1, KNN_VALUES // len(bank))):
        similarity, neighbours = _nearest(part @ bank.T, k)
        # On the CPU, where votes are always added up in the same order.
        votes = torch.zeros(len(part), num_classes, dtype=torch.float64)
        highest = similarity.max(1, keepdim=True).values
        weights = ((similarity - highest).double() / temperature).exp()
        votes.scatter_add_(1, labels[neighbours], weights)
        scores.append(votes.log() + highest / temperature)
    return torch.cat(scores)


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, with their columns, on the CPU; of equal ones the first."""
    lowest = similarity.topk(k).values[:, -1:]
    above, equal = similarity > lowest, similarity == lowest
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    columns = chosen.nonzero()[:, 1].view(-1, k)
    return similarity.gather(1, columns).cpu(), columns.cpu()
