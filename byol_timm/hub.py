"""Encoders in timm's own format: a folder that plain timm loads, with or without byol_timm, and the Hub."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import _registry
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_input_config
from timm.models._pretrained import PretrainedCfg
from timm.utils import unwrap_model
from torch import nn

from .card import CARD_START, card_metadata, merge_cards, model_card, own_text, redact
from .checkpoint import seal
from .encoder import create_encoder
from .errors import REDACTED, ByolTimmError, one_line
from .network import cache_alone_without_network, why_unreachable

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, CARD, RECORD = "config.json", "model.safetensors", "README.md", "byol.json"
PICTURES = ("curves.png", "embedding.png")
TRAINING_STATE = "training_state"
# Of a checkpoint, what a run starts from.
STATE_FILES = ("manifest.json", "state.json", "byol.safetensors")
# What it means that a repository lacks a file.
WITHOUT = {
    CONFIG: "is it a timm model?",
    WEIGHTS: "its weights are in another, possibly unsafe, format",
    TRAINING_STATE: "it was pushed without its training state",
}

PAPER = dict(
    paper_name="Bootstrap your own latent: A new approach to self-supervised Learning", paper_ids="arXiv:2006.07733"
)
# Facts that the architecture's default tag brings along and that are not true of new weights.
SOURCE_FACTS = ("origin_url", "notes", "label_names", "label_descriptions")
# What makes timm read weights from elsewhere, or run a loader for another file format.
FOREIGN_SOURCES = ("file", "state_dict", "hf_hub_filename")
# Arguments of timm's factory, not of a network.
FACTORY_ARGUMENTS = re.compile(r"pretrained.*|checkpoint_path|cache_dir|features_only|feature_cfg|model_.*|pruned")


class PushError(ByolTimmError):
    """A push that failed for reasons outside of this machine; what was to be pushed is still here."""

    exit_code = 3


def save_encoder(
    encoder: nn.Module,
    folder: str | Path,
    *,
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    tag: str = "byol",
    license: str | None = None,
    card: str | None = None,
    record: Mapping[str, Any] | None = None,
    pictures: Iterable[str | Path] = (),
) -> Path:
    """The folder in timm's format that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads to the same bits.

    encoder: a timm model with `num_classes=0`, bare or wrapped by DistributedDataParallel or torch.compile.
    image_size: (H, W) or the side of a square, where the network takes more than one; with mean, std, interpolation and
        crop_pct how images are prepared.
    card: text of README.md; None: `model_card` of the record. record: what made the encoder, for byol.json; secrets
        and folders of this machine are taken out. pictures: files to copy along, `curves.png` and `embedding.png`.

    Holds config.json, model.safetensors, README.md, byol.json. Replaces an earlier folder of the same kind in one
    rename, where the user's own text in README.md stays. Raises `ByolTimmError` for a module that plain timm cannot
    build again.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ByolTimmError(f"{folder} exists and is no encoder folder. Move it away or choose another place")
    encoder = unwrap_model(encoder)
    _check_is_timm(encoder)
    partial, replaced = (folder.with_name(f".tmp-{what}-{folder.name}") for what in ("new", "old"))
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)  # a kill came between the two renames
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        preparation = dict(mean=tuple(mean), std=tuple(std), interpolation=interpolation, crop_pct=crop_pct)
        facts = {"tag": tag, "license": license, **PAPER, **dict.fromkeys(SOURCE_FACTS)}
        _save_config(encoder, partial / CONFIG, _height_and_width(image_size), preparation, facts)
        # Cloned and contiguous: safetensors refuses tied and channels_last weights.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.state_dict().items()}
        _check_rebuilds(partial, tensors)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / RECORD).write_text(_json(redact(dict(record or {}))), encoding="utf-8")
        for picture in pictures:
            shutil.copy(picture, partial / Path(picture).name)
        if card is None:
            shown = [name for name in PICTURES if (partial / name).is_file()]
            local = _text_of(folder / CARD)
            card = _card(partial, shown, repo_id=None, license=license, local=local, remote=None)
        (partial / CARD).write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def check_encoder_folder(folder: str | Path) -> dict[str, Any]:
    """The config of an encoder folder of any origin, after a check that timm can be trusted with it.

    Known architecture, arguments of a network and nothing else, no other source of weights, weights in safetensors
    that have every tensor of the network in its shape and only finite numbers. Raises `ByolTimmError` otherwise.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ByolTimmError(f"{folder} has no {WEIGHTS}. Weights in other formats go through recipes/convert.py")
    try:
        with torch.device("meta"):
            network = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ByolTimmError(
            f"{folder / CONFIG} describes no network that timm can build ({one_line(error)})"
        ) from error
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            names = set(weights.keys())
            for name, tensor in network.state_dict().items():
                if name not in names:
                    raise ByolTimmError(f"{folder / WEIGHTS} lacks {name} of {config['architecture']}")
                stored = weights.get_tensor(name)
                if stored.shape != tensor.shape:
                    shapes = f"{tuple(stored.shape)}, {config['architecture']} has {tuple(tensor.shape)}"
                    raise ByolTimmError(f"{folder / WEIGHTS} has {name} in another shape ({shapes})")
                if stored.is_floating_point() and not stored.isfinite().all():
                    raise ByolTimmError(f"{folder / WEIGHTS} has weights that are not finite ({name})")
    except (SafetensorError, OSError) as error:
        raise ByolTimmError(f"{folder / WEIGHTS} is damaged ({one_line(error)}). Fetch or save it again") from error
    return config


def fetch_encoder(name: str) -> Path:
    """The folder, yet to be checked, behind `user/name`, `user/name@revision` or either with `hf-hub:` in front.

    Two files are fetched, by name. Without a network the copy in the cache is used, and said so. Raises
    `ByolTimmError` when there is none, and for a repository that is missing, private, gated or no timm model.
    """
    return _fetch(name, (CONFIG, WEIGHTS))


def fetch_training_state(name: str) -> Path:
    """The checkpoint that was pushed beside the encoder `user/name`, as `fetch_encoder` fetches that."""
    return _fetch(name, [f"{TRAINING_STATE}/{file}" for file in STATE_FILES]) / TRAINING_STATE


def _fetch(name: str, files: Sequence[str]) -> Path:
    """The folder of the cache with these files of one commit, and nothing else that was not fetched before."""
    repo_id, _, revision = name.removeprefix("hf-hub:").partition("@")
    _check_name(repo_id)
    unreachable = why_unreachable()
    if unreachable:
        logger.warning(f"{unreachable}; using the cached copy of {repo_id}")
    folder: Path | None = None
    for file in files:
        commit = folder.name if folder else revision or None
        try:
            path = hf_hub_download(repo_id, file, revision=commit, local_files_only=unreachable is not None)
        except RepositoryNotFoundError as error:
            page = f"{constants.ENDPOINT}/{repo_id}"
            raise ByolTimmError(
                f"{repo_id} is not on the Hub, or private, or gated. Check the name, run `hf auth login`, or accept "
                f"its terms at {page}"
            ) from error
        except RevisionNotFoundError as error:
            raise ByolTimmError(f"{repo_id} has no revision {revision!r}") from error
        except LocalEntryNotFoundError as error:
            reason = unreachable or f"the Hub did not deliver it ({one_line(error.__cause__ or error)})"
            raise ByolTimmError(f"{repo_id} is not in the cache and {reason}. Try again later") from error
        except EntryNotFoundError as error:
            raise ByolTimmError(f"{repo_id} has no {file}: {WITHOUT.get(file, WITHOUT[TRAINING_STATE])}") from error
        except (HfHubHTTPError, HTTPError, OSError) as error:
            raise ByolTimmError(f"{repo_id} could not be fetched ({one_line(error)}). Try again later") from error
        folder = Path(path).parents[file.count("/")]
    assert folder is not None
    return folder


def load_encoder(
    name: str, *, image_size: int | None = None, in_chans: int | None = None, **settings: Any
) -> nn.Module:
    """`create_encoder` with what is behind `hf-hub:` or `local-dir:` fetched and checked first.

    image_size, in_chans: None takes those the encoder was trained with, and of a bare timm name its own size and RGB.
    Raises `ByolTimmError` as `fetch_encoder`, `check_encoder_folder` and `create_encoder` do.
    """
    source, _, place = name.partition(":")
    if source == "hf-hub":
        place = str(fetch_encoder(place))
    if source in ("hf-hub", "local-dir"):
        config = check_encoder_folder(place)
        name = f"local-dir:{place}"
        in_chans = in_chans or (config["pretrained_cfg"].get("input_size") or (3,))[0]
    downloads = ":" not in name and settings.get("pretrained")
    with cache_alone_without_network() if downloads else contextlib.nullcontext() as unreachable:
        try:
            return create_encoder(name, image_size=image_size, in_chans=in_chans or 3, **settings)
        except ByolTimmError as error:
            if unreachable and isinstance(error.__cause__, LocalEntryNotFoundError):
                raise ByolTimmError(
                    f"the pretrained weights of {name} are not in the cache and {unreachable}. Try again later"
                ) from error
            raise


def check_push(repo_id: str, *, public: bool = False, token: str | None = None) -> str:
    """The full `user/name` of the Hub repository, which exists afterwards and can be written to.

    Asks for name, token, network, and permission, in this order; within 5 seconds where there is no network. Creates
    the repository, private unless `public`. Raises `ByolTimmError` with what to do about it.
    """
    _check_name(repo_id)
    token = token or get_token()
    if token is None:
        raise ByolTimmError("no Hugging Face token. Run `hf auth login` or set HF_TOKEN")
    unreachable = why_unreachable()
    if unreachable:
        raise PushError(f"{unreachable}. Push later, or train without --push_to_hub")
    api = HfApi(token=token)
    with _hub_errors(token, {401: "the Hugging Face token is not valid. Run `hf auth login` or renew HF_TOKEN"}):
        user = api.whoami()
    if "/" not in repo_id:
        repo_id = f"{user['name']}/{repo_id}"
    refused = (
        f"the Hugging Face token of {user['name']} may not write to {repo_id}. Use a token with write permission "
        "(huggingface.co/settings/tokens), or a repository of your own"
    )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ByolTimmError(refused)
    with _hub_errors(token, {401: refused, 403: refused, 404: refused}):
        api.create_repo(repo_id, private=not public, exist_ok=True)
        # Nothing is uploaded: the Hub is asked how it would take such a file, which needs permission to write.
        api.preupload_lfs_files(repo_id, [CommitOperationAdd(RECORD, b"{}")])
        private = api.model_info(repo_id).private
    if public and private:
        raise ByolTimmError(f"{repo_id} exists and is private. Make it public in its settings, or omit --public")
    if not public and not private:
        raise ByolTimmError(f"{repo_id} exists and is public. Pass --public to push there, or choose another name")
    return repo_id


def push_encoder(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    license: str | None = None,
    training_state: str | Path | None = None,
    token: str | None = None,
) -> str:
    """The address of the Hub repository that now holds the encoder, pushed in one commit.

    folder: what `save_encoder` wrote, or the run folder around it. public: a new repository is private otherwise.
    revision: branch to push to, created when missing. license: as the Hub writes it, `cc-by-4.0`.
    training_state: folder of a checkpoint (safetensors and JSON), pushed as `training_state/` beside the encoder.

    Text of the user in an earlier card stays. Raises `ByolTimmError` for what the user can mend, and `PushError` (exit
    code 3) when the Hub fails; the folder stays as it is and the message holds the command to try again.
    """
    files = files_to_push(folder, repo_id, license=license, training_state=training_state)
    try:
        repo_id = check_push(repo_id, public=public, token=token)
        token = token or get_token()
        api = HfApi(token=token)
        with _hub_errors(token, {}):
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            remote = _remote_card(api, repo_id, revision)
            files[CARD] = _card_to_push(folder, files, repo_id, license, remote)
            ask_for_licence(files[CARD])
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            message = f"{json.loads(files[CONFIG])['architecture']} pretrained with BYOL"
            api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except ByolTimmError as error:
        command = ["python", "recipes/push_encoder.py", str(folder), repo_id]
        command += ["--public"] * public
        for flag, value in (("revision", revision), ("license", license), ("training_state", training_state)):
            command += [f"--{flag}", str(value)] if value is not None else []
        raise type(error)(f"{error}. The encoder is safe in {folder}; to push it: {shlex.join(command)}") from error
    return f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def files_to_push(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    training_state: str | Path | None = None,
) -> dict[str, Any]:
    """What `push_encoder` would upload: names in the repository, each with its content or the path of its file."""
    _check_name(repo_id)
    encoder = _encoder_folder(folder)
    check_encoder_folder(encoder)
    config = _json_of(encoder / CONFIG)
    # What timm builds the network from stays as it is, whatever the names of its arguments.
    pushed = {**redact(config), **({"model_args": config["model_args"]} if "model_args" in config else {})}
    files: dict[str, Any] = {CONFIG: _json(pushed).encode(), WEIGHTS: encoder / WEIGHTS}
    if (encoder / RECORD).is_file():
        files[RECORD] = _redacted_file(encoder / RECORD)
    for picture in PICTURES:
        for place in (Path(folder), encoder):
            if (place / picture).is_file():
                files[picture] = place / picture
    files[CARD] = _card_to_push(folder, files, repo_id, license, None)
    if training_state is not None:
        files |= _training_state_files(Path(training_state))
    return files


def ask_for_licence(card: bytes) -> None:
    """Warn of a model card that does not say what others may do with the weights."""
    if not card_metadata(card.decode())[0].get("license"):
        logger.warning(
            "the card states no licence, so that nobody knows what the weights may be used for. Push with --license, "
            "such as mit or cc-by-4.0"
        )


def register(source: str, *, tag: str) -> str:
    """The name, `resnet18.byol_cifar10` for tag `byol_cifar10`, under which timm now finds the encoder in this process.

    source: `hf-hub:user/name`, with `@revision` or without, or `local-dir:folder`. The architecture's other tags and
    its default stay as they are. Raises `ByolTimmError` for an encoder built with arguments that a tag cannot carry.
    """
    if not re.fullmatch(r"[A-Za-z0-9]\w*", tag):
        raise ByolTimmError(f"a tag consists of letters, digits and underscores ({tag!r})")
    kind, _, place = source.partition(":")
    if kind not in ("hf-hub", "local-dir") or not place:
        raise ByolTimmError(f"an encoder comes from hf-hub:user/name or local-dir:folder ({source!r})")
    folder = fetch_encoder(place) if kind == "hf-hub" else Path(place).absolute()
    config = check_encoder_folder(folder)
    architecture = config["architecture"]
    name = f"{architecture}.{tag}"
    location: dict[str, Any] = (
        dict(hf_hub_id=place, hf_hub_filename=WEIGHTS) if kind == "hf-hub" else dict(file=str(folder / WEIGHTS))
    )
    weights = PretrainedCfg(**{**config["pretrained_cfg"], "architecture": architecture, "tag": tag, **location})
    weights.num_classes = 0
    weights.fixed_input_size |= "img_size" in config.get("model_args", {})
    with torch.device("meta"):
        registered = timm.create_model(architecture, pretrained_cfg=dataclasses.asdict(weights), pretrained=False)
        original = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    if repr(registered) != repr(original) or _shapes(registered) != _shapes(original):
        arguments = ", ".join(f"{key}={value}" for key, value in config.get("model_args", {}).items())
        raise ByolTimmError(
            f"a tag of {architecture} cannot carry the arguments that the encoder was built with ({arguments}). "
            f"Load it as timm.create_model({source!r}, pretrained=True)"
        )
    known: Any = _registry._model_default_cfgs[architecture]
    if tag in known.cfgs and (known.cfgs[tag].hf_hub_id, known.cfgs[tag].file) != (weights.hf_hub_id, weights.file):
        raise ByolTimmError(f"timm knows other weights as {name}. Choose another tag")
    # timm offers no public way; registering the architecture anew would drop its other tags.
    if tag not in known.cfgs:
        known.tags.append(tag)
        _registry._model_with_tags[architecture].append(name)
    known.cfgs[tag] = weights
    _registry._model_pretrained_cfgs[name] = weights
    _registry._model_has_pretrained.add(name)
    return name


def _check_is_timm(encoder: nn.Module) -> None:
    try:
        architecture, num_classes = encoder.pretrained_cfg["architecture"], encoder.num_classes  # type: ignore[index]
    except (AttributeError, KeyError, TypeError):
        raise ByolTimmError(
            f"{type(encoder).__name__} was not built by timm, so timm could not load it again. "
            "Build it with timm.create_model(name, num_classes=0), or save its weights with torch"
        ) from None
    if num_classes != 0:
        raise ByolTimmError(
            f"{architecture} has a classifier (num_classes={num_classes}). Call encoder.reset_classifier(0) first"
        )


def _save_config(
    encoder: nn.Module, path: Path, input_size: tuple[int, int], preparation: dict[str, Any], facts: dict[str, Any]
) -> None:
    try:
        facts_of_input = get_model_input_config(encoder)
        channels, *own_size = facts_of_input["input_size"]
        # A network of one size brings all others to it by itself (CrossViT), and timm lets it be described by no other.
        size = own_size if facts_of_input["fixed_input_size"] else input_size
        preparation = {"input_size": (channels, *size), **preparation}
        save_config_for_hf(encoder, str(path), model_config={"pretrained_cfg": facts}, data_config=preparation)
    except ValueError as error:
        raise ByolTimmError(f"the encoder cannot be described to timm. {error}") from error


def _check_rebuilds(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A stem or layer exchanged after `timm.create_model` would only be noticed by whoever loads the folder."""
    with torch.device("meta"):
        rebuilt = _shapes(timm.create_model(f"local-dir:{folder}", pretrained=False))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(rebuilt.keys() | shapes.keys()):
        if rebuilt.get(name) != shapes.get(name):
            raise ByolTimmError(
                f"timm would build another network than this encoder (they differ in {name}): it was changed after "
                "timm.create_model. Ask for the change by arguments of create_model, or save its weights with torch"
            )


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of the folder, in today's layout, its types and keys checked."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ByolTimmError(f"{path} cannot be read ({error.strerror}). Is it an encoder folder?") from error
    except ValueError as error:
        raise ByolTimmError(f"{path} is not JSON ({one_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ByolTimmError(f"{path} names no architecture: not a timm model")
    if "pretrained_cfg" not in config:
        flat = {key: value for key, value in config.items() if key not in ("architecture", "num_features")}
        config = {"architecture": config["architecture"], "pretrained_cfg": flat}
    architecture, facts, arguments = config["architecture"], config["pretrained_cfg"], config.get("model_args", {})
    if not timm.is_model(architecture):
        raise ByolTimmError(f"{path}: timm {timm.__version__} has no architecture {architecture!r}. Update timm?")
    if not isinstance(facts, dict) or not isinstance(arguments, dict):
        raise ByolTimmError(f"{path}: pretrained_cfg and model_args must be objects")
    unknown = facts.keys() - {field.name for field in dataclasses.fields(PretrainedCfg)} - {"labels"}
    if unknown:
        raise ByolTimmError(f"{path}: pretrained_cfg has the unknown key {min(unknown)!r}")
    for key in FOREIGN_SOURCES:
        if facts.get(key):
            raise ByolTimmError(f"{path}: pretrained_cfg.{key} names another source of weights. Remove it")
    if facts.get("custom_load") not in (None, False, True):
        raise ByolTimmError(f"{path}: pretrained_cfg.custom_load asks for another file format. Remove it")
    size = facts.get("input_size")
    if size is not None and not (_numbers(size, int) and len(size) == 3 and min(size) > 0):
        raise ByolTimmError(f"{path}: input_size must be three positive numbers ({size!r})")
    for key in ("mean", "std"):
        if facts.get(key) is not None and not _numbers(facts[key], int | float):
            raise ByolTimmError(f"{path}: {key} must be numbers ({facts[key]!r})")
    for key, value in arguments.items():
        if FACTORY_ARGUMENTS.fullmatch(key) or not _is_plain(value):
            raise ByolTimmError(f"{path}: {key!r} in model_args is no argument of a network")
    return config


def _numbers(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ByolTimmError(
            f"{repo_id!r} is no name of a Hub repository. Use user/name with letters, digits, '-', '_' and '.'"
        ) from None


@contextlib.contextmanager
def _hub_errors(token: str | None, known: Mapping[int, str]) -> Iterator[None]:
    """Errors of the client in one line: those the user can mend by their status, the others as `PushError`."""
    try:
        yield
    except ByolTimmError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:
        # The client wraps a failed upload of weights in a RuntimeError.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            status, text = cause.response.status_code, cause.server_message or ""
            if status in known:
                raise ByolTimmError(known[status]) from None
            what = f"the Hub answered {status}"
        else:
            what, text = "the connection to the Hub failed", str(cause)
        text = one_line(text.replace(token or REDACTED, REDACTED)) if text else ""
        raise PushError(f"{what} ({text})" if text else what) from None
    except ValueError as error:
        raise ByolTimmError(f"the Hub does not accept this ({one_line(error)})") from None


def _encoder_folder(folder: str | Path) -> Path:
    for place in (Path(folder), Path(folder) / "encoder"):
        if (place / CONFIG).is_file():
            return place
    raise ByolTimmError(f"{folder} holds no encoder (no {CONFIG} in it or in its folder encoder)")


def _card_to_push(
    folder: str | Path, files: Mapping[str, Any], repo_id: str, license: str | None, remote: str | None
) -> bytes:
    encoder = _encoder_folder(folder)
    pictures = [name for name in PICTURES if name in files]
    local = _text_of(encoder / CARD)
    return _card(encoder, pictures, repo_id=repo_id, license=license, local=local, remote=remote).encode()


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def _card(
    folder: Path,
    pictures: Sequence[str],
    *,
    repo_id: str | None,
    license: str | None,
    local: str | None,
    remote: str | None,
) -> str:
    """Our card of the encoder in `folder`, around it the user's text: that on the Hub, else that in the folder."""
    if local is not None and CARD_START not in local:
        return local  # written by the user as a whole
    base = local if remote is None or (local and own_text(local) and not own_text(remote)) else remote
    config = _read_config(folder)
    record = _json_of(folder / RECORD) if (folder / RECORD).is_file() else {}
    if not isinstance(record, dict):
        raise ByolTimmError(f"{folder / RECORD} is no JSON object. Remove it, or save the encoder again")
    stated = card_metadata(base)[0].get("license") if base is not None else None
    license = license or stated or config["pretrained_cfg"].get("license")
    ours = model_card(record, config=config, repo_id=repo_id, license=license, pictures=pictures)
    return ours if base is None else merge_cards(base, ours)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ByolTimmError(f"{path} is not UTF-8 text ({one_line(error)}). Mend or remove it") from error


def _training_state_files(folder: Path) -> dict[str, Any]:
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        raise ByolTimmError(f"{folder} holds no training state. Name a checkpoint, RUN/checkpoints/step-N")
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json") or not path.is_file():
            raise ByolTimmError(f"{path} is neither safetensors nor JSON and is not pushed. Move it away")
        files[path.name] = _redacted_file(path) if path.suffix == ".json" else path
    if "manifest.json" in files:
        # The manifest vouches for the bytes that are pushed, not for those before redaction.
        manifest = json.loads(files["manifest.json"])
        manifest.pop("sha256", None)
        for name, entry in manifest["files"].items():
            if name.endswith(".json"):
                entry |= {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        files["manifest.json"] = seal(manifest)
    return {f"{TRAINING_STATE}/{name}": content for name, content in files.items()}


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ByolTimmError(f"{path} is not JSON ({one_line(error)}). Remove it, or save the encoder again") from error


def _redacted_file(path: Path) -> bytes:
    return _json(redact(_json_of(path))).encode()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
