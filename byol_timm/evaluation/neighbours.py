"""k nearest neighbours."""

import torch
from torch import Tensor

from ..byol import normalize
from .metrics import Labels, _accuracy, _labelled

# Similarities held at a time.
KNN_VALUES = 2**24
# The bias of a class that has no training image: low enough never to be chosen.
ABSENT = -1e4


# Nearest neighbours


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
    known = _labelled(labels, "classify")
    scores = knn_scores(bank, bank_labels, queries[known], k=k, temperature=temperature, center=center)
    return _accuracy(scores, labels[known])


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
    """Each class's share of the votes as a logarithm, float64 [Q, num_classes]: -inf for a class without votes.

    The k nearest labelled images of the bank vote with weight exp(cosine / temperature) (Wu et al. 2018, section 3.4);
    a smaller bank votes as a whole. bank_labels: int64 [N], -1 for none. See `nearest_neighbours` for the rest.
    """
    bank_labels = torch.as_tensor(bank_labels)
    known = _labelled(bank_labels, "learn from")
    labels = bank_labels[known]
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    similarity, neighbours = nearest_neighbours(bank[known], queries, k=k, center=center)
    # On the CPU, where votes are always added up in the same order.
    votes = torch.zeros(len(queries), num_classes, dtype=torch.float64)
    votes.scatter_add_(1, labels[neighbours], (similarity.double() / temperature).softmax(1))
    return votes.log()


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, *, k: int, center: bool = True) -> tuple[Tensor, Tensor]:
    """The cosines of the k most similar features of the bank, [Q, k], the highest first, and their places in the bank.

    bank [N, d] and queries [Q, d] are on one device, the results on the CPU. Of equally similar features those come
    first that do in the bank; features that are not finite count as zeros, and k larger than N as N.
    center: subtract the bank's mean from both, so that the cosines are of what differs between images.
    """
    bank, queries = (features.float().nan_to_num(0, 0, 0) for features in (bank, queries))
    mean = bank.mean(0) if center else 0.0
    bank, queries = normalize(bank - mean), normalize(queries - mean)
    found = []
    for part in queries.split(max(1, KNN_VALUES // len(bank))):
        similarity = part @ bank.T
        highest, columns = similarity.topk(min(k, len(bank)))
        tied = (similarity >= highest[:, -1:]).sum(1) > columns.shape[1]
        if tied.any():
            columns[tied] = _first_of_highest(similarity[tied], highest[tied, -1:], columns.shape[1])
        columns = columns.sort(1).values
        highest = similarity.gather(1, columns)
        order = highest.argsort(dim=1, descending=True, stable=True)
        found.append((highest.gather(1, order).cpu(), columns.gather(1, order).cpu()))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def _first_of_highest(values: Tensor, lowest: Tensor, k: int) -> Tensor:
    """Columns [rows, k] of the values above `lowest` [rows, 1], filled up with the first ones that are equal to it."""
    above, equal = values > lowest, values == lowest
    room = k - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
