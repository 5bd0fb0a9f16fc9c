"""Steps of BYOL on digits, cut over processes and accumulation as the launch says: what they saw and what they made.

    torchrun --nproc_per_node 2 tests/helpers/cut_steps.py OUTPUT BATCH_SIZE

The network has no BatchNorm, which on CPUs every process computes for itself.
"""

import copy
import hashlib
import json
import sys
from pathlib import Path

import timm
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn

from byol_timm import BYOL, PretrainConfig
from byol_timm.data import TrainingBatches, open_cache, open_dataset
from byol_timm.training import Schedule, create_accelerator, prepare, train_step
from byol_timm.views import AUGMENTATIONS, TwoViews

# The last step of an epoch and two of the next one.
STEPS = range(21, 24)


def take_steps(output: Path, batch_size: int) -> None:
    """Writes OUTPUT.json, a list with `order`, `lr`, `tau`, `loss` and every rank's `weights` (a hash) per step, and
    OUTPUT.safetensors with the gradients of every step and the views of the last, by name."""
    accelerator = create_accelerator((), output.parent)
    rank, world, accumulation = (
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.gradient_accumulation_steps,
    )
    images = open_cache(open_dataset("digits").train, None)
    config = PretrainConfig(batch_size=batch_size, epochs=2, lr=0.4, warmup_epochs=1.1, target_decay=0.95)
    schedule = Schedule.of(config, len(images), world * accumulation)
    assert schedule.steps_per_epoch == STEPS[1]
    views = TwoViews(AUGMENTATIONS["torchvision"], 32, seed=0, mean=[0.5], std=[0.25])
    torch.manual_seed(0)
    byol = without_batch_norm(timm.create_model("test_vit", num_classes=0, img_size=32))
    optimizer = torch.optim.SGD([p for p in byol.parameters() if p.requires_grad], lr=0.1)
    tensors, rows = {}, []

    def note_gradients(*_):
        names = {name: p.grad.clone() for name, p in byol.named_parameters() if p.grad is not None}
        tensors.update({f"{step} {name}": gradient for name, gradient in names.items()})

    optimizer.register_step_pre_hook(note_gradients)
    model, optimizer = prepare(accelerator, byol, optimizer)
    sizes = dict(batch_size=batch_size, global_batch=schedule.global_batch, rank=rank, world=world)
    with TrainingBatches(images, cut=views.cut, start_step=STEPS[0], **sizes) as batches:
        stream = iter(batches)
        for step in STEPS:
            parts = [next(stream) for _ in range(accumulation)]
            pairs = [views(part.images, part.ordinals) for part in parts]
            lr, tau = schedule.lr(step), schedule.target_decay(step)
            optimizer.param_groups[0]["lr"] = lr
            figures = train_step(accelerator, model, optimizer, pairs, target_decay=tau)
            ranks = gather_object([[part.ordinals.tolist() for part in parts]])
            order = [ordinal for micro in zip(*ranks, strict=True) for part in micro for ordinal in part]
            loss = accelerator.reduce(figures["loss"], "mean").item()
            rows.append({"order": order, "lr": lr, "tau": tau, "loss": loss})
            rows[-1] |= {"weights": gather_object([weights_hash(byol)])}
    # Once more, with a number that the last process alone has lost.
    lost = [(view1 * torch.nan if rank == world - 1 else view1, view2) for view1, view2 in pairs]
    train_step(accelerator, model, optimizer, lost, target_decay=tau)
    rows[-1] |= {"weights after a lost number": gather_object([weights_hash(byol)])}
    seen = {}
    for part, pair in zip(parts, pairs, strict=True):
        seen |= dict(zip(part.ordinals.tolist(), torch.stack(pair, dim=1), strict=True))
    for views_of_rank in gather_object([seen]):
        tensors |= {f"views of {ordinal}": pair.clone() for ordinal, pair in views_of_rank.items()}
    if accelerator.is_main_process:
        output.with_suffix(".json").write_text(json.dumps(rows))
        save_file(tensors, output.with_suffix(".safetensors"))
    accelerator.end_training()


def without_batch_norm(encoder: nn.Module) -> BYOL:
    byol = BYOL(encoder, hidden_dim=16, projection_dim=8)
    byol.projector = nn.Linear(byol.projector[0].in_features, 8)
    byol.predictor = nn.Linear(8, 8)
    byol.target_projector = copy.deepcopy(byol.projector).requires_grad_(False)
    return byol


def weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    take_steps(Path(sys.argv[1]), int(sys.argv[2]))
