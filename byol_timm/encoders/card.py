"""The model card: what a stranger needs to know of an encoder, written from the record of its run."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..errors import ByolTimmError, one_line, redact

CARD_START = "<!-- byol_timm: written anew by every push; your own text outside of these two marks stays -->"
CARD_END = "<!-- byol_timm: end -->"
PICTURE_TITLES = {"curves.png": "Training curves", "embedding.png": "Map of the representation"}
RECIPE_ROWS = {
    "image_size": "image side",
    "value_range": "values of more than 8 bits that became black and white",
    "pretrained": "started from pretrained weights",
    "augmentation": "augmentation",
    "batch_size": "images per process and forward pass",
    "opt": "optimizer",
    "lr": "base learning rate (per 256 images)",
    "weight_decay": "weight decay",
    "warmup_epochs": "warm-up epochs",
    "target_decay": "target decay at the start",
    "num_head_layers": "layers of the projector",
    "hidden_dim": "hidden width of projector and predictor",
    "projection_dim": "output width of projector and predictor",
    "freeze": "left untrained",
    "seed": "seed",
}
LIMITS = """- The encoder has no classifier: its output is a representation for a classifier, a search or a detector.
- It learned to ignore what the augmentations change. Where colour, orientation or scale are what matters, check first.
- Images that differ from the training images in content or in size may be served badly; nothing was measured there.
- Whatever bias the training images have is in the representation. Nothing was done against it."""
PROBE_PROTOCOL = (
    "Linear probe: a linear classifier that learned from the augmented training images while the encoder trained, and "
    "had no say in it; measured on the same images."
)
CITATION = """```bibtex
@inproceedings{grill2020bootstrap,
  title     = {Bootstrap your own latent: A new approach to self-supervised Learning},
  author    = {Grill, Jean-Bastien and Strub, Florian and Altch{\\'e}, Florent and Tallec, Corentin and
               Richemond, Pierre H. and Buchatskaya, Elena and Doersch, Carl and Pires, Bernardo Avila and
               Guo, Zhaohan Daniel and Azar, Mohammad Gheshlaghi and Piot, Bilal and Kavukcuoglu, Koray and
               Munos, R{\\'e}mi and Valko, Michal},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}
```"""


def model_card(
    record: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    repo_id: str | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The text of README.md: metadata of the Hub, and between two marks what a stranger needs to know of the encoder.

    record: as in byol.json, each key optional. config: config.json, as timm writes it. repo_id: how the examples load
    it; None: USER/NAME. license: as the Hub writes it; None: not stated. pictures: names of those that lie beside it.
    """
    record = redact(dict(record))
    backbone = record.get("backbone") or config["architecture"]
    data = record.get("data") or {}
    subject = f"{backbone} pretrained with BYOL" + (f" on {data['name']}" if data.get("name") else "")
    parts = [
        f"# {subject}",
        _introduction(config, data),
        "## Load it\n\n" + _examples(repo_id or "USER/NAME"),
        "## How it was trained\n\n" + _recipe(record),
        *(f"![{PICTURE_TITLES[name]}]({name})" for name in pictures),
        "## Data\n\n" + _data(data),
        "## Results\n\n" + _results(record),
        "## Did it collapse?\n\n" + _health(record.get("health") or {}),
        "## Limits\n\n" + "\n".join([*(f"- {note}" for note in record.get("notes") or []), LIMITS]),
        "## Licence\n\n" + _licence(license),
        "## Citation\n\n" + CITATION,
    ]
    metadata = _metadata(record, subject, license)
    return f"---\n{metadata.to_yaml()}\n---\n\n{CARD_START}\n\n" + "\n\n".join(parts) + f"\n\n{CARD_END}\n"


def merge_cards(card: str, ours: str) -> str:
    """`card` with its part between our marks, and the metadata that we know, replaced by those of `ours`."""
    metadata, body = card_metadata(card)
    our_metadata, our_body = card_metadata(ours)
    our_part = our_body[our_body.find(CARD_START) : our_body.find(CARD_END) + len(CARD_END)]
    lists = {
        key: list(dict.fromkeys([*metadata[key], *our_metadata[key]]))
        for key in ("tags", "datasets")
        if isinstance(metadata.get(key), list) and key in our_metadata
    }
    metadata |= our_metadata | lists
    start, end = body.find(CARD_START), body.find(CARD_END)
    if 0 <= start < end:
        body = body[:start] + our_part + body[end + len(CARD_END) :]
    else:
        body = f"{body.strip()}\n\n{our_part}"
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body.strip()}\n"


def own_text(card: str) -> str:
    """What is outside of our marks: the user's own words."""
    body = card_metadata(card)[1]
    start, end = body.find(CARD_START), body.find(CARD_END)
    return (body[:start] + body[end + len(CARD_END) :] if 0 <= start < end else body).strip()


def card_metadata(card: str) -> tuple[dict[str, Any], str]:
    """The metadata at the top of a card, and the text below."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", card, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ByolTimmError(
            f"the metadata of README.md are not YAML ({one_line(error)}). Mend or remove them"
        ) from error
    return metadata if isinstance(metadata, dict) else {}, card[match.end() :]


def _metadata(record: Mapping[str, Any], subject: str, license: str | None) -> ModelCardData:
    settings, results, data = (record.get(key) or {} for key in ("config", "results", "data"))
    dataset = data.get("hub_id")
    measured = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset or "other",
            dataset_name=str(data.get("name") or "the data it was evaluated on"),
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(float(value), 2),
        )
        for name, value in _measurements(results)
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["timm", "byol", "self-supervised-learning"],
        license=license,
        datasets=[dataset] if dataset else None,
        base_model=_base_model(record.get("backbone"), settings),
        model_name=subject if measured else None,
        eval_results=measured or None,
    )


def _base_model(backbone: str | None, settings: Mapping[str, Any]) -> str | None:
    if backbone and backbone.startswith("hf-hub:"):
        return backbone.removeprefix("hf-hub:").partition("@")[0]
    if backbone is None or not settings.get("pretrained"):
        return None
    return timm.models.get_pretrained_cfg_value(backbone, "hf_hub_id") if timm.is_model(backbone) else None


def _introduction(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    channels, height, width = config["pretrained_cfg"].get("input_size") or (3, 224, 224)
    count = f"{data['images']:,} " if isinstance(data.get("images"), int) else ""
    return (
        f"An image encoder: `{config['architecture']}` of [timm](https://github.com/huggingface/pytorch-image-models), "
        f"trained from {count}images without labels by BYOL (Bootstrap your own latent, Grill et al. 2020). It turns "
        f"images of {channels} x {height} x {width} into one vector each. Plain timm loads it; nothing else is needed."
    )


def _examples(repo_id: str) -> str:
    name = f'"hf-hub:{repo_id}"'
    return f"""Train a classifier on top, or everything end to end:

```python
import timm

model = timm.create_model({name}, pretrained=True, num_classes=10)
```

Features of an image:

```python
import timm, torch
from PIL import Image

encoder = timm.create_model({name}, pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=encoder), is_training=False)
with torch.inference_mode():
    features = encoder(transform(Image.open("image.jpg")).unsqueeze(0))
```

A feature pyramid, for detection or segmentation:

```python
import timm

backbone = timm.create_model({name}, pretrained=True, features_only=True)
print(backbone.feature_info.channels(), backbone.feature_info.reduction())
```"""


def _recipe(record: Mapping[str, Any]) -> str:
    settings = record.get("config") or {}
    rows = [("backbone", record.get("backbone")), ("converted from", record.get("converted_from"))]
    rows += [(f"backbone's {key}", value) for key, value in (record.get("backbone_kwargs") or {}).items()]
    rows += [(text, settings.get(key)) for key, text in RECIPE_ROWS.items()]
    rows += [("epochs", record.get("epochs")), ("steps", record.get("steps"))]
    rows += [("global batch", record.get("global_batch")), ("device", record.get("device"))]
    rows += [(name, record.get(name)) for name in ("processes", "precision")]
    rows += [("time", _duration(record["seconds"]) if record.get("seconds") else None)]
    rows += [(f"version of {name}", value) for name, value in (record.get("versions") or {}).items()]
    rows += [("commit", record.get("commit"))]
    shown = [f"| {text} | {_cell(value)} |" for text, value in rows if value not in (None, "", [], ())]
    if not shown:
        return "Not recorded."
    note = "\n\nAll settings are in [byol.json](byol.json)." if settings else ""
    return "\n".join(["| | |", "|---|---|", *shown]) + note


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return "Not recorded."
    rows = {
        "name": data.get("name"),
        "images": data.get("images"),
        "channels": data.get("channels"),
        "fingerprint": data.get("fingerprint"),
    }
    lines = [f"- {key}: {_cell(value)}" for key, value in rows.items() if value is not None]
    return "\n".join([*lines, "- labels: not used in training"])


def _results(record: Mapping[str, Any]) -> str:
    results = record.get("results") or {}
    neighbours = results.get("k", 20)
    rows = [
        (f"{neighbours}-NN on raw pixels", results.get("knn_raw_pixels")),
        (f"{neighbours}-NN, the same network before training", results.get("knn_random")),
        *((f"**{name}, this encoder**", value) for name, value in _measurements(results)),
    ]
    shown = [f"| {text} | {value:.1f} % |" for text, value in rows if value is not None]
    if not shown:
        return "None were measured."
    protocol = f"\n\nProtocol: {results['protocol']}." if results.get("protocol") else ""
    if protocol and results.get("linear_byol") is not None:
        protocol += f" {PROBE_PROTOCOL}"
    return "\n".join(["| top-1 accuracy | |", "|---|---|", *shown]) + protocol


def _measurements(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Each with a name of its own: the Hub merges results of one data set under the first one's."""
    names = {"knn_byol": f"{results.get('k', 20)}-NN top-1", "linear_byol": "linear probe top-1"}
    return [(name, results[key]) for key, name in names.items() if results.get(key) is not None]


def _health(health: Mapping[str, Any]) -> str:
    lines = []
    if health.get("feature_std") is not None:
        spread = health["feature_std"]
        lines.append(f"- spread of the representation: {spread:.3f} (0: all images alike; 1: in all directions alike)")
    if health.get("projection_std") is not None:
        spread = health["projection_std"]
        lines.append(f"- spread of the projections, where a collapse shows first: {spread:.3f} (likewise)")
    if health.get("effective_rank") is not None:
        lines.append(f"- effective rank: {health['effective_rank']:.1f} dimensions in use")
    return "\n".join(lines) or "Not recorded."


def _licence(license: str | None) -> str:
    if license:
        return f"{license}. The licence of the training images may ask for more."
    return (
        "Not stated. Ask the owner of this repository before you use the weights; the licence of the training images "
        "matters too."
    )


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    text = (
        f"{value:,}"
        if isinstance(value, int) and value >= 10_000
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
