"""A linear classifier on a frozen encoder.

    python recipes/linear_probe.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
    python recipes/linear_probe.py --encoder hf-hub:user/name --dataset path/to/images --protocol byol-linear

Parameters and batch statistics of the encoder stay as they are. The learning rate is chosen on held-out training
images, never on the test images.
"""

from dataclasses import dataclass

from byol_timm.config import EvaluationConfig, parse, run


@dataclass(frozen=True)
class ProbeConfig(EvaluationConfig):
    """Train a linear classifier on a frozen encoder and test it on held-out images."""

    protocol: str = "quick"
    """quick; byol-linear: SGD with crops and flips; byol-transfer-linear: logistic regression by L-BFGS."""


def main() -> None:
    config = parse(ProbeConfig)

    from byol_timm.evaluation import open_evaluation, train_classifier
    from byol_timm.summary import accuracy_lines, evaluation_folder, save_evaluation

    folder = evaluation_folder(config.output) if config.output else None
    encoder, splits, preparation = open_evaluation(config)
    settings = dict(protocol=config.protocol, seed=config.seed)
    trained = train_classifier(encoder, splits.train, splits.test, preparation, frozen=True, **settings)
    metrics, class_names = trained.metrics, splits.train.class_names
    print(f"linear probe ({metrics['protocol']}) of {config.encoder} on {config.dataset}")
    print(*accuracy_lines(metrics, class_names), sep="\n")
    if folder:
        record = {"encoder": config.encoder, "dataset": config.dataset, **metrics}
        save_evaluation(folder, record, class_names, rows=trained.rows)


if __name__ == "__main__":
    run(main)
