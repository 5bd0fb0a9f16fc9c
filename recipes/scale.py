"""What the paper's run costs on today's machines, by arithmetic from stated figures.

    python recipes/scale.py
    python recipes/scale.py --backbone vit_large_patch16_224 --epochs 300 --gpus 64 128 --cards H100 --supervised 1600
    python recipes/scale.py --measure path/to/images
    python recipes/scale.py --output recipes/scale.md

Nothing here is measured on a GPU. --measure gives the figures of this machine that the arithmetic starts from.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from byol_timm import BYOL
from byol_timm.byol import mlp, regression_loss
from byol_timm.cli import output_file, parse, run
from byol_timm.data import open_dataset
from byol_timm.encoders import encoder_width, fit_backbone, is_patch_transformer
from byol_timm.errors import ByolTimmError
from byol_timm.training import optimizer_tensors, save_checkpoint
from byol_timm.views import AUGMENTATIONS, TwoViews

GIGA, MEGA = 1e9, 1e6
# Forward passes that a training image is worth, of which a backward pass is two: BYOL takes two views through two
# networks and back through one; a classifier takes one there and back. The last of BYOL's two backward passes is the
# one behind which gradients travel.
BYOL_PASSES, SUPERVISED_PASSES, LAST_BACKWARD = 8, 3, 2
MEASURED = """\
## What was measured

On one core of an AMD EPYC (Zen 4, 2.6 GHz) and its virtual disk, the last of three goes (the disk: 186, 350, 360 MB/s):

    $ python recipes/scale.py --measure photos
    decode: 1.7 ms of a core per image
    two crops: 0.8 ms of a core per image
    the rest of both views, on a CPU: 2.3 ms of a core per image
    --cut_ms 2.5
    checkpoint: 413 MB in 1.1 s
    --disk 360

`photos` are 64 JPEGs of 500 x 375 pixels and 96 KB on average, cut from scikit-learn's two photographs:

```python
import os
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

os.makedirs("photos", exist_ok=True)
draw, photographs = np.random.default_rng(0), load_sample_images().images
for number in range(64):
    photo = Image.fromarray(photographs[number % 2])
    width = draw.integers(500, 561)
    left, top = draw.integers(0, photo.width - width + 1), draw.integers(0, photo.height - width * 3 // 4 + 1)
    photo = photo.crop((left, top, left + width, top + width * 3 // 4)).resize((500, 375), Image.LANCZOS)
    photo.save(f"photos/{number:02}.jpg", quality=97)
```

Workers also stack and hand over what they cut; that is not in the figure. The rest of both views runs on the GPU in the
runs above."""
LARGE = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224", "vit_giant_patch14_224")


@dataclass(frozen=True)
class Scale:
    """What a run costs on machines that are not here, by arithmetic."""

    backbone: str = "resnet50"
    """A timm name."""
    image_size: int = 224
    """Side of the views in pixels."""
    images: int = 1_281_167
    """Images of the data set."""
    epochs: int = 1000
    """Passes over them."""
    global_batch: int = 4096
    """Images of a step."""
    moments: int = 1
    """Tensors that the optimizer keeps for each parameter: 1 of LARS and SGD, 2 of AdamW."""
    gpus: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of GPUs to work it out for, eight in a host."""
    cards: tuple[str, ...] = ("A100", "H100")
    """Kinds of GPU."""
    supervised: tuple[float, ...] = (2470, 4940)
    """Images/s that one GPU of each kind trains as a classifier in mixed precision."""
    prices: tuple[float, ...] = (1.5, 2.5)
    """Dollars for an hour of one GPU of each kind."""
    memory: float = 80
    """GB of one GPU."""
    inside: float = 200
    """GB/s between a GPU and the others of its host."""
    between: float = 12.5
    """GB/s between a GPU and other hosts."""
    latency: float = 30
    """Microseconds of an exchange of a few values among all GPUs."""
    cut_ms: float = 2.5
    """Milliseconds of one core to decode an image and cut both crops."""
    image_kb: float = 110
    """KB of an image file."""
    disk: float = 350
    """MB/s at which checkpoints are written, hashes included."""
    measure: str | None = None
    """Folder of images: measure cut_ms and disk on this machine instead."""
    output: str | None = None
    """File to write; None: print."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> None:
    config = parse(Scale)
    if not len(config.cards) == len(config.supervised) == len(config.prices):
        raise ByolTimmError(f"--cards names {len(config.cards)} kinds. Give each its --supervised and its --prices")
    output = output_file(config.output) if config.output else None
    text = "\n".join(measured(config) if config.measure else page(config)) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


@dataclass(frozen=True)
class Network:
    """Bytes and counts of a BYOL network."""

    online: int
    """Parameters that are trained."""
    target: int
    """Parameters of the target network."""
    buffers: int
    activations: float
    """Bytes per image that one view's pass through the online network keeps for its backward pass, under bfloat16."""
    exchanges: int
    """Times per step that all GPUs exchange batch statistics."""

    @classmethod
    def of(cls, backbone: str, image_size: int) -> "Network":
        encoder = fit_backbone(backbone, image_size=image_size).encoder
        with torch.device("meta"):
            layers = 3 if is_patch_transformer(encoder) else 2
            target = nn.Sequential(encoder, mlp(encoder_width(encoder), 4096, 256, layers))
            online = nn.Sequential(target, mlp(256, 4096, 256))
        kept = [kept_bytes(online, (batch, 3, image_size, image_size)) for batch in (2, 4)]
        norms, target_norms = (
            sum(isinstance(module, _BatchNorm) for module in network.modules()) for network in (online, target)
        )
        return cls(
            online=parameters(online),
            target=parameters(target),
            buffers=sum(buffer.numel() for network in (online, target) for buffer in network.buffers()),
            activations=(kept[1] - kept[0]) / 2,
            # Both views: through the online network and back, through the target network.
            exchanges=2 * (2 * norms + target_norms),
        )

    def fixed(self, moments: int) -> int:
        """Bytes on every GPU, whatever the batch: float32 parameters, target, gradients, optimizer; bfloat16 copies."""
        return self.online * (4 + 4 + 4 * moments + 2) + self.target * (4 + 2)

    def checkpoint(self, moments: int) -> int:
        return 4 * (self.online * (1 + moments) + self.target + self.buffers)

    def batch(self, images: float, image_size: int) -> float:
        """Bytes of a batch on the GPU: activations of one view, both views in float32, both crops in uint8."""
        return images * (self.activations + 2 * 3 * image_size**2 * (4 + 1))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def kept_bytes(online: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes of the tensors that autograd keeps of one view's pass, parameters apart."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    # Tensors that say to be on a CPU, where autocast looks after them, and have no memory.
    with FakeTensorMode():
        own = {name: torch.empty(p.shape, requires_grad=True) for name, p in online.named_parameters()}
        own_storages = {parameter.untyped_storage()._cdata for parameter in own.values()}
        own |= {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in online.named_buffers()}
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            prediction = functional_call(online, own, torch.empty(shape))
            loss = regression_loss(prediction, torch.empty_like(prediction))
        assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own_storages)


def page(config: Scale) -> Iterator[str]:
    network = Network.of(config.backbone, config.image_size)
    steps = config.epochs * (config.images // config.global_batch)
    saved = network.checkpoint(config.moments)
    yield from heading(config)
    yield f"""\
{config.backbone} at {config.image_size} px, global batch {config.global_batch:,}, {config.epochs:,} epochs of \
{config.images:,} images: {steps:,} steps.

- Parameters: {network.online / MEGA:.1f} M online, {network.target / MEGA:.1f} M target.
- Gradients of a step: {4 * network.online / MEGA:.0f} MB in float32. In a ring of n GPUs each sends 2 (n - 1) / n
  times as much, once a step, behind the last of its two backward passes: a quarter of the work.
- Batch statistics: {network.exchanges} exchanges a step that nothing hides.
- Memory: {network.fixed(config.moments) / GIGA:.1f} GB whatever the batch, and \
{network.batch(1, config.image_size) / MEGA:.0f} MB per image, of which \
{network.activations / MEGA:.0f} MB are activations of one view.
- Checkpoint: {saved / MEGA:.0f} MB, {saved / MEGA / config.disk:.1f} s in a thread beside training.
"""
    yield from table(config, network, steps)
    yield from larger(config)
    yield MEASURED


def heading(config: Scale) -> Iterator[str]:
    rates = ", ".join(f"{card} {rate:,.0f}" for card, rate in zip(config.cards, config.supervised, strict=True))
    prices = ", ".join(f"{card} ${price:g}" for card, price in zip(config.cards, config.prices, strict=True))
    rows = (
        (
            "images/s as a classifier",
            rates,
            "A100: ResNet-50, one GPU, mixed precision, NVIDIA DeepLearningExamples; H100: assumed twice as fast, "
            "which Lambda's report on it says of vision models",
        ),
        ("a BYOL image", "8/3 of a classifier's", "forward passes, backward counted as two; augmentation not counted"),
        ("decode and two crops", f"{config.cut_ms:g} ms of a core", "measured, below"),
        ("writing a checkpoint", f"{config.disk:g} MB/s", "measured, below"),
        ("image file", f"{config.image_kb:g} KB", "ImageNet's 138 GB over 1,281,167 images"),
        ("between GPUs of a host", f"{config.inside:g} GB/s", "assumed (NVLink, as all-reduce sees it)"),
        ("between hosts", f"{config.between:g} GB/s per GPU", "assumed (100 Gbit/s per GPU)"),
        ("a small exchange", f"{config.latency:g} us", "assumed"),
        ("an hour of a GPU", prices, "assumed"),
    )
    inputs = "".join(f"| {name} | {value} | {source} |\n" for name, value, source in rows)
    yield f"""\
# The paper's run on today's machines, on paper

    python recipes/scale.py --output recipes/scale.md

**No GPU was measured.** This is arithmetic from the figures below, each of which is a flag; put in your own
(`python recipes/scale.py --help`).

| figure | value | where the default is from |
|---|---|---|
{inputs}"""


def table(config: Scale, network: Network, steps: int) -> Iterator[str]:
    columns = (
        "GPUs", "images per GPU", "memory", "work", "gradients", "room", "statistics", "step", "images/s per GPU",
        "cores per GPU", "MB/s per host", "days", "GPU hours", "cost",
    )  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" + "|--:" * (len(columns) - 1) + "|"
    for card, supervised, price in zip(config.cards, config.supervised, config.prices, strict=True):
        for gpus in config.gpus:
            images = config.global_batch / gpus
            work = images / (supervised * SUPERVISED_PASSES / BYOL_PASSES)
            speed = config.inside if gpus <= 8 else config.between
            gradients = 2 * (gpus - 1) / gpus * 4 * network.online / (speed * GIGA)
            room = work * LAST_BACKWARD / BYOL_PASSES
            statistics = network.exchanges * config.latency / MEGA
            step = work + max(0.0, gradients - room) + statistics
            memory = (network.fixed(config.moments) + network.batch(images, config.image_size)) / GIGA
            hours = steps * step / 3600
            rate = images / step
            cells = (
                f"{gpus} {card}",
                f"{images:g}",
                f"{memory:.0f} GB" + " (too much)" * (memory > config.memory),
                *(f"{1000 * seconds:.0f} ms" for seconds in (work, gradients, room, statistics, step)),
                f"{rate:.0f}",
                f"{rate * config.cut_ms / 1000:.1f}",
                f"{rate * min(gpus, 8) * config.image_kb / 1000:.0f}",
                f"{hours / 24:.1f}",
                f"{hours * gpus:.0f}",
                f"${hours * gpus * price:,.0f}",
            )
            yield f"| {' | '.join(cells)} |"
    yield """
**work**: forward and backward passes. **gradients**: time of their all-reduce, hidden while it is below **room**, the
last backward pass. **statistics**: exchanges of BatchNorm. **cores per GPU**: to decode and cut. **MB/s per host**:
read from disk. Colours, blur and solarize run on the GPU and are not counted. Memory is what autograd keeps, without
what kernels take for a moment. For comparison: the authors report about 8 hours on 512 cores of TPU v3.

Where a host has fewer cores than that, they are the limit and not the GPU: store the images smaller (a shorter side of
256 to 320 pixels), or let them lie decoded: in memory, where they are of one shape (`--memory_limit`), or on a disk
(`--decoded_cache`).
"""


def larger(config: Scale) -> Iterator[str]:
    yield f"""\
## Encoders of 0.1 to 1 billion parameters

Every GPU holds everything: for an online parameter 4 bytes each for itself, its gradient and two moments of AdamW, and
2 for a bfloat16 copy; for a target parameter 4 and 2. Activations are those of one view, since each view has a backward
pass of its own.

| backbone | online | on every GPU | per image | images on {config.memory:g} GB |
|---|--:|--:|--:|--:|"""
    for name in LARGE:
        network = Network.of(name, 224)
        fixed, image = network.fixed(2), network.batch(1, 224)
        room = int((0.9 * config.memory * GIGA - fixed) / image)
        yield (f"| {name} | {network.online / MEGA:.0f} M | {fixed / GIGA:.1f} GB | {image / MEGA:.0f} MB | {room} |")
    yield """
A tenth of the memory is left free. `--grad_checkpointing` keeps one tensor per block in place of a block's
activations, and accumulation makes any global batch of them.
"""


def measured(config: Scale) -> Iterator[str]:
    """What the data path takes of one core, and the disk for a checkpoint."""
    torch.set_num_threads(1)
    images = open_dataset(config.measure or "").train
    views = TwoViews(AUGMENTATIONS["paper"], config.image_size, seed=0, mean=[0.5], std=[0.25])
    ordinals, start = torch.arange(256), time.process_time()
    pixels = [images.decode(ordinal % len(images)) for ordinal in ordinals.tolist()]
    decoded = time.process_time()
    crops = [views.cut(image, ordinal) for ordinal, image in enumerate(pixels)]
    cut = time.process_time()
    for part in ordinals.split(64):
        views.finish(torch.stack([crops[ordinal] for ordinal in part]), part)
    finished = time.process_time()
    stages = {"decode": decoded - start, "two crops": cut - decoded, "the rest of both views, on a CPU": finished - cut}
    for stage, seconds in stages.items():
        yield f"{stage}: {1000 * seconds / len(ordinals):.1f} ms of a core per image"
    yield f"--cut_ms {1000 * (cut - start) / len(ordinals):.1f}"

    byol = BYOL(timm.create_model(config.backbone, num_classes=0))
    optimizer = torch.optim.SGD([p for p in byol.parameters() if p.requires_grad], lr=0.0, momentum=0.9)
    sum(parameter.sum() for parameter in byol.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    tensors = {"byol": byol.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) / MEGA
    with tempfile.TemporaryDirectory(dir=".") as folder:
        begin = time.perf_counter()
        save_checkpoint(Path(folder), 1, tensors, {})
        seconds = time.perf_counter() - begin
    yield f"checkpoint: {size:.0f} MB in {seconds:.1f} s"
    yield f"--disk {size / seconds:.0f}"


if __name__ == "__main__":
    run(main)
