"""Train a linear classifier on a frozen encoder and test it on held-out images.

    python recipes/linear_probe.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
    python recipes/linear_probe.py --encoder hf-hub:user/name --dataset path/to/images --protocol byol-linear

Parameters and batch statistics of the encoder do not change. The learning rate is chosen on held-out training images,
never on the test images.
"""

from byol_timm.cli import parse, run
from byol_timm.config import ClassifierConfig


def main() -> None:
    config = parse(ClassifierConfig)

    from byol_timm.evaluation import evaluate, metrics_lines

    print(*metrics_lines(evaluate(method="linear", **vars(config))), sep="\n")


if __name__ == "__main__":
    run(main)
