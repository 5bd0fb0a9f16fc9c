"""Optimizers as BYOL uses them: LARS, parameter groups, and the learning rate as a function of the step."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..byol import target_decay
from ..errors import ByolTimmError, nearest, one_line


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling as in BYOL's released code (Grill et al. 2020, appendix J; You et al. 2017).

    For every parameter p with gradient g, `g += wd p; r = eta |p| / |g|; m = momentum m + r g; p -= lr m`, with r = 1
    where either norm is zero. A group with `adapt=False` gets neither decay nor adaptation: plain momentum SGD.
    The gradients are used up: after a step they hold what was added to the momentum.
    timm's `Lars` divides by `|g| + wd |p| + eps` instead, and stops adapting at `weight_decay=0`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=True)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            if group["adapt"]:
                # In place: fresh memory for all gradients costs a CPU as much as everything else here.
                torch._foreach_add_(grads, params, alpha=group["weight_decay"])
                param_norms = torch.stack(torch._foreach_norm(params))
                grad_norms = torch.stack(torch._foreach_norm(grads))
                ratios = torch.where((param_norms > 0) & (grad_norms > 0), group["eta"] * param_norms / grad_norms, 1.0)
                torch._foreach_mul_(grads, list(ratios.unbind()))
            momenta = [self._momentum(p) for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            lr = group["lr"]
            if isinstance(lr, torch.Tensor):
                # A scalar on the device, which `alpha` would read on the host.
                torch._foreach_add_(params, torch._foreach_mul(momenta, -lr))
            else:
                torch._foreach_add_(params, momenta, alpha=-lr)
        return loss

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def parameter_groups(module: nn.Module, weight_decay: float, *, no_weight_decay: Iterable[str] = ()) -> list[dict]:
    """The trainable parameters in two groups: adapted and decayed; biases, norms and the names of `no_weight_decay`.

    These names may be patterns such as `pos_embed.*`, as in timm's networks. The second group carries `weight_decay=0`
    and, for `LARS`, `adapt=False`.
    """
    patterns = list(no_weight_decay)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = any(fnmatchcase(name, pattern) for pattern in patterns)
            skip = exempt or parameter.ndim <= 1 or name.endswith(".bias")
            (plain if skip else decayed).append(parameter)
    return [
        dict(params=decayed, weight_decay=weight_decay, adapt=True),
        dict(params=plain, weight_decay=0.0, adapt=False),
    ]


def create_optimizer(
    opt: str, module: nn.Module, *, lr: float, weight_decay: float, no_weight_decay: Iterable[str] = ()
) -> torch.optim.Optimizer:
    """`lars`, or any optimizer that `timm.optim.create_optimizer_v2` knows, over `parameter_groups(module)`.

    Raises `ByolTimmError` for an unknown one, and for one that needs more than gradients or is not to be had here.
    """
    groups = parameter_groups(module, weight_decay, no_weight_decay=no_weight_decay)
    if opt == "lars":
        return LARS(groups, lr)
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known, name = [str(name) for name in list_optimizers()], opt.lower().removeprefix("lookahead_")
    # timm's own `lars`, which it would take for LARS, is another.
    if name not in known or name == "lars":
        raise ByolTimmError(f"unknown optimizer {opt!r}. {nearest(opt.lower(), known)}")
    if get_optimizer_info(name).second_order:
        raise ByolTimmError(f"{opt} needs second derivatives, which training has none of. Choose another --opt")
    for group in groups:
        del group["adapt"]
    try:
        return create_optimizer_v2(groups, opt, lr=lr, weight_decay=weight_decay)
    # timm asserts that packages and a GPU are there.
    except (AssertionError, ImportError, ValueError) as error:
        raise ByolTimmError(f"optimizer {opt} cannot be used ({one_line(error)}). Choose another --opt") from error


def learning_rate(step: int, *, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 to `peak` over the warm-up, then a cosine to 0 over the rest (Grill et al. 2020, section 3.2)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate, target decay and epoch as functions of the step; one step is one global batch."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    global_batch: int
    peak_lr: float
    base_target_decay: float

    @classmethod
    def of(cls, config: Any, num_images: int, forwards: int) -> "Schedule":
        """forwards: of one batch each that make up a step, over processes and accumulation."""
        global_batch = config.batch_size * forwards
        if num_images < global_batch:
            raise ByolTimmError(
                f"{num_images} images are fewer than the global batch of {global_batch} ({config.batch_size} x "
                f"{forwards}). Lower --batch_size"
            )
        steps_per_epoch = num_images // global_batch
        total_steps = config.epochs * steps_per_epoch
        warmup_steps = round(config.warmup_epochs * steps_per_epoch)
        if warmup_steps >= total_steps:
            raise ByolTimmError(f"--warmup_epochs {config.warmup_epochs:g} leaves nothing of {config.epochs} epochs")
        return cls(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            warmup_steps=warmup_steps,
            global_batch=global_batch,
            peak_lr=config.lr * global_batch / 256,
            base_target_decay=config.target_decay,
        )

    def lr(self, step: int) -> float:
        return learning_rate(step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, peak=self.peak_lr)

    def target_decay(self, step: int) -> float:
        return target_decay(step, self.total_steps, self.base_target_decay)

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def evaluates(self, step: int, every: int) -> bool:
        """Whether kNN is due after `step` steps: at the start, every so many epochs, at the end."""
        return step == self.total_steps or step % (every * self.steps_per_epoch) == 0
