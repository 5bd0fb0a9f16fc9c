"""Measure the k-nearest-neighbour accuracy of an encoder.

python recipes/knn.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
python recipes/knn.py --encoder resnet18 --pretrained --dataset path/to/images --k 200
"""

from byol_timm.cli import parse, run
from byol_timm.config import KnnConfig


def main() -> None:
    config = parse(KnnConfig)

    from byol_timm.evaluation import evaluate, metrics_lines

    print(*metrics_lines(evaluate(method="knn", **vars(config))), sep="\n")


if __name__ == "__main__":
    run(main)
