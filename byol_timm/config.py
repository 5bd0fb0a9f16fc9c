"""Config: frozen dataclasses whose fields are command-line flags and the keys of YAML presets."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import ByolTimmError

Config = TypeVar("Config")
# What a command does besides training: never written to config.yaml, and refused in a file that --config reads.
ORDERS = frozenset("output_dir resume overwrite max_time push_to_hub public dry_run debug".split())
# Flags of earlier versions, and what to do now.
REPLACED = {
    "memory_limit": "Use --cache ram or --cache none",
    "decoded_cache": "Use --cache disk --cache_dir FOLDER",
    "decoded_side": "Shrink the image files themselves",
    "push_training_state": "Only the encoder can be pushed",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """The images of a run or an evaluation."""

    dataset: str = "digits"
    """`digits`; an image folder; a .parquet or .arrow file or a folder of them; a Hugging Face dataset id."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str | None = None
    """Split to train on; None: train."""
    image_column: str | None = None
    """Column of the images; None: the only image column."""
    label_column: str | None = None
    """Column of the labels, which pretraining uses only to report accuracy; None: the only class label column."""
    value_range: tuple[float, float] | None = None
    """Pixel values that become black and white, for images of more than 8 bits; None: the full 16-bit range."""
    workers: int | None = None
    """Data-loading workers; None: one per core, at most 8."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig(ImagesConfig):
    """Pretrain a timm backbone with BYOL. Without flags: resnet18 on scikit-learn's digits, a few minutes on a CPU.

    --config takes a preset by name (--config alone lists them) or a YAML file; flags override it. Defaults of None
    depend on the data and the backbone; each run prints the values it chose and writes them to config.yaml. Devices,
    mixed precision and gradient accumulation are options of accelerate launch.
    """

    backbone: str = "resnet18"
    """timm model name, with or without a pretrained tag; hf-hub:user/name; local-dir:folder."""
    backbone_kwargs: tuple[str, ...] = ()
    """Arguments of the timm model as key=value, or `auto`: add the one that keeps a larger feature map if needed."""
    pretrained: bool = False
    """Start from the backbone's pretrained weights."""
    zero_init_last: bool = True
    """Start residual branches at zero, as timm does; --no_zero_init_last starts them at one, as the paper does."""
    training_state: str | None = None
    """Start all networks from a checkpoint: RUN/checkpoints/step-N."""
    image_size: int | None = None
    """Training image size in pixels; None: 32 for digits, the images' own size up to 64, else 224."""
    in_chans: int = 3
    """Image channels that the encoder gets: 1 grey, 3 RGB, 4 RGBA, or as many as the files have."""

    image_share: float = 1.0
    """Fraction of the training images to train on, drawn by the seed; smaller fractions are part of larger ones."""
    cache: Literal["ram", "disk", "none"] | None = None
    """Decode each image once, for all processes of a host; None: ram if all have one size and take up to 2 GB."""
    cache_dir: str | None = None
    """With --cache disk: folder on a fast disk for the decoded images; later runs find them there."""
    streaming: bool = False
    """Read parquet, arrow or tar (webdataset) shards in sequence, local or on the Hub, without a copy on disk."""
    shuffle_buffer: int | None = None
    """With --streaming: number of encoded images held in memory to shuffle them; None: 10,000."""
    num_images: int | None = None
    """With --streaming: number of images of the split, if its files do not say."""
    fast_jpeg: bool = False
    """Decode large JPEG photos at reduced resolution. Faster; pixel values differ slightly."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """Replace and count images that cannot be read, or stop at the first one."""

    augmentation: Literal["auto", "paper", "torchvision", "small", "digits"] = "auto"
    """Set of augmentations; auto: digits for digits, small for images up to 64 pixels, else paper."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest area of the random crop, as a fraction of the image."""
    rotate: float | None = None
    """Largest random rotation in degrees."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    jitter: float | None = None
    """Probability of colour jitter."""
    colors: Literal["paper", "torchvision"] | None = None
    """Formulas of the colour operations: those of the authors' code or those of torchvision."""
    blur: tuple[float, float] | None = None
    """Probability of Gaussian blur for view 1 and view 2."""
    solarize: tuple[float, float] | None = None
    """Probability of solarization for view 1 and view 2."""

    epochs: int | None = None
    """Passes over the training images; None: 100."""
    batch_size: int | None = None
    """Images per process and forward pass; the global batch is this times processes times accumulation."""
    opt: str | None = None
    """lars, adamw, sgd, or any timm optimizer; None: lars for backbones with BatchNorm, else adamw."""
    lr: float | None = None
    """Base learning rate per 256 images of the global batch; required for optimizers other than lars, adamw, sgd."""
    weight_decay: float | None = None
    """Weight decay; biases and norms are exempt."""
    target_decay: float | None = None
    """tau at the first step; it rises to 1 along a cosine."""
    warmup_epochs: float | None = None
    """Epochs of linear learning rate warm-up."""
    hidden_dim: int | None = None
    """Hidden width of projector and predictor; None: 4096, as in the paper."""
    projection_dim: int = 256
    """Output width of projector and predictor."""
    num_head_layers: int | None = None
    """Layers of the projector, 2 or 3; None: 3 for transformers, else 2 as in the paper."""
    freeze: tuple[str, ...] | None = None
    """Modules to freeze, or `stem`; their BatchNorm statistics are frozen too; None: patch embedding of ViTs."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    channels_last: bool | None = None
    """Use the channels_last memory format; None: for convolutional encoders."""
    triton_views: bool | None = None
    """Compute the views with Triton kernels; None: on CUDA GPUs, for images with 1 or 3 channels."""
    cuda_graph: bool = False
    """Run the whole training step as one CUDA graph: faster for small networks on one GPU."""
    deterministic: bool = False
    """On a GPU, use only kernels that repeat bit for bit; slower for some networks."""
    sync_batch_norm: bool = False
    """Use byol_timm's synchronised BatchNorm, also on CPU processes, instead of torch's, which needs GPUs."""
    seed: int = 0
    """Random seed; fixes weights, data order and augmentation."""
    split_seed: int = 0
    """Seed of the split into training and held-out images, where the dataset has no labelled test split."""

    output_dir: str | None = None
    """Run folder; None: runs/BACKBONE-DATASET."""
    save_every: int | None = None
    """Steps between checkpoints; None: a tenth of the run, at most 2,000."""
    log_every: int | None = None
    """Steps between lines of metrics; None: a fiftieth of the run, at most 100."""
    knn_every: int | None = None
    """Epochs between kNN evaluations, if there are labels; None: at most ten in a run."""
    resume: bool = False
    """Resume the run in output_dir from its newest good checkpoint."""
    overwrite: bool = False
    """Replace the run in output_dir."""
    max_time: float | None = None
    """Minutes after which the run stops with a checkpoint."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when the representation collapses."""
    report_to: tuple[str, ...] = ()
    """Trackers in addition to metrics.jsonl: tensorboard, trackio, wandb, ... (through Accelerate)."""
    push_to_hub: str | None = None
    """Push the encoder to this Hub repository (user/name) at the end; private unless --public."""
    public: bool = False
    """Make the Hub repository public."""
    license: str | None = None
    """License of the weights as the Hub spells it, such as cc-by-4.0; the training images may restrict it."""
    dry_run: bool = False
    """Print what the run would do, save example views in OUTPUT_DIR-dry_run, and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(PretrainConfig):
    """A config with every value decided by the images and the encoder."""

    image_size: int
    augmentation: Literal["paper", "torchvision", "small", "digits"]
    epochs: int
    batch_size: int
    opt: str
    lr: float
    weight_decay: float
    target_decay: float
    warmup_epochs: float
    hidden_dim: int
    num_head_layers: int
    freeze: tuple[str, ...]
    channels_last: bool
    output_dir: str
    save_every: int
    log_every: int
    knn_every: int


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(ImagesConfig):
    """The encoder and the images of an evaluation."""

    encoder: str = "local-dir:runs/resnet18-digits/encoder"
    """local-dir:RUN/encoder, hf-hub:user/name, or a timm name (untrained unless --pretrained)."""
    pretrained: bool = False
    """Use the pretrained weights of a timm name."""
    image_size: int | None = None
    """Image size in pixels; None: as in training."""
    in_chans: int | None = None
    """Image channels; None: as in training."""

    seed: int = 0
    """Random seed."""
    split_seed: int | None = None
    """Seed of the split into training and held-out images; None: that of the encoder's training, else 0."""
    output: str | None = None
    """Folder for results.json, confusion.png and labelled.json, the rows whose labels a classifier learned from."""


@dataclasses.dataclass(frozen=True)
class KnnConfig(EvaluationConfig):
    """Measure the k-nearest-neighbour accuracy of an encoder: all training images vote on every held-out image.

    Neighbours are found by cosine and vote with weight exp(cosine / temperature).
    """

    k: int = 20
    """Number of neighbours that vote."""
    temperature: float = 0.07
    """Temperature of the votes."""
    center: bool = True
    """Subtract the mean of the training features first."""
    raw_pixels: bool = False
    """Also measure the accuracy of the raw pixels, averaged to 32x32 if images are larger."""


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(EvaluationConfig):
    """Train a linear classifier on an encoder and test it on held-out images."""

    protocol: str = "quick"
    """For a frozen encoder: quick; byol-linear: SGD with crops and flips; byol-transfer-linear: logistic regression.
    For fine-tuning: quick; byol-semi-1 and byol-semi-10: with 1 % and 10 % of the labels of every class."""


def data_settings(config: ImagesConfig) -> dict[str, Any]:
    """Return the fields that select the images, as `open_dataset` and `open_stream` take them."""
    names = ("dataset", "split", "image_column", "label_column", "value_range")
    return {"config": config.dataset_config, **{name: getattr(config, name) for name in names}}


def without_orders(config: PretrainConfig) -> dict[str, Any]:
    """Return the fields that decide what comes out of a run, not what the command does besides."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ORDERS}


def to_yaml(config: PretrainConfig) -> str:
    """Return the text of a file that `--config` reads back to the same values; it has no `ORDERS`."""
    fields = without_orders(config).items()
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def output_dir(config: PretrainConfig) -> Path:
    """Return the run folder: as asked, or `runs/BACKBONE-DATASET`."""
    names = (Path(text.rpartition(":")[2]).name or "run" for text in (config.backbone, config.dataset))
    return Path(config.output_dir or f"runs/{'-'.join(names)}")


_POSITIVE = (
    *("image_size", "in_chans", "epochs", "batch_size", "hidden_dim", "projection_dim", "save_every", "log_every"),
    *("knn_every", "max_time", "shuffle_buffer", "num_images"),
)
_NOT_NEGATIVE = ("lr", "weight_decay", "warmup_epochs", "rotate", "workers")
_PROBABILITIES = ("target_decay", "flip", "jitter", "blur", "solarize", "crop_scale")


def check(config: PretrainConfig) -> None:
    """Raise `ByolTimmError` for values that no run can have, before anything is read."""
    for name, value in dataclasses.asdict(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if name in _POSITIVE and number <= 0:
                raise ByolTimmError(f"--{name} must be positive ({number})")
            if name in _NOT_NEGATIVE and not 0 <= number < math.inf:
                raise ByolTimmError(f"--{name} must be finite and not negative ({number})")
            if name in _PROBABILITIES and not 0 <= number <= 1:
                raise ByolTimmError(f"--{name} must be between 0 and 1 ({number})")
    check_seed(config.seed)
    if config.batch_size == 1:
        raise ByolTimmError("--batch_size must be 2 or more (1): BatchNorm compares the images of a batch")
    if config.triton_views and config.in_chans not in (1, 3):
        raise ByolTimmError(f"--triton_views needs images with 1 or 3 channels ({config.in_chans}). Omit it")
    if config.cuda_graph and (config.compile or config.grad_checkpointing):
        raise ByolTimmError("--cuda_graph cannot be used with --compile or --grad_checkpointing. Omit one")
    if not 0 < config.image_share <= 1:
        raise ByolTimmError(f"--image_share must be above 0 and at most 1 ({config.image_share})")
    if config.crop_scale is not None and not 0 < config.crop_scale[0] <= config.crop_scale[1]:
        raise ByolTimmError(f"--crop_scale takes the smallest and the largest area {config.crop_scale}")
    if config.num_head_layers not in (None, 2, 3):
        raise ByolTimmError(f"--num_head_layers must be 2 or 3 ({config.num_head_layers})")
    if config.pretrained and config.training_state is not None:
        raise ByolTimmError(f"--training_state ({config.training_state}) replaces all weights. Remove --pretrained")
    _check_companions(config)


def _check_companions(config: PretrainConfig) -> None:
    """Raise `ByolTimmError` for flags that need another one, or do not work with it."""
    if config.public and config.push_to_hub is None:
        raise ByolTimmError("--public needs --push_to_hub. Name the repository with it")
    for name in ("shuffle_buffer", "num_images"):
        if getattr(config, name) is not None and not config.streaming:
            raise ByolTimmError(f"--{name} ({getattr(config, name)}) needs --streaming. Remove it")
    if config.streaming and config.image_share != 1:
        raise ByolTimmError(f"--image_share ({config.image_share:g}) does not work with --streaming. Remove one")
    if config.streaming and config.cache in ("ram", "disk"):
        raise ByolTimmError(f"--cache {config.cache} does not work with --streaming. Use --shuffle_buffer")
    if config.fast_jpeg and config.cache in ("ram", "disk"):
        raise ByolTimmError(f"--fast_jpeg does not work with --cache {config.cache}, which decodes once. Remove one")
    if config.cache == "disk" and config.cache_dir is None:
        raise ByolTimmError("--cache disk needs --cache_dir. Name a folder on a fast disk with it")
    if config.cache_dir is not None and config.cache != "disk":
        raise ByolTimmError(f"--cache_dir ({config.cache_dir}) needs --cache disk. Add it or remove both")


def check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ByolTimmError(f"--seed must fit into 64 bits ({seed})")
