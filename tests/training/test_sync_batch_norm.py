"""Two processes with synchronised BatchNorms compute what one process computes on both batches."""

import copy

import pytest
import timm
import torch
from launching import launch
from torch import nn

from byol_timm import BYOL

pytestmark = pytest.mark.slow

# Every rank takes its half of the batch.
HALF = """
    import sys
    import torch
    import torch.distributed as dist
    from byol_timm.training import synchronize_batch_norms
    from test_sync_batch_norm import make_byol, views

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    byol = make_byol(freeze=sys.argv[1] == "frozen")
    synchronize_batch_norms(byol)
    pair = [view.chunk(2)[rank] for view in views()]
    exchanges = []
    for name in ("all_gather", "all_reduce"):
        act = getattr(dist, name)
        setattr(dist, name, lambda *given, act=act: (exchanges.append(1), act(*given))[1])
    byol(*pair)["loss"].backward()
    passes = len(exchanges)
    grads = {name: p.grad for name, p in byol.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= 2
    if rank == 0:
        torch.save({"grads": grads, "buffers": dict(byol.named_buffers()), "exchanges": passes}, "half.pt")
    dist.destroy_process_group()
"""


def views():
    return torch.randn(2, 16, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_byol(freeze):
    """A network with BatchNorms of torch (heads) and of timm (with an activation)."""
    torch.manual_seed(0)
    encoder = timm.create_model("test_efficientnet", num_classes=0)
    if freeze:
        encoder.bn1.requires_grad_(False)
    # In float32 rounding would hide what differs.
    return BYOL(encoder, hidden_dim=16, projection_dim=8).double()


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_two_processes_have_the_gradients_and_statistics_of_one(tmp_path, kind):
    result = launch(tmp_path, HALF, kind)
    assert result.returncode == 0, result.stderr[-3000:]
    half = torch.load(tmp_path / "half.pt", weights_only=True)
    byol = make_byol(freeze=kind == "frozen")
    start = copy.deepcopy(dict(byol.named_buffers()))
    byol(*views())["loss"].backward()
    grads = {name: p.grad for name, p in byol.named_parameters() if p.grad is not None}
    assert grads.keys() == half["grads"].keys()
    for name, grad in grads.items():
        torch.testing.assert_close(half["grads"][name], grad, rtol=1e-5, atol=1e-9, msg=name)
    for name, buffer in byol.named_buffers():
        torch.testing.assert_close(half["buffers"][name], buffer, rtol=1e-5, atol=1e-6, msg=name)
    if kind == "frozen":
        assert torch.equal(half["buffers"]["encoder.bn1.running_mean"], start["encoder.bn1.running_mean"])
    norms = [m for m in byol.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    online = [m for m in norms if m.weight.requires_grad]
    # A forward pass of a norm takes one exchange, a backward pass another; every network sees two views.
    assert half["exchanges"] == 2 * (len(norms) + len(online))
