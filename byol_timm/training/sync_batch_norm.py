"""BatchNorm over the batches of all processes, with one exchange a pass, on GPUs (NCCL) and on CPUs (gloo)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norms(network: nn.Module) -> None:
    """Let every BatchNorm of torch and timm in the network use the batches of all processes, in place.

    In eval mode, and so where they are frozen, nothing is exchanged.
    """
    for module in network.modules():
        if type(module) is BatchNormAct2d:
            module.__class__ = SyncBatchNormAct  # type: ignore[assignment]
        elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = SyncBatchNorm


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm whose statistics in training are those of all processes."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None and self.num_batches_tracked is not None:
            momentum = 1 / int(self.num_batches_tracked)
        running = (self.running_mean, self.running_var, momentum) if self.track_running_stats else None
        output: Tensor = _Normalize.apply(x, self.weight, self.bias, running, self.eps)
        return output


class SyncBatchNormAct(SyncBatchNorm):
    """The same of timm's BatchNorm with an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(x)))
        return output


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Any, eps: float) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), axes, correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() // x.shape[1])])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        means, variances, counts = torch.stack(every).split([x.shape[1], x.shape[1], 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / total
        if running is not None:
            running_mean, running_var, momentum = running
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (total / (total - 1))).to(running_var.dtype), momentum)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        normalized = (x - mean.view(shape)) * scale.view(shape)
        grad_bias = grad.sum(axes, dtype=mean.dtype)
        grad_weight = (grad * normalized).sum(axes)
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        grad_mean, grad_scale = (part.view(shape) for part in sums / total)
        factor = scale if weight is None else scale * weight
        grad_x = ((grad - grad_mean - normalized * grad_scale) * factor.view(shape)).to(x.dtype)
        affine = (None, None) if weight is None else (grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))
        return grad_x, *affine, None, None
