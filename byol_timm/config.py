"""Settings: frozen dataclasses whose fields are command-line flags and the keys of YAML presets."""

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from . import errors
from .errors import ByolTimmError, one_line

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
    """Start all networks from a checkpoint: RUN/checkpoints/step-N, or hf-hub:user/name with its training state."""
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
    push_training_state: bool = False
    """Push target network and heads too, so that somebody else can continue with --training_state."""
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
    output: str | None = None
    """Folder for results.json, confusion.png and labelled.json, the rows whose labels a classifier learned from."""
    debug: bool = False
    """Show the traceback of an error."""


def parse(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The settings that the command line asks for: defaults, then the preset or YAML file of `--config`, then flags.

    Raises `ByolTimmError` for an unknown flag, key or preset (with the nearest valid name) and for a value of the wrong
    type.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    named, argv = _take_config(argv)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    _check_flags(argv, names)
    if named is not None:
        switches = {field.name for field in fields if field.type is bool}
        argv = [*_file_arguments(_config_file(named), names, switches), *argv]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(config_class, args=argv, use_underscores=True)
    except BrokenPipeError:
        # The help went into a pager that was left. Python would fail once more as it empties stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ByolTimmError(_plain(output.getvalue())) from None


def presets() -> dict[str, Path]:
    """The YAML files that `--config` finds by name: `recipes/presets` of a clone, or what the wheel has of it."""
    package = Path(__file__).parent
    folder = package / "presets"
    if not folder.is_dir():
        folder = package.parent / "recipes" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


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


def output_folder(path: str | Path) -> Path:
    """The folder that --output names, made and written to before the work whose results it takes."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ByolTimmError(f"cannot write to {folder} ({error.strerror}). Choose another --output") from error
    return folder


def output_file(path: str) -> Path:
    """The file that --output names, in an `output_folder`."""
    file = Path(path)
    if file.is_dir():
        raise ByolTimmError(f"--output takes a file and {file} is a folder. Name a file in it")
    output_folder(file.parent)
    return file


def run(main: Callable[[], Any]) -> None:
    """Call a recipe's `main`, its log on stdout; of `ByolTimmError` or Ctrl-C, one line on stderr and the exit code."""
    package = logging.getLogger(__package__)
    # A notebook runs its cells again.
    package.handlers = [_Console()]
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.CRITICAL)
    try:
        main()
    except ByolTimmError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0" or (not error.agreed and _is_alone()):
            _tell(str(error))
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":
            _tell("interrupted")
        raise SystemExit(128 + signal.SIGINT) from None


def _tell(message: str) -> None:
    text = " ".join(f"byol_timm: error: {message}".split())
    print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)


def _is_alone() -> bool:
    """Whether the first process goes on: had it failed too, the launcher would end this one within that time."""
    time.sleep(errors.ALONE_SECONDS)
    return True


class _Console(logging.Handler):
    """Messages as plain lines on stdout, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "byol_timm: warning: " if record.levelno >= logging.WARNING else ""
        line = f"{prefix}{record.getMessage()}".encode(sys.stdout.encoding or "utf-8", errors="backslashreplace")
        tqdm.write(line.decode(sys.stdout.encoding or "utf-8"), file=sys.stdout)
        sys.stdout.flush()


def nearest(name: str, names: Sequence[str]) -> str:
    """`name` of `names` that a typing error most likely meant, as the end of a sentence."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}"


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    rest, named, index = [], None, 0
    while index < len(argv):
        token = argv[index]
        if token == "--config":
            if index + 1 == len(argv):
                raise ByolTimmError(f"--config takes a YAML file or a preset: {', '.join(presets())}")
            named, index = argv[index + 1], index + 2
        elif token.startswith("--config="):
            named, index = token.partition("=")[2], index + 1
        else:
            rest.append(token)
            index += 1
    return named, rest


def _config_file(named: str) -> Path:
    known = presets()
    path = Path(named)
    if named in known:
        return known[named]
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    near = difflib.get_close_matches(named, known, cutoff=0.5)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ByolTimmError(f"no preset {named!r}.{guess} Presets: {', '.join(known)}; or give a YAML file")


def _check_flags(argv: list[str], names: list[str]) -> None:
    for token in argv:
        if token.startswith("--"):
            flag = token[2:].partition("=")[0].replace("-", "_")
            if flag not in (*names, "help") and flag.removeprefix("no_") not in names:
                raise ByolTimmError(f"unknown flag {token.partition('=')[0]}. {nearest(flag, names)}")


def _file_arguments(path: Path, names: list[str], switches: set[str]) -> list[str]:
    """The settings of a YAML file as command-line arguments, so that both are read by one parser.

    switches: settings that are on or off and take no value on the command line.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ByolTimmError(f"config file {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ByolTimmError(f"config file {path} is not YAML ({one_line(error)})") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ByolTimmError(f"config file {path} must hold `key: value` lines")
    arguments: list[str] = []
    for key, value in settings.items():
        if key not in names:
            raise ByolTimmError(f"unknown key {key!r} in {path}. {nearest(str(key), names)}")
        if isinstance(value, bool) and key in switches:
            arguments.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, dict):
            arguments += [f"--{key}", *(f"{k}={v}" for k, v in value.items())]
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments += [f"--{key}", str(value)]
    return arguments


def _plain(message: str) -> str:
    """The first paragraph of a boxed message of the parser, in one line."""
    lines = [line.strip(" │") for line in message.splitlines() if not line.startswith(("╭", "╰"))]
    paragraph: list[str] = []
    for line in lines:
        if line.startswith(("──", "Got errors")) or (paragraph and not line):
            break
        paragraph.append(line)
    return " ".join(paragraph)
