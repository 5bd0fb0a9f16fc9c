"""Push encoders to the Hub, and register them as tags of timm."""

import contextlib
import dataclasses
import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from timm.models import _registry
from timm.models._pretrained import PretrainedCfg

from ..errors import REDACTED, ByolTimmError, one_line, redact
from .card import PICTURES, read_card
from .check import CONFIG, RECORD, WEIGHTS, build_on_meta, check_encoder_folder, read_record, shapes
from .fetch import check_repo_name, fetch_encoder, why_unreachable
from .folder import CARD, as_json, encoder_card, read_text

logger = logging.getLogger(__name__)


class PushError(ByolTimmError):
    """A push that failed for reasons outside this machine; the encoder is still here."""

    exit_code = 3


def check_push(repo_id: str, *, public: bool = False, token: str | None = None) -> str:
    """Return the full `user/name` of the Hub repository after checking that it exists and can be written to.

    Checks name, token, network and permission, in this order; takes at most 5 seconds without a network. Creates the
    repository, private unless `public`. Raises `ByolTimmError` that says what to do.
    """
    check_repo_name(repo_id)
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
        # Uploads nothing: it asks how the Hub would take such a file, which needs permission to write.
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
    token: str | None = None,
) -> str:
    """Push an encoder to the Hub in one commit and return the address of its repository.

    folder: what `save_encoder` wrote, or the run folder around it. public: a new repository is private otherwise.
    revision: branch to push to, created when missing. license: as the Hub writes it, `cc-by-4.0`.

    Keeps the user's text in an earlier card. Raises `ByolTimmError` for what the user can fix, and `PushError` (exit
    code 3) when the Hub fails; the message holds the command to try again.
    """
    files = _files(folder, repo_id, license)
    try:
        repo_id = check_push(repo_id, public=public, token=token)
        token = token or get_token()
        api = HfApi(token=token)
        with _hub_errors(token, {}):
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            remote = _remote_card(api, repo_id, revision)
            files[CARD] = _card_to_push(_encoder_folder(folder), files, repo_id, license, remote)
            _warn_without_licence(files[CARD])
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            message = f"{json.loads(files[CONFIG])['architecture']} pretrained with BYOL"
            api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except ByolTimmError as error:
        command = ["python", "recipes/push_encoder.py", str(folder), repo_id]
        command += ["--public"] * public
        for flag, value in (("revision", revision), ("license", license)):
            command += [f"--{flag}", value] if value is not None else []
        raise type(error)(f"{error}. The encoder is safe in {folder}; to push it: {shlex.join(command)}") from error
    return f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def files_to_push(folder: str | Path, repo_id: str, *, license: str | None = None) -> dict[str, Any]:
    """Return what `push_encoder` would upload: names in the repository, with contents or paths of files."""
    files = _files(folder, repo_id, license)
    _warn_without_licence(files[CARD])
    return files


def register(source: str, *, tag: str) -> str:
    """Register an encoder as a tag of timm in this process; return its name, such as `resnet18.byol_cifar10`.

    source: `hf-hub:user/name`, with or without `@revision`, or `local-dir:folder`. The architecture keeps its other
    tags and its default. Raises `ByolTimmError` for an encoder built with arguments that a tag cannot carry.
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
    original = build_on_meta(folder, num_classes=0)
    if repr(registered) != repr(original) or shapes(registered) != shapes(original):
        arguments = ", ".join(f"{key}={value}" for key, value in config.get("model_args", {}).items())
        raise ByolTimmError(
            f"a tag of {architecture} cannot carry the arguments that the encoder was built with ({arguments}). "
            f"Load it as timm.create_model({source!r}, pretrained=True)"
        )
    known: Any = _registry._model_default_cfgs[architecture]
    if tag in known.cfgs and (known.cfgs[tag].hf_hub_id, known.cfgs[tag].file) != (weights.hf_hub_id, weights.file):
        raise ByolTimmError(f"timm knows other weights as {name}. Choose another tag")
    # timm offers no public way; registering the architecture again would drop its other tags.
    if tag not in known.cfgs:
        known.tags.append(tag)
        _registry._model_with_tags[architecture].append(name)
    known.cfgs[tag] = weights
    _registry._model_pretrained_cfgs[name] = weights
    _registry._model_has_pretrained.add(name)
    return name


def _files(folder: str | Path, repo_id: str, license: str | None) -> dict[str, Any]:
    check_repo_name(repo_id)
    encoder = _encoder_folder(folder)
    check_encoder_folder(encoder)
    config = json.loads((encoder / CONFIG).read_text(encoding="utf-8"))
    # What timm builds the network from stays unchanged, whatever the names of its arguments.
    pushed = {**redact(config), **({"model_args": config["model_args"]} if "model_args" in config else {})}
    files: dict[str, Any] = {CONFIG: as_json(pushed).encode(), WEIGHTS: encoder / WEIGHTS}
    if (encoder / RECORD).is_file():
        files[RECORD] = as_json(redact(read_record(encoder))).encode()
    for picture in PICTURES:
        for place in (Path(folder), encoder):
            if (place / picture).is_file():
                files[picture] = place / picture
    files[CARD] = _card_to_push(encoder, files, repo_id, license, None)
    return files


def _warn_without_licence(card: bytes) -> None:
    """Warn of a model card that does not say what others may do with the weights."""
    if not read_card(card.decode()).data.get("license"):
        logger.warning(
            "the card states no licence, so nobody knows what the weights may be used for. Push with --license, such "
            "as mit or cc-by-4.0"
        )


@contextlib.contextmanager
def _hub_errors(token: str | None, known: Mapping[int, str]) -> Iterator[None]:
    """Raise errors of the client in one line: `known` statuses as the user's own to fix, the others as `PushError`."""
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
    encoder: Path, files: Mapping[str, Any], repo_id: str, license: str | None, remote: str | None
) -> bytes:
    local = read_text(encoder / CARD)
    card = encoder_card(encoder, repo_id=repo_id, license=license, pictures=files, local=local, remote=remote)
    return card.encode()


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")
