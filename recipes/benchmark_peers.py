"""Views and steps of BYOL in other packages, as their documentation has them, for benchmark.py to measure.

Each package is imported only when it is named.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byol_timm.errors import ByolTimmError, one_line

Views = Callable[[Any], Any]
Step = Callable[[Tensor, Tensor], None]


def check_peers(names: Sequence[str]) -> None:
    """Raise `ByolTimmError` for a package that is unknown or cannot be imported."""
    for name in names:
        if name not in MODULES:
            raise ByolTimmError(f"unknown package {name!r} in --against. Known: {', '.join(MODULES)}")
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:
            # Any exception: old packages fail in many ways with new ones installed.
            reason = one_line(error)
            raise ByolTimmError(f"--against {name} cannot be imported ({reason}). Run pip install {name}") from error


# Two views: of a PIL image, or of float images [B, C, H, W] in 0..1


def lightly_views(size: int) -> Views:
    from lightly.transforms import BYOLTransform
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    return BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))


def torchvision_views(size: int) -> Views:
    from torchvision.transforms import v2

    def view(blur: float, solarize: float) -> Any:
        operations = [
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(_taps(size))], blur),
            v2.RandomSolarize(128, solarize),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
        return v2.Compose(operations)

    first, second = view(1.0, 0.0), view(0.1, 0.2)
    return lambda image: (first(image), second(image))


def kornia_views(size: int) -> Views:
    import kornia.augmentation as kornia

    def view(blur: float, solarize: float) -> nn.Module:
        taps = _taps(size)
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        return nn.Sequential(
            kornia.RandomResizedCrop((size, size), resample="BICUBIC"),
            kornia.RandomHorizontalFlip(),
            kornia.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            kornia.RandomGrayscale(p=0.2),
            kornia.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=blur),
            kornia.RandomSolarize(0.0, 0.0, p=solarize),
            kornia.Normalize(mean=mean, std=std),
        )

    first, second = view(1.0, 0.0), view(0.1, 0.2)
    return lambda images: (first(images), second(images))


def _taps(size: int) -> int:
    """Return the width of the paper's blur: an odd number of pixels, at least 3."""
    return max(3, 2 * int(size / 10 / 2) + 1)


# One step on two views, on the device of the encoder


def _device(encoder: nn.Module) -> torch.device:
    return next(encoder.parameters()).device


def lightly_step(encoder: nn.Module, width: int, hidden_dim: int, image_size: int) -> Step:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
    from lightly.utils.lars import LARS

    device = _device(encoder)
    projection = BYOLProjectionHead(width, hidden_dim).to(device)
    prediction = BYOLPredictionHead(256, hidden_dim).to(device)
    online = nn.Sequential(encoder, projection)
    momentum = copy.deepcopy(online)
    deactivate_requires_grad(momentum)
    decayed, plain = get_weight_decay_parameters([encoder, projection, prediction])
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=0.1, momentum=0.9, weight_decay=1.5e-6)
    criterion = NegativeCosineSimilarity()

    def step(view1: Tensor, view2: Tensor) -> None:
        update_momentum(online, momentum, m=0.99)
        first, second = prediction(online(view1)), prediction(online(view2))
        with torch.no_grad():
            target1, target2 = momentum(view1), momentum(view2)
        loss = 0.5 * (criterion(first, target2) + criterion(second, target1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def byol_pytorch_step(encoder: nn.Module, width: int, hidden_dim: int, image_size: int) -> Step:
    from byol_pytorch import BYOL

    class Given(nn.Module):
        """Return precomputed views instead of augmenting."""

        views: list[Tensor]

        def forward(self, images: Tensor) -> Tensor:
            return self.views.pop(0)

    given = Given()
    # It builds its networks in a first pass.
    given.views = list(torch.randn(2, 2, 3, image_size, image_size, device=_device(encoder)))
    learner = BYOL(
        encoder,
        image_size,
        hidden_layer=-1,
        projection_hidden_size=hidden_dim,
        augment_fn=given,
        augment_fn2=given,
        use_simplicial_embeddings=False,
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)

    def step(view1: Tensor, view2: Tensor) -> None:
        given.views = [view1, view2]
        loss = learner(view1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()

    return step


def solo_learn_step(encoder: nn.Module, width: int, hidden_dim: int, image_size: int) -> Step:
    """Return a step with its loss, optimizer and target network, without its online classifier."""
    from solo.losses.byol import byol_loss_func
    from solo.utils.lars import LARSWrapper
    from solo.utils.momentum import MomentumUpdater, initialize_momentum_params

    def head(inputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 256)
        )

    projector, predictor = (head(inputs).to(_device(encoder)) for inputs in (width, 256))
    pairs = [(network, copy.deepcopy(network)) for network in (encoder, projector)]
    for online, momentum in pairs:
        initialize_momentum_params(online, momentum)
    (_, momentum_encoder), (_, momentum_projector) = pairs
    parameters = [*encoder.parameters(), *projector.parameters(), *predictor.parameters()]
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1.5e-6)
    optimizer = LARSWrapper(sgd, exclude_bias_n_norm=True)
    updater = MomentumUpdater(0.99)

    def step(view1: Tensor, view2: Tensor) -> None:
        features = [encoder(view) for view in (view1, view2)]
        with torch.no_grad():
            momentum_features = [momentum_encoder(view) for view in (view1, view2)]
        first, second = (predictor(projector(feature)) for feature in features)
        with torch.no_grad():
            target1, target2 = (momentum_projector(feature) for feature in momentum_features)
        loss = byol_loss_func(second, target1) + byol_loss_func(first, target2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for online, momentum in pairs:
            updater.update(online, momentum)

    return step


MODULES = {
    "lightly": "lightly.transforms",
    "torchvision": "torchvision.transforms.v2",
    "kornia": "kornia.augmentation",
    "byol-pytorch": "byol_pytorch",
    "solo-learn": "solo.losses.byol",
}
VIEWS: dict[str, Callable[[int], Views]] = {
    "lightly": lightly_views,
    "torchvision": torchvision_views,
    "kornia": kornia_views,
}
TAKES_BATCHES = ("kornia",)
STEPS: dict[str, Callable[[nn.Module, int, int, int], Step]] = {
    "lightly": lightly_step,
    "byol-pytorch": byol_pytorch_step,
    "solo-learn": solo_learn_step,
}
# Packages that use channels_last for convolutions, as we do.
TAKE_CHANNELS_LAST = ("solo-learn",)
