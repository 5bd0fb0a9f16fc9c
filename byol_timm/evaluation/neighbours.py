"""Classification by the k nearest neighbours."""

import torch
from torch import Tensor

from ..byol import normalize
from .metrics import Labels, accuracy, labelled

# Similarities that are in memory at a time.
KNN_VALUES = 2**24


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
    """Return the kNN accuracy of the queries, 0 to 1; see `knn_scores`. Queries with label -1 are left out."""
    labels = torch.as_tensor(query_labels)
    known = labelled(labels, "classify")
    scores = knn_scores(bank, bank_labels, queries[known], k=k, temperature=temperature, center=center)
    return accuracy(scores, labels[known])


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
    """Return the logarithm of each class's share of the votes, float64 [Q, num_classes]: -inf without votes.

    The k nearest labelled images of the bank vote with weight exp(cosine / temperature) (Wu et al. 2018, section 3.4).
    All images of a bank smaller than k vote. bank_labels: int64 [N], -1 for unlabelled. See `nearest_neighbours` for
    the rest.
    """
    bank_labels = torch.as_tensor(bank_labels)
    known = labelled(bank_labels, "learn from")
    labels = bank_labels[known]
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    similarity, neighbours = nearest_neighbours(bank[known], queries, k=k, center=center)
    # On the CPU, where votes are always added up in the same order.
    votes = torch.zeros(len(queries), num_classes, dtype=torch.float64)
    votes.scatter_add_(1, labels[neighbours], (similarity.double() / temperature).softmax(1))
    return votes.log()


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, *, k: int, center: bool = True) -> tuple[Tensor, Tensor]:
    """Return the k highest cosines with features of the bank, [Q, k] in falling order, and their indices in the bank.

    bank [N, d] and queries [Q, d] are on one device, the results on the CPU. Of equally similar features, the first in
    the bank count. Features that are not finite count as zeros; k is cut to N.
    center: subtract the mean of the bank from both, so that the cosines measure what differs between images.
    """
    bank, queries = (features.float().nan_to_num(0, 0, 0) for features in (bank, queries))
    mean = bank.mean(0) if center else 0.0
    bank, queries = normalize(bank - mean), normalize(queries - mean)
    k = min(k, len(bank))
    cosines, indices = [], []
    for part in queries.split(max(1, KNN_VALUES // len(bank))):
        similarity = part @ bank.T
        highest, columns = similarity.topk(k)
        # topk may take any of the features that are equally similar.
        tied = (similarity >= highest[:, -1:]).sum(1) > k
        columns[tied] = similarity[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        columns = columns.sort(1).values
        highest = similarity.gather(1, columns)
        order = highest.argsort(dim=1, descending=True, stable=True)
        cosines.append(highest.gather(1, order).cpu())
        indices.append(columns.gather(1, order).cpu())
    return torch.cat(cosines), torch.cat(indices)
