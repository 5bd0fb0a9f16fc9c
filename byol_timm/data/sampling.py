"""Random orders and subsets of images: functions of a seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of `n` images in that epoch, an int64 permutation."""
    return torch.from_numpy(np.random.default_rng((seed % 2**64, epoch)).permutation(n))


def share_indices(count: int, share: float, seed: int) -> Array:
    """Return the sorted indices of that share (0 to 1) of `count` images, at least one, whatever their labels.

    With the same seed, a smaller share is part of a larger one.
    """
    return np.sort(np.random.default_rng(seed % 2**64).permutation(count)[: max(1, round(share * count))])


def class_share_indices(
    labels: Array, share: float, generator: Callable[[int], np.random.Generator], *, leave_one: bool = False
) -> Array:
    """Return the sorted indices of that share (0 to 1) of every class, at least one image each, without label -1.

    generator: draws the images of a class, given its label. leave_one: leave at least one image of each class.
    """
    chosen = [np.empty(0, dtype=np.int64)]
    for label in np.unique(labels[labels >= 0]).tolist():
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - leave_one)
        chosen.append(generator(label).permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def subset_indices(labels: Array, size: int, seed: int) -> Array:
    """Return the sorted indices of at most `size` labelled images, as many of each class as possible."""
    order = np.random.default_rng(seed % 2**64).permutation(np.flatnonzero(labels >= 0))
    rank = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels[order]):
        members = labels[order] == label
        rank[members] = np.arange(members.sum())
    return np.sort(order[np.argsort(rank, kind="stable")[:size]])
