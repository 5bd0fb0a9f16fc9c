"""Linear classifiers on frozen encoders and fine-tuning, seeded and repeatable."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Images, TrainingBatches, epoch_order, open_cache
from ..encoders import encoder_width
from ..errors import ByolTimmError
from ..training import DeviceViews, learning_rate
from ..views import Augmentation, TwoViews
from .features import Network, Preparation, dataset_features, device_of, evaluating
from .metrics import Array, Labels, accuracy, classification_metrics, label_subset, labelled, labels_of

Setting = Mapping[str, float]
Batches = Iterator[tuple[Tensor, Tensor]]
# scikit-learn's default of 100 is too few for weak penalties.
LOGISTIC_STEPS = 1000
# The bias of a class that has no training image: low enough never to be chosen.
ABSENT = -1e4


@dataclass(frozen=True)
class Protocol:
    """How a classifier is trained. The most accurate setting on held-out training images is trained on all of them.

    frozen: True for a linear classifier on a frozen encoder, False for fine-tuning.
    lrs, epochs: of SGD with Nesterov momentum 0.9 and no weight decay; the rate follows a cosine from `lr` to 0.
    l2: penalties `l2 / 2 |w|^2` plus the sum of the losses, of logistic regression by L-BFGS instead of SGD.
    labels: share of the labels of every class that is used for training.
    augmentation: of the training images, as for view 1; None extracts features once.
    min_steps: repeats small data sets beyond `epochs`, up to this many steps.
    standardize: scales features to mean 0 and standard deviation 1 over the training images.
    held_out: share of every class that settings are chosen on.
    """

    frozen: bool
    lrs: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    l2: tuple[float, ...] = ()
    labels: float = 1.0
    batch_size: int = 1024
    augmentation: Augmentation | None = None
    min_steps: int = 0
    standardize: bool = False
    held_out: float = 0.2

    @property
    def settings(self) -> list[Setting]:
        """Return the settings to choose from."""
        if self.l2:
            return [{"l2": l2} for l2 in self.l2]
        return [{"lr": lr, "epochs": epochs} for epochs in self.epochs for lr in self.lrs]


CROP_AND_FLIP = Augmentation(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0))
NO_AUGMENTATION = replace(CROP_AND_FLIP, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
L2_VALUES = tuple(np.logspace(-6, 5, 45).tolist())
_SEMI = Protocol(frozen=False, lrs=(0.005, 0.01, 0.02, 0.05, 0.1), epochs=(30, 50), augmentation=CROP_AND_FLIP)
PROTOCOLS: dict[str, Protocol] = {
    # Grill et al. 2020, appendix C.
    "byol-linear": Protocol(frozen=True, lrs=(0.05, 0.1, 0.2, 0.3, 0.4), epochs=(80,), augmentation=CROP_AND_FLIP),
    "byol-semi-1": replace(_SEMI, labels=0.01),
    "byol-semi-10": replace(_SEMI, labels=0.1),
    "byol-transfer-linear": Protocol(frozen=True, l2=L2_VALUES),
    # Minutes on a CPU, and suited to few labels.
    "quick-linear": Protocol(
        frozen=True, lrs=(0.01, 0.03, 0.1, 0.3, 1.0), epochs=(30,), batch_size=128, min_steps=300, standardize=True
    ),
    "quick-finetune": Protocol(
        frozen=False,
        lrs=(0.01, 0.03, 0.1),
        epochs=(20,),
        batch_size=128,
        min_steps=200,
        augmentation=replace(CROP_AND_FLIP, crop_scale=(0.5, 1.0), flip=0.0),
    ),
}


class TrainedClassifier(NamedTuple):
    """An encoder with a linear classifier, its metrics for JSON, and the rows whose labels it was trained with."""

    classifier: nn.Sequential
    metrics: dict[str, Any]
    rows: Array


def train_classifier(
    encoder: nn.Module,
    train: Images,
    test: Images,
    preparation: Preparation,
    *,
    frozen: bool,
    protocol: str | Protocol = "quick",
    seed: int = 0,
) -> TrainedClassifier:
    """Train a classifier on the training images and return it with its `classification_metrics` on the test images.

    frozen: train a linear classifier on the encoder in eval mode and leave its parameters and buffers unchanged.
        Otherwise train it together with a copy of the encoder.
    protocol: a name of `PROTOCOLS`, or `quick` for the quick one that fits `frozen`.
    seed: of the share of labels, the held-out images, their order, augmentation and random layers of the encoder.
    """
    name, protocol = _resolve(protocol, frozen)
    labels, test_labels = labels_of(train, "learn from"), labels_of(test, "classify")
    num_classes = max(len(train.class_names), 1 + int(labels.max()))
    train = train.subset(label_subset(labels, protocol.labels, seed))
    fit = _fit_probe if frozen else _finetune
    classifier, train, record = fit(encoder, train, preparation, protocol, num_classes, seed)
    scores, read = dataset_features(classifier, test, preparation, indices=np.flatnonzero(test_labels >= 0))
    settings = {"protocol": name, "frozen": frozen, "seed": seed, "train_images": len(train), **record}
    return TrainedClassifier(classifier, {**settings, **classification_metrics(scores, test_labels[read])}, train.rows)


def _fit_probe(
    encoder: nn.Module, train: Images, preparation: Preparation, protocol: Protocol, num_classes: int, seed: int
) -> tuple[nn.Sequential, Images, dict[str, Any]]:
    """Return the classifier, the training images that are readable, and the record of `fit_linear`."""
    device = device_of(encoder)
    features, read = dataset_features(encoder, train, preparation)
    train = train.subset(read)

    def embedded(members: Array) -> Batches:
        with evaluating(encoder):
            for images, targets in augmented(train.subset(members), preparation, protocol, device, seed):
                with torch.no_grad():
                    embedding = encoder(images).float()
                yield embedding, targets

    head, record = fit_linear(
        features.to(device),
        labels_of(train, "learn from"),
        protocol=protocol,
        num_classes=num_classes,
        seed=seed,
        batches=None if protocol.augmentation is None else embedded,
    )
    return nn.Sequential(encoder, head.float()), train, record


def fit_linear(
    features: Tensor,
    labels: Labels,
    *,
    protocol: str | Protocol = "quick",
    num_classes: int | None = None,
    seed: int = 0,
    batches: Callable[[Array], Batches] | None = None,
) -> tuple[nn.Linear, dict[str, Any]]:
    """Return a linear classifier of features [N, d], on their device, and the setting that was chosen with all trials.

    Features with label -1 are left out. protocol: for frozen encoders; its share of labels is not applied here.
    batches: given indices of the features, returns endless (features, labels) to train on instead.
    """
    _, protocol = _resolve(protocol, True)
    labels = torch.as_tensor(labels)
    known = labelled(labels, "learn from")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    shift, scale = torch.zeros_like(features[0]), torch.ones_like(features[0])
    if protocol.standardize:
        scale, shift = torch.std_mean(features[known], dim=0, correction=0)
        # Do not amplify near-constant features.
        scale = scale.clamp(min=max(1e-4 * scale.max().item(), torch.finfo(scale.dtype).tiny))
    inputs = (features - shift) / scale

    def fit(settings: Sequence[Setting], members: Array) -> list[nn.Linear]:
        if protocol.l2:
            return [_logistic(inputs[members], labels[members], s["l2"], num_classes) for s in settings]
        heads = [zero_linear(features.shape[1], num_classes).to(features.device) for _ in settings]
        if batches is None:
            stream = _shuffled(inputs[members], labels[members].to(inputs.device), protocol.batch_size, seed)
        else:
            stream = (((fresh - shift) / scale, targets) for fresh, targets in batches(members))
        return _descend(heads, settings, stream, len(members), protocol)

    def score(head: nn.Linear, members: Array) -> tuple[Tensor, Tensor]:
        return head(inputs[members].to(head.weight.dtype)).cpu(), labels[members]

    head, record = _choose(protocol, labels.numpy(), fit, score, seed)
    with torch.no_grad():
        head.weight.div_(scale)
        head.bias.sub_(head.weight @ shift.to(head.weight.dtype))
    return head, record


def _finetune(
    encoder: nn.Module, train: Images, preparation: Preparation, protocol: Protocol, num_classes: int, seed: int
) -> tuple[nn.Sequential, Images, dict[str, Any]]:
    """Return the classifier with a trained copy of the encoder, the training images, and the record of `_choose`."""
    device, labels = device_of(encoder), labels_of(train, "learn from")

    def fit(settings: Sequence[Setting], members: Array) -> list[nn.Sequential]:
        heads = [zero_linear(encoder_width(encoder), num_classes).to(device) for _ in settings]
        networks = [nn.Sequential(copy.deepcopy(encoder), head).requires_grad_(True).train() for head in heads]
        stream = augmented(train.subset(members), preparation, protocol, device, seed)
        before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                return _descend(networks, settings, stream, len(members), protocol)
        finally:
            torch.backends.cudnn.deterministic = before

    def score(network: nn.Sequential, members: Array) -> tuple[Tensor, Tensor]:
        scores, read = dataset_features(network, train, preparation, indices=members)
        return scores, torch.as_tensor(labels)[read]

    network, record = _choose(protocol, labels, fit, score, seed)
    return network.eval(), train, record


def _choose(
    protocol: Protocol,
    labels: Array,
    fit: Callable[[Sequence[Setting], Array], list[Network]],
    score: Callable[[Network, Array], tuple[Tensor, Tensor]],
    seed: int,
) -> tuple[Network, dict[str, Any]]:
    """Return the network that the best setting trains on all labelled images, and a record of the choice.

    fit: trains one network per setting on the images with these indices. score: returns their logits and labels.
    The best setting has the highest accuracy on held-out images; of equals, the lowest loss. If every class has a
    single image, nothing can be held out and the middle setting is taken.
    """
    everyone = label_subset(labels, 1.0, seed)
    present = np.bincount(labels[everyone])
    if np.count_nonzero(present) < 2:
        raise ByolTimmError(
            f"all {len(everyone)} images to learn from are of one class ({labels[everyone[0]]}). A classifier needs two"
        )
    settings, trials = protocol.settings, []
    held_out = label_subset(labels, protocol.held_out, seed)
    held_out = held_out[present[labels[held_out]] > 1]
    best = len(settings) // 2
    if len(settings) > 1 and len(held_out):
        ranks = []
        for setting, network in zip(settings, fit(settings, np.setdiff1d(everyone, held_out)), strict=True):
            with torch.no_grad():
                logits, targets = score(network, held_out)
            top1, loss = accuracy(logits, targets), F.cross_entropy(logits, targets).item()
            ranks.append((top1, -loss) if math.isfinite(loss) else (-1.0, 0.0))
            trials.append({**setting, "accuracy": top1, "loss": loss if math.isfinite(loss) else None})
        best = ranks.index(max(ranks))
    [network] = fit(settings[best : best + 1], everyone)
    head: Any = network[-1] if isinstance(network, nn.Sequential) else network
    with torch.no_grad():
        absent = torch.as_tensor(np.bincount(labels[everyone], minlength=len(head.bias)) == 0)
        head.weight[absent], head.bias[absent] = 0.0, ABSENT
    return network, {"chosen": settings[best], "trials": trials}


def _descend(
    networks: list[Network], settings: Sequence[Setting], batches: Batches, images: int, protocol: Protocol
) -> list[Network]:
    """Train the networks by SGD on the same batches, each with its own setting, and return them."""
    steps_per_epoch = images // min(protocol.batch_size, images)
    totals = [max(round(setting["epochs"] * steps_per_epoch), protocol.min_steps) for setting in settings]
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, nesterov=True) for network in networks]
    with closing(batches):  # type: ignore[type-var]
        for step, (inputs, labels) in zip(range(max(totals)), batches, strict=False):
            for network, setting, total, optimizer in zip(networks, settings, totals, optimizers, strict=True):
                if step < total:
                    rate = learning_rate(step, total_steps=total, warmup_steps=0, peak=setting["lr"])
                    optimizer.param_groups[0]["lr"] = rate
                    optimizer.zero_grad()
                    F.cross_entropy(network(inputs), labels, ignore_index=-1).backward()
                    optimizer.step()
    return networks


def _shuffled(inputs: Tensor, labels: Tensor, batch_size: int, seed: int) -> Batches:
    """Yield endless full batches, in a new order every epoch."""
    batch_size = min(batch_size, len(inputs))
    for epoch in itertools.count():
        for members in epoch_order(seed, epoch, len(inputs)).to(inputs.device).split(batch_size):
            if len(members) == batch_size:
                yield inputs[members], labels[members]


def augmented(images: Images, preparation: Preparation, protocol: Protocol, device: torch.device, seed: int) -> Batches:
    """Yield endless batches of augmented, normalized images and their labels, each valid until the next."""
    settings: Any = dict(seed=seed, mean=preparation.mean, std=preparation.std)
    views = TwoViews(protocol.augmentation or NO_AUGMENTATION, preparation.transform.size, **settings)
    make_views = DeviceViews(views, device, preparation.channels_last)
    labels, size = torch.tensor(images.labels), min(protocol.batch_size, len(images))
    reading: Any = dict(batch_size=size, global_batch=size, seed=seed, workers=preparation.workers)
    cached = open_cache(images, None, workers=preparation.workers)
    with TrainingBatches(cached, cut=views.cut, **reading) as batches:
        for batch in batches:
            # Unreadable images are replaced by others: ignore their labels.
            labels[list(batches.bad)] = -1
            yield make_views(batch)[0], labels[batch.ordinals % len(images)].to(device)


def _logistic(features: Tensor, labels: Tensor, l2: float, num_classes: int) -> nn.Linear:
    """Fit logistic regression in float64 and return it as a linear layer."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / l2, max_iter=LOGISTIC_STEPS)
    with warnings.catch_warnings():
        # The weakest penalties may not converge: their result is judged like the others.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features.cpu().double().numpy(), labels.numpy())
    weight, bias = torch.as_tensor(model.coef_), torch.as_tensor(model.intercept_)
    if len(model.classes_) == 2:
        weight, bias = (torch.cat([-half, half]) for half in (weight / 2, bias / 2))
    head = zero_linear(features.shape[1], num_classes).double()
    with torch.no_grad():
        head.weight[model.classes_], head.bias[model.classes_] = weight, bias
    return head.to(features.device)


def zero_linear(width: int, num_classes: int) -> nn.Linear:
    """Return a linear layer of zeros, without drawing random numbers."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _resolve(protocol: str | Protocol, frozen: bool) -> tuple[str, Protocol]:
    """Return name and values of a protocol, which must fit `frozen`."""
    if protocol == "quick":
        protocol = "quick-linear" if frozen else "quick-finetune"
    name = protocol if isinstance(protocol, str) else "custom"
    if isinstance(protocol, str):
        if name not in PROTOCOLS:
            raise ByolTimmError(f"unknown protocol {name!r}. Choose quick, {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[name]
    if protocol.frozen != frozen:
        kinds = ("frozen", "fine-tuned") if protocol.frozen else ("fine-tuned", "frozen")
        raise ByolTimmError(f"protocol {name} is for {kinds[0]} encoders, not {kinds[1]} ones. Choose another")
    return name, protocol
