"""What a run prints before and after training, and a description of the machine."""

import json
import platform
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..cli import counted
from ..config import PretrainConfig
from ..encoders import encoder_width, has_batch_norm
from ..training import Accelerator
from ..views import omitted_operations
from .launch import Run
from .plan import Plan

PACKAGES = ("torch", "timm", "accelerate", "datasets", "huggingface_hub")
# Fields that an evaluation must share with pretraining to see the same images.
DATA = ("dataset_config", "split", "image_column", "label_column", "value_range", "split_seed")
# Files of a run folder, as `closing` lists them.
FILES = {
    "curves.png": "training curves",
    "views.png": "augmented views",
    "embedding.png": "feature map (PCA)",
    "neighbours.png": "nearest neighbours",
    "confusion.png": "confusion matrix (kNN)",
    "report.html": "all of this on one page",
    "results.json": "all metrics; see also metrics.jsonl, config.yaml and environment.json",
    "checkpoints/": "to continue with --resume",
}


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return the machine and the versions behind a run, as JSON."""
    versions = {"python": platform.python_version(), "byol_timm": __version__}
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": precision(accelerator),
        "accumulation": accelerator.gradient_accumulation_steps,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions | {name: version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def precision(accelerator: Accelerator) -> str:
    return "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def banner(plan: Plan, run: Run) -> list[str]:
    """Return lines that say, before anything slow, what will be trained, on which images, and how."""
    settings, schedule, accelerator = plan.settings, plan.schedule, run.accelerator
    processes = f"{run.processes.count} process" + "es" * (run.processes.count > 1)
    threads = f" ({torch.get_num_threads()} threads)" if accelerator.device.type == "cpu" else ""
    low, high = plan.views.augmentation.crop_scale
    omitted = omitted_operations(plan.views.augmentation, settings.in_chans)
    without = f"; without {', '.join(omitted)}, which need RGB" if omitted else ""
    accumulated = accelerator.gradient_accumulation_steps
    batch = f"{schedule.global_batch} = {settings.batch_size} x {processes}"
    batch += f" x {accumulated} accumulated" if accumulated > 1 else ""
    lengths = ((settings.epochs, "epoch"), (schedule.steps_per_epoch, "step"), (schedule.total_steps, "step"))
    epochs, steps, total = (counted(number, noun) for number, noun in lengths)
    size = f"{settings.in_chans} x {settings.image_size} x {settings.image_size}"
    lines = {
        "device": f"{device_name(accelerator.device)}{threads}, {processes}, {precision(accelerator)}",
        "images": f"{len(plan.splits.train):,} of {plan.splits.train.name}, {plan.splits.note}",
        "encoder": f"{settings.backbone}, {millions(plan.encoder)} parameters, width {encoder_width(plan.encoder)}, "
        f"images {size}",
        "views": f"{settings.augmentation}, crops of {low:g} to {high:g} of the area{without}",
        "batch": f"{batch}; {epochs} of {steps}, {total}",
        "optimizer": f"{settings.opt}, lr {schedule.peak_lr:g} ({settings.lr:g} per 256 images), weight decay "
        f"{settings.weight_decay:g}, {counted(schedule.warmup_steps, 'step')} of warm-up; "
        f"tau from {settings.target_decay:g}",
    }
    if plan.frozen:
        lines["frozen"] = ", ".join(plan.frozen)
    if run.processes.count > 1 and has_batch_norm(plan.byol):
        shared = accelerator.device.type == "cuda" or settings.sync_batch_norm
        separate = "of each process in training (torch has no SyncBatchNorm for CPUs), averaged for evaluation"
        lines["BatchNorm"] = f"statistics {'of all processes' if shared else separate}"
    lines["folder"] = str(run.folder)
    return [f"byol_timm {__version__}", *(f"  {name:<10} {text}" for name, text in lines.items())]


def closing(config: PretrainConfig, folder: Path, record: dict[str, Any]) -> list[str]:
    """Return lines that say, at the end, what came out, where it is and what to type next."""
    minutes, seconds = divmod(round(record["seconds"]), 60)
    lines = ["", f"{counted(record['steps'], 'step')} in {minutes} min {seconds} s"]
    results = record.get("results")
    if results:
        trained = config.pretrained or ":" in config.backbone or config.training_state
        rows = {
            "raw pixels": results["knn_raw_pixels"],
            f"{config.backbone} before BYOL" if trained else f"untrained {config.backbone}": results.get("knn_random"),
            f"{config.backbone} after BYOL": results["knn_byol"],
        }
        width = max(map(len, rows))
        lines += ["", f"{results['k']}-NN accuracy"]
        lines += [f"  {name:<{width}}  {value:5.1f} %" for name, value in rows.items() if value is not None]
        lines += [f"  ({results['protocol']})"]
        if "linear_byol" in results:
            lines += [f"online linear probe: {results['linear_byol']:.1f} %"]
    else:
        lines += ["No labels, so accuracy was not measured. Check curves.png for signs of collapse."]
    lines += ["", f"in {folder}"]
    files = {"encoder/": f'timm.create_model("local-dir:{folder}/encoder", pretrained=True)', **FILES}
    present = [name for name in files if (folder / name).exists() or name == "results.json"]
    lines += [f"  {name:<15} {files[name]}" for name in present]
    return [*lines, "", "next", *(f"  {shlex.join(command)}" for command in _next(config, folder, bool(results)))]


def _next(config: PretrainConfig, folder: Path, labelled: bool) -> list[list[str]]:
    """Return commands to continue with: recipes, or Python calls where only the package is installed."""
    data = {"dataset": config.dataset}
    data |= {name: getattr(config, name) for name in DATA if getattr(config, name) != getattr(PretrainConfig, name)}
    if config.streaming:
        # The other recipes read whole datasets.
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
    """Return a Python literal in quotes that do not disturb a shell's."""
    return json.dumps(value, ensure_ascii=False)


def _commit() -> str | None:
    """Return the commit of the clone that this code runs from, with `+` if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        commit = subprocess.run(describe, capture_output=True)
    except OSError:
        return None
    return commit.stdout.decode().strip() or None if tracked.returncode == 0 else None


def millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"
