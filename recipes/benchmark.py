"""How fast this machine augments, loads and trains, next to the bare backbone and to other packages.

    python recipes/benchmark.py --backbone resnet18 --image_size 32 --batch_size 256
    python recipes/benchmark.py --parts augmentation --image_size 224 --batch_size 32 --threads 1 --against lightly
    python recipes/benchmark.py --parts loader loop --dataset path/to/images --image_size 224 --memory_limit 0
    python recipes/benchmark.py --parts loader --image_size 224 --decoded_cache path/to/disk --memory_limit 0
    python recipes/benchmark.py --parts start --backbone test_resnet

Without --dataset it works on cuttings of two photographs that come with scikit-learn.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from byol_timm.cli import output_file, parse, run


@dataclass(frozen=True)
class BenchmarkConfig:
    """How fast this machine augments, loads and trains, next to the bare backbone and to other packages."""

    parts: tuple[Literal["augmentation", "loader", "step", "loop", "memory", "start"], ...] = (
        "augmentation",
        "loader",
        "step",
        "loop",
        "memory",
    )
    """What to measure. `loop` is loader, augmentation and step together; `start` the time to the first step."""
    against: tuple[str, ...] = ()
    """Installed packages to measure beside: lightly, torchvision, kornia, byol-pytorch, solo-learn."""
    backbone: str = "resnet18"
    """A timm name."""
    image_size: int = 32
    """Side of the square views."""
    batch_size: int = 256
    """Images per step."""
    hidden_dim: int = 4096
    """Hidden width of projector and predictor."""
    opt: str = "lars"
    """lars, adamw, sgd, or any optimizer of timm."""
    augmentation: Literal["paper", "torchvision", "small", "digits"] = "paper"
    """Named set of augmentations; other packages have the paper's."""
    source: tuple[int, int] | None = None
    """Height and width of the decoded images that `augmentation` gets; None: the views' up to 96 px, else 375 500."""
    dataset: str | None = None
    """What `loader` and `loop` read, as for pretrain.py; None: JPEG files of 500x375 photographs."""
    workers: int | None = None
    """Data loading processes; None: one per core, at most 8."""
    memory_limit: float = 2.0
    """Images of one shape are held decoded in memory up to this many GB; 0: `loader` and `loop` decode all the time."""
    decoded_cache: str | None = None
    """Folder where `loader` and `loop` keep the images decoded, as for pretrain.py."""
    decoded_side: int | None = None
    """With --decoded_cache: shrink images to this shorter side."""
    rounds: int = 5
    """Rounds in which all candidates are measured in turns; the figures are medians over them."""
    seconds: float = 1.0
    """The least time that a candidate gets in a round."""
    clock: Literal["wall", "cpu"] = "wall"
    """Count the time that passes, or the CPU time of this process (workers not included: use --workers 0)."""
    threads: int | None = None
    """Threads of torch; None: as many as it takes by itself."""
    output: str | None = None
    """File for the figures, .json; a picture of them is put beside it."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> None:
    config = parse(BenchmarkConfig)

    import torch

    from byol_timm import benchmark
    from byol_timm.data import open_cache, open_dataset
    from byol_timm.files import write_json
    from byol_timm.peers import check_peers
    from byol_timm.report import save_costs

    check_peers(config.against)
    output = output_file(config.output) if config.output else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timing = benchmark.Timing(config.rounds, config.seconds, config.clock)
    workload = benchmark.Workload(
        config.backbone, config.image_size, config.batch_size, config.hidden_dim, config.opt, config.augmentation
    )
    parts, against = [], config.against

    def show(part: benchmark.Part) -> None:
        parts.append(part)
        print(part, flush=True)

    print(f"{device}, {torch.get_num_threads()} threads, {config.clock} time, medians of {config.rounds} rounds\n")
    if "augmentation" in config.parts:
        source = config.source or ((config.image_size,) * 2 if config.image_size <= benchmark.IN_MEMORY else (375, 500))
        show(benchmark.augmentation(workload, source, timing, against=against, device=device))
    if "step" in config.parts:
        show(benchmark.step(workload, timing, against=against, device=device))
    if "loader" in config.parts or "loop" in config.parts:
        with tempfile.TemporaryDirectory() as folder:
            if config.dataset is None:
                benchmark.write_photographs(Path(folder), 2 * config.batch_size)
            images = files = open_dataset(config.dataset or folder).train
            if config.decoded_cache is not None:
                images = open_cache(files, config.decoded_cache, side=config.decoded_side, workers=config.workers)
            reading = benchmark.Reading(config.workers, config.memory_limit * 2**30)
            if "loader" in config.parts:
                show(benchmark.loader(images, workload, timing, files=files, reading=reading))
            if "loop" in config.parts:
                show(benchmark.loop(images, workload, timing, reading=reading, device=device))
    if "memory" in config.parts:
        show(benchmark.memory(workload, against=against, device=device))
    if "start" in config.parts:
        show(benchmark.start(Path(__file__).with_name("pretrain.py"), config.backbone, timing))
    if output:
        write_json(output, {"config": asdict(config), "parts": [asdict(part) for part in parts]})
        relative = {part.title: {name: part.relative(name) for name in part.costs} for part in parts}
        save_costs(relative, output.with_suffix(".png"), title="Time or memory, relative to the first that is 1")


if __name__ == "__main__":
    run(main)
