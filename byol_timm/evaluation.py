"""What a representation is worth: features of any encoder, kNN, and classifiers, seeded and repeatable."""

import copy
import itertools
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .augment import Augmentation, EvaluationTransform, TwoViews
from .augment import normalize as normalize_pixels
from .byol import normalize
from .config import EvaluationConfig, data_settings
from .data import TrainingBatches, epoch_order, evaluation_batches
from .defaults import check_seed, crop_pct, normalization
from .encoder import encoder_width, has_convolutions
from .errors import ByolTimmError
from .hub import load_encoder
from .optim import learning_rate
from .sources import Images, Splits, open_dataset, warn_of_few_levels

Array = NDArray[Any]
Labels = Tensor | NDArray[np.int64]
Setting = Mapping[str, float]
Network = TypeVar("Network", bound=nn.Module)

# Similarities held at a time.
KNN_VALUES = 2**24
RAW_PIXELS_SIDE = 32
# The bias of a class that has no training image: low enough never to be chosen.
ABSENT = -1e4
# scikit-learn's default of 100 is too few for weak penalties.
LOGISTIC_STEPS = 1000


# Features


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
    device = torch.device(device) if device is not None else _device(encoder)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = []
    with evaluating(encoder), torch.autocast(device.type, enabled=False):
        for pixels in batches.split(batch_size) if isinstance(batches, Tensor) else batches:
            if not len(pixels):
                continue
            if poll is not None:
                poll()
            images = normalize_pixels(pixels.to(device), mean, std).contiguous(memory_format=layout)
            features.append(encoder(images).float().cpu())
    return torch.cat(features) if features else torch.empty(0, encoder_width(encoder))


@dataclass(frozen=True)
class Preparation:
    """How images become the input of an encoder, and how they are read.

    transform: of an image to uint8 [C, H, W]. mean, std: of pixels in 0..1, per channel or one for all.
    workers: processes that decode; memory_limit: bytes of images held decoded during training; as in `data`.
    poll: called before every batch, to interrupt by raising.
    """

    transform: EvaluationTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False
    workers: int | None = None
    memory_limit: float = 2 * 2**30
    poll: Callable[[], None] | None = None

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @classmethod
    def of(cls, encoder: nn.Module, in_chans: int = 3, **settings: Any) -> "Preparation":
        """What timm knows of the encoder's input: size, crop (small images are left whole), mean and std."""
        wanted = resolve_model_data_config(encoder)
        size = wanted["input_size"][1:]
        transform = EvaluationTransform(size, crop_pct=max(wanted["crop_pct"], crop_pct(min(size))))
        return cls(transform, *normalization(encoder, in_chans), **settings)


def open_evaluation(config: EvaluationConfig, *, labelled: bool = True) -> tuple[nn.Module, Splits, Preparation]:
    """The encoder that the settings name, on a GPU where there is one, its images, and how they become its input.

    labelled: raise `ByolTimmError` for images of which none are held out with a label; else all images of the split are
        in `train`, with or without labels.
    """
    if config.workers is not None and config.workers < 0:
        raise ByolTimmError(f"--workers must not be negative ({config.workers})")
    check_seed(config.seed)
    # What a bare timm name gets without --pretrained.
    torch.manual_seed(config.seed)
    encoder = load_encoder(
        config.encoder, image_size=config.image_size, in_chans=config.in_chans, pretrained=config.pretrained
    )
    channels = resolve_model_data_config(encoder)["input_size"][0]
    splits = open_dataset(**data_settings(config), in_chans=channels, seed=config.seed, hold_out=labelled)
    warn_of_few_levels(splits.train)
    if labelled and splits.test is None:
        raise ByolTimmError(f"{config.dataset} has no labels to evaluate with. Name their column with --label_column")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    preparation = Preparation.of(encoder, channels, channels_last=has_convolutions(encoder), workers=config.workers)
    return encoder.to(device).eval(), splits, preparation


def dataset_features(
    network: nn.Module,
    images: Images,
    preparation: Preparation,
    *,
    indices: Array | Sequence[int] | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Array]:
    """Outputs of the network for images, float32 [M, width] on the CPU, and the indices of those M that can be read."""
    read = [torch.empty(0, dtype=torch.int64)]

    def pixels() -> Iterator[Tensor]:
        batches = evaluation_batches(
            images, preparation.transform, batch_size=batch_size, workers=preparation.workers, indices=indices
        )
        for batch, good in batches:
            read.append(good)
            yield batch

    features = extract_features(
        network,
        pixels(),
        mean=preparation.mean,
        std=preparation.std,
        channels_last=preparation.channels_last,
        poll=preparation.poll,
    )
    return features, torch.cat(read).numpy()


def raw_pixels(images: Tensor) -> Tensor:
    """Images [N, C, H, W] as their own representation, float32 [N, C * h * w]: averaged to 32x32 where larger."""
    if images.shape[-1] > RAW_PIXELS_SIDE:
        images = torch.cat([F.adaptive_avg_pool2d(part.float(), RAW_PIXELS_SIDE) for part in images.split(256)])
    return images.float().flatten(1)


class RawPixels(nn.Module):
    """`raw_pixels` in the place of an encoder, to compare encoders with."""

    def forward(self, images: Tensor) -> Tensor:
        return raw_pixels(images)


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


def _device(module: nn.Module) -> torch.device:
    # `RawPixels` has no parameters.
    return next(module.parameters(), torch.empty(0)).device


@contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


# Labels and figures


def label_subset(labels: Labels, fraction: float, seed: int) -> Array:
    """Sorted indices of that share (0 to 1) of every class's images, at least one; unlabelled ones (-1) are left out.

    A smaller share of the same seed is part of a larger one.
    """
    if not 0 < fraction <= 1:
        raise ByolTimmError(f"a share of labels lies above 0 and is at most 1 ({fraction})")
    labels = np.asarray(labels)
    chosen = [np.empty(0, dtype=np.int64)]
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng((seed % 2**64, int(label))).permutation(members)
        chosen.append(order[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def classification_metrics(scores: Tensor, labels: Labels) -> dict[str, Any]:
    """What the scores [N, classes] of a classifier are worth, as numbers for JSON; images with label -1 do not count.

    `images`; `top1` with its 95 % interval `top1_interval` (Wilson); `top5`, None for less than 6 classes; `per_class`
    accuracies, None for a class without images, and their mean `mean_per_class`; `confusion` counts, a row per true
    class. Of equal scores the first class counts as higher. A class with score -inf is never right, nor is one that
    the classifier does not have.
    """
    labels = torch.as_tensor(labels).cpu()
    known = _labelled(labels, "classify")
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
    """Wilson's 95 % interval for the share of which `correct` of `total` is a sample."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, weight = correct / total, z**2 / total
    center, half = share + weight / 2, z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (center - half) / (1 + weight), (center + half) / (1 + weight)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).double().mean().item()


def _labels_of(images: Images, purpose: str) -> Array:
    if images.labels is None:
        raise ByolTimmError(f"the images of {images.name} to {purpose} have no labels. Evaluation needs them")
    _labelled(torch.as_tensor(images.labels), purpose)
    return images.labels


def _labelled(labels: Tensor, purpose: str) -> Tensor:
    known = labels >= 0
    if not known.any():
        raise ByolTimmError(f"none of the {len(labels)} images to {purpose} has a label. Evaluation needs labels")
    return known
