import copy

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from byol_timm import BYOL
from byol_timm.training import effective_rank, recovers, train_step


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class NoFloat64(TorchDispatchMode):
    """Refuse float64, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Scalars that Python reads on the host are no tensors of the device.
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{func} gives float64")
        return out


class Plain(BYOL):
    """BYOL with heads that have no BatchNorm, so that a batch may be cut anywhere."""

    def __init__(self, encoder):
        super().__init__(encoder, hidden_dim=16, projection_dim=8)
        self.projector = nn.Linear(self.projector[0].in_features, 8)
        self.predictor = nn.Linear(8, 8)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)


def step_of(accumulation, pairs, decay=0.9, precision="no", watch=lambda byol: None):
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    byol = Plain(timm.create_model("test_vit", num_classes=0, img_size=32))
    watch(byol)
    optimizer = torch.optim.SGD([p for p in byol.parameters() if p.requires_grad], lr=0.1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=precision)
    model, optimizer = accelerator.prepare(byol, optimizer)
    before = {name: tensor.clone() for name, tensor in byol.state_dict().items()}
    figures = train_step(accelerator, model, optimizer, pairs, target_decay=decay)
    return byol, before, figures


def test_a_backward_pass_per_view_gives_the_gradients_of_the_whole_loss():
    view1, view2 = torch.rand(2, 8, 3, 32, 32)
    byol, before, figures = step_of(1, [(view1, view2)])
    whole = copy.deepcopy(byol)
    whole.load_state_dict(before)
    out = whole(view1, view2)
    out["loss"].backward()
    assert figures["loss"].item() == pytest.approx(out["loss"].item(), rel=1e-6)
    assert figures["agreement"].item() == pytest.approx(out["agreement"].item(), rel=1e-5, abs=1e-6)
    for (name, after), parameter in zip(byol.named_parameters(), whole.parameters(), strict=True):
        if parameter.grad is not None:
            expected = before[name] - 0.1 * parameter.grad
            torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


def test_accumulation_is_one_step_with_one_target_update():
    view1, view2 = torch.rand(2, 8, 3, 32, 32)
    whole, before, figures = step_of(1, [(view1, view2)])
    cut, _, cut_figures = step_of(2, [(view1[:4], view2[:4]), (view1[4:], view2[4:])])
    assert cut_figures["loss"].item() == pytest.approx(figures["loss"].item(), rel=1e-6)
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        if name.startswith("target_"):
            online = cut.state_dict()[name.removeprefix("target_")]
            torch.testing.assert_close(b, torch.lerp(before[name], online, 0.1), rtol=1e-5, atol=1e-7)


def test_bf16_ends_before_the_loss_and_never_reaches_the_target():
    outputs = {"predictor": [], "target_projector": []}

    def watch(byol):
        for name, seen in outputs.items():
            byol.get_submodule(name).register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out))

    decay = 0.999
    byol, before, figures = step_of(1, [tuple(torch.rand(2, 8, 3, 32, 32))], decay, "bf16", watch)
    assert {out.dtype for seen in outputs.values() for out in seen} == {torch.bfloat16}
    predictions, targets = outputs["predictor"], reversed(outputs["target_projector"])
    cosines = [
        nn.functional.cosine_similarity(q.double(), z.double()) for q, z in zip(predictions, targets, strict=True)
    ]
    expected = sum((2 - 2 * cosine).mean() for cosine in cosines).item()
    # bfloat16 has three digits.
    assert figures["loss"].item() == pytest.approx(expected, rel=1e-6)
    after = byol.state_dict()
    for name, online in byol.named_parameters():
        assert online.dtype == torch.float32
        if not name.startswith(("target_", "predictor")):
            assert torch.equal(after[f"target_{name}"], torch.lerp(before[f"target_{name}"], online, 1 - decay))


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    view1, view2 = torch.rand(2, 8, 3, 32, 32)
    view1[3] = torch.nan
    byol, before, figures = step_of(1, [(view1, view2)])
    assert not figures["grad_norm"].isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in byol.state_dict().items())


def test_the_target_is_in_no_optimizer_and_gets_no_gradient():
    view1, view2 = torch.rand(2, 8, 3, 32, 32)
    byol, _, _ = step_of(1, [(view1, view2)])
    assert not any(p.requires_grad for name, p in byol.named_parameters() if name.startswith("target_"))
    assert all(p.grad is None for name, p in byol.named_parameters() if name.startswith("target_"))


def test_float16_goes_on_while_a_smaller_scale_of_the_loss_can_help():
    accelerator = Accelerator(cpu=True)
    good, overflown = torch.tensor(2.0), torch.tensor(torch.inf)
    answers = [recovers(accelerator, good, skipped) for skipped in (0, 1, 20, 21)]
    assert answers == [False, True, True, False]
    assert not recovers(accelerator, overflown, 1)


def test_a_step_and_its_checks_need_no_float64():
    with NoFloat64():
        _, _, figures = step_of(1, [tuple(torch.rand(2, 8, 3, 32, 32))])
        effective_rank(figures["representation"])
        assert recovers(Accelerator(cpu=True), figures["loss"], 1)
