import copy

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_timm.byol import BYOL, mlp, normalize, regression_loss, target_decay
from byol_timm.encoders import freeze_parts
from byol_timm.errors import ByolTimmError
from byol_timm.training import create_optimizer


def small_byol(name="test_resnet", **kwargs):
    encoder = timm.create_model(name, num_classes=0, **kwargs)
    return BYOL(encoder, hidden_dim=64, projection_dim=16)


def two_views(size=32, batch=8):
    return torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size)


def test_loss_equals_the_authors_code(golden):
    ours = regression_loss(torch.tensor(golden["loss/prediction"]), torch.tensor(golden["loss/projection"]))
    assert ours.item() == pytest.approx(float(golden["loss/value"]), rel=1e-6)


def test_target_decay_follows_the_authors_code(golden):
    _, _, base, total, _ = golden["schedule/args"]
    for step, tau in zip(golden["schedule/step"], golden["schedule/tau"], strict=True):
        assert target_decay(int(step), int(total), base) == pytest.approx(float(tau), rel=1e-6)


def test_target_update_equals_the_authors_code(golden):
    class Numbers(nn.Module):
        head_hidden_size = 1

        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.tensor(golden["ema/online"]))

    byol = BYOL(Numbers(), hidden_dim=2, projection_dim=2)
    byol.target_encoder.values.data = torch.tensor(golden["ema/target"])
    byol.update_target(float(golden["ema/tau"]))
    after = torch.tensor(golden["ema/after"])
    assert (byol.target_encoder.values - after).abs().max() <= 1e-6 * after.abs().max()


def test_loss_is_summed_over_directions_and_averaged_over_the_batch():
    byol = small_byol()
    view1, view2 = two_views()
    twin = copy.deepcopy(byol)
    z1, z2 = (twin.target_projector(twin.target_encoder(v)) for v in (view1, view2))
    q1, q2 = (twin.predictor(twin.projector(twin.encoder(v))) for v in (view1, view2))
    cosines = (normalize(q1) * normalize(z2)).sum(1).mean() + (normalize(q2) * normalize(z1)).sum(1).mean()
    assert byol(view1, view2)["loss"].item() == pytest.approx((4 - 2 * cosines).item(), rel=1e-5)


def test_loss_does_not_depend_on_the_batch_size():
    prediction, projection = torch.randn(6, 16), torch.randn(6, 16)
    once = regression_loss(prediction, projection)
    assert torch.allclose(regression_loss(prediction.repeat(3, 1), projection.repeat(3, 1)), once)


def test_loss_of_zero_vectors_is_finite():
    prediction = torch.zeros(2, 4, requires_grad=True)
    loss = regression_loss(prediction, torch.randn(2, 4))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(prediction.grad).all()


def test_loss_is_float32_under_autocast():
    byol = small_byol()
    with torch.autocast("cpu", torch.bfloat16):
        assert byol(*two_views())["loss"].dtype == torch.float32


def test_one_backward_per_direction_gives_the_gradients_of_their_sum():
    byol = small_byol()
    view1, view2 = two_views()
    twin = copy.deepcopy(byol)
    byol(view1, view2)["loss"].backward()
    target1, target2 = twin.target_projections(view1, view2)
    for view, target in ((view1, target2), (view2, target1)):
        twin(view, target=target)["loss"].backward()
    for one, two in zip(byol.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_heads_are_those_of_the_released_code():
    first, norm, activation, last = mlp(512, 4096, 256)
    assert first.bias is not None and last.bias is None
    assert (norm.num_features, norm.eps, norm.momentum) == (4096, 1e-5, 0.1)
    assert isinstance(activation, nn.ReLU) and (last.in_features, last.out_features) == (4096, 256)


def test_target_starts_as_a_copy_and_has_no_predictor_and_no_gradient():
    byol = small_byol()
    byol(*two_views())["loss"].backward()
    for online, target in ((byol.encoder, byol.target_encoder), (byol.projector, byol.target_projector)):
        for p, q in zip(online.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr() and q.grad is None and not q.requires_grad


def test_every_online_parameter_has_a_gradient():
    byol = small_byol()
    byol(*two_views())["loss"].backward()
    assert all(p.grad is not None for p in byol.parameters() if p.requires_grad)


def test_target_projector_moves_with_the_target_encoder():
    byol = small_byol()
    before = copy.deepcopy(byol)
    for p in byol.parameters():
        if p.requires_grad:
            p.data.add_(1.0)
    byol.update_target(0.9)
    for name in ("target_encoder", "target_projector"):
        for p, q in zip(getattr(byol, name).parameters(), getattr(before, name).parameters(), strict=True):
            assert torch.allclose(p, q + 0.1, atol=1e-6)


def test_forward_alone_never_moves_the_target_parameters():
    byol = small_byol()
    before = [p.clone() for p in byol.target_encoder.parameters()]
    for _ in range(3):
        byol(*two_views())
    assert all(torch.equal(p, q) for p, q in zip(byol.target_encoder.parameters(), before, strict=True))


def test_target_keeps_its_own_batch_statistics():
    byol = small_byol()
    for p in byol.encoder.parameters():
        p.data.mul_(1.5)
    initial = copy.deepcopy(byol.target_encoder.state_dict())
    byol(*two_views())
    after_forward = copy.deepcopy(byol.target_encoder.state_dict())
    byol.update_target(0.5)
    statistics = [n for n, _ in byol.target_encoder.named_buffers() if "running_mean" in n]
    assert statistics
    for name in statistics:
        assert not torch.equal(initial[name], after_forward[name])
        assert torch.equal(byol.target_encoder.state_dict()[name], after_forward[name])
        assert not torch.equal(after_forward[name], byol.encoder.state_dict()[name])


def test_frozen_batch_norms_stay_as_they_are_and_no_other():
    encoder = timm.create_model("test_efficientnet", num_classes=0)
    frozen = freeze_parts(encoder, ("stem", "blocks.1"))
    byol = BYOL(encoder, hidden_dim=16, projection_dim=8)
    before = copy.deepcopy(byol.state_dict())
    byol.eval()
    byol.train()(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))
    for name, module in byol.named_modules():
        if isinstance(module, _BatchNorm):
            layer = f"{name}.weight".partition(".")[2]
            still = "encoder" in name and layer in frozen
            assert module.training == (not still), name
            for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                key = f"{name}.{statistic}"
                assert torch.equal(byol.state_dict()[key], before[key]) == still, key


def test_views_do_not_mix_in_batch_statistics():
    byol = small_byol()
    view1, view2 = two_views()
    alone = copy.deepcopy(byol)
    target = alone.target_projections(view1)[0]
    assert torch.equal(byol.target_projections(view1, view2 * 100)[0], target)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_only_batch_norms_of_the_target_are_in_train_mode(name):
    byol = small_byol(name)
    for module in (*byol.target_encoder.modules(), *byol.target_projector.modules()):
        assert module.training == isinstance(module, _BatchNorm)
    byol.eval()
    assert not any(m.training for m in byol.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_synchronising_takes_every_batch_norm_and_keeps_every_parameter(name):
    byol = small_byol(name)
    modes = {name: module.training for name, module in byol.named_modules()}
    parameters = dict(byol.named_parameters())
    synchronised = convert_sync_batchnorm(byol)
    norms = [(name, module) for name, module in synchronised.named_modules() if isinstance(module, _BatchNorm)]
    assert {name.partition(".")[0] for name, _ in norms} == {name for name, _ in byol.named_children()}
    assert all(isinstance(module, nn.SyncBatchNorm) for _, module in norms)
    assert all(parameter is parameters[name] for name, parameter in synchronised.named_parameters())
    assert {name: module.training for name, module in synchronised.train().named_modules()} == modes


def test_target_is_deterministic_where_the_online_network_is_random():
    byol = small_byol("test_resnet", drop_path_rate=0.5, zero_init_last=False)
    view, _ = two_views()
    assert torch.equal(*byol.target_projections(view, view))
    byol.encoder.requires_grad_(False)
    assert not torch.equal(byol.encoder(view), byol.encoder(view))


@pytest.mark.parametrize("name", ["test_mambaout", "test_vit", "test_resnet", "test_efficientnet"])
def test_projector_takes_the_width_that_the_encoder_returns(name):
    byol = small_byol(name)
    assert byol.projector[0].in_features == byol.encoder(torch.randn(2, 3, 160, 160)).shape[1]


def test_any_module_is_an_encoder_when_its_width_is_told():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 24))
    assert torch.isfinite(BYOL(encoder, width=24, hidden_dim=32, projection_dim=8)(*two_views())["loss"])
    with pytest.raises(ByolTimmError, match="width"):
        BYOL(encoder)


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0, "global_pool": ""}])
def test_an_encoder_that_returns_something_else_than_its_width_is_told(kwargs):
    byol = BYOL(timm.create_model("test_resnet", **kwargs), hidden_dim=16, projection_dim=8)
    with pytest.raises(ByolTimmError, match=r"returns .* for 8 images, not \(8, 96\). Take its classifier off") as told:
        byol(*two_views())
    assert "\n" not in str(told.value)


def test_pretrained_weights_are_where_training_starts(tmp_path):
    given = timm.create_model("test_resnet")
    kept = copy.deepcopy(given.state_dict())
    given.reset_classifier(0)
    byol = BYOL(given, hidden_dim=16, projection_dim=8)
    for network in (byol.encoder, byol.target_encoder):
        assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())


def test_an_ordinary_loop_learns():
    torch.manual_seed(0)
    byol = small_byol()
    optimizer = create_optimizer("sgd", byol, lr=0.05, weight_decay=0)
    images = torch.randn(16, 3, 32, 32)
    losses = []
    for step in range(12):
        loss = byol(images + 0.1 * torch.randn_like(images), images)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        byol.update_target(target_decay(step, 12, 0.9))
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
