"""Measure how fast this machine augments and trains, next to the bare backbone and to other packages.

    python recipes/benchmark.py --backbone resnet18 --image_size 32 --batch_size 256
    python recipes/benchmark.py --parts augmentation --image_size 224 --batch_size 32 --threads 1 --against lightly
    python recipes/benchmark.py --parts loop --dataset path/to/images --image_size 224 --cache none

Each part measures a few candidates that do the same work, in turns in one process, so that whatever else the machine
does affects all of them. Without --dataset the images are crops of two photographs that come with scikit-learn.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from byol_timm.cli import output_file, parse, run
from byol_timm.errors import ByolTimmError


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure how fast this machine augments and trains, next to the bare backbone and to other packages."""

    parts: tuple[Literal["augmentation", "step", "loop", "memory"], ...] = ("augmentation", "step", "loop", "memory")
    """What to measure. `loop` is loading, augmentation and step together."""
    against: tuple[str, ...] = ()
    """Other installed packages to measure: lightly, torchvision, kornia, byol-pytorch, solo-learn."""
    backbone: str = "resnet18"
    """A timm name."""
    image_size: int = 32
    """Height and width of the views."""
    batch_size: int = 256
    """Images per step."""
    hidden_dim: int = 4096
    """Hidden width of projector and predictor."""
    opt: str = "lars"
    """lars, adamw, sgd, or any optimizer of timm."""
    augmentation: Literal["paper", "torchvision", "small", "digits"] = "paper"
    """Named set of augmentations; other packages use the paper's."""
    source: tuple[int, int] | None = None
    """Height and width of the decoded images for `augmentation`; None: the views' up to 96 px, else 375 500."""
    dataset: str | None = None
    """Images for `loop`, as for pretrain.py; None: JPEG files of 500x375 photographs."""
    workers: int | None = None
    """Data-loading workers; None: one per core, at most 8."""
    cache: Literal["ram", "disk", "none"] | None = None
    """Where `loop` keeps decoded images, as for pretrain.py."""
    cache_dir: str | None = None
    """With --cache disk: folder for the decoded images."""
    rounds: int = 5
    """Rounds in which all candidates are measured in turns; results are medians over them."""
    seconds: float = 1.0
    """Minimum time of a candidate in a round."""
    clock: Literal["wall", "cpu"] = "wall"
    """Count elapsed time, or the CPU time of this process on all its threads, without its workers."""
    threads: int | None = None
    """Threads of torch; None: torch's own choice."""
    output: str | None = None
    """File for the results, .json."""
    debug: bool = False
    """Show the traceback of an error."""


def main() -> None:
    config = parse(BenchmarkConfig)
    if config.rounds < 1:
        raise ByolTimmError(f"--rounds must be positive ({config.rounds}). Give 1 or more")

    # Only now: --help and a wrong flag do not wait for torch.
    import torch
    from benchmark_parts import measure
    from benchmark_peers import check_peers

    from byol_timm.files import write_json

    check_peers(config.against)
    output = output_file(config.output) if config.output else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads, {config.clock} time, medians of {config.rounds} rounds\n")
    measured = []
    for part in measure(config, device):
        measured.append(part)
        print(part, flush=True)
    if output:
        write_json(output, {"config": asdict(config), "parts": [asdict(part) for part in measured]})


if __name__ == "__main__":
    run(main)
