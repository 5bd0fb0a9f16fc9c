"""BYOL: an online and a target network in one module, and the loss between them (Grill et al. 2020, section 3)."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .encoders import encoder_width
from .errors import ByolTimmError

# Label-free health metrics, scalars without gradient.
HEALTH = ("agreement", "feature_std", "projection_std")


class BYOL(nn.Module):
    """Hold an encoder and everything that BYOL adds to it: projector, predictor and the target network.

    encoder: images [B, C, H, W] -> representations [B, width]; trained in place.
    width: of the representation; asked from a timm encoder when None.
    num_head_layers: 2 as in the paper; 3 as MoCo v3 has for transformers.

    In training the target's BatchNorms use (and track) the statistics of its own batches, while everything random in
    the target (dropout, drop path) stays off. A BatchNorm of the encoder that was frozen before (`requires_grad` off)
    is in eval mode in both networks.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        width: int | None = None,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        num_head_layers: int = 2,
    ) -> None:
        super().__init__()
        self.width = encoder_width(encoder) if width is None else width
        self.encoder = encoder
        self.projector = mlp(self.width, hidden_dim, projection_dim, num_head_layers)
        self.predictor = mlp(projection_dim, hidden_dim, projection_dim)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.train()

    def forward(self, view1: Tensor, view2: Tensor | None = None, *, target: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss of two views of the same images, [B, C, H, W] each, with label-free health metrics.

        Given `target` (from `target_projections`) instead of `view2`: that one direction of the loss. The two
        directions share no activations, so one backward pass per direction gives the same gradients as one for their
        sum at about half the memory.

        Returns a dict: `loss` (scalar, 0 to 8, or 0 to 4 for one direction); `agreement`, the mean cosine of online and
        target projection; `feature_std` and `projection_std`, the spread of representations and projections over the
        batch (1 when isotropic, 0 when collapsed); `representation` [B, width] of the (first) view, detached.

        Raises `ByolTimmError` for an encoder that returns anything else than [B, width].
        """
        if target is not None:
            return self._direction(view1, target)
        if view2 is None:
            raise TypeError("BYOL takes two views, or one view and the target projection of the other")
        target1, target2 = self.target_projections(view1, view2)
        first, second = self._direction(view1, target2), self._direction(view2, target1)
        means = {name: (first[name] + second[name]) / 2 for name in HEALTH}
        return {"loss": first["loss"] + second["loss"], **means, "representation": first["representation"]}

    def _direction(self, view: Tensor, target: Tensor) -> dict[str, Tensor]:
        representation = self._represent(self.encoder, view)
        projection = self.projector(representation)
        prediction = self.predictor(projection)
        return {
            "loss": regression_loss(prediction, target),
            "agreement": (normalize(projection.detach()) * normalize(target)).sum(1).mean(),
            "feature_std": feature_std(representation.detach()),
            "projection_std": feature_std(projection.detach()),
            "representation": representation.detach(),
        }

    @torch.no_grad()
    def target_projections(self, *views: Tensor) -> list[Tensor]:
        """Return the target network's projections [B, projection_dim] of each view, without gradient."""
        # One pass per view: batch statistics must not mix the views.
        return [self.target_projector(self._represent(self.target_encoder, view)) for view in views]

    def _represent(self, encoder: nn.Module, view: Tensor) -> Tensor:
        output = encoder(view)
        if not isinstance(output, Tensor) or output.shape != (len(view), self.width):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ByolTimmError(
                f"the encoder returns {what} for {len(view)} images, not {(len(view), self.width)}. Take its "
                "classifier off (num_classes=0, or reset_classifier(0)), or give BYOL the right width"
            )
        return output

    @torch.no_grad()
    def update_target(self, decay: float | Tensor) -> None:
        """`target <- decay * target + (1 - decay) * online`, for parameters only; call it once per optimizer step.

        Buffers are left alone: the target's batch statistics come from its own forward passes. `decay` may be a scalar
        on the device.
        """
        online: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
        target: list[Tensor] = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        if isinstance(decay, Tensor):
            # `_foreach_lerp_` would read the scalar on the host.
            steps = torch._foreach_sub(online, target)
            torch._foreach_mul_(steps, 1 - decay)
            torch._foreach_add_(target, steps)
        else:
            torch._foreach_lerp_(target, online, 1 - decay)

    def train(self, mode: bool = True) -> "BYOL":
        super().train(mode)
        for online, target in ((self.encoder, self.target_encoder), (self.projector, self.target_projector)):
            for module, twin in zip(online.modules(), target.modules(), strict=True):
                is_norm = isinstance(module, _BatchNorm)
                module.training &= not (is_norm and _is_frozen(module))
                twin.training = module.training and is_norm
        return self

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that the encoder wants exempt from weight decay, such as position embeddings."""
        exempt: set[str] = getattr(self.encoder, "no_weight_decay", set)()
        return {f"encoder.{name}" for name in exempt}


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def mlp(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int = 2) -> nn.Sequential:
    """Build a projector or predictor: hidden layers of Linear, BatchNorm, ReLU, then Linear without bias or norm."""
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        in_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim, bias=False))


def normalize(x: Tensor) -> Tensor:
    """Return the rows of x [B, d] with l2 norm 1, in float32; a zero row stays zero."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(1, keepdim=True).clamp(min=1e-12))


def regression_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    """Return one direction of the loss: the batch mean of `|q/|q| - z'/|z'||^2`, 0 to 4 (equation 2 of the paper)."""
    return (normalize(prediction) - normalize(projection.detach())).square().sum(1).mean()


def target_decay(step: int, total_steps: int, base: float) -> float:
    """Return tau of the step: from `base` at step 0 to 1 at the end, on a cosine (Grill et al. 2020, section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Return the spread of features [B, d] over the batch: 1 when directions are isotropic, 0 when all are the same.

    The standard deviation of each dimension of the l2-normalised rows, averaged and multiplied by sqrt(d), as in
    SimSiam (Chen & He 2020, section 4.1). float32 also under autocast; nothing waits for the device.
    """
    rows = torch.nn.functional.normalize(features.float(), dim=1)
    return rows.std(0, correction=0).mean() * math.sqrt(features.shape[1])
