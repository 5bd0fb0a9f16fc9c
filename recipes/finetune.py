"""Fine-tune an encoder together with a linear classifier and test both on held-out images.

    python recipes/finetune.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
    python recipes/finetune.py --encoder hf-hub:user/name --dataset path/to/images --protocol byol-semi-10

Learning rate and epochs are chosen on held-out training images, never on the test images.
"""

from byol_timm.cli import parse, run
from byol_timm.config import ClassifierConfig


def main() -> None:
    config = parse(ClassifierConfig)

    from byol_timm.evaluation import evaluate, metrics_lines

    print(*metrics_lines(evaluate(method="finetune", **vars(config))), sep="\n")


if __name__ == "__main__":
    run(main)
