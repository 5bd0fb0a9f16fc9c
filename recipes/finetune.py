"""Fine-tune an encoder together with a classifier.

    python recipes/finetune.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
    python recipes/finetune.py --encoder hf-hub:user/name --dataset path/to/images --protocol byol-semi-10

Learning rate and epochs are chosen on held-out training images, never on the test images.
"""

from dataclasses import dataclass

from byol_timm.cli import parse, run
from byol_timm.config import EvaluationConfig


@dataclass(frozen=True)
class FinetuneConfig(EvaluationConfig):
    """Train an encoder and a linear classifier on top of it together, and test them on held-out images."""

    protocol: str = "quick"
    """quick; byol-semi-1 and byol-semi-10: on 1 % and 10 % of every class's labels."""


def main() -> None:
    config = parse(FinetuneConfig)

    from byol_timm.evaluation import evaluate_classifier

    evaluate_classifier(config, config.protocol, frozen=False)


if __name__ == "__main__":
    run(main)
