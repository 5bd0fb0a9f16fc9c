"""What a representation is worth: features of any encoder, kNN, and classifiers, seeded and repeatable."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Images, TrainingBatches, epoch_order
from ..encoders import encoder_width
from ..errors import ByolTimmError
from ..training import learning_rate
from ..views import Augmentation, TwoViews
from .features import Network, Preparation, _device, dataset_features, evaluating
from .metrics import Array, Labels, _accuracy, _labelled, _labels_of, classification_metrics, label_subset
from .neighbours import ABSENT

Setting = Mapping[str, float]
# scikit-learn's default of 100 is too few for weak penalties.
LOGISTIC_STEPS = 1000


# Linear classifiers and fine-tuning


@dataclass(frozen=True)
class Protocol:
    """How a classifier is trained; of several settings the best on held-out training images is trained on all of them.

    frozen: whether it is for frozen encoders (a linear probe) or for fine-tuning.
    lrs, epochs: of SGD with Nesterov momentum 0.9 and no weight decay, its rate on a cosine from `lr` to 0.
    l2: penalties of logistic regression by L-BFGS instead, `l2 / 2 |w|^2` beside the sum of the images' losses.
    labels: share of every class's training labels that is used.
    augmentation: of the training images, as for view 1; None: as in the test, so that features are extracted once.
    min_steps: small data are passed more often than `epochs`, up to so many steps.
    standardize: give the linear classifier features of mean 0 and standard deviation 1 over the training images.
    held_out: share of every class to choose on.
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
        """What is chosen from."""
        if self.l2:
            return [{"l2": l2} for l2 in self.l2]
        return [{"lr": lr, "epochs": epochs} for epochs in self.epochs for lr in self.lrs]


CROP_AND_FLIP = Augmentation(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0))
AS_THEY_ARE = replace(CROP_AND_FLIP, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
L2_VALUES = tuple(np.logspace(-6, 5, 45).tolist())
_SEMI = Protocol(frozen=False, lrs=(0.005, 0.01, 0.02, 0.05, 0.1), epochs=(30, 50), augmentation=CROP_AND_FLIP)
PROTOCOLS: dict[str, Protocol] = {
    # Grill et al. 2020, appendix C.
    "byol-linear": Protocol(frozen=True, lrs=(0.05, 0.1, 0.2, 0.3, 0.4), epochs=(80,), augmentation=CROP_AND_FLIP),
    "byol-semi-1": replace(_SEMI, labels=0.01),
    "byol-semi-10": replace(_SEMI, labels=0.1),
    "byol-transfer-linear": Protocol(frozen=True, l2=L2_VALUES),
    # Minutes on a CPU, also where there are few labels.
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
    """An encoder with a linear classifier on top; how it was trained and does on the test images, ready for JSON.

    rows: of the images in their split whose labels it learned from.
    """

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
    """A classifier of the training images, and its `classification_metrics` on the test images.

    frozen: train a linear classifier on the encoder in eval mode, its parameters and buffers untouched; else train it
        together with a copy of the encoder.
    protocol: a name of `PROTOCOLS`, or `quick` for the quick one that fits `frozen`.
    seed: of the share of labels, what is held out, order, augmentation and everything random in the encoder.
    """
    name, protocol = _resolve(protocol, frozen)
    labels, test_labels = _labels_of(train, "learn from"), _labels_of(test, "classify")
    chosen = label_subset(labels, protocol.labels, seed)
    num_classes = max(len(train.class_names), 1 + int(labels.max()))
    device = _device(encoder)
    if frozen:
        features, chosen = dataset_features(encoder, train, preparation, indices=chosen)

        def embedded(members: Array) -> Iterator[tuple[Tensor, Tensor]]:
            with evaluating(encoder):
                for images, targets in _augmented(train.subset(chosen[members]), preparation, protocol, device, seed):
                    with torch.no_grad():
                        embedding = encoder(images).float()
                    yield embedding, targets

        head, record = fit_linear(
            features.to(device),
            labels[chosen],
            protocol=protocol,
            num_classes=num_classes,
            seed=seed,
            batches=None if protocol.augmentation is None else embedded,
        )
        classifier = nn.Sequential(encoder, head.float())
    else:
        classifier, record = _finetune(encoder, train.subset(chosen), preparation, protocol, num_classes, seed)
    scores, read = dataset_features(classifier, test, preparation, indices=np.flatnonzero(test_labels >= 0))
    how = {"protocol": name, "frozen": frozen, "seed": seed, "train_images": len(chosen), **record}
    metrics = {**how, **classification_metrics(scores, test_labels[read])}
    return TrainedClassifier(classifier, metrics, train.rows[chosen])


def fit_linear(
    features: Tensor,
    labels: Labels,
    *,
    protocol: str | Protocol = "quick",
    num_classes: int | None = None,
    seed: int = 0,
    batches: Callable[[Array], Iterator[tuple[Tensor, Tensor]]] | None = None,
) -> tuple[nn.Linear, dict[str, Any]]:
    """A linear classifier of features [N, d], on their device, and the record of what was chosen.

    Features with label -1 are left out. protocol: for frozen encoders; its share of labels is not applied here.
    batches: endless (features, labels) to train on instead of `features`, given indices of these.
    """
    _, protocol = _resolve(protocol, True)
    labels = torch.as_tensor(labels)
    known = _labelled(labels, "learn from")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    shift, scale = torch.zeros_like(features[0]), torch.ones_like(features[0])
    if protocol.standardize:
        scale, shift = torch.std_mean(features[known], dim=0, correction=0)
        # What hardly varies is not blown up.
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
        _descend(heads, settings, stream, len(members), protocol)
        return heads

    def score(head: nn.Linear, members: Array) -> tuple[Tensor, Tensor]:
        return head(inputs[members].to(head.weight.dtype)).cpu(), labels[members]

    head, record = _choose(protocol, labels.numpy(), fit, score, seed)
    with torch.no_grad():
        head.weight.div_(scale)
        head.bias.sub_(head.weight @ shift.to(head.weight.dtype))
    return head, record


def _finetune(
    encoder: nn.Module, train: Images, preparation: Preparation, protocol: Protocol, num_classes: int, seed: int
) -> tuple[nn.Sequential, dict[str, Any]]:
    device = _device(encoder)
    generators = [device] if device.type == "cuda" else []

    def fit(settings: Sequence[Setting], members: Array) -> list[nn.Sequential]:
        networks = []
        for _ in settings:
            head = zero_linear(encoder_width(encoder), num_classes).to(device)
            networks.append(nn.Sequential(copy.deepcopy(encoder), head).requires_grad_(True).train())
        stream = _augmented(train.subset(members), preparation, protocol, device, seed)
        with torch.random.fork_rng(generators), _deterministic_convolutions():
            torch.manual_seed(seed)
            _descend(networks, settings, stream, len(members), protocol)
        return networks

    def score(network: nn.Sequential, members: Array) -> tuple[Tensor, Tensor]:
        scores, read = dataset_features(network, train, preparation, indices=members)
        return scores, torch.as_tensor(train.labels)[read]

    network, record = _choose(protocol, np.asarray(train.labels), fit, score, seed)
    return network.eval(), record


def _choose(
    protocol: Protocol,
    labels: Array,
    fit: Callable[[Sequence[Setting], Array], list[Network]],
    score: Callable[[Network, Array], tuple[Tensor, Tensor]],
    seed: int,
) -> tuple[Network, dict[str, Any]]:
    """What the protocol's best setting makes of all labelled images, and the record of the choice.

    fit: trains on the images of these indices, once per setting; score: logits of such images, and their labels.
    The best has the highest accuracy on held-out images, of equals the lowest loss. Where no class has two images,
    nothing can be held out, and the setting in the middle is taken.
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
            accuracy, loss = _accuracy(logits, targets), F.cross_entropy(logits, targets).item()
            ranks.append((accuracy, -loss) if math.isfinite(loss) else (-1.0, 0.0))
            trials.append({**setting, "accuracy": accuracy, "loss": loss if math.isfinite(loss) else None})
        best = ranks.index(max(ranks))
    [network] = fit(settings[best : best + 1], everyone)
    head: Any = network[-1] if isinstance(network, nn.Sequential) else network
    with torch.no_grad():
        absent = torch.as_tensor(np.bincount(labels[everyone], minlength=len(head.bias)) == 0)
        head.weight[absent], head.bias[absent] = 0.0, ABSENT
    return network, {"chosen": settings[best], "trials": trials}


def _descend(
    networks: Sequence[nn.Module],
    settings: Sequence[Setting],
    batches: Iterator[tuple[Tensor, Tensor]],
    images: int,
    protocol: Protocol,
) -> None:
    """Train the networks side by side on the same batches, one setting each."""
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


def _shuffled(inputs: Tensor, labels: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, in another order every epoch, what does not fill a batch left out."""
    batch_size = min(batch_size, len(inputs))
    for epoch in itertools.count():
        for members in epoch_order(seed, epoch, len(inputs)).to(inputs.device).split(batch_size):
            if len(members) == batch_size:
                yield inputs[members], labels[members]


def _augmented(
    images: Images, preparation: Preparation, protocol: Protocol, device: torch.device, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of augmented, normalised images and their labels, on the device."""
    views = TwoViews(
        protocol.augmentation or AS_THEY_ARE,
        preparation.transform.size,
        seed=seed,
        mean=preparation.mean,
        std=preparation.std,
    )
    labels = torch.tensor(images.labels)
    batch_size = min(protocol.batch_size, len(images))
    batches = TrainingBatches(
        images,
        batch_size=batch_size,
        global_batch=batch_size,
        cut=views.cut,
        seed=seed,
        workers=preparation.workers,
        memory_limit=preparation.memory_limit,
    )
    with batches:
        for batch in batches:
            if preparation.poll is not None:
                preparation.poll()
            if batch.crops is not None:
                view, _ = views.finish(batch.crops.to(device), batch.ordinals)
            else:
                view, _ = views(batch.images.to(device), batch.ordinals)  # type: ignore[union-attr]
            # Another image takes the place of one that cannot be read.
            labels[list(batches.bad)] = -1
            yield view.contiguous(memory_format=preparation.layout), labels[batch.ordinals % len(images)].to(device)


def _logistic(features: Tensor, labels: Tensor, l2: float, num_classes: int) -> nn.Linear:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / l2, max_iter=LOGISTIC_STEPS)
    with warnings.catch_warnings():
        # The weakest penalties need not converge: what they give is judged like the rest.
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
    """A linear layer of zeros; nothing is drawn."""
    layer = nn.utils.skip_init(nn.Linear, width, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _resolve(protocol: str | Protocol, frozen: bool) -> tuple[str, Protocol]:
    """Name and values of a protocol that fits."""
    if isinstance(protocol, Protocol):
        name = "custom"
    else:
        name = protocol if protocol != "quick" else "quick-linear" if frozen else "quick-finetune"
        if name not in PROTOCOLS:
            raise ByolTimmError(f"there is no protocol {name!r}. Choose quick, {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[name]
    if protocol.frozen != frozen:
        kinds = ("frozen", "fine-tuned") if protocol.frozen else ("fine-tuned", "frozen")
        raise ByolTimmError(f"protocol {name} is for {kinds[0]} encoders, not {kinds[1]} ones. Choose another")
    return name, protocol


@contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
