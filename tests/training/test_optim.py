import numpy as np
import pytest
import timm
import torch
from torch import nn

from byol_timm.byol import BYOL
from byol_timm.training import LARS, create_optimizer, learning_rate, parameter_groups

DECAYED = "linear.w"
EXCLUDED = ("linear.b", "batch_norm.scale", "batch_norm.offset")


def test_lars_follows_the_authors_code_over_six_steps(golden):
    weight_decay, momentum, eta = golden["lars/args"]
    parameters = {n: nn.Parameter(torch.tensor(golden[f"lars/init/{n}"])) for n in (DECAYED, *EXCLUDED)}
    groups = [
        dict(params=[parameters[DECAYED]], weight_decay=weight_decay),
        dict(params=[parameters[n] for n in EXCLUDED], adapt=False, weight_decay=0.0),
    ]
    optimizer = LARS(groups, 0.1, momentum=momentum, eta=eta)
    for step, lr in enumerate(golden["lars/lr"]):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(golden[f"lars/grad{step}/{name}"])
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        for name, parameter in parameters.items():
            after = golden[f"lars/after{step}/{name}"]
            assert np.abs(parameter.detach().numpy() - after).max() <= 1e-6 * np.abs(after).max()


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_lars_takes_a_plain_step_where_a_norm_is_zero(zero):
    parameter = nn.Parameter(torch.zeros(3, 2) if zero == "parameter" else torch.ones(3, 2))
    parameter.grad = torch.zeros(3, 2) if zero == "gradient" else torch.full((3, 2), 2.0)
    expected = parameter.detach() - 0.5 * parameter.grad
    LARS([parameter], 0.5).step()
    assert torch.equal(parameter.detach(), expected)


def test_lars_adapts_without_weight_decay():
    parameter = nn.Parameter(torch.full((4, 4), 3.0))
    parameter.grad = torch.full((4, 4), 100.0)
    LARS([parameter], 1.0, weight_decay=0.0).step()
    assert torch.allclose(3.0 - parameter.detach(), torch.tensor(3.0 * 1e-3))


def test_lars_accepts_channels_last_parameters():
    weight, grad = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    plain, last = nn.Parameter(weight.clone()), nn.Parameter(weight.to(memory_format=torch.channels_last))
    plain.grad, last.grad = grad.clone(), grad.to(memory_format=torch.channels_last)
    for parameter in (plain, last):
        LARS([parameter], 0.1, weight_decay=1e-2).step()
    assert torch.allclose(plain, last, rtol=1e-6)


def test_learning_rate_follows_the_authors_code(golden):
    batch, base_lr, _, total, warmup = golden["schedule/args"]
    for step, lr in zip(golden["schedule/step"], golden["schedule/lr"], strict=True):
        ours = learning_rate(int(step), total_steps=int(total), warmup_steps=int(warmup), peak=base_lr * batch / 256)
        # The reference is float32, whose cosine loses relative precision next to its zero.
        assert ours == pytest.approx(float(lr), rel=1e-6, abs=1e-6 * base_lr * batch / 256)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, total_steps=10, warmup_steps=0, peak=0.3) == 0.3


def test_biases_norms_and_exempt_names_get_neither_decay_nor_adaptation():
    encoder = timm.create_model("test_vit", num_classes=0, img_size=32)
    byol = BYOL(encoder, hidden_dim=32, projection_dim=8)
    adapted, plain = parameter_groups(byol, 0.1, no_weight_decay=byol.no_weight_decay())
    names = {id(p): n for n, p in byol.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} >= {"encoder.pos_embed", "encoder.cls_token", "projector.0.bias"}
    assert all(p.ndim > 1 for p in adapted["params"])
    assert plain["weight_decay"] == 0 and plain["adapt"] is False and adapted["weight_decay"] == 0.1


def test_exempt_names_may_be_patterns_as_timms_are():
    with torch.device("meta"):
        byol = BYOL(timm.create_model("xcit_nano_12_p8_224", num_classes=0, depth=1), hidden_dim=32, projection_dim=8)
    assert "encoder.pos_embed.*" in byol.no_weight_decay()
    _, plain = parameter_groups(byol, 0.1, no_weight_decay=byol.no_weight_decay())
    exempt = {id(p) for p in plain["params"]}
    positions = [p for name, p in byol.encoder.named_parameters() if name.startswith("pos_embed.")]
    assert positions and all(id(p) in exempt for p in positions)


@pytest.mark.parametrize("opt", ["lars", "adamw", "AdamW", "sgd"])
def test_the_target_network_is_never_handed_to_the_optimizer(opt):
    byol = BYOL(timm.create_model("test_resnet", num_classes=0), hidden_dim=32, projection_dim=8)
    optimizer = create_optimizer(opt, byol, lr=0.1, weight_decay=1e-4)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    online = [*byol.encoder.parameters(), *byol.projector.parameters(), *byol.predictor.parameters()]
    assert optimized == {id(p) for p in online}
