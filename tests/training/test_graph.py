"""A step that reads learning rate and target decay on the device, as a CUDA graph must, is the ordinary step."""

import copy

import pytest
import timm
import torch
from accelerate import Accelerator

from byol_timm import BYOL, ByolTimmError
from byol_timm.training import GraphedStep, create_optimizer, prepare, train_step


@pytest.mark.parametrize("opt", ["lars", "sgd", "momentum", "adamw"])
def test_steps_with_values_on_the_device_are_ordinary_steps(opt):
    torch.manual_seed(0)
    byol = BYOL(timm.create_model("test_resnet", num_classes=0), hidden_dim=32, projection_dim=16)
    pairs = [tuple(torch.randn(2, 8, 3, 32, 32)) for _ in range(3)]
    accelerator, ends = Accelerator(cpu=True), []
    for graphed in (False, True):
        network = copy.deepcopy(byol)
        model, optimizer = prepare(accelerator, network, create_optimizer(opt, network, lr=1.0, weight_decay=1e-3))
        step = GraphedStep(accelerator, model, optimizer) if graphed else None
        for number, pair in enumerate(pairs):
            lr, decay = 1e-3 * (number + 1), 0.9 + 0.01 * number
            for group in optimizer.param_groups:
                group["lr"] = lr
            if step is not None:
                metrics = step([pair], lr=lr, target_decay=decay)
            else:
                metrics = train_step(accelerator, model, optimizer, [pair], target_decay=decay)
        assert {group["lr"] for group in optimizer.param_groups} == {lr}
        ends.append((network.state_dict(), {**metrics}))
    (expected, metrics), (found, graphed_metrics) = ends
    expected, found = (torch.cat([value.double().flatten() for value in end.values()]) for end in (expected, found))
    # Adam divides by the size of a gradient, so rounding counts where that is next to nothing.
    assert (found - expected).norm() < (1e-3 if opt == "adamw" else 1e-6) * expected.norm()
    assert metrics.keys() == graphed_metrics.keys()
    assert graphed_metrics["loss"].item() == pytest.approx(metrics["loss"].item(), rel=1e-4)


def test_an_optimizer_that_reads_its_learning_rate_on_the_host_is_refused():
    accelerator = Accelerator(cpu=True)
    network = BYOL(timm.create_model("test_resnet", num_classes=0), hidden_dim=8)
    model, optimizer = prepare(accelerator, network, create_optimizer("lion", network, lr=1.0, weight_decay=0.0))
    with pytest.raises(ByolTimmError, match="--cuda_graph does not support"):
        GraphedStep(accelerator, model, optimizer)
