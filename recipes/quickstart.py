"""From images to an encoder in plain timm, in one process: for a notebook cell or a first look.

    python recipes/quickstart.py
    python recipes/quickstart.py --backbone convnext_atto --dataset path/to/images

It takes the flags of pretrain.py and runs on a GPU where there is one.
"""

from byol_timm.config import PretrainConfig, parse, run


def main() -> None:
    config = parse(PretrainConfig)

    import timm

    from byol_timm import pretrain
    from byol_timm.defaults import output_dir

    pretrain(config)
    if config.dry_run:
        return

    # From here on plain timm: ready to be fine-tuned on ten classes.
    folder = output_dir(config)
    classifier = timm.create_model(f"local-dir:{folder}/encoder", pretrained=True, num_classes=10)
    print(f"{type(classifier).__name__} with {sum(p.numel() for p in classifier.parameters()):,} parameters")
    print("look at", *sorted(str(path) for path in folder.glob("*.png")))


if __name__ == "__main__":
    run(main)
