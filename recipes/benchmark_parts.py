"""Measure the parts of a run: augmentation, step, loop and memory. A part compares candidates that do the same work."""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from benchmark_peers import STEPS, TAKE_CHANNELS_LAST, TAKES_BATCHES, VIEWS
from torch import Tensor, nn

from byol_timm import BYOL, TwoViews, create_encoder
from byol_timm.data import Batch, Images, TrainingBatches, copied_ahead, open_cache, open_dataset
from byol_timm.encoders import encoder_width, has_convolutions
from byol_timm.errors import ByolTimmError
from byol_timm.training import DeviceViews, create_accelerator, create_optimizer, prepare, train_step
from byol_timm.views import AUGMENTATIONS

if TYPE_CHECKING:
    from benchmark import BenchmarkConfig

Work = Callable[[], int]
OURS, FLOOR, NETWORKS = "byol_timm", "bare backbone", "bare backbone and heads"
# Larger images seldom fit in memory all together.
IN_MEMORY = 96


@dataclass(frozen=True)
class Part:
    """Costs of candidates, one a round: seconds per image where the unit is images/s, else in the unit."""

    title: str
    unit: Literal["images/s", "GB"]
    reference: str
    costs: Mapping[str, Sequence[float]]
    note: str = ""

    def value(self, name: str) -> float:
        """Return the median of a candidate, in the unit."""
        cost = statistics.median(self.costs[name])
        return 1 / cost if self.unit == "images/s" else cost

    def relative(self, name: str) -> float:
        """Return the cost of a candidate divided by the reference's: the median over rounds."""
        rounds = zip(self.costs[name], self.costs[self.reference], strict=True)
        return statistics.median(cost / reference for cost, reference in rounds)

    def __str__(self) -> str:
        width = max(map(len, self.costs))
        measure = "memory" if self.unit == "GB" else "time"
        lines = [f"{self.title}; {measure} relative to {self.reference}"]
        for name in self.costs:
            value = self.value(name)
            number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            lines.append(f"  {name:<{width}}  {number:>7} {self.unit:<8}  {self.relative(name):6.2f} x")
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else []), ""])


def measure(config: "BenchmarkConfig", device: torch.device) -> Iterator[Part]:
    if "augmentation" in config.parts:
        yield augmentation(config, device)
    if "step" in config.parts:
        yield step(config, device)
    if "loop" in config.parts:
        with tempfile.TemporaryDirectory() as folder:
            if config.dataset is None:
                write_photographs(Path(folder), 2 * config.batch_size)
            yield loop(config, open_dataset(config.dataset or folder).train, device)
    if "memory" in config.parts:
        yield memory(config, device)


def interleaved(
    candidates: Mapping[str, Work], config: "BenchmarkConfig", *, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return seconds per image of each candidate, one per round. A candidate returns the images it worked on.

    Each gets one call that is not measured. Then every round calls each, after `before`, for at least `config.seconds`.
    """
    costs: dict[str, list[float]] = {name: [] for name in candidates}
    for work in candidates.values():
        work()
    for _ in range(config.rounds):
        for name, work in candidates.items():
            before()
            images, start = 0, now(config)
            while images == 0 or now(config) - start < config.seconds:
                images += work()
            costs[name].append((now(config) - start) / images)
    return costs


def now(config: "BenchmarkConfig") -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if config.clock == "cpu" else time.perf_counter()


# Parts


def augmentation(config: "BenchmarkConfig", device: torch.device) -> Part:
    """Measure two views of decoded images, ours and those of other packages.

    Each gets images in the form that suits it: batches from memory as tensors, single ones as decoders return them.
    The first candidate is what training does: whole batches up to `IN_MEMORY` px, else crops cut by workers.
    """
    size, count = config.image_size, config.batch_size
    source = config.source or ((size, size) if size <= IN_MEMORY else (375, 500))
    images = photographs(count, *source)
    decoded = images.contiguous(memory_format=torch.channels_last).unbind()
    views = our_views(config)
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
    others = {name: their_views(name, size, images, device) for name in config.against if name in VIEWS}
    title = f"two views of {size} px, from images of {source[1]}x{source[0]}"
    return Part(title, "images/s", next(iter(ours)), interleaved(ours | others, config))


def their_views(name: str, size: int, images: Tensor, device: torch.device) -> Work:
    from torchvision.transforms.v2.functional import to_pil_image

    views: Callable[[Any], Any] = VIEWS[name](size)
    pictures, on_device = [to_pil_image(image) for image in images], images.to(device)

    def of_batches() -> int:
        views(on_device.float() / 255)
        return len(images)

    def of_pictures() -> int:
        for view in zip(*(views(picture) for picture in pictures), strict=True):
            torch.stack(view).to(device)
        return len(images)

    return of_batches if name in TAKES_BATCHES else of_pictures


def step(config: "BenchmarkConfig", device: torch.device) -> Part:
    """Measure one optimizer step on precomputed views, next to the passes through the networks that every BYOL needs.

    These passes are measured twice: through the backbone alone, and with projector and predictor.
    """
    names = (FLOOR, NETWORKS, OURS, *(name for name in config.against if name in STEPS))
    candidates = {name: build_step(name, config, device) for name in names}
    return Part(f"step of {workload(config)}", "images/s", FLOOR, interleaved(candidates, config))


def build_step(name: str, config: "BenchmarkConfig", device: torch.device) -> Work:
    """Return the named candidate for a step, with views of its own."""
    torch.manual_seed(0)
    encoder = create_encoder(config.backbone, image_size=config.image_size).to(device)
    contiguous = name in STEPS and name not in TAKE_CHANNELS_LAST
    layout = torch.contiguous_format if contiguous else layout_of(encoder)
    encoder.to(memory_format=layout)
    view1, view2 = precomputed_views(config, device, layout)
    if name in STEPS:
        take = STEPS[name](encoder, encoder_width(encoder), config.hidden_dim, config.image_size)
    else:
        byol = BYOL(encoder, hidden_dim=config.hidden_dim).to(device).to(memory_format=layout)
        take = our_step(byol, config) if name == OURS else passes(byol, heads=name == NETWORKS)

    def work() -> int:
        take(view1, view2)
        return config.batch_size

    return work


def passes(byol: BYOL, *, heads: bool) -> Callable[[Tensor, Tensor], None]:
    """Pass both views forward and backward through the online network, and forward through the target network."""
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


def our_step(byol: BYOL, config: "BenchmarkConfig") -> Callable[[Tensor, Tensor], None]:
    accelerator = create_accelerator((), Path())
    exempt = byol.no_weight_decay()
    optimizer = create_optimizer(config.opt, byol, lr=0.1, weight_decay=1.5e-6, no_weight_decay=exempt)
    model, optimizer = prepare(accelerator, byol, optimizer)

    def take(view1: Tensor, view2: Tensor) -> None:
        train_step(accelerator, model, optimizer, [(view1, view2)], target_decay=0.99)

    return take


def loop(config: "BenchmarkConfig", images: Images, device: torch.device) -> Part:
    """Measure training from files to weights, next to the same step on precomputed views."""
    torch.manual_seed(0)
    encoder = create_encoder(config.backbone, image_size=config.image_size)
    layout = layout_of(encoder)
    byol = BYOL(encoder, hidden_dim=config.hidden_dim).to(device).to(memory_format=layout)
    take = our_step(byol, config)
    two_views = DeviceViews(our_views(config), device, channels_last=has_convolutions(encoder))
    precomputed = precomputed_views(config, device, layout)
    waited = total = 0.0
    with TrainingBatches(
        open_cache(images, config.cache, config.cache_dir, workers=config.workers),
        batch_size=config.batch_size,
        global_batch=config.batch_size,
        cut=our_views(config).cut,
        workers=config.workers,
    ) as batches:
        stream = copied_ahead(iter(batches), device)

        def on_precomputed() -> int:
            take(*precomputed)
            return config.batch_size

        def on_images() -> int:
            nonlocal waited, total
            begin = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - begin
            take(*two_views(batch))
            total += time.perf_counter() - begin
            return config.batch_size

        candidates = {"precomputed views": on_precomputed, OURS: on_images}
        costs = interleaved(candidates, config, before=lambda: discard(stream, batches.ahead))
    note = f"the loop waits for images {waited / total:.1%} of its time"
    return Part(f"training on {images.name}: {workload(config)}", "images/s", "precomputed views", costs, note)


def discard(stream: Iterator[Batch], count: int) -> None:
    """Discard what workers prepared while another candidate was measured."""
    for _ in range(count):
        next(stream)


def memory(config: "BenchmarkConfig", device: torch.device) -> Part:
    """Measure how far the first step raises the memory in use, each candidate in a process of its own."""
    if device.type == "cpu" and sys.platform != "linux":
        raise ByolTimmError(f"the peak memory of a process is not known on {sys.platform}. Leave memory out of --parts")
    costs = {}
    for name in (OURS, FLOOR, *(name for name in config.against if name in STEPS)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rise = pool.submit(memory_rise, name, config, device, torch.get_num_threads()).result()
        costs[name] = [rise / 2**30]
    return Part(f"memory of a step: {workload(config)}", "GB", OURS, costs, "each was measured once")


def memory_rise(name: str, config: "BenchmarkConfig", device: torch.device, threads: int) -> int:
    """Return the bytes between what is in use before the first step of a process and the peak during it."""
    torch.set_num_threads(threads)
    work = build_step(name, config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    before = process_memory("VmRSS")
    work()
    return process_memory("VmHWM") - before


def process_memory(name: str) -> int:
    """Return bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# Views, layouts, photographs


def workload(config: "BenchmarkConfig") -> str:
    return f"{config.backbone}, {config.image_size} px, batch of {config.batch_size}"


def our_views(config: "BenchmarkConfig") -> TwoViews:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return TwoViews(AUGMENTATIONS[config.augmentation], config.image_size, mean=mean, std=std)


def precomputed_views(
    config: "BenchmarkConfig", device: torch.device, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    images = photographs(config.batch_size, config.image_size, config.image_size).to(device)
    view1, view2 = our_views(config)(images, torch.arange(config.batch_size))
    return view1.contiguous(memory_format=layout), view2.contiguous(memory_format=layout)


def layout_of(encoder: nn.Module) -> torch.memory_format:
    return torch.channels_last if has_convolutions(encoder) else torch.contiguous_format


def photographs(count: int, height: int, width: int) -> Tensor:
    """Return crops of scikit-learn's two photographs, uint8 [count, 3, height, width]."""
    from sklearn.datasets import load_sample_images

    sources = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    random = np.random.default_rng(0)
    images = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for number, image in enumerate(images):
        source = sources[number % len(sources)]
        room = min(source.shape[1] / height, source.shape[2] / width) * random.uniform(0.5, 1)
        rows, columns = math.floor(height * room), math.floor(width * room)
        top, left = random.integers(source.shape[1] - rows + 1), random.integers(source.shape[2] - columns + 1)
        crop = source[None, :, top : top + rows, left : left + columns]
        image.copy_(F.interpolate(crop, (height, width), mode="bicubic", antialias=True)[0])
    return images


def write_photographs(folder: Path, count: int, height: int = 375, width: int = 500) -> None:
    """Write such crops to `count` JPEG files, as large as those of ImageNet."""
    from torchvision.io import write_jpeg

    for number, image in enumerate(photographs(count, height, width)):
        write_jpeg(image, str(folder / f"{number}.jpg"), quality=90)
