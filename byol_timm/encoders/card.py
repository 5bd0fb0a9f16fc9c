"""Write the model card: what a stranger needs to know about an encoder, from the record of its run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import ORDERS
from ..errors import ByolTimmError, one_line, redact

CARD_START = "<!-- byol_timm: replaced by every push; your own text outside these two marks stays -->"
CARD_END = "<!-- byol_timm: end -->"
OUR_PART = re.compile(rf"<!-- byol_timm: (?!end).*?-->.*?{CARD_END}", re.DOTALL)
TEXT = Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
PICTURES = {"curves.png": "Training curves", "embedding.png": "Map of the representation"}
TRAINING = ("epochs", "steps", "global_batch", "device", "processes", "precision", "commit")
PROBE_PROTOCOL = (
    "Linear probe: a linear classifier that was trained on the augmented training images during pretraining, without "
    "any influence on the encoder; measured on the same images."
)
HEALTH = {
    "feature_std": "- spread of the representation: {:.3f} (0: all images get the same vector; 1: all directions)",
    "projection_std": "- spread of the projections, where a collapse shows first: {:.3f} (same scale)",
    "effective_rank": "- effective rank: {:.1f} dimensions in use",
}


def model_card(
    record: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    repo_id: str | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Return the text of README.md: metadata for the Hub, and our part between two marks.

    record: as in byol.json, each key optional. config: config.json, as timm writes it. repo_id: the name in the
    examples; None: USER/NAME. license: as the Hub writes it; None: not stated. pictures: names of files in the folder.
    """
    record = redact(dict(record))
    data = dict(record.get("data") or {})
    if data.get("name"):
        data["name"] = str(data["name"]).removeprefix(".../")  # of a local folder
    subject = f"{record.get('backbone') or config['architecture']} pretrained with BYOL"
    subject += f" on {data['name']}" if data.get("name") else ""
    images = "".join(f"\n\n![{PICTURES[name]}]({name})" for name in pictures)
    text = TEXT.substitute(
        subject=subject,
        architecture=config["architecture"],
        count=f"{data['images']:,} " if isinstance(data.get("images"), int) else "",
        input_size=" x ".join(map(str, config["pretrained_cfg"].get("input_size") or (3, 224, 224))),
        repo_id=repo_id or "USER/NAME",
        recipe=_recipe(record) + images,
        data=_data(data),
        results=_results(record),
        health=_health(record),
        notes="".join(f"- {note}\n" for note in record.get("notes") or []),
        licence=_licence(license),
    )
    metadata = _metadata(record, data, subject, license)
    return f"---\n{metadata.to_yaml()}\n---\n\n{CARD_START}\n\n{text}\n{CARD_END}\n"


def merge_cards(card: str, ours: str) -> str:
    """Return `card` with our part, and the metadata that we know, replaced by those of `ours`."""
    theirs, merged = read_card(card), read_card(ours)
    metadata, known = theirs.data.to_dict(), merged.data.to_dict()
    lists = {
        key: list(dict.fromkeys([*metadata[key], *known[key]]))
        for key in ("tags", "datasets")
        if isinstance(metadata.get(key), list) and key in known
    }
    match = OUR_PART.search(merged.text)
    assert match is not None
    text = theirs.text if is_ours(card) else f"{theirs.text.strip()}\n\n{match[0]}"
    merged.text = f"\n{OUR_PART.sub(lambda _: match[0], text, count=1).strip()}\n"
    merged.data = ModelCardData(ignore_metadata_errors=True, **{**metadata, **known, **lists})
    return str(merged)


def read_card(card: str) -> ModelCard:
    """Return the metadata and the text of a card; raise `ByolTimmError` for metadata that are not YAML."""
    card = card.removeprefix("\ufeff")
    if not card.lstrip().startswith("---"):
        card = f"---\n\n---\n{card}"
    try:
        return ModelCard(card, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ByolTimmError(
            f"the metadata of README.md are not YAML ({one_line(error)}). Fix or remove them"
        ) from error


def is_ours(card: str) -> bool:
    """Return True if the card has a part of ours, False if its user wrote all of it."""
    return OUR_PART.search(card) is not None


def own_text(card: str) -> str:
    """Return the user's own words: the text outside our marks."""
    return OUR_PART.sub("", read_card(card).text, count=1).strip()


def _metadata(record: Mapping[str, Any], data: Mapping[str, Any], subject: str, license: str | None) -> ModelCardData:
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
        for name, value in _measurements(record.get("results") or {})
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["timm", "byol", "self-supervised-learning"],
        license=license,
        datasets=[dataset] if dataset else None,
        base_model=_base_model(record.get("backbone"), record.get("config") or {}),
        model_name=subject if measured else None,
        eval_results=measured or None,
    )


def _base_model(backbone: str | None, settings: Mapping[str, Any]) -> str | None:
    if backbone is None or backbone.startswith("hf-hub:"):
        return backbone and backbone.removeprefix("hf-hub:").partition("@")[0]
    known = settings.get("pretrained") and timm.is_model(backbone)
    return timm.models.get_pretrained_cfg_value(backbone, "hf_hub_id") if known else None


def _recipe(record: Mapping[str, Any]) -> str:
    rows = {"backbone": record.get("backbone"), "converted from": record.get("converted_from")}
    rows |= {f"backbone's {key}": value for key, value in (record.get("backbone_kwargs") or {}).items()}
    rows |= {name.replace("_", " "): record.get(name) for name in TRAINING}
    rows |= {"time": _duration(record["seconds"]) if record.get("seconds") else None}
    rows |= {f"version of {name}": value for name, value in (record.get("versions") or {}).items()}
    settings = {name: value for name, value in (record.get("config") or {}).items() if name not in ORDERS}
    table = _table(rows) or "Not recorded."
    details = "<details><summary>All settings</summary>\n\n{}\n\n</details>"
    return table + (f"\n\n{details.format(_table(settings))}" if settings else "")


def _table(rows: Mapping[str, Any], title: str = "") -> str:
    shown = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "", [], ())]
    return "\n".join([f"| {title} | |", "|---|---|", *shown]) if shown else ""


def _data(data: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {_cell(data[name])}" for name in ("name", "images", "channels", "fingerprint") if name in data]
    return "\n".join([*lines, "- labels: not used in training"]) if lines else "Not recorded."


def _results(record: Mapping[str, Any]) -> str:
    results = record.get("results") or {}
    neighbours = results.get("k", 20)
    rows = {
        f"{neighbours}-NN on raw pixels": results.get("knn_raw_pixels"),
        f"{neighbours}-NN, the same network before training": results.get("knn_random"),
        **{f"**{name}, this encoder**": value for name, value in _measurements(results)},
    }
    table = _table({name: f"{value:.1f} %" for name, value in rows.items() if value is not None}, "top-1 accuracy")
    protocol = f"\n\nProtocol: {results['protocol']}." if results.get("protocol") else ""
    if protocol and results.get("linear_byol") is not None:
        protocol += f" {PROBE_PROTOCOL}"
    return table + protocol if table else "None were measured."


def _measurements(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return each result under a name of its own: the Hub merges those of one data set under the first name."""
    names = {"knn_byol": f"{results.get('k', 20)}-NN top-1", "linear_byol": "linear probe top-1"}
    return [(name, results[key]) for key, name in names.items() if results.get(key) is not None]


def _health(record: Mapping[str, Any]) -> str:
    health = record.get("health") or {}
    lines = [line.format(health[name]) for name, line in HEALTH.items() if health.get(name) is not None]
    return "\n".join(lines) or "Not recorded."


def _licence(license: str | None) -> str:
    if license:
        return f"{license}. The licence of the training images may ask for more."
    return "Not stated. Ask the owner of this repository, and mind the licence of the training images."


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:g}"
    text = f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
