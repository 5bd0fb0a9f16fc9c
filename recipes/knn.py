"""k-nearest-neighbour accuracy of an encoder.

    python recipes/knn.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
    python recipes/knn.py --encoder resnet18 --pretrained --dataset path/to/images --k 200

The whole training split is the bank, the whole held-out split the queries.
"""

from dataclasses import dataclass, replace
from typing import Any

from byol_timm.cli import parse, run
from byol_timm.config import EvaluationConfig
from byol_timm.errors import ByolTimmError


@dataclass(frozen=True)
class KnnConfig(EvaluationConfig):
    """k-nearest-neighbour accuracy of an encoder: by cosine, votes weighted by exp(cosine / temperature)."""

    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of the votes."""
    center: bool = True
    """Subtract the mean of the training features first."""
    raw_pixels: bool = False
    """Tell the accuracy of the images' own pixels too, averaged to 32x32 where they are larger."""


def main() -> None:
    config = parse(KnnConfig)
    for name in ("k", "temperature"):
        if not getattr(config, name) > 0:
            raise ByolTimmError(f"--{name} must be positive ({getattr(config, name)})")

    from byol_timm.evaluation import (
        RawPixels,
        accuracy_lines,
        classification_metrics,
        dataset_features,
        evaluation_folder,
        knn_scores,
        open_evaluation,
        save_evaluation,
    )

    folder = evaluation_folder(config.output) if config.output else None
    encoder, splits, preparation = open_evaluation(config)
    settings = dict(k=config.k, temperature=config.temperature, center=config.center)
    class_names = splits.train.class_names

    def evaluate(network: Any, preparation: Any) -> dict[str, Any]:
        bank, banked = dataset_features(network, splits.train, preparation)
        queries, queried = dataset_features(network, splits.test, preparation)
        scores = knn_scores(bank, splits.train.labels[banked], queries, num_classes=len(class_names), **settings)
        return {"bank_images": len(bank), **classification_metrics(scores, splits.test.labels[queried])}

    metrics = evaluate(encoder, preparation)
    bank_images = f"{metrics['bank_images']:,} images in the bank"
    print(f"{config.k}-NN accuracy of {config.encoder} on {config.dataset}, {bank_images}")
    print(*accuracy_lines(metrics, class_names), sep="\n")
    if config.raw_pixels:
        # Pixels as they are: without centring, an offset would change the cosines.
        metrics["raw_pixels_top1"] = evaluate(RawPixels(), replace(preparation, mean=(0.0,), std=(1.0,)))["top1"]
        print(f"  raw pixels {metrics['raw_pixels_top1']:.1%}")
    if folder:
        chosen = {"encoder": config.encoder, "dataset": config.dataset, **settings}
        save_evaluation(folder, {**chosen, **metrics}, class_names)


if __name__ == "__main__":
    run(main)
