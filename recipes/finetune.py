"""Fine-tune an encoder together with a classifier.

    python recipes/finetune.py --encoder local-dir:runs/resnet18-digits/encoder --dataset digits
    python recipes/finetune.py --encoder hf-hub:user/name --dataset path/to/images --protocol byol-semi-10

Learning rate and epochs are chosen on held-out training images, never on the test images.
"""

from dataclasses import dataclass

from byol_timm.config import EvaluationConfig, parse, run


@dataclass(frozen=True)
class FinetuneConfig(EvaluationConfig):
    """Train an encoder and a linear classifier on top of it together, and test them on held-out images."""

    protocol: str = "quick"
    """quick; byol-semi-1 and byol-semi-10: on 1 % and 10 % of every class's labels."""


def main() -> None:
    config = parse(FinetuneConfig)

    from byol_timm.evaluation import open_evaluation, train_classifier
    from byol_timm.summary import accuracy_lines, evaluation_folder, save_evaluation

    folder = evaluation_folder(config.output) if config.output else None
    encoder, splits, preparation = open_evaluation(config)
    settings = dict(protocol=config.protocol, seed=config.seed)
    trained = train_classifier(encoder, splits.train, splits.test, preparation, frozen=False, **settings)
    metrics, class_names = trained.metrics, splits.train.class_names
    print(f"fine-tuning ({metrics['protocol']}) of {config.encoder} on {config.dataset}")
    print(*accuracy_lines(metrics, class_names), sep="\n")
    if folder:
        record = {"encoder": config.encoder, "dataset": config.dataset, **metrics}
        save_evaluation(folder, record, class_names, rows=trained.rows)


if __name__ == "__main__":
    run(main)
