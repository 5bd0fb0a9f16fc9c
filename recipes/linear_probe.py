"""A linear classifier on a frozen encoder.

    python recipes/linear_probe.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
    python recipes/linear_probe.py --encoder hf-hub:user/name --dataset path/to/images --protocol byol-linear

Parameters and batch statistics of the encoder stay as they are. The learning rate is chosen on held-out training
images, never on the test images.
"""

from dataclasses import dataclass

from byol_timm.cli import parse, run
from byol_timm.config import EvaluationConfig


@dataclass(frozen=True)
class ProbeConfig(EvaluationConfig):
    """Train a linear classifier on a frozen encoder and test it on held-out images."""

    protocol: str = "quick"
    """quick; byol-linear: SGD with crops and flips; byol-transfer-linear: logistic regression by L-BFGS."""


def main() -> None:
    config = parse(ProbeConfig)

    from byol_timm.evaluation import evaluate_classifier

    evaluate_classifier(config, config.protocol, frozen=True)


if __name__ == "__main__":
    run(main)
