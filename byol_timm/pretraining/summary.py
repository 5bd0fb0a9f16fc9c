"""What a run says at its beginning, in a rehearsal and at its end, the machine it ran on, and what evaluations say."""

import json
import platform
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..byol import BYOL
from ..cli import counted
from ..config import PretrainConfig
from ..data import Splits, StreamSplits
from ..encoders import encoder_width, has_batch_norm
from ..views import omitted_operations
from .plan import resolve_augmentation

PACKAGES = ("byol_timm", "torch", "timm", "accelerate", "datasets", "huggingface_hub")
# Fields that an evaluation must share with pretraining to see the same images.
DATA = ("dataset_config", "split", "image_column", "label_column", "value_range", "split_seed")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """The machine and the versions behind a run, as JSON."""
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": precision(accelerator),
        "accumulation": accelerator.gradient_accumulation_steps,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def precision(accelerator: Accelerator) -> str:
    return "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def banner(
    config: Any,
    schedule: Any,
    splits: Splits | StreamSplits,
    byol: BYOL,
    accelerator: Accelerator,
    folder: Path,
    frozen: list[str],
) -> list[str]:
    """Lines that say, before anything slow, what will be trained, from what, how, and where it goes."""
    augmentation = resolve_augmentation(config)
    processes = f"{accelerator.num_processes} process" + "es" * (accelerator.num_processes > 1)
    threads = f" ({torch.get_num_threads()} threads)" if accelerator.device.type == "cpu" else ""
    views = (
        f"{config.augmentation}, crops of {augmentation.crop_scale[0]:g} to {augmentation.crop_scale[1]:g} of the area"
    )
    omitted = omitted_operations(augmentation, config.in_chans)
    if omitted:
        views += f"; without {', '.join(omitted)}, which need RGB"
    batch = f"{schedule.global_batch} = {config.batch_size} x {processes}"
    if accelerator.gradient_accumulation_steps > 1:
        batch += f" x {accelerator.gradient_accumulation_steps} accumulated"
    lines = [
        ("device", f"{device_name(accelerator.device)}{threads}, {processes}, {precision(accelerator)}"),
        ("images", f"{len(splits.train):,} of {splits.train.name}, {splits.note}"),
        (
            "encoder",
            f"{config.backbone}, {_millions(byol.encoder)} parameters, width {encoder_width(byol.encoder)}, "
            f"images {config.in_chans} x {config.image_size} x {config.image_size}",
        ),
        ("views", views),
        (
            "batch",
            f"{batch}; {counted(config.epochs, 'epoch')} of {counted(schedule.steps_per_epoch, 'step')}, "
            f"{counted(schedule.total_steps, 'step')}",
        ),
        (
            "optimizer",
            f"{config.opt}, lr {schedule.peak_lr:g} ({config.lr:g} per 256 images), weight decay "
            f"{config.weight_decay:g}, {counted(schedule.warmup_steps, 'step')} of warm-up; "
            f"tau from {config.target_decay:g}",
        ),
    ]
    if frozen:
        lines.append(("frozen", ", ".join(frozen)))
    if accelerator.num_processes > 1 and has_batch_norm(byol):
        shared = (
            "of all processes together"
            if accelerator.device.type == "cuda"
            else (
                "of each process alone in training, since torch has no SyncBatchNorm for CPUs; averaged for evaluation"
            )
        )
        lines.append(("BatchNorm", f"statistics {shared}"))
    lines.append(("folder", str(folder)))
    return [f"byol_timm {version('byol_timm')}", *(f"  {name:<10} {text}" for name, text in lines)]


def closing(config: Any, folder: Path, record: dict[str, Any]) -> list[str]:
    """Lines that say, at the end, what came out, where it lies and what to type next."""
    minutes, seconds = divmod(round(record["seconds"]), 60)
    lines = ["", f"{counted(record['steps'], 'step')} in {minutes} min {seconds} s"]
    results = record.get("results")
    if results:
        trained = config.pretrained or ":" in config.backbone or config.training_state
        start = "before BYOL" if trained else "at random initialisation"
        rows = {
            "raw pixels": results["knn_raw_pixels"],
            f"{config.backbone} {start}": results.get("knn_random"),
            f"{config.backbone} after BYOL": results["knn_byol"],
        }
        width = max(map(len, rows))
        lines += [
            "",
            f"{results['k']}-NN accuracy",
            *(f"  {name:<{width}}  {value:5.1f} %" for name, value in rows.items() if value is not None),
        ]
        lines += [f"  ({results['protocol']})"]
        if "linear_byol" in results:
            lines += [f"linear probe that learned alongside: {results['linear_byol']:.1f} %"]
    else:
        lines += ["no labels, so no kNN accuracy: see curves.png for the health of the features"]
    files = {
        "encoder/": f'timm.create_model("local-dir:{folder}/encoder", pretrained=True)',
        "curves.png": "how training went",
        "views.png": "what the networks saw",
        "embedding.png": "images on a map",
        "neighbours.png": "what the encoder finds alike",
        "confusion.png": "what it mistakes for what",
        "report.html": "all of this on one page",
        "results.json": "all figures; metrics.jsonl, config.yaml and environment.json beside it",
        "checkpoints/": "to continue with --resume",
    }
    lines += ["", f"in {folder}"]
    lines += [
        f"  {name:<15} {text}" for name, text in files.items() if (folder / name).exists() or name == "results.json"
    ]
    return [*lines, "", "next", *(f"  {shlex.join(command)}" for command in _next(config, folder, bool(results)))]


def _next(config: Any, folder: Path, labelled: bool) -> list[list[str]]:
    """Commands to go on with: recipes, or what there is in their place where only the package is installed."""
    data = {"dataset": config.dataset}
    data |= {name: getattr(config, name) for name in DATA if getattr(config, name) != getattr(PretrainConfig, name)}
    if config.streaming:
        # The other recipes read whole data sets.
        labelled, data = False, {**data, "dataset": "path/to/images"}
        data = {name: value for name, value in data.items() if name in ("dataset", "value_range")}
    encoder = f"local-dir:{folder}/encoder"
    own = ["--backbone", config.backbone, "--dataset", "path/to/images"]
    for recipes in (Path("recipes"), Path(__file__).parents[2] / "recipes"):
        if (recipes / "linear_probe.py").exists():
            evaluation = "linear_probe.py" if labelled else "extract_features.py"
            flags: list[str] = []
            for name, value in data.items():
                flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
            return [
                ["accelerate", "launch", f"{recipes}/pretrain.py", *own],
                ["python", f"{recipes}/{evaluation}", "--encoder", encoder, *flags],
                ["python", f"{recipes}/push_encoder.py", str(folder), "user/name"],
            ]
    settings = ", ".join(f"{name}={_quoted(value)}" for name, value in {"encoder": encoder, **data}.items())
    probe = f"import byol_timm; print(byol_timm.evaluate({settings}, method={_quoted('linear')})[{_quoted('top1')}])"
    push = f'import byol_timm; byol_timm.push_encoder({_quoted(str(folder))}, "user/name")'
    return [
        ["accelerate", "launch", "-m", "byol_timm", *own],
        *([["python", "-c", probe]] if labelled else []),
        ["python", "-c", push],
    ]


def _quoted(value: Any) -> str:
    """As Python takes it, in the quotes that a shell's do not disturb."""
    return json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"about {hours:,} h {minutes} min"
    return f"about {minutes} min" if minutes else f"about {seconds:.0f} s"


def _commit() -> str | None:
    """The commit of the clone that this is run from, with `+` if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        commit = subprocess.run(
            [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"], capture_output=True
        )
    except OSError:
        return None
    return commit.stdout.decode().strip() or None if tracked.returncode == 0 else None


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"
