"""Check on a GPU that byol_timm is right, and measure time, memory and exact resume.

    python tests/gpu_check.py [SECTION ...]

Prints one line a section; writes all numbers to gpu_check.json and everything else that was printed to gpu_check.log,
both in $OUT or here. A section that fails, hangs or kills its process costs only itself. No section starts after
GPU_CHECK_SECONDS (440). Without a GPU all sections run on a CPU with tiny sizes, to try this file itself.
"""

import collections
import contextlib
import copy
import gc
import hashlib
import json
import math
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

BEGAN = time.monotonic()
SECONDS = float(os.environ.get("GPU_CHECK_SECONDS", 440))
OUT = Path(os.environ.get("OUT", "."))
MARK = "@gpu_check "
ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__" and (len(sys.argv) < 2 or not sys.argv[1].startswith("--")):
    torch = None  # The parent only watches.
else:
    import torch
    import torch.nn.functional as F
    from accelerate.state import AcceleratorState
    from torch import nn

    from byol_timm import BYOL, PretrainConfig, create_encoder
    from byol_timm.data import Batch, TrainingBatches, copied_ahead, open_dataset
    from byol_timm.encoders import has_convolutions
    from byol_timm.evaluation import knn
    from byol_timm.training import (
        DeviceViews,
        GraphedStep,
        create_accelerator,
        create_optimizer,
        effective_rank,
        enable_grad_checkpointing,
        prepare,
        synchronize_batch_norms,
        train_step,
    )
    from byol_timm.views import AUGMENTATIONS, TwoViews

    GPU = torch.cuda.is_available()
    DEVICE = torch.device("cuda" if GPU else "cpu")
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sized(on_gpu, on_cpu):
    return on_gpu if GPU else on_cpu


# Measuring


def sync():
    if GPU:
        torch.cuda.synchronize()


def milliseconds(work, *, calls=4, rounds=3, warm=2):
    """The median time of a call, several in a row between two waits for the device."""
    return interleaved({"": work}, calls=calls, rounds=rounds, warm=warm)[""]


def interleaved(candidates, *, calls=4, rounds=3, warm=2):
    calls, rounds, warm = sized((calls, rounds, warm), (1, 1, 1))
    for work in candidates.values():
        for _ in range(warm):
            work()
    times = collections.defaultdict(list)
    for _ in range(rounds):
        for name, work in candidates.items():
            sync()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            sync()
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: statistics.median(taken) for name, taken in times.items()}


def host_milliseconds(work, *, rounds=5):
    """Until the call returns, with nothing queued before it: what the CPU needs to say what the GPU shall do."""
    work()
    taken = []
    for _ in range(sized(rounds, 1)):
        sync()
        start = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - start))
        sync()
    return statistics.median(taken)


def peak_gb(work):
    """Most memory allocated during a call."""
    if not GPU:
        work()
        return 0.0
    sync()
    torch.cuda.reset_peak_memory_stats()
    work()
    sync()
    return torch.cuda.max_memory_allocated() / 1e9


def kernels(work):
    """Kernels, copies and fills that a call puts on the device, and the ms that they take there."""
    from torch.profiler import ProfilerActivity, profile

    work()
    sync()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]) as record:
        work()
        sync()
    count, copies, busy = 0, 0, 0.0
    for event in record.events():
        # Ranges that optimizers name are shown on the device too.
        named = getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep"))
        if event.device_type == torch.autograd.DeviceType.CUDA and not named:
            copies += event.name.startswith(("Memcpy", "Memset"))
            count += 1
            busy += event.time_range.elapsed_us()
    return {"launches": count, "copies": copies, "busy_ms": busy / 1e3}


def waits(work):
    """Where a call waits for the device, by line, with counts."""
    if not GPU:
        work()
        return collections.Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as report:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    report = [w for w in report if "synchronizing CUDA operation" in str(w.message)]
    return collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in report)


# What is measured


def pictures(*shape, seed=0):
    """Return smooth uint8 images; noise would hide errors of the augmentation."""
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(math.prod(shape[:-3]), shape[-3], 9, 9, generator=random)
    return (F.interpolate(small, shape[-2:], mode="bicubic").clamp(0, 1) * 255).to(torch.uint8).view(shape)


def accelerator_for(precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    return create_accelerator((), Path(tempfile.gettempdir()))


def make_byol(backbone, size, *, hidden_dim=4096, channels_last=None, **kwargs):
    torch.manual_seed(0)
    encoder = create_encoder(backbone, image_size=size, **kwargs)
    byol = BYOL(encoder, hidden_dim=sized(hidden_dim, 64))
    last = has_convolutions(encoder) if channels_last is None else channels_last
    return byol.to(memory_format=torch.channels_last if last else torch.contiguous_format), last


class Step:
    """One network, ready to train, on views that are given or made."""

    def __init__(self, byol, last, size, batch, *, precision="bf16", opt="lars", whole=False, compile=False,
                 graphed=False, triton=False):  # fmt: skip
        self.byol, self.precision, self.batch = byol, precision, batch
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.accelerator = accelerator_for(precision)
        lr = 0.1 if opt == "lars" else 1e-4
        optimizer = create_optimizer(opt, byol, lr=lr, weight_decay=1e-6, no_weight_decay=byol.no_weight_decay())
        if compile:
            for network in byol.children():
                network.compile()
        self.model, self.optimizer = prepare(self.accelerator, byol, optimizer)
        views = torch.randn(2, batch, 3, size, size, device=DEVICE)
        self.view1, self.view2 = (view.contiguous(memory_format=self.layout) for view in views)
        name = "paper" if size > 64 else "small"
        views_of = TwoViews(AUGMENTATIONS[name], size, mean=MEAN, std=STD)
        dtype = torch.bfloat16 if precision == "bf16" and triton else torch.float32
        kernels = views_of.with_triton(dtype=dtype, channels_last=last) if triton else None
        self.two_views = DeviceViews(views_of, DEVICE, last, kernels=kernels)
        self.lr = lr
        self.graphed = GraphedStep(self.accelerator, self.model, self.optimizer) if graphed else None
        self.stream = copied_ahead(endless(batch, size, whole), DEVICE)

    def passes(self, *, heads):
        """Forward and backward passes of both views through one network, forward passes through the other."""
        byol = self.byol
        online = nn.Sequential(byol.encoder, byol.projector, byol.predictor) if heads else byol.encoder
        target = nn.Sequential(byol.target_encoder, byol.target_projector) if heads else byol.target_encoder
        with torch.no_grad(), self.accelerator.autocast():
            target(self.view1)
            target(self.view2)
        for view in (self.view1, self.view2):
            with self.accelerator.autocast():
                output = online(view)
            output.float().mean().backward()
        online.zero_grad()

    def floor(self):
        self.passes(heads=False)

    def heads(self):
        self.passes(heads=True)

    def ours(self, lr=None):
        return self.train([(self.view1, self.view2)], self.lr if lr is None else lr)

    def train(self, pairs, lr):
        if self.graphed is not None:
            return self.graphed(pairs, lr=lr, target_decay=0.99)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return train_step(self.accelerator, self.model, self.optimizer, pairs, target_decay=0.99)

    def views(self):
        self.two_views(next(self.stream))

    def loop(self):
        micro_batches = [next(self.stream)]
        pairs = map(self.two_views, micro_batches)
        figures = self.train(pairs, self.lr)
        if not figures["grad_norm"].isfinite():
            raise ArithmeticError(f"gradient norm {figures['grad_norm']}")


def endless(batch, size, whole):
    """Batches that wait in pinned memory, as the loaders' do."""
    shape = (batch, 3, size, size) if whole else (batch, 2, 3, size, size)
    held = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2)]
    held = [pixels.pin_memory() if GPU else pixels for pixels in held]
    step = 0
    while True:
        ordinals = torch.arange(batch) + step * batch
        yield Batch(*((held[step % 2], None) if whole else (None, held[step % 2])), ordinals)
        step += 1


def step_figures(step, *, calls=4, rounds=3):
    names = ("floor", "heads", "ours", "loop", "views")
    times = interleaved({name: getattr(step, name) for name in names}, calls=calls, rounds=rounds)
    figures = {f"{name}_ms": taken for name, taken in times.items()}
    figures |= {"ours_x": times["ours"] / times["floor"], "ours_x_heads": times["ours"] / times["heads"]}
    figures |= {"loop_x": times["loop"] / times["floor"], "images_s": 1e3 * step.batch / times["loop"]}
    figures |= {"floor_gb": peak_gb(step.floor), "ours_gb": peak_gb(step.ours)}
    return figures


def relative(a, b):
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm().clamp(min=1e-30)).item()


@contextlib.contextmanager
def float32():
    """Convolutions and products in float32 and nothing less."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# Sections: figures, and what must be true


def env():
    import accelerate
    import timm

    figures = {
        "device": torch.cuda.get_device_name() if GPU else "cpu",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "conv_tf32": torch.backends.cudnn.allow_tf32,
    }
    source = torch.empty(sized(2**28, 2**20), device=DEVICE).normal_()
    target = torch.empty_like(source)
    taken = milliseconds(lambda target=target, source=source: target.copy_(source), calls=10)
    figures["copy_tb_s"] = 2 * source.numel() * 4 / taken / 1e9
    del source, target
    side = sized(8192, 128)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = torch.randn(2, side, side, device=DEVICE).to(dtype)
        figures[f"{name}_tflop_s"] = 2 * side**3 / milliseconds(lambda a=a, b=b: a @ b, calls=5) / 1e9
    tiny = torch.zeros(1, device=DEVICE)

    def many():
        for _ in range(1000):
            tiny.add_(1)

    figures["host_us_per_launch"] = host_milliseconds(many)
    return figures, {}


def views():
    """The views of a GPU are those of a CPU, in levels of 0 to 255, and the same bits again."""
    figures, repeated = {}, True
    cases = (("paper", 224, 16), ("torchvision", 96, 32), ("small", 32, 64), ("digits", 32, 64))
    for name, size, batch in sized(cases, cases[2:]):
        two_views = TwoViews(AUGMENTATIONS[name], size, mean=MEAN, std=STD)
        crops, ordinals = pictures(batch, 2, 3, size, size), torch.arange(batch) + 5
        pairs = {"finish": (two_views.finish, crops)}
        if size <= 48:
            pairs["whole"] = (two_views, crops[:, 0].contiguous())
        for way, (make, pixels) in pairs.items():
            here, there = make(pixels, ordinals), make(pixels.to(DEVICE), ordinals)
            again = make(pixels.to(DEVICE), ordinals)
            scale = 255 * torch.tensor(STD).view(-1, 1, 1)
            figures[f"{name}_{size}_{way}"] = max(
                ((a - b.cpu()) * scale).abs().max().item() for a, b in zip(here, there, strict=True)
            )
            repeated &= all(torch.equal(a, b) for a, b in zip(there, again, strict=True))
    size = sized(224, 64)
    images, ordinals = pictures(8, 3, size + 32, size), torch.arange(8)
    crop_only = TwoViews(
        AUGMENTATIONS["digits"].__class__(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0)),
        size,
        mean=(0.0,),
        std=(1.0,),
    )
    whole = crop_only(images.to(DEVICE), ordinals)
    cut = torch.stack([crop_only.cut(image, ordinal) for ordinal, image in enumerate(images)])
    figures["crop_against_uint8"] = max(
        (255 * view.cpu() - cut[:, number]).abs().max().item() for number, view in enumerate(whole)
    )
    worst = max(value for name, value in figures.items() if name != "crop_against_uint8")
    # Both passes of the CPU's crop are rounded, of the GPU's none is.
    return figures, {"near": worst < 0.1, "crop": figures["crop_against_uint8"] < 6, "repeated": repeated}


def ahead():
    """Batches travel on a stream of their own and arrive whole."""
    count, shape = 40, (16, 3, 64, 64)

    def source():
        for number in range(count + 1):
            pixels = torch.full(shape, number % 251, dtype=torch.uint8)
            yield Batch(pixels.pin_memory() if GPU else pixels, None, torch.tensor([number]))

    seen = []
    for batch in copied_ahead(source(), DEVICE):
        if GPU:
            torch.cuda._sleep(3_000_000)
        seen.append((batch.images.min(), batch.images.max(), batch.ordinals))
        del batch
        # What the allocator gives out next must not be what is still to be read.
        torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)
    right = all(low.item() == high.item() == int(ordinal) % 251 for low, high, ordinal in seen)
    return {"batches": len(seen)}, {"whole": right, "all": len(seen) >= count}


def equal():
    """Three steps in float32 on the GPU and on the CPU from the same weights and views."""
    figures = {}
    with float32():
        for backbone, opt in (("test_resnet", "lars"), ("test_vit", "sgd")):
            byol, last = make_byol(backbone, 32, hidden_dim=256)
            accelerator, results = accelerator_for("no"), []
            for device in (torch.device("cpu"), DEVICE):
                network = copy.deepcopy(byol).to(device)
                # Not AdamW, whose steps of one size make rounding as large as everything else.
                optimizer = create_optimizer(opt, network, lr=0.05, weight_decay=1e-4)
                random, report = torch.Generator().manual_seed(0), []
                for _ in range(3):
                    pair = torch.randn(2, 32, 3, 32, 32, generator=random).to(device)
                    pair = [v.contiguous(memory_format=torch.channels_last) if last else v for v in pair]
                    report.append(train_step(accelerator, network, optimizer, [pair], target_decay=0.9))
                results.append((network, report))
            (here, report), (there, metrics_there) = results
            figures[f"{backbone}_loss"] = max(
                abs(a["loss"].item() - b["loss"].item()) for a, b in zip(report, metrics_there, strict=True)
            )
            figures[f"{backbone}_norm"] = relative(metrics_there[0]["grad_norm"], report[0]["grad_norm"])
            figures[f"{backbone}_weights"] = max(
                relative(b, a)
                for a, b in zip(here.parameters(), there.parameters(), strict=True)
                if a.ndim > 1  # Of those that start at zero there is only the noise.
            )
    near = max(figures.values()) < 5e-3
    return figures, {"near": near}


def precision():
    """bf16 and fp16: loss and target stay float32; fp16 skips a step that overflows; a NaN shows in the norm."""
    figures, checks = {}, {}
    size, batch = sized((64, 128), (32, 8))
    losses = {}
    for name in sized(("no", "bf16", "fp16"), ("no",)):
        byol, last = make_byol("resnet18", size, hidden_dim=512)
        step = Step(byol, last, size, batch, precision=name)
        report = [step.ours() for _ in range(sized(10, 1))]
        losses[name] = [figures_of["loss"].item() for figures_of in report]
        checks[f"{name}_finite"] = all(map(math.isfinite, losses[name]))
        checks[f"{name}_float32"] = (
            report[0]["loss"].dtype == torch.float32
            and {p.dtype for p in byol.parameters()} == {torch.float32}
            and {p.dtype for state in step.optimizer.state.values() for p in state.values()} <= {torch.float32}
        )
        before = {key: value.clone() for key, value in byol.state_dict().items()}
        if name == "fp16":
            scaler = step.accelerator.scaler
            figures["fp16_scale"] = scaler.get_scale()
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
            step.ours()
            checks["fp16_skipped"] = step.accelerator.optimizer_step_was_skipped and scaler.get_scale() == 2.0**59
            names = [key for key, _ in byol.named_parameters()]
            checks["fp16_unchanged"] = all(torch.equal(byol.state_dict()[key], before[key]) for key in names)
        else:
            step.view1[0] = math.nan
            checks[f"{name}_nan_seen"] = not step.ours()["grad_norm"].isfinite().item()
    for name in losses.keys() - {"no"}:
        figures[f"{name}_loss_off"] = max(abs(a - b) for a, b in zip(losses[name], losses["no"], strict=True))
        checks[f"{name}_near"] = abs(losses[name][0] - losses["no"][0]) < 0.05
    return figures, checks


def syncs():
    """Where a run waits for the device, per step: twelve steps of `pretrain` on digits, and one step of large parts."""
    from byol_timm import pretrain

    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig(
            backbone="test_resnet",
            image_size=32,
            epochs=1,
            batch_size=64,
            hidden_dim=64,
            log_every=1000,
            save_every=1000,
            workers=0,
            output_dir=f"{folder}/run",
        )
        accelerator_for("no")
        AcceleratorState._reset_state(reset_partial_state=True)
        places = waits(lambda: pretrain(config))
        steps = 22
    figures = {"steps": steps}
    in_loop = {place: count / steps for place, count in places.items() if count >= steps - 2}
    figures["per_step"] = sum(in_loop.values())
    figures["where"] = " ".join(f"{place}={count:.2g}" for place, count in sorted(in_loop.items())) or "nowhere"
    step = Step(*make_byol("test_resnet", 64, hidden_dim=64), 64, sized(64, 8), precision="no")
    step.loop()
    figures["in_views"] = sum(waits(step.views).values())
    figures["in_train_step"] = sum(waits(step.ours).values())
    return figures, {"views_never_wait": figures["in_views"] == 0, "steps_never_wait": figures["in_train_step"] == 0}


def launches():
    """How many kernels, and how long the GPU is busy with them, next to how long the host takes to launch them."""
    figures = {}
    cases = [("paper", 224, 256, False), ("small", 32, 512, True)] if GPU else [("small", 32, 8, True)]
    for name, size, batch, whole in cases:
        make = TwoViews(AUGMENTATIONS[name], size, mean=MEAN, std=STD)
        pixels = next(endless(batch, size, whole))
        pixels = (pixels.images if whole else pixels.crops).to(DEVICE)
        ordinals = torch.arange(batch)
        last = None

        def work(make=make, pixels=pixels, ordinals=ordinals, whole=whole):
            nonlocal last
            last = (make if whole else make.finish)(pixels, ordinals, out=last)

        figures |= {f"views_{size}_{key}": value for key, value in kernels(work).items()}
        figures[f"views_{size}_host_ms"] = host_milliseconds(work)
    cases = [("resnet50", 224, 64, "lars"), ("vit_small_patch16_224", 224, 64, "adamw"), ("resnet18", 32, 512, "lars")]
    for backbone, size, batch, opt in sized(cases, [("test_resnet", 32, 8, "lars")]):
        step = Step(*make_byol(backbone, size), size, batch, precision=sized("bf16", "no"), opt=opt, whole=size <= 48)
        step.ours()
        figures |= {f"{backbone}_{key}": value for key, value in kernels(step.ours).items()}
        figures[f"{backbone}_step_ms"] = milliseconds(step.ours)
    return figures, {}


def augment():
    """Views a second, by size and batch, and what the host takes of it."""
    figures = {}
    cases = [
        ("paper", 224, 256, False),
        ("paper", 224, 1024, False),
        ("torchvision", 224, 256, False),
        ("paper", 224, 256, True),
        ("paper", 96, 256, True),
        ("small", 32, 256, True),
        ("small", 32, 1024, True),
    ]
    for name, size, batch, whole in sized(cases, [("small", 32, 8, True)]):
        make = TwoViews(AUGMENTATIONS[name], size, mean=MEAN, std=STD)
        batch_of = next(endless(batch, size, whole))
        pixels = (batch_of.images if whole else batch_of.crops).to(DEVICE)
        call, last, turn = (make if whole else make.finish), None, 0

        def work(call=call, pixels=pixels, batch=batch):
            nonlocal last, turn
            turn += 1
            last = call(pixels, torch.arange(batch) + turn * batch, out=last)

        key = f"{name}_{size}_{batch}_{'whole' if whole else 'finish'}"
        figures[f"{key}_ms"] = milliseconds(work)
        figures[f"{key}_host_ms"] = host_milliseconds(work)
        figures[f"{key}_gb"] = peak_gb(work)
        last = None
    return figures, {}


def resnet50():
    size, batch = sized((224, 256), (32, 4))
    step = Step(*make_byol(sized("resnet50", "test_resnet"), size), size, batch, precision=sized("bf16", "no"))
    return step_figures(step), {}


def vit_small():
    size, batch = sized((224, 256), (32, 4))
    backbone = sized("vit_small_patch16_224", "test_vit")
    step = Step(*make_byol(backbone, size), size, batch, precision=sized("bf16", "no"), opt="adamw")
    figures = step_figures(step)
    del step
    for name, setting in (("fp32", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(setting)
        step = Step(*make_byol(backbone, size), size, sized(128, 4), precision="no", opt="adamw")
        figures[f"{name}_ours_ms_b128"] = milliseconds(step.ours, calls=2, rounds=2)
        del step
    torch.set_float32_matmul_precision("highest")
    return figures, {}


def resnet18_32():
    batch = sized(512, 8)
    step = Step(*make_byol(sized("resnet18", "test_resnet"), 32), 32, batch, precision=sized("bf16", "no"), whole=True)
    return step_figures(step, calls=20), {}


def variants():
    """ResNet-50's step in other precisions and layouts, and with cuDNN's own measurements."""
    size, batch = sized((224, 256), (32, 4))
    base, _ = make_byol(sized("resnet50", "test_resnet"), size)
    cases = {
        "bf16": {},
        "bf16_benchmark": {"benchmark": True},
        "bf16_deterministic": {"deterministic": True},
        "fp16": {"precision": "fp16"},
        "bf16_contiguous": {"last": False},
        "no": {"precision": "no"},
        "no_contiguous": {"precision": "no", "last": False},
    }
    figures = {}
    for name, case in sized(cases, {"no": {"precision": "no"}}).items():
        last = case.get("last", True)
        torch.backends.cudnn.benchmark = case.get("benchmark", False)
        torch.backends.cudnn.deterministic = case.get("deterministic", False)
        byol = copy.deepcopy(base).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        step = Step(byol, last, size, batch, precision=case.get("precision", "bf16"))
        figures[f"{name}_ms"] = milliseconds(step.ours, calls=2, rounds=2)
        figures[f"{name}_gb"] = peak_gb(step.ours)
        del step, byol
        clean()
    return figures, {}


def memory():
    """A large batch, and recomputed activations."""
    figures = {}
    size = sized(224, 32)
    for name, batch, recomputes in (("b256_recomputed", 256, True), ("b1024", 1024, False)):
        byol, last = make_byol(sized("resnet50", "test_resnet"), size)
        if recomputes:
            enable_grad_checkpointing(byol.encoder)
        step = Step(byol, last, size, sized(batch, 4), precision=sized("bf16", "no"))
        figures[f"{name}_gb"] = peak_gb(step.ours)
        figures[f"{name}_ms"] = milliseconds(step.ours, calls=2, rounds=1, warm=1)
        del step, byol
        clean()
    return figures, {}


def extras():
    """What happens once in a while, or to be found out: rank, neighbours, optimizers, the copy for a checkpoint."""
    figures = {}
    for rows, width in sized(((256, 2048), (1024, 2048)), ((16, 32),)):
        features = torch.randn(rows, width, device=DEVICE)
        figures[f"rank_{rows}_ms"] = milliseconds(lambda f=features: effective_rank(f), calls=1, warm=1)

        def by_gram(features=features):
            centred = (features - features.mean(0)).double()
            gram = centred @ centred.T if len(features) <= features.shape[1] else centred.T @ centred
            shares = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
            shares = shares / shares.sum()
            return torch.exp(-torch.xlogy(shares, shares).sum())

        figures[f"rank_{rows}_gram_ms"] = milliseconds(by_gram, calls=1, warm=1)
        figures[f"rank_{rows}_off"] = abs(by_gram().item() - effective_rank(features).item())
    bank, queries = torch.randn(sized(10_000, 200), 512), torch.randn(sized(2_000, 40), 512)
    labels, asked = torch.randint(0, 10, (len(bank),)), torch.randint(0, 10, (len(queries),))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures["knn_cpu_1_thread_ms"] = milliseconds(lambda: knn(bank, labels, queries, asked), calls=1, rounds=1, warm=0)
    torch.set_num_threads(threads)
    there = bank.to(DEVICE), queries.to(DEVICE)
    figures["knn_device_ms"] = milliseconds(lambda: knn(there[0], labels, there[1], asked), calls=1, warm=1)
    same = knn(bank, labels, queries, asked) == knn(there[0], labels, there[1], asked)

    byol, _ = make_byol(sized("vit_small_patch16_224", "test_vit"), sized(224, 32))
    byol.to(DEVICE)
    for parameter in byol.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    adamw = create_optimizer("adamw", byol, lr=1e-4, weight_decay=0.1)
    figures["adamw_ms"] = milliseconds(adamw.step)
    for state in adamw.state.values():
        state["step"] = state["step"].to(DEVICE)
    figures["adamw_as_resumed_ms"] = milliseconds(adamw.step)
    figures["target_ms"] = milliseconds(lambda: byol.update_target(0.99))

    byol, _ = make_byol(sized("resnet50", "test_resnet"), sized(224, 32))
    byol.to(DEVICE)
    for parameter in byol.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    lars = create_optimizer("lars", byol, lr=0.1, weight_decay=1e-6)
    figures["lars_ms"] = milliseconds(lars.step)
    for parameter, state in lars.state.items():
        state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    figures["lars_as_resumed_ms"] = milliseconds(lars.step)
    figures["checkpoint_copy_ms"] = milliseconds(lambda: [t.cpu() for t in byol.state_dict().values()], calls=1, warm=1)
    return figures, {"knn_same": same}


def loader():
    """JPEG files of ImageNet's size decoded and cut by all cores, images a second."""
    from benchmark import write_photographs

    figures = {}
    size, batch, count = sized((224, 256, 512), (32, 8, 24))
    make = TwoViews(AUGMENTATIONS["paper"], size, mean=MEAN, std=STD)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), count)
        images = open_dataset(folder).train
        cores = len(os.sched_getaffinity(0))
        for workers in sized((None, cores - 1), (2,)):
            settings = dict(cut=make.cut, workers=workers, pin=GPU)
            with TrainingBatches(images, batch_size=batch, global_batch=batch, **settings) as batches:
                stream = copied_ahead(iter(batches), DEVICE)
                for _ in range(sized(18, 2)):
                    next(stream)
                start, taken = time.perf_counter(), 0
                while taken < sized(24, 2):
                    next(stream)
                    taken += 1
                name = "default" if workers is None else workers
                figures[f"images_s_{name}_workers"] = taken * batch / (time.perf_counter() - start)
    return figures, {}


def triton():
    """The Triton kernels against the reference, in levels of 0 to 255, and their time."""
    if not GPU:
        return {"skipped": "no GPU; tests/views/test_triton.py runs the kernels in Triton's interpreter"}, {}
    figures, checks = {}, {}
    cases = [("paper", 224, 256, 3, False), ("torchvision", 96, 256, 3, False), ("small", 32, 512, 3, True)]
    for name, size, batch, channels, whole in [*cases, ("digits", 32, 512, 3, True), ("paper", 33, 64, 1, True)]:
        key = f"{name}_{size}_{channels}"
        two_views = TwoViews(AUGMENTATIONS[name], size, mean=MEAN[:channels], std=STD[:channels])
        crops, ordinals = pictures(batch, 2, channels, size, size).to(DEVICE), torch.arange(batch) + 5
        pixels = crops[:, 0].contiguous() if whole else crops
        scale = 255 * torch.tensor(STD[:channels], device=DEVICE).view(-1, 1, 1)
        expected = (two_views if whole else two_views.finish)(pixels, ordinals)
        for dtype, last, limit in ((torch.float32, False, 0.1), (torch.bfloat16, True, 3.0)):
            kernel_views = two_views.with_triton(dtype=dtype, channels_last=last)
            make = kernel_views if whole else kernel_views.finish
            pairs = zip(make(pixels, ordinals), expected, strict=True)
            levels = max(((a.float() - b) * scale).abs().max().item() for a, b in pairs)
            figures[f"{key}_{'bf16_' * last}levels"] = levels
            checks[f"{key}_{'bf16_' * last}near"] = levels < limit

        def work(make=make, pixels=pixels, ordinals=ordinals):
            make(pixels, ordinals)

        figures[f"{key}_ms"], figures[f"{key}_host_ms"] = milliseconds(work, calls=10), host_milliseconds(work)
        figures[f"{key}_launches"] = kernels(work)["launches"]
        checks[f"{key}_never_waits"] = not waits(work)
        checks[f"{key}_few_launches"] = figures[f"{key}_launches"] <= 12
    return figures, checks


def graph():
    """Steps of a CUDA graph against ordinary ones in float32, and their time in bf16."""
    figures, checks = {}, {}
    size, batch = 32, sized(64, 8)
    for opt, lr in (("momentum", 0.05), ("lars", 0.1)):
        ends = []
        for graphed in (False, True):
            with float32():
                byol, last = make_byol(sized("resnet18", "test_resnet"), size, hidden_dim=256)
                step = Step(byol, last, size, batch, precision="no", opt=opt, graphed=graphed)
                for _ in range(8):
                    step.ours(lr=lr)
            checks[f"{opt}_captured"] = not GPU or not graphed or step.graphed.graph is not None
            ends.append(torch.cat([p.detach().double().flatten() for p in byol.parameters()]))
        figures[f"{opt}_weights"] = relative(ends[1], ends[0])
        checks[f"{opt}_near"] = figures[f"{opt}_weights"] < 1e-3
    for graphed in (False, True):
        byol, last = make_byol(sized("resnet18", "test_resnet"), size)
        precision = sized("bf16", "no")
        step = Step(byol, last, size, sized(512, 8), precision=precision, whole=True, graphed=graphed, triton=GPU)
        kind = "graph" if graphed else "ordinary"
        figures[f"{kind}_ms"] = milliseconds(step.ours, calls=20, warm=5)
        figures[f"{kind}_loop_ms"] = milliseconds(step.loop, calls=20, warm=5)
        figures[f"{kind}_gb"] = peak_gb(step.ours)
    return figures, checks


def compiled(backbone, size, batch, opt):
    figures = {}
    step = Step(*make_byol(backbone, size), size, batch, precision=sized("bf16", "no"), opt=opt)
    figures["eager_ms"] = milliseconds(step.ours)
    figures["eager_gb"] = peak_gb(step.ours)
    del step
    clean()
    step = Step(*make_byol(backbone, size), size, batch, precision=sized("bf16", "no"), opt=opt, compile=True)
    start = time.perf_counter()
    step.ours()
    sync()
    figures["first_step_s"] = time.perf_counter() - start
    figures["ms"] = milliseconds(step.ours)
    figures["gb"] = peak_gb(step.ours)
    figures["x"] = figures["ms"] / figures["eager_ms"]
    return figures, {}


def compile_vit():
    size, batch = sized((224, 256), (32, 4))
    return compiled(sized("vit_small_patch16_224", "test_vit"), size, batch, "adamw")


def compile_resnet50():
    size, batch = sized((224, 256), (32, 4))
    return compiled(sized("resnet50", "test_resnet"), size, batch, "lars")


# Sections that start processes of their own


def child(*arguments, log, **variables):
    # In the group of the one that starts it, so that they end together.
    with open(log, "ab") as file:
        command = [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment)


def resume():
    """Runs that are killed and resumed end in the bits of one that was not; also without deterministic kernels?"""
    figures, checks = {}, {}
    precision = sized("bf16", "no")
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)

        def start(run, backbone, deterministic):
            variables = dict(ACCELERATE_MIXED_PRECISION=precision, DETERMINISTIC=deterministic)
            if deterministic:
                variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            return child("--train", place / run, backbone, log=place / f"{run}.log", **variables)

        backbones = sized(("resnet18", "test_vit"), ("test_resnet",))
        running = {}
        for backbone in backbones:
            for kind in sized(("whole", "again", "cut"), ("whole", "cut")):
                running[f"{backbone}-{kind}"] = start(f"{backbone}-{kind}", backbone, 1)
            for kind in sized(("free1", "free2"), ()):
                running[f"{backbone}-{kind}"] = start(f"{backbone}-{kind}", backbone, 0)
        killed = set()
        while len(killed) < len(backbones) and any(p.poll() is None for p in running.values()):
            for backbone in backbones:
                name = f"{backbone}-cut"
                metrics = place / name / "metrics.jsonl"
                if name not in killed and metrics.exists() and metrics.read_bytes().count(b'"loss"') >= sized(15, 4):
                    running[name].kill()
                    figures[f"{backbone}_killed_at"] = metrics.read_bytes().count(b'"loss"')
                    killed.add(name)
            time.sleep(0.005)
        for name in killed:
            running[name].wait()
            running[name] = start(name, name.removesuffix("-cut"), 1)
        codes = {name: process.wait() for name, process in running.items()}

        def digest(name):
            encoder = place / name / "encoder" / "model.safetensors"
            checkpoints = (place / name / "checkpoints").glob("step-*/byol.safetensors")
            saved = sorted(checkpoints, key=lambda path: int(path.parent.name.removeprefix("step-")))
            return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (encoder, *saved[-1:])]

        for name, code in codes.items():
            if code:
                print((place / f"{name}.log").read_text()[-3000:], file=sys.stderr)
        for backbone in backbones:
            checks[f"{backbone}_ran"] = not any(code for name, code in codes.items() if name.startswith(backbone))
            checks[f"{backbone}_killed"] = f"{backbone}-cut" in killed
            if checks[f"{backbone}_ran"]:
                checks[f"{backbone}_resumes"] = digest(f"{backbone}-whole") == digest(f"{backbone}-cut")
                if GPU:
                    checks[f"{backbone}_repeats"] = digest(f"{backbone}-whole") == digest(f"{backbone}-again")
                    free = digest(f"{backbone}-free1") == digest(f"{backbone}-free2")
                    figures[f"{backbone}_repeats_without_deterministic"] = free
    return figures, checks


def train(folder, backbone):
    """One of the runs of `resume`."""
    from byol_timm import pretrain

    if os.environ.get("DETERMINISTIC") == "1":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
    pretrain(
        PretrainConfig(
            backbone=backbone,
            image_size=32,
            epochs=sized(4, 2),
            batch_size=sized(64, 256),
            hidden_dim=sized(256, 32),
            opt="adamw" if "vit" in backbone else "lars",
            save_every=sized(10, 3),
            log_every=1,
            knn_every=4,
            workers=0,
            output_dir=folder,
            resume=True,
        )
    )


def two_processes():
    """Two processes over gloo with synchronised BatchNorms end in the weights of one process with the whole batch."""
    figures, checks = {}, {}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = dict(WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        if not GPU:
            shared["ACCELERATE_USE_CPU"] = "true"
        shared["ACCELERATE_MIXED_PRECISION"] = "no"
        processes = [
            child("--rank", place / "two.pt", log=place / f"{rank}.log", RANK=rank, OMP_NUM_THREADS=1, **shared)
            for rank in (0, 1)
        ]
        processes += [child("--rank", place / "one.pt", log=place / "one.log", ACCELERATE_MIXED_PRECISION="no")]
        codes = [process.wait() for process in processes]
        for name, code in zip(("0", "1", "one"), codes, strict=True):
            if code:
                print((place / f"{name}.log").read_text()[-3000:], file=sys.stderr)
        checks["ran"] = not any(codes)
        if checks["ran"]:
            two, one = (torch.load(place / name, weights_only=True) for name in ("two.pt", "one.pt"))
            compared = [name for name in one["weights"] if one["weights"][name].ndim > 1]
            apart = {name: relative(two["weights"][name], one["weights"][name]) for name in compared}
            figures["worst"] = max(apart, key=apart.__getitem__)
            figures["weights"] = apart[figures["worst"]]
            figures["loss_one"], figures["loss_two"] = one["loss"], two["loss"]
            figures["waits_one"], figures["waits_two"] = one["waits"], two["waits"]
            figures["waits_where"] = two["where"]
            figures["batch_norms"] = two["batch_norms"]
            # On a CPU with one thread, torch's own BatchNorm of the whole batch is the less exact one.
            checks["same"] = figures["weights"] < sized(5e-3, 5e-2)
    return figures, checks


def rank_steps(path):
    """Three steps of one process of `two_processes`, each with its share of 64 images."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and GPU:
        torch.distributed.init_process_group("gloo")
    torch.backends.cudnn.allow_tf32 = False
    accelerator = create_accelerator((), Path(tempfile.gettempdir()))
    assert accelerator.num_processes == world, accelerator.num_processes
    byol, _ = make_byol("test_resnet", 32, hidden_dim=64)
    if world > 1:
        synchronize_batch_norms(byol)
    optimizer = create_optimizer("sgd", byol, lr=0.05, weight_decay=1e-4)
    model, optimizer = prepare(accelerator, byol, optimizer)
    random = torch.Generator().manual_seed(0)
    places = collections.Counter()
    for _ in range(3):
        pair = torch.randn(2, 64, 3, 32, 32, generator=random)
        pair = [view.chunk(world)[rank].to(accelerator.device) for view in pair]
        pair = [view.contiguous(memory_format=torch.channels_last) for view in pair]

        def step(pair=pair):
            nonlocal figures
            figures = train_step(accelerator, model, optimizer, [pair], target_decay=0.9)

        figures = {}
        places = waits(step)
    loss = accelerator.reduce(figures["loss"], "mean").item()
    if rank == 0:
        weights = {name: tensor.cpu() for name, tensor in byol.named_parameters()}
        most = ", ".join(f"{place} {count}" for place, count in places.most_common(4))
        norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in byol.modules())
        report = {"weights": weights, "loss": loss, "waits": sum(places.values()), "where": most, "batch_norms": norms}
        torch.save(report, path)
    accelerator.end_training()


# In order of what is to be known first, each with the most seconds that it may take
SECTIONS = {
    "env": 60,
    "views": 40,
    "ahead": 20,
    "equal": 40,
    "precision": 60,
    "syncs": 60,
    "launches": 60,
    "augment": 60,
    "resnet50": 90,
    "vit_small": 90,
    "resnet18_32": 40,
    "triton": 60,
    "graph": 60,
    "two_processes": 90,
    "resume": 120,
    "extras": 60,
    "variants": 90,
    "loader": 90,
    "memory": 60,
    "compile_vit": 150,
    "compile_resnet50": 200,
}


def clean():
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def work_through(names):
    """Run sections one after the other and say so on stdout."""
    functions = globals()
    for name in names:
        print(f"{MARK}start {name}", flush=True)
        start = time.perf_counter()
        try:
            figures, checks = functions[name]()
            report = {"figures": figures, "checks": checks}
        except BaseException as error:
            traceback.print_exc()
            report = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            if isinstance(error, KeyboardInterrupt):
                raise
        report["seconds"] = time.perf_counter() - start
        print(f"{MARK}done {json.dumps(report, default=str)}", flush=True)
        if "CUDA error" in report.get("error", ""):
            # This process has lost the device; a new process runs the other sections.
            sys.exit(1)
        with contextlib.suppress(Exception):
            AcceleratorState._reset_state(reset_partial_state=True)
            clean()


# The parent


def watch(names, results, log):
    """Have a process work through the sections; the names of those that are left when it has ended or was ended."""
    arguments = [sys.executable, "-u", str(Path(__file__).resolve()), "--sections", *names]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes"), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    current, limit = None, min(time.monotonic() + 90, BEGAN + SECONDS)
    left = list(names)
    failure = "its process ended"
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                failure = "took too long"
                break
            if line is None:
                break
            if not line.startswith(MARK):
                log.write(line)
                log.flush()
                continue
            word, _, rest = line.removeprefix(MARK).partition(" ")
            if word == "start":
                current = rest.strip()
                left.remove(current)
                limit = min(time.monotonic() + SECTIONS[current], BEGAN + SECONDS)
            else:
                tell(current, json.loads(rest), results)
                current, limit = None, min(time.monotonic() + 30, BEGAN + SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if current is not None:
        tell(current, {"error": failure, "seconds": 0.0}, results)
    elif left == list(names):
        # It did not even begin: the same would happen again.
        tell(left.pop(0), {"error": f"{failure} before it began, see gpu_check.log", "seconds": 0.0}, results)
    return left


def tell(name, report, results):
    results[name] = report
    wrong = [check for check, holds in report.get("checks", {}).items() if not holds]
    verdict = "FAIL" if "error" in report or wrong else "ok"
    report["verdict"] = verdict
    figures = " ".join(f"{key}={shown(value)}" for key, value in report.get("figures", {}).items())
    ill = report.get("error", "") or (f"NOT {', '.join(wrong)};" if wrong else "")
    print(f"{verdict:<4} {name:<16} {report['seconds']:5.1f} s  {ill} {figures}", flush=True)
    (OUT / "gpu_check.json").write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(names):
    unknown = set(names) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"no such section: {', '.join(sorted(unknown))}. There are {', '.join(SECTIONS)}")
    OUT.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    with open(OUT / "gpu_check.log", "w", encoding="utf-8") as log:
        left = list(names or SECTIONS)
        while left and time.monotonic() < BEGAN + SECONDS - 5:
            left = watch(left, results, log)
    for name in left:
        results[name] = {"error": "no time was left", "verdict": "left"}
    (OUT / "gpu_check.json").write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    failed = [name for name, report in results.items() if report["verdict"] == "FAIL"]
    good = sum(report["verdict"] == "ok" for report in results.values())
    print(
        f"{good} of {len(results)} sections ok in {time.monotonic() - BEGAN:.0f} s;"
        f" failed: {', '.join(failed) or 'none'}; no time for: {', '.join(left) or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--sections", *names]:
            work_through(names)
        case ["--train", folder, backbone]:
            train(folder, backbone)
        case ["--rank", path]:
            rank_steps(path)
        case names:
            raise SystemExit(main(names))
