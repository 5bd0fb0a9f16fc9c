"""Settings: frozen dataclasses whose fields are command-line flags and the keys of YAML presets."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import ByolTimmError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a timm backbone with BYOL. Without any flag: resnet18 on scikit-learn's digits, in minutes on a CPU.

    --config takes a preset by name (--config alone lists them) or a YAML file; flags win over it. A setting left at
    None is chosen by the data and the backbone; the run prints what it chose and writes it to config.yaml. Devices,
    mixed precision and gradient accumulation belong to accelerate launch.
    """

    backbone: str = "resnet18"
    """A timm name, with a pretrained tag or without; hf-hub:user/name; local-dir:folder."""
    backbone_kwargs: tuple[str, ...] = ()
    """Arguments of the timm model as key=value, or `auto`: what keeps spatial structure in small images."""
    pretrained: bool = False
    """Start from the backbone's pretrained weights."""
    zero_init_last: bool = True
    """Start residual branches at zero, as timm does; --no_zero_init_last starts them at one, as the paper does."""
    training_state: str | None = None
    """Start all networks from a checkpoint: RUN/checkpoints/step-N."""
    image_size: int | None = None
    """Side of the square training images; None: 32 for digits, the images' own size up to 64, else 224."""
    in_chans: int = 3
    """Channels of the images as the encoder sees them: 1 grey, 3 RGB, 4 RGBA, or as many as the files have."""

    dataset: str = "digits"
    """`digits`; a folder of images; a .parquet or .arrow file or a folder of them; a Hub dataset id."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset."""
    split: str | None = None
    """Split to train on; None: train."""
    image_column: str | None = None
    """Column that holds the images; None: the only one of type image."""
    label_column: str | None = None
    """Column that holds the labels, used for evaluation only; None: the only one of type class label."""
    value_range: tuple[float, float] | None = None
    """Values of images of 16 bits and more that become black and white; None: all that 16 bits can hold."""
    image_share: float = 1.0
    """Share of the training images to train on, drawn by the seed; a smaller share is part of a larger one."""
    workers: int | None = None
    """Processes that decode images, once if memory or cache holds them, else always; None: one per core, at most 8."""
    memory_limit: float = 2.0
    """Images of one shape are held decoded in memory up to this many GB."""
    decoded_cache: str | None = None
    """Folder where all images to train on are kept decoded, on a fast disk: decoded once, not in every epoch."""
    decoded_side: int | None = None
    """With --decoded_cache: shrink images to this shorter side, to save room; None: keep them as they are."""
    streaming: bool = False
    """Read parquet, arrow or tar (webdataset) shards, here or on the Hub, bit by bit and without a copy on disk."""
    shuffle_buffer: int | None = None
    """With --streaming: images that are held in memory, encoded, to shuffle them; None: 10,000."""
    num_images: int | None = None
    """With --streaming: how many images the split has, where its files do not say."""
    fast_jpeg: bool = False
    """Decode JPEG at a half to an eighth where crops stay twice the views' size: for large photos; other bits."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An image that cannot be read is replaced by another one and counted, or ends the run."""

    augmentation: Literal["auto", "paper", "torchvision", "small", "digits"] = "auto"
    """Named set of augmentations; auto: digits for digits, small up to 64 px, else paper."""
    crop_scale: tuple[float, float] | None = None
    """Area of the random crop as a fraction of the image, lowest and highest."""
    rotate: float | None = None
    """Largest random rotation in degrees."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    jitter: float | None = None
    """Probability of colour jitter."""
    colors: Literal["paper", "torchvision"] | None = None
    """Definition of the colour operations: the authors' code or torchvision."""
    blur: tuple[float, float] | None = None
    """Probability of Gaussian blur for view 1 and view 2."""
    solarize: tuple[float, float] | None = None
    """Probability of solarization for view 1 and view 2."""

    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per process and forward pass; the global batch is this times processes times accumulation."""
    opt: str | None = None
    """lars, adamw, sgd, or any optimizer of timm; None: lars for networks with BatchNorm, adamw for others."""
    lr: float | None = None
    """Base learning rate, per 256 images of the global batch."""
    weight_decay: float | None = None
    """Weight decay, biases and norms exempt."""
    target_decay: float | None = None
    """tau at the first step; it rises to 1 along a cosine."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate rises linearly from 0."""
    hidden_dim: int | None = None
    """Hidden width of projector and predictor (paper: 4096)."""
    projection_dim: int = 256
    """Output width of projector and predictor."""
    num_head_layers: int | None = None
    """Layers of the projector: 2 as in the paper, or 3; None: 3 for transformers, else 2."""
    freeze: tuple[str, ...] | None = None
    """Modules or `stem` to leave as they are, BatchNorm statistics too; None: the patch embedding of transformers."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    channels_last: bool | None = None
    """Memory layout; None: channels_last for convolutional encoders."""
    seed: int = 0
    """Everything random is a function of this seed and the position in training."""
    split_seed: int = 0
    """Seed of the split into training and held-out images, where the dataset has no labelled test split."""

    output_dir: str | None = None
    """Folder of the run; None: runs/BACKBONE-DATASET."""
    save_every: int | None = None
    """Steps between checkpoints; None: ten in all, or every 2,000 steps if that is more often."""
    log_every: int | None = None
    """Steps between lines of metrics; None: fifty in all, or every 100 steps if that is more often."""
    knn_every: int | None = None
    """Epochs between kNN evaluations, where labels exist; None: at most ten times, and at both ends."""
    resume: bool = False
    """Continue the run in output_dir from its newest good checkpoint."""
    overwrite: bool = False
    """Discard what output_dir holds."""
    max_time: float | None = None
    """Minutes after which the run stops with a checkpoint."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when the representation collapses."""
    report_to: tuple[str, ...] = ()
    """Trackers besides metrics.jsonl: tensorboard, trackio, wandb, ... (through Accelerate)."""
    push_to_hub: str | None = None
    """Push the encoder to this Hub repository (user/name) at the end, private unless --public."""
    public: bool = False
    """Make the Hub repository public."""
    license: str | None = None
    """Licence of the weights as the Hub writes it, for example cc-by-4.0; the training images may restrict it."""
    dry_run: bool = False
    """Print what would be done, leave views.png in OUTPUT_DIR-dry_run, and stop."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What any evaluation needs to know: which encoder, on which images."""

    encoder: str = "local-dir:runs/resnet18-digits/encoder"
    """local-dir:RUN/encoder, hf-hub:user/name, or a timm name: random weights, or pretrained ones with --pretrained."""
    pretrained: bool = False
    """Use the pretrained weights of a timm name."""
    image_size: int | None = None
    """Side of the square images; None: what the encoder was trained with."""
    in_chans: int | None = None
    """Channels of the images; None: what the encoder was trained with."""

    dataset: str = "digits"
    """`digits`; a folder of images; a .parquet or .arrow file or a folder of them; a Hub dataset id."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset."""
    split: str | None = None
    """Split that classifiers and neighbours learn from; None: train."""
    image_column: str | None = None
    """Column that holds the images; None: the only one of type image."""
    label_column: str | None = None
    """Column that holds the labels; None: the only one of type class label."""
    value_range: tuple[float, float] | None = None
    """Values of images of 16 bits and more that become black and white, as in pretraining."""
    workers: int | None = None
    """Processes that decode images; None: one per core, at most 8."""

    seed: int = 0
    """Everything random is a function of this seed."""
    split_seed: int = 0
    """Seed of the split into training and held-out images, where the dataset has no labelled test split."""
    output: str | None = None
    """Folder for results.json, confusion.png and labelled.json, the rows whose labels a classifier learned from."""
    debug: bool = False
    """Show the traceback of an error."""


def data_settings(config: Any) -> dict[str, Any]:
    """The settings that say which images are meant, as `open_dataset` and `open_stream` take them."""
    names = ("split", "image_column", "label_column", "value_range")
    return {
        "dataset": config.dataset,
        "config": config.dataset_config,
        **{name: getattr(config, name) for name in names},
    }


def to_yaml(config: Any) -> str:
    """A config as the text of a file that `--config` reads back to the same values."""
    values = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def output_dir(config: PretrainConfig) -> Path:
    """The folder of the run: as asked, or `runs/BACKBONE-DATASET`."""
    return Path(config.output_dir or f"runs/{_file_name(config.backbone)}-{_file_name(config.dataset)}")


def check(config: PretrainConfig) -> None:
    """Refuse values that no run can have, before anything is read."""
    positive = ("image_size", "in_chans", "epochs", "batch_size", "hidden_dim", "projection_dim", "save_every")
    for name in (*positive, "log_every", "knn_every", "max_time", "shuffle_buffer", "num_images", "decoded_side"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ByolTimmError(f"--{name} must be positive ({value})")
    if config.batch_size == 1:
        raise ByolTimmError("--batch_size must be 2 or more (1): BatchNorm compares the images of a batch")
    for name in ("lr", "weight_decay", "warmup_epochs", "rotate", "workers", "memory_limit"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ByolTimmError(f"--{name} must be finite and not negative ({value})")
    for name in ("target_decay", "flip", "jitter", "blur", "solarize", "crop_scale"):
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not 0 <= number <= 1:
                raise ByolTimmError(f"--{name} must lie between 0 and 1 ({number})")
    check_seed(config.seed)
    if not 0 < config.image_share <= 1:
        raise ByolTimmError(f"--image_share must lie above 0 and be at most 1 ({config.image_share})")
    if config.crop_scale is not None and not 0 < config.crop_scale[0] <= config.crop_scale[1]:
        raise ByolTimmError(f"--crop_scale takes the lowest and the highest area {config.crop_scale}")
    if config.public and config.push_to_hub is None:
        raise ByolTimmError("--public is for --push_to_hub. Name a repository with that")
    if config.pretrained and config.training_state is not None:
        raise ByolTimmError(f"--training_state ({config.training_state}) replaces all weights. Leave out --pretrained")
    for name in ("shuffle_buffer", "num_images"):
        if getattr(config, name) is not None and not config.streaming:
            raise ByolTimmError(f"--{name} ({getattr(config, name)}) is for --streaming. Leave it out")
    if config.streaming and config.image_share != 1:
        raise ByolTimmError(f"--image_share ({config.image_share:g}) needs all images. Leave out --streaming")
    if config.streaming and config.memory_limit != PretrainConfig.memory_limit:
        raise ByolTimmError(
            f"--memory_limit ({config.memory_limit:g}) is for decoded images and --streaming holds none. "
            "Use --shuffle_buffer"
        )
    if config.streaming and config.decoded_cache is not None:
        raise ByolTimmError(f"--decoded_cache ({config.decoded_cache}) holds all images. Leave out --streaming")
    if config.fast_jpeg and config.decoded_cache is not None:
        raise ByolTimmError("--fast_jpeg saves nothing where images are decoded once. Leave out --decoded_cache")
    if config.decoded_side is not None and config.decoded_cache is None:
        raise ByolTimmError(f"--decoded_side ({config.decoded_side}) is for --decoded_cache. Name a folder with that")
    if config.num_head_layers not in (None, 2, 3):
        raise ByolTimmError(f"--num_head_layers is 2 or 3 ({config.num_head_layers})")


def check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ByolTimmError(f"--seed must fit into 64 bits ({seed})")


def _file_name(text: str) -> str:
    return Path(text.rpartition(":")[2]).name or "run"
