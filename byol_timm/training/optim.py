"""Optimizers as BYOL uses them: LARS, parameter groups, and the optimizers of timm."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import ByolTimmError, nearest, one_line


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling as in BYOL's released code (Grill et al. 2020, appendix J; You et al. 2017).

    For every parameter p with gradient g, `g += wd p; r = eta |p| / |g|; m = momentum m + r g; p -= lr m`, with r = 1
    if either norm is zero. A group with `adapt=False` gets neither decay nor adaptation: plain momentum SGD. A step
    overwrites the gradients. timm's `Lars` divides by `|g| + wd |p| + eps` and does not adapt at `weight_decay=0`.
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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
                # In place: new memory for all gradients would double the time on a CPU.
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
        state: dict[str, torch.Tensor] = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def parameter_groups(
    module: nn.Module, weight_decay: float, *, no_weight_decay: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Split the trainable parameters in two groups: decayed and adapted; biases, norms and those of `no_weight_decay`.

    Names may be patterns such as `pos_embed.*`, as in timm's networks. The second group has `weight_decay=0` and, for
    `LARS`, `adapt=False`.
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


def check_optimizer(opt: str) -> None:
    """Raise `ByolTimmError` for an unknown optimizer, and for one that needs more than gradients."""
    if opt == "lars":
        return
    from timm.optim import get_optimizer_info, list_optimizers

    known, name = [str(name) for name in list_optimizers()], opt.lower().removeprefix("lookahead_")
    # timm has another `lars`, under that name.
    if name not in known or name == "lars":
        raise ByolTimmError(f"unknown optimizer {opt!r}. {nearest(opt.lower(), known)}")
    if get_optimizer_info(name).second_order:
        raise ByolTimmError(f"{opt} needs second derivatives, which training does not compute. Choose another --opt")


def create_optimizer(
    opt: str, module: nn.Module, *, lr: float, weight_decay: float, no_weight_decay: Iterable[str] = ()
) -> torch.optim.Optimizer:
    """Create `lars`, or any optimizer of `timm.optim`, over `parameter_groups(module)`.

    timm's `sgd` has Nesterov momentum 0.9; `momentum` is plain momentum SGD. Raises `ByolTimmError` for an unknown
    optimizer, and for one that needs second derivatives, a missing package or another device.
    """
    groups = parameter_groups(module, weight_decay, no_weight_decay=no_weight_decay)
    if opt == "lars":
        return LARS(groups, lr)
    check_optimizer(opt)
    from timm.optim import create_optimizer_v2

    for group in groups:
        del group["adapt"]
    try:
        return create_optimizer_v2(groups, opt, lr=lr, weight_decay=weight_decay)
    # timm asserts that packages and a GPU are available.
    except (AssertionError, ImportError, ValueError) as error:
        raise ByolTimmError(f"optimizer {opt} cannot be used ({one_line(error)}). Choose another --opt") from error
