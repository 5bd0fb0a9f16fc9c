"""Classification metrics, and class-balanced subsets of labelled images."""

import math
import statistics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data import Images, class_share_indices
from ..errors import ByolTimmError

Array = NDArray[Any]
Labels = Tensor | NDArray[np.int64]


def label_subset(labels: Labels, fraction: float, seed: int) -> Array:
    """Return the sorted indices of that fraction (0 to 1) of every class, at least one image each.

    Images with label -1 are left out. With the same seed, a smaller subset is part of a larger one.
    """
    if not 0 < fraction <= 1:
        raise ByolTimmError(f"the share of labels must be above 0 and at most 1 ({fraction})")
    return class_share_indices(np.asarray(labels), fraction, lambda label: np.random.default_rng((seed % 2**64, label)))


def classification_metrics(scores: Tensor, labels: Labels) -> dict[str, Any]:
    """Return the metrics of a classifier's scores [N, classes] as numbers for JSON. Images with label -1 are left out.

    `images`; `top1` and its 95 % interval `top1_interval`; `top5`, None with fewer than 6 classes; `per_class`
    accuracies, None for a class without images, and their mean `mean_per_class`; `confusion` counts, one row per true
    class. Of equal scores, the first class ranks higher. A class with score -inf is never correct, and neither is a
    label that the classifier has no class for.
    """
    labels = torch.as_tensor(labels).cpu()
    known = labelled(labels, "classify")
    scores, labels = scores.detach().cpu()[known], labels[known]
    if scores.isnan().any():
        raise ByolTimmError("the classifier's outputs are not numbers: training diverged. Lower its learning rate")
    scores = F.pad(scores, (0, max(0, int(labels.max()) + 1 - scores.shape[1])), value=-math.inf)
    classes = scores.shape[1]
    own = scores.gather(1, labels[:, None])
    ahead = (scores > own) | ((scores == own) & (torch.arange(classes) < labels[:, None]))
    rank = ahead.sum(1).masked_fill(own[:, 0] == -math.inf, classes)
    confusion = torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)
    correct = int((rank == 0).sum())
    shares = (confusion.diag().double() / confusion.sum(1)).tolist()
    per_class = [None if math.isnan(share) else share for share in shares]
    return {
        "images": len(labels),
        "top1": correct / len(labels),
        "top1_interval": confidence_interval(correct, len(labels)),
        "top5": (rank < 5).double().mean().item() if classes > 5 else None,
        "mean_per_class": statistics.fmean(share for share in per_class if share is not None),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def confidence_interval(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy of `correct` out of `total` images."""
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of the images whose highest score is that of their label."""
    return (scores.argmax(1) == labels).double().mean().item()


def labels_of(images: Images, purpose: str) -> Array:
    """Return the labels of images, of which at least one must have one."""
    if images.labels is None:
        raise ByolTimmError(f"the images of {images.name} to {purpose} have no labels. Evaluation needs them")
    labelled(torch.as_tensor(images.labels), purpose)
    return images.labels


def labelled(labels: Tensor, purpose: str) -> Tensor:
    """Return which images have a label, as a mask. At least one must have one."""
    known = labels >= 0
    if not known.any():
        raise ByolTimmError(f"none of the {len(labels)} images to {purpose} has a label. Evaluation needs labels")
    return known
