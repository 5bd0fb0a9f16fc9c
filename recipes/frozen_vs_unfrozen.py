"""Is pretraining worth it? Random, pretrained and BYOL encoders, frozen and fine-tuned, by share of the labels.

    python recipes/frozen_vs_unfrozen.py --quick
    python recipes/frozen_vs_unfrozen.py --backbone resnet18 --dataset path/to/images --epochs 100

The same command again goes on where it stopped. All settings of pretraining hold for the BYOL encoders. Afterwards the
folder holds `conclusion.md` (three sentences and a table), `results.csv`, `bars.png` and `label_efficiency.png`.
"""

import dataclasses
from dataclasses import dataclass

from byol_timm.cli import parse, run
from byol_timm.config import PretrainConfig
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
# Of a single run: a comparison has none of these, or one of its own.
REFUSED = (
    *("seed", "image_share", "pretrained", "training_state", "overwrite", "dry_run", "max_time"),
    *("push_to_hub", "public"),
)


@dataclass(frozen=True)
class Settings(PretrainConfig):
    """Random, pretrained and BYOL encoders, frozen and fine-tuned, by share of the labels; on digits without any flag.

    All settings of pretraining hold for the BYOL encoders. What is None is chosen, smaller with --quick.
    """

    backbone: str | None = None
    """A timm name; None: resnet18, test_resnet with --quick."""
    backbone_kwargs: tuple[str, ...] | None = None
    """Arguments of the timm model as key=value, or `auto`: what keeps spatial structure in small images."""
    label_shares: tuple[float, ...] | None = None
    """Shares of the labels that classifiers learn from."""
    image_shares: tuple[float, ...] | None = None
    """Shares of the training images for further BYOL encoders."""
    seeds: tuple[int, ...] | None = None
    """One repetition each."""
    finetune_epochs: int | None = None
    """Epochs of fine-tuning; None: 20."""
    finetune_lrs: tuple[float, ...] | None = None
    """Learning rates of fine-tuning to choose from on held-out training images; None: 0.01, 0.03, 0.1."""
    finetune_steps: int | None = None
    """Steps of fine-tuning at least, however few the labels; None: 200."""
    quick: bool = False
    """Minutes on a CPU: a small network, fewer shares and seeds, short trainings, unless set."""


def main() -> None:
    settings = parse(Settings)
    for name in REFUSED:
        if getattr(settings, name) != getattr(PretrainConfig, name):
            raise ByolTimmError(f"--{name} ({getattr(settings, name)}) is for a single run. Leave it out")
    chosen = QUICK if settings.quick else FULL
    settings = dataclasses.replace(settings, **{k: v for k, v in chosen.items() if getattr(settings, k) is None})

    from byol_timm.comparison import Comparison, compare, conclusion, results_table
    from byol_timm.config import output_dir
    from byol_timm.evaluation import PROTOCOLS

    pretraining = {field.name: getattr(settings, field.name) for field in dataclasses.fields(PretrainConfig)}
    pretraining["backbone_kwargs"] = settings.backbone_kwargs or ()
    finetune = dict(
        lrs=settings.finetune_lrs,
        epochs=settings.finetune_epochs and (settings.finetune_epochs,),
        min_steps=settings.finetune_steps,
    )
    comparison = Comparison(
        PretrainConfig(**pretraining),
        settings.label_shares,
        settings.image_shares,
        settings.seeds,
        finetune=dataclasses.replace(
            PROTOCOLS["quick-finetune"], **{k: v for k, v in finetune.items() if v is not None}
        ),
    )
    folder = settings.output_dir or f"{output_dir(comparison.pretraining)}-frozen_vs_unfrozen"
    rows = compare(comparison, folder)
    print("", conclusion(rows), "", results_table(rows), "", f"in {folder}", sep="\n")


if __name__ == "__main__":
    run(main)
