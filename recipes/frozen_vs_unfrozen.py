"""Measure what pretraining gains: random, pretrained and BYOL encoders, frozen and fine-tuned, by share of the labels.

    python recipes/frozen_vs_unfrozen.py --quick
    python recipes/frozen_vs_unfrozen.py --backbone resnet18 --dataset path/to/images --epochs 100

The same command again resumes where it stopped. The BYOL encoders take all settings of pretraining. At the end the
folder holds `conclusion.md` (three sentences and a table), `results.csv`, `bars.png` and `label_efficiency.png`.
"""

import dataclasses
from dataclasses import dataclass

from byol_timm.cli import parse, run
from byol_timm.config import PretrainConfig, output_dir
from byol_timm.errors import ByolTimmError

FULL = dict(backbone="resnet18", label_shares=(0.01, 0.1, 0.5, 0.8, 1.0), image_shares=(0.1, 0.5, 0.8), seeds=(0, 1, 2))
QUICK = dict(
    backbone="test_resnet",
    backbone_kwargs=("auto",),
    label_shares=(0.01, 0.1, 1.0),
    image_shares=(0.1,),
    seeds=(0, 1, 2),
    epochs=10,
    finetune_epochs=3,
    finetune_lrs=(0.03, 0.1),
    finetune_steps=50,
)
# Settings of a single run: a comparison has none of these, or its own.
REFUSED = (
    *("seed", "image_share", "pretrained", "training_state", "overwrite", "dry_run", "max_time", "push_to_hub"),
    "public",
)


@dataclass(frozen=True)
class FrozenVsUnfrozen(PretrainConfig):
    """Compare random, pretrained and BYOL encoders, frozen and fine-tuned, by share of the labels (default: digits).

    The BYOL encoders take all settings of pretraining. Defaults are smaller with --quick.
    """

    backbone: str | None = None
    """A timm name; None: resnet18, test_resnet with --quick."""
    backbone_kwargs: tuple[str, ...] | None = None
    """Arguments of the timm model as key=value, or `auto` to keep spatial structure in small images."""
    label_shares: tuple[float, ...] | None = None
    """Shares of the labels that classifiers learn from."""
    image_shares: tuple[float, ...] | None = None
    """Shares of the training images for further BYOL encoders."""
    seeds: tuple[int, ...] | None = None
    """Seeds, one repetition each."""
    finetune_epochs: int | None = None
    """Epochs of fine-tuning; None: 20."""
    finetune_lrs: tuple[float, ...] | None = None
    """Learning rates of fine-tuning, chosen from on held-out training images; None: 0.01, 0.03, 0.1."""
    finetune_steps: int | None = None
    """Minimum steps of fine-tuning, however few the labels; None: 200."""
    quick: bool = False
    """Finish in minutes on a CPU: a small network, fewer shares and seeds, short trainings, unless set."""


def main() -> None:
    config = parse(FrozenVsUnfrozen)
    for name in REFUSED:
        if getattr(config, name) != getattr(PretrainConfig, name):
            raise ByolTimmError(f"--{name} ({getattr(config, name)}) is for a single run. Leave it out")
    defaults = QUICK if config.quick else FULL
    config = dataclasses.replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})

    # Only now: --help and a wrong flag do not wait for torch.
    from frozen_vs_unfrozen_cells import Comparison, compare
    from frozen_vs_unfrozen_report import conclusion, results_table

    from byol_timm.evaluation import PROTOCOLS

    pretraining = {field.name: getattr(config, field.name) for field in dataclasses.fields(PretrainConfig)}
    pretraining["backbone_kwargs"] = config.backbone_kwargs or ()
    finetune = dict(
        lrs=config.finetune_lrs,
        epochs=config.finetune_epochs and (config.finetune_epochs,),
        min_steps=config.finetune_steps,
    )
    chosen = {name: value for name, value in finetune.items() if value is not None}
    comparison = Comparison(
        PretrainConfig(**pretraining),
        config.label_shares,
        config.image_shares,
        config.seeds,
        finetune=dataclasses.replace(PROTOCOLS["quick-finetune"], **chosen),
    )
    folder = config.output_dir or f"{output_dir(comparison.pretraining)}-frozen_vs_unfrozen"
    rows = compare(comparison, folder)
    print("", conclusion(rows), "", results_table(rows), "", f"in {folder}", sep="\n")


if __name__ == "__main__":
    run(main)
