"""How fast the parts of a run are on this machine, next to what bounds them and to other packages.

A part is a few candidates that do the same work, measured in turns in one process, so that whatever else the machine
does meets all of them alike.
"""

import itertools
import math
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .byol import BYOL
from .data import Batch, Images, TrainingBatches, copied_ahead
from .encoders import create_encoder, encoder_width, has_convolutions
from .errors import ByolTimmError
from .peers import STEPS, TAKE_CHANNELS_LAST, TAKES_BATCHES, VIEWS
from .training import DeviceViews, create_accelerator, create_optimizer, prepare, train_step
from .views import AUGMENTATIONS, TwoViews

Clock = Literal["wall", "cpu"]
Work = Callable[[], int]
OURS, FLOOR, NETWORKS = "byol_timm", "bare backbone", "bare backbone and heads"
# Images larger than this seldom fit in memory all together.
IN_MEMORY = 96
IMPORTS = "import torch, timm, accelerate, datasets"
TARGET_DECAY = 0.99


@dataclass(frozen=True)
class Part:
    """Costs of candidates, one a round: seconds per image where the unit is images/s, else in the unit."""

    title: str
    unit: Literal["images/s", "s", "GB"]
    reference: str
    costs: Mapping[str, Sequence[float]]
    note: str = ""

    def value(self, name: str) -> float:
        """The median of a candidate, in the unit."""
        cost = statistics.median(self.costs[name])
        return 1 / cost if self.unit == "images/s" else cost

    def relative(self, name: str) -> float:
        """What a candidate costs in units of what the reference does: the median over rounds."""
        rounds = zip(self.costs[name], self.costs[self.reference], strict=True)
        return statistics.median(cost / reference for cost, reference in rounds)

    def __str__(self) -> str:
        width = max(map(len, self.costs))
        lines = [
            f"  {name:<{width}}  {_figure(self.value(name)):>7} {self.unit:<8}  {self.relative(name):6.2f} x"
            for name in self.costs
        ]
        measure = "memory" if self.unit == "GB" else "time"
        lines = [f"{self.title}; {measure} relative to {self.reference}", *lines]
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else []), ""])


@dataclass(frozen=True)
class Timing:
    """Rounds, the least seconds of a candidate in each, and what is counted: time that passes, or CPU time.

    `cpu` counts what this process computes, on all its threads, and neither what others do meanwhile nor its workers.
    """

    rounds: int = 5
    seconds: float = 1.0
    clock: Clock = "wall"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ByolTimmError(f"--rounds must be positive ({self.rounds}). Give 1 or more")

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


@dataclass(frozen=True)
class Workload:
    """What the networks have to do: steps on batches of square RGB images."""

    backbone: str
    image_size: int
    batch_size: int
    hidden_dim: int = 4096
    optimizer: str = "lars"
    augmentation: str = "paper"

    def __str__(self) -> str:
        return f"{self.backbone}, {self.image_size} px, batch of {self.batch_size}"


def interleaved(
    candidates: Mapping[str, Work], timing: Timing, *, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds per image of each candidate (which returns the number of images it worked on), one a round.

    All get one call that is not measured; then every round calls each, `before` first, for `timing.seconds` at least.
    """
    costs: dict[str, list[float]] = {name: [] for name in candidates}
    for work in candidates.values():
        work()
    for _ in range(timing.rounds):
        for name, work in candidates.items():
            before()
            images, start = 0, timing.now()
            while images == 0 or timing.now() - start < timing.seconds:
                images += work()
            costs[name].append((timing.now() - start) / images)
    return costs


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# Photographs


def photographs(count: int, height: int, width: int) -> Tensor:
    """Cuttings of scikit-learn's two photographs, uint8 [count, 3, height, width]."""
    from sklearn.datasets import load_sample_images

    sources = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    random = np.random.default_rng(0)
    images = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for number, image in enumerate(images):
        source = sources[number % len(sources)]
        room = min(source.shape[1] / height, source.shape[2] / width) * random.uniform(0.5, 1)
        rows, columns = math.floor(height * room), math.floor(width * room)
        top, left = random.integers(source.shape[1] - rows + 1), random.integers(source.shape[2] - columns + 1)
        cutting = source[None, :, top : top + rows, left : left + columns]
        image.copy_(F.interpolate(cutting, (height, width), mode="bicubic", antialias=True)[0])
    return images


def write_photographs(folder: Path, count: int, height: int = 375, width: int = 500) -> None:
    """`count` JPEG files of such cuttings, as large as ImageNet's are."""
    from torchvision.io import write_jpeg

    for number, image in enumerate(photographs(count, height, width)):
        write_jpeg(image, str(folder / f"{number}.jpg"), quality=90)


# Parts


def augmentation(
    workload: Workload,
    source: tuple[int, int],
    timing: Timing,
    *,
    against: Sequence[str] = (),
    device: torch.device,
) -> Part:
    """Two views of decoded images of `source` (height, width), by us and by peers.

    All get the images in the form that suits them: whole batches from memory as tensors, single ones as decoders have
    them. The first candidate is the way of training: from memory up to `IN_MEMORY` px, else cut by loaders.
    """
    size, count = workload.image_size, workload.batch_size
    images = photographs(count, *source)
    decoded = images.contiguous(memory_format=torch.channels_last).unbind()
    views = _two_views(workload)
    ordinals, on_device = torch.arange(count), images.to(device)
    last = views(on_device, ordinals)

    def whole() -> int:
        views(on_device, ordinals, out=last)
        return count

    def cut_and_finish() -> int:
        crops = torch.stack([views.cut(image, ordinal) for ordinal, image in enumerate(decoded)])
        views.finish(crops.to(device), ordinals, out=last)
        return count

    ours: dict[str, Work] = {f"{OURS}, whole images": whole, f"{OURS}, cut and finish": cut_and_finish}
    if max(source) > IN_MEMORY:
        ours = dict(reversed(ours.items()))
    peers = {
        peer: _peer_views(VIEWS[peer](size), images, device, batches=peer in TAKES_BATCHES)
        for peer in against
        if peer in VIEWS
    }
    title = f"two views of {size} px, from images of {source[1]}x{source[0]}"
    return Part(title, "images/s", next(iter(ours)), interleaved(ours | peers, timing))


def _peer_views(views: Callable[[Any], Any], images: Tensor, device: torch.device, *, batches: bool) -> Work:
    from torchvision.transforms.v2.functional import to_pil_image

    pictures = [] if batches else [to_pil_image(image) for image in images]
    on_device = images.to(device)

    def work() -> int:
        if batches:
            views(on_device.float() / 255)
        else:
            pairs = [views(picture) for picture in pictures]
            for view in zip(*pairs, strict=True):
                torch.stack(view).to(device)
        return len(images)

    return work


def step(workload: Workload, timing: Timing, *, against: Sequence[str] = (), device: torch.device) -> Part:
    """One optimizer step on given views, against the passes through the networks that no BYOL can do without.

    They are counted twice: through the backbone alone, and with projector and predictor.
    """
    names = (FLOOR, NETWORKS, OURS, *(name for name in against if name in STEPS))
    candidates = {name: build_step(name, workload, device) for name in names}
    return Part(f"step of {workload}", "images/s", FLOOR, interleaved(candidates, timing))


def build_step(name: str, workload: Workload, device: torch.device) -> Work:
    """The named candidate for a step, on views of its own."""
    torch.manual_seed(0)
    encoder = create_encoder(workload.backbone, image_size=workload.image_size).to(device)
    as_it_comes = name in STEPS and name not in TAKE_CHANNELS_LAST
    layout = torch.contiguous_format if as_it_comes else _layout(encoder)
    encoder.to(memory_format=layout)
    view1, view2 = _given_views(workload, device, layout)
    if name in STEPS:
        take = STEPS[name](encoder, encoder_width(encoder), workload.hidden_dim, workload.image_size)
    else:
        byol = BYOL(encoder, hidden_dim=workload.hidden_dim).to(device).to(memory_format=layout)
        take = _our_step(byol, workload) if name == OURS else _passes(byol, heads=name == NETWORKS)

    def work() -> int:
        take(view1, view2)
        return workload.batch_size

    return work


def _passes(byol: BYOL, *, heads: bool) -> Callable[[Tensor, Tensor], None]:
    """Forward and backward passes of both views through the online network, forward passes through the target."""
    online: nn.Module = nn.Sequential(byol.encoder, byol.projector, byol.predictor) if heads else byol.encoder
    target: nn.Module = nn.Sequential(byol.target_encoder, byol.target_projector) if heads else byol.target_encoder

    def take(view1: Tensor, view2: Tensor) -> None:
        with torch.no_grad():
            target(view1)
            target(view2)
        for view in (view1, view2):
            online(view).sum().backward()
        online.zero_grad()

    return take


def _our_step(byol: BYOL, workload: Workload) -> Callable[[Tensor, Tensor], None]:
    accelerator = create_accelerator((), Path())
    exempt = byol.no_weight_decay()
    optimizer = create_optimizer(workload.optimizer, byol, lr=0.1, weight_decay=1.5e-6, no_weight_decay=exempt)
    model, optimizer = prepare(accelerator, byol, optimizer)

    def take(view1: Tensor, view2: Tensor) -> None:
        train_step(accelerator, model, optimizer, [(view1, view2)], target_decay=TARGET_DECAY)

    return take


@dataclass(frozen=True)
class Reading:
    """How images come: the processes that decode, and the bytes of images of one shape that may be held decoded."""

    workers: int | None = None
    memory_limit: float = 2 * 2**30


def loader(images: Images, workload: Workload, timing: Timing, *, files: Images, reading: Reading) -> Part:
    """Batches as training gets them, against the decoding of every image's file in this process alone."""
    turn = itertools.count()
    with _batches(images, workload, reading) as batches:
        stream = iter(batches)

        def decode() -> int:
            files.decode(next(turn) % len(files))
            return 1

        def load() -> int:
            return len(next(stream).ordinals)

        way = "decoded and cut" if images is files else "cut from a decoded cache"
        name = f"{OURS}, {'from memory' if batches.in_memory else way}"
        costs = interleaved({"decoding": decode, name: load}, timing, before=lambda: _empty(batches, stream))
    return Part(f"batches of {images.name}", "images/s", "decoding", costs)


def loop(images: Images, workload: Workload, timing: Timing, *, reading: Reading, device: torch.device) -> Part:
    """Training from files to weights, against the same step fed with the same views over and over."""
    torch.manual_seed(0)
    encoder = create_encoder(workload.backbone, image_size=workload.image_size)
    layout = _layout(encoder)
    byol = BYOL(encoder, hidden_dim=workload.hidden_dim).to(device).to(memory_format=layout)
    take = _our_step(byol, workload)
    two_views = DeviceViews(_two_views(workload), device, channels_last=has_convolutions(encoder))
    given = _given_views(workload, device, layout)
    waited = total = 0.0
    with _batches(images, workload, reading) as batches:
        stream = copied_ahead(iter(batches), device)

        def on_given() -> int:
            take(*given)
            return workload.batch_size

        def on_images() -> int:
            nonlocal waited, total
            begin = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - begin
            take(*two_views(batch))
            total += time.perf_counter() - begin
            return workload.batch_size

        candidates = {"given views": on_given, OURS: on_images}
        costs = interleaved(candidates, timing, before=lambda: _empty(batches, stream))
    note = f"the loop waits for images {waited / total:.1%} of its time"
    return Part(f"training on {images.name}: {workload}", "images/s", "given views", costs, note)


def memory(workload: Workload, *, against: Sequence[str] = (), device: torch.device) -> Part:
    """How far the first step raises the memory in use, each candidate in a process of its own."""
    if device.type == "cpu" and sys.platform != "linux":
        raise ByolTimmError(f"the peak memory of a process is not known on {sys.platform}. Leave memory out of --parts")
    costs = {}
    for name in (OURS, FLOOR, *(name for name in against if name in STEPS)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            costs[name] = [pool.submit(memory_rise, name, workload, device, torch.get_num_threads()).result() / 2**30]
    return Part(f"memory that a step takes: {workload}", "GB", OURS, costs, "each was measured once")


def memory_rise(name: str, workload: Workload, device: torch.device, threads: int) -> int:
    """Bytes from what is in use before the first step of a process to the most during it."""
    torch.set_num_threads(threads)
    work = build_step(name, workload, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    """Bytes, from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def start(pretrain: Path, backbone: str, timing: Timing) -> Part:
    """From the command to the end of the first step of the recipe at `pretrain`, against importing what it needs.

    The step is of 8 small images, so that what it takes itself does not count.
    """
    costs: dict[str, list[float]] = {"imports": [], OURS: []}
    for number in range(timing.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            settings = f"--backbone {backbone} --batch_size 8 --hidden_dim 512 --log_every 1 --output_dir {folder}/run"
            recipe = [sys.executable, str(pretrain), *settings.split()]
            taken = {
                "imports": _seconds([sys.executable, "-c", IMPORTS], timing, until=None),
                OURS: _seconds(recipe, timing, until=Path(folder, "run", "metrics.jsonl")),
            }
        if number:
            for name, seconds in taken.items():
                costs[name].append(seconds)
    return Part(f"from command to first step of {backbone}", "s", "imports", costs)


def _seconds(command: Sequence[str], timing: Timing, *, until: Path | None) -> float:
    """Seconds that a process takes to end, or to write the metrics of a step to `until`."""
    computed, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (until and until.exists() and b'"loss"' in until.read_bytes()):
            time.sleep(0.005)
        passed = time.perf_counter() - begin
        process.kill()
        _, errors = process.communicate()
    if process.returncode > 0:
        raise ByolTimmError(f"{shlex.join(command)} failed ({errors.decode().strip()}). Try it by hand")
    if timing.clock == "wall":
        return passed
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - computed.ru_utime - computed.ru_stime


# Pieces


def _two_views(workload: Workload) -> TwoViews:
    augmentation = AUGMENTATIONS[workload.augmentation]
    return TwoViews(augmentation, workload.image_size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _given_views(workload: Workload, device: torch.device, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    images = photographs(workload.batch_size, workload.image_size, workload.image_size).to(device)
    view1, view2 = _two_views(workload)(images, torch.arange(workload.batch_size))
    return view1.contiguous(memory_format=layout), view2.contiguous(memory_format=layout)


def _layout(encoder: nn.Module) -> torch.memory_format:
    return torch.channels_last if has_convolutions(encoder) else torch.contiguous_format


def _batches(images: Images, workload: Workload, reading: Reading) -> TrainingBatches:
    return TrainingBatches(
        images,
        batch_size=workload.batch_size,
        global_batch=workload.batch_size,
        cut=_two_views(workload).cut,
        workers=reading.workers,
        memory_limit=reading.memory_limit,
    )


def _empty(batches: TrainingBatches, stream: Iterator[Batch]) -> None:
    """Throw away what workers made while another candidate was at work."""
    for _ in range(batches.ahead):
        next(stream)
