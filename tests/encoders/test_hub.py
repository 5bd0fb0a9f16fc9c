import base64
import json
import os
import pickle
import shutil
import socket
import time
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import timm
import torch
import torchvision
from hub_client import Client, Failed
from loopback_hub import LoopbackHub
from pictures import DIGITS, digits_table, encoded, photo
from safetensors.torch import load_file, save_file

from byol_timm.encoders import create_encoder, files_to_push, register, save_encoder
from byol_timm.encoders.card import CARD_END, CARD_START, merge_cards, model_card
from byol_timm.encoders.fetch import PROBE_SECONDS
from byol_timm.errors import ByolTimmError, redact

TOKEN, READER, STRANGER = (f"hf_{name}{'x' * 30}" for name in ("writer", "reader", "other"))
RECIPE = Path(__file__).parents[2] / "recipes" / "push_encoder.py"

ENCODERS = {
    "test_resnet": {},
    "test_vit": {"img_size": 64},
    "test_efficientnet": {},
    "test_resnet2": {"in_chans": 1},
    "coat_lite_tiny": {"img_size": 64},
}

RECORD = {
    "byol_timm": "0.1.0",
    "backbone": "resnet18",
    "backbone_kwargs": {"output_stride": 8},
    "config": {"lr": 0.4, "opt": "lars", "dataset": "/data/alice/x", "hub_token": "abc", "note": f"see {TOKEN}"},
    "data": {"name": "digits", "images": 1437, "channels": 3, "fingerprint": "abc123", "hub_id": "user/digits"},
    "steps": 12000,
    "epochs": 20.0,
    "global_batch": 64,
    "seconds": 5000.0,
    "device": "cpu",
    "results": {
        "knn_raw_pixels": 91.2,
        "knn_random": 88.1,
        "knn_byol": 97.7,
        "linear_byol": 96.4,
        "k": 20,
        "protocol": "cosine, T = .07",
    },
    "processes": 2,
    "precision": "bf16",
    "health": {"feature_std": 0.7, "projection_std": 0.6, "effective_rank": 31.2},
    "versions": {"torch": "2.6"},
    "commit": None,
}


def build(name="test_resnet", **kwargs):
    """An encoder whose weights and running statistics are those of no one else."""
    encoder = timm.create_model(name.rstrip("2"), num_classes=0, **kwargs)
    channels = kwargs.get("in_chans", 3)
    encoder(torch.rand(4, channels, 64, 64))
    return encoder.eval()


def save(encoder, folder, **kwargs):
    return save_encoder(encoder, folder, **{**dict(image_size=64, mean=[0.5], std=[0.25]), **kwargs})


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# In timm's format


@pytest.mark.parametrize("name", ENCODERS)
def test_plain_timm_loads_a_saved_encoder_to_the_same_features(name, tmp_path):
    encoder = build(name, **ENCODERS[name])
    loaded = load(save(encoder, tmp_path / "encoder"))
    images = torch.rand(2, ENCODERS[name].get("in_chans", 3), 64, 64)
    assert torch.equal(loaded(images), encoder(images))
    assert {p.name for p in tmp_path.rglob("*")} == {
        "encoder", "config.json", "model.safetensors", "README.md", "byol.json"
    }  # fmt: skip


def test_the_config_tells_how_images_were_prepared_and_nothing_of_the_default_tag(tmp_path):
    folder = save(build(), tmp_path / "e", image_size=(48, 64), mean=[0.1, 0.2, 0.3], crop_pct=0.9, tag="byol_cifar10")
    facts = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert (facts["input_size"], facts["mean"], facts["crop_pct"]) == ([3, 48, 64], [0.1, 0.2, 0.3], 0.9)
    assert (facts["tag"], facts["num_classes"], facts["license"]) == ("byol_cifar10", 0, None)
    assert timm.data.resolve_data_config(model=load(folder))["input_size"] == (3, 48, 64)


def test_layouts_and_wrappers_leave_the_saved_weights_alone(tmp_path):
    encoder = build()
    wanted = load_file(save(encoder, tmp_path / "plain") / "model.safetensors")
    compiled = torch.compile(encoder.to(memory_format=torch.channels_last))
    found = load_file(save(compiled, tmp_path / "wrapped") / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def changed_stem():
    encoder = build()
    encoder.conv1 = torch.nn.Conv2d(3, 16, 3)
    return encoder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torchvision.models.resnet18, "was not built by timm"),
        (lambda: timm.create_model("test_resnet"), "reset_classifier"),
        (lambda: timm.create_model("test_resnet", features_only=True), "was not built by timm"),
        (changed_stem, "was changed after timm.create_model"),
    ],
)
def test_an_encoder_that_timm_cannot_build_again_is_refused(make, message, tmp_path):
    with pytest.raises(ByolTimmError, match=message):
        save(make(), tmp_path / "encoder")
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_the_encoder_and_keeps_the_users_words(tmp_path):
    folder = save(build(), tmp_path / "encoder", record=RECORD)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace(CARD_START, f"My words.\n\n{CARD_START}") + "\nMore words.\n")
    encoder = build()
    save(encoder, folder, record={**RECORD, "steps": 99999})
    card = (folder / "README.md").read_text()
    assert card.index("My words.") < card.index("99,999") < card.index("More words.")
    assert torch.equal(load(folder).conv1[0].weight, encoder.conv1[0].weight)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize("moment", ["before the renames", "between them", "after them"])
def test_a_kill_while_saving_costs_no_words_and_leaves_nothing_behind(moment, tmp_path):
    folder = save(build(), tmp_path / "encoder")
    (folder / "README.md").write_text("My words.")
    for what in ("new", "old"):
        shutil.copytree(folder, tmp_path / f".tmp-{what}-encoder")
    if moment == "before the renames":
        shutil.rmtree(tmp_path / ".tmp-old-encoder")
    elif moment == "between them":
        shutil.rmtree(folder)
    save(build(), folder)
    assert (folder / "README.md").read_text() == "My words."
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ByolTimmError, match="is not an encoder folder"):
        save(build(), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_decides_who_may_read_an_encoder(umask, tmp_path):
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"x")
    picture.chmod(0o600)
    before = os.umask(umask)
    try:
        folder = save(build(), tmp_path / "encoder", pictures=[picture])
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "README.md", "byol.json", "curves.png"], 0o666 & ~umask
    )


# Folders of others


def huge(config):
    config["pretrained_cfg"]["input_size"] = [3, -1, 64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "does not name an architecture"),
        (lambda c: c.update(architecture="resnet_18"), "has no architecture 'resnet_18'"),
        (lambda c: c.update(architecture=["test_resnet"]), "does not name an architecture"),
        (lambda c: c.update(architecture="test_efficientnet"), "lacks"),
        (lambda c: c.update(model_args={"evil": 1}), "does not describe a network of timm"),
        (lambda c: c.update(model_args={"checkpoint_path": "/etc/passwd"}), "'checkpoint_path' in model_args"),
        (lambda c: c.update(model_args={"pretrained_strict": False}), "'pretrained_strict' in model_args"),
        (lambda c: c.update(model_args=[1]), "must be objects"),
        (lambda c: c["pretrained_cfg"].update(file="/etc/passwd"), "another source of weights"),
        (lambda c: c["pretrained_cfg"].update(hf_hub_filename="evil.bin"), "another source of weights"),
        (lambda c: c["pretrained_cfg"].update(custom_load="hf"), "another file format"),
        (lambda c: c["pretrained_cfg"].update(surprise=1), "unknown key 'surprise'"),
        (lambda c: c["pretrained_cfg"].update(mean="half"), "mean must be numbers"),
        (huge, "three positive numbers"),
    ],
)
def test_a_config_that_timm_cannot_be_trusted_with_is_refused_in_one_line(change, message, tmp_path):
    folder = save(build(), tmp_path / "encoder")
    create_encoder(f"local-dir:{folder}")
    edit(folder, change)
    with pytest.raises(ByolTimmError, match=message) as raised:
        create_encoder(f"local-dir:{folder}")
    assert "\n" not in str(raised.value)


def test_broken_files_are_refused_in_one_line(tmp_path):
    folder = save(build(), tmp_path / "encoder")
    weights = (folder / "model.safetensors").read_bytes()
    tensors = load_file(folder / "model.safetensors")
    not_finite = {name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in tensors.items()}
    other_shape = {**tensors, "conv1.0.weight": torch.zeros(2)}
    for broken, message in ((not_finite, "not finite"), (other_shape, "in another shape"), ({}, "lacks")):
        save_file(broken, folder / "model.safetensors")
        with pytest.raises(ByolTimmError, match=message):
            create_encoder(f"local-dir:{folder}")
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ByolTimmError, match="is damaged"):
        create_encoder(f"local-dir:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ByolTimmError, match=r"has no model\.safetensors"):
        create_encoder(f"local-dir:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(ByolTimmError, match="is not JSON"):
        create_encoder(f"local-dir:{folder}")
    with pytest.raises(ByolTimmError, match="cannot be read"):
        create_encoder(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("byol.json", b"[1]", "is not a JSON object"),
        ("byol.json", b"{", "is not JSON"),
        ("README.md", b"\xf6", "is not UTF-8"),
    ],
)
def test_a_record_or_card_that_is_damaged_is_named(name, content, message, tmp_path):
    folder = save(build(), tmp_path / "encoder", record=RECORD)
    (folder / name).write_bytes(content)
    with pytest.raises(ByolTimmError, match=f"{name} {message}"):
        files_to_push(folder, "user/name")


# A tag of timm's own


def test_a_registered_encoder_is_a_tag_beside_the_others(tmp_path):
    before = timm.list_models("test_vit*", pretrained=True)
    default = timm.models.get_pretrained_cfg("test_vit").tag
    encoder = build("test_vit", img_size=64)
    folder = save(encoder, tmp_path / "encoder")
    for _ in range(2):
        assert register(f"local-dir:{folder}", tag="byol_x") == "test_vit.byol_x"
    assert timm.list_models("*.byol_x", pretrained=True) == ["test_vit.byol_x"]
    assert sorted(timm.list_models("test_vit*", pretrained=True)) == sorted([*before, "test_vit.byol_x"])
    assert timm.models.get_pretrained_cfg("test_vit").tag == default
    assert timm.create_model("test_vit").num_classes == 1000
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(timm.create_model("test_vit.byol_x", pretrained=True).eval()(images), encoder(images))


def test_a_tag_that_would_lose_arguments_or_hide_other_weights_is_refused(tmp_path):
    dilated = save(build(output_stride=8), tmp_path / "dilated")
    with pytest.raises(ByolTimmError, match=r"cannot carry the arguments.*output_stride=8"):
        register(f"local-dir:{dilated}", tag="byol_y")
    plain = save(build(), tmp_path / "plain")
    with pytest.raises(ByolTimmError, match="knows other weights"):
        register(f"local-dir:{plain}", tag="r160_in1k")
    with pytest.raises(ByolTimmError, match="a tag consists of"):
        register(f"local-dir:{plain}", tag="a/b")
    with pytest.raises(ByolTimmError, match="comes from"):
        register(str(plain), tag="byol_y")
    assert not timm.list_models("*.byol_y", pretrained=True)


# The card


def test_the_card_says_what_the_record_holds_and_no_secret():
    config = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 32, 32]}}
    card = model_card(RECORD, config=config, repo_id="user/name", license="cc-by-4.0", pictures=["curves.png"])
    for text in (
        "# resnet18 pretrained with BYOL on digits", "library_name: timm", "pipeline_tag: image-feature-extraction",
        "- user/digits", "license: cc-by-4.0", "name: 20-NN top-1", "value: 97.7", "name: linear probe top-1",
        "value: 96.4", 'hf-hub:user/name", pretrained=True',
        "features_only=True", "num_classes=10", "output_stride | 8", "| lars |", "on 1,437 images", "abc123", "88.1 %",
        "91.2 %", "**linear probe top-1, this encoder** | 96.4 %", "cosine, T = .07. Linear probe: a linear classifier",
        "0.700", "shows first: 0.600", "31.2", "| precision | bf16 |", "1 h 23 min", "12,000", "All settings",
        "![Training curves](curves.png)",
        "grill2020bootstrap", "## Limits",
    ):  # fmt: skip
        assert text in card, text
    assert "embedding.png" not in card and "alice" not in card and TOKEN not in card and "base_model" not in card
    bare = model_card({}, config=config)
    assert "Not stated" in bare and "license:" not in bare and "model-index" not in bare and "USER/NAME" in bare


@pytest.mark.parametrize(
    ("backbone", "pretrained", "base_model"),
    [
        ("resnet18.a1_in1k", True, "timm/resnet18.a1_in1k"),
        ("resnet18", True, "timm/resnet18.a1_in1k"),
        ("hf-hub:user/name@v2", False, "user/name"),
        ("local-dir:x", False, None),
    ],
)
def test_the_card_names_the_model_that_training_started_from(backbone, pretrained, base_model):
    config = {"architecture": "resnet18", "pretrained_cfg": {}}
    card = model_card({"backbone": backbone, "config": {"pretrained": pretrained}}, config=config)
    assert (f"base_model: {base_model}\n" in card) == (base_model is not None)


def test_merging_keeps_the_users_words_and_metadata():
    ours = model_card({}, config={"architecture": "resnet18", "pretrained_cfg": {}})
    theirs = f"---\nlicense: mit\ntags: [birds]\nlanguage: en\n---\nHello\n{CARD_START}\nold\n{CARD_END}\nBye\n"
    merged = merge_cards(theirs, ours)
    assert "license: mit" in merged and "- birds\n- timm" in merged and "language: en" in merged
    assert merged.index("Hello") < merged.index(CARD_START) < merged.index(CARD_END) < merged.index("Bye")
    assert "\nold\n" not in merged and merged.count(CARD_START) == 1
    assert merge_cards(merged, ours) == merged
    assert merge_cards("Only words", ours).index("Only words") < merge_cards("Only words", ours).index(CARD_START)
    with pytest.raises(ByolTimmError, match="not YAML"):
        merge_cards("---\n{\n---\n", ours)


def test_redaction_leaves_values_and_takes_secrets_and_places():
    home = Path.home()
    value = {
        "api_key": "abc", "HF_TOKEN": "abc", "password": "", "keys": 3, "lr": 0.1, "list": [f"x {TOKEN} y", None],
        "tokens": ["abc"], "reg_tokens": 2, "class_token": True,
        "folder": home / "data" / "birds", "command": f"python {home}/train.py /home/alice/x", "monkey": "yes",
        "undecoded": "na\udcc3\udcafve", "backbone": "local-dir:/data/alice/run", "said": "see /srv/data/a.png, a/b/c",
        "page": "https://hub.example/a/b",
    }  # fmt: skip
    assert redact(value) == {
        "api_key": "[redacted]", "HF_TOKEN": "[redacted]", "password": "", "keys": 3, "lr": 0.1,
        "tokens": "[redacted]", "reg_tokens": 2, "class_token": True, "list": ["x [redacted] y", None],
        "folder": ".../birds", "command": "python ~/train.py ~/x", "monkey": "yes",
        "undecoded": "naïve", "backbone": "local-dir:.../run", "said": "see .../a.png, a/b/c",
        "page": "https://hub.example/a/b",
    }  # fmt: skip


def test_what_would_be_pushed_is_a_fixed_list(tmp_path):
    run = tmp_path / "run"
    save(build(), run / "encoder", record=RECORD)
    for name in ("curves.png", "secret.txt", "model.pkl"):
        (run / name).write_bytes(b"x")
        (run / "encoder" / name).write_bytes(b"x")
    files = files_to_push(run, "user/name")
    assert set(files) == {"config.json", "model.safetensors", "README.md", "byol.json", "curves.png"}
    assert b"alice" not in files["byol.json"]
    with pytest.raises(ByolTimmError, match="holds no encoder"):
        files_to_push(tmp_path, "user/name")


# To a Hub and back


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub() as hub:
        hub.tokens = {TOKEN: ("tester", "write"), READER: ("tester", "read"), STRANGER: ("somebody", "write")}
        yield hub
    assert TOKEN in {request[3] for request in hub.log}
    assert_no_token([*pushed(hub), *written(tmp_path_factory.getbasetemp())])


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(tmp_path_factory.mktemp("client"), hub.url, HF_TOKEN=TOKEN) as client:
        yield client
    assert_no_token([client.output.encode()])


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """Somebody with timm and a token for the private repositories, and without byol_timm."""
    with Client(tmp_path_factory.mktemp("stranger"), hub.url, byol_timm=False, HF_TOKEN=TOKEN) as stranger:
        yield stranger


def pushed(hub):
    repositories = hub.repositories.items()
    return [data for name, known in repositories for ref in known["refs"] for data in hub.files(name, ref).values()]


def written(folder):
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def assert_no_token(texts):
    for token in (TOKEN, READER, STRANGER):
        assert not any(token.encode() in text for text in texts)


@pytest.fixture(autouse=True)
def no_faults(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults.clear()


def push(client, folder, repo_id, token=TOKEN, **kwargs):
    code = """
    import os
    from byol_timm.encoders import push_encoder
    os.environ["HF_TOKEN"] = token
    result = push_encoder(folder, repo_id, **eval(kwargs))
    """
    return client.run(code, folder=folder, repo_id=repo_id, token=token, kwargs=repr(kwargs))


def check(client, repo_id, token=TOKEN, **kwargs):
    code = """
    import os
    from byol_timm.encoders import check_push
    os.environ["HF_TOKEN"] = token
    result = check_push(repo_id, **eval(kwargs))
    """
    return client.run(code, repo_id=repo_id, token=token, kwargs=repr(kwargs))


def fetch(client, name):
    code = """
    from byol_timm.encoders import create_encoder, fetch_encoder
    create_encoder(name)
    result = str(fetch_encoder(name))
    """
    return client.run(code, name=f"hf-hub:{name.removeprefix('hf-hub:')}")


def assert_one_line(failed, *texts, exit_code=2):
    assert failed.value.exit_code == exit_code, failed.value
    assert "\n" not in failed.value.text and TOKEN not in failed.value.text
    for text in texts:
        assert text in failed.value.text


PRETRAIN = """
import logging, sys
from byol_timm import PretrainConfig, pretrain
logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
settings = dict(hidden_dim=32, projection_dim=16, epochs=1, batch_size=8, workers=0, license="mit")
encoder = pretrain(PretrainConfig(**{**settings, **eval(changes)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_whoever_has_timm_alone_gets_the_features_of_a_run_from_the_hub(name, hub, client, stranger, tmp_path):
    with pytest.raises(Failed, match="no byol_timm here"):
        stranger.run("import byol_timm")
    kwargs, architecture = dict(ENCODERS[name]), name.rstrip("2")
    channels = kwargs.pop("in_chans", 3)
    for place in range(24):
        path = tmp_path / "images" / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(48 + place, 64).save(path)
    torch.save(torch.rand(2, channels, 64, 64), tmp_path / "images.pt")
    changes = dict(
        backbone=architecture, image_size=64, in_chans=channels, dataset=str(tmp_path / "images"),
        output_dir=str(tmp_path / "run"), push_to_hub=f"tester/{name}",
    )  # fmt: skip
    code = (
        PRETRAIN
        + """
import torch
from byol_timm import create_encoder
images = torch.load(f"{folder}/images.pt")
features = encoder.to(memory_format=torch.contiguous_format)(images)
torch.save(features, f"{folder}/features.pt")
again = create_encoder("hf-hub:" + eval(changes)["push_to_hub"], image_size=64, in_chans=images.shape[1]).eval()
result = torch.equal(again(images), features)
"""
    )
    assert client.run(code, folder=tmp_path, changes=changes)
    code = """
    import timm, torch
    from pathlib import Path
    images, features = (torch.load(Path(folder) / file) for file in ("images.pt", "features.pt"))
    load = lambda **kwargs: timm.create_model(f"hf-hub:tester/{name}", pretrained=True, **kwargs).eval()
    encoder, classifier, pyramid = load(), load(num_classes=37), load(features_only=True)
    other = 3 if images.shape[1] == 1 else 1
    result = [
        torch.equal(encoder(images), features),
        torch.equal(classifier.forward_head(classifier.forward_features(images), pre_logits=True), features),
        list(classifier(images).shape),
        all(torch.isfinite(level).all().item() for level in pyramid(images)),
        list(load(in_chans=other)(torch.rand(1, other, 64, 64)).shape),
    ]
    """
    width = timm.create_model(architecture, num_classes=0).head_hidden_size
    assert stranger.run(code, folder=tmp_path, name=name) == [True, True, [2, 37], True, [1, width]]
    assert hub.repositories[f"tester/{name}"]["private"]
    assert hub.messages(f"tester/{name}") == ["initial commit", f"{architecture} pretrained with BYOL"]
    assert set(hub.files(f"tester/{name}")) == {
        ".gitattributes", "config.json", "model.safetensors", "README.md", "byol.json", "curves.png", "embedding.png"
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(hub, client, tmp_path_factory):
    """A run on a folder of photos, two of them unreadable, pushed to tester/continued."""
    place = tmp_path_factory.mktemp("holidays-of-bob")
    for number in range(44):
        path = place / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(32 + number, 32).save(path)
    for label in "ab":
        (place / "photos" / label / "wedding.jpg").write_bytes(b"not an image")
    changes = dict(
        backbone="test_resnet", image_size=32, dataset=os.path.relpath(place / "photos", client.home), split_seed=7,
        output_dir=str(place / "run"), push_to_hub="tester/continued",
    )  # fmt: skip
    client.run(PRETRAIN, changes=changes)
    return place / "run"


def test_nothing_about_single_images_and_no_local_path_leaves_the_machine(hub, run):
    assert "wedding.jpg" in (run / "bad_images.txt").read_text()
    for text in [*hub.received, *pushed(hub), *(path.encode() for _, path, *_ in hub.log)]:
        assert b"wedding" not in text and b"holidays-of-bob" not in text and str(run.parent).encode() not in text
    files = hub.files("tester/continued")
    assert json.loads(files["byol.json"])["config"]["dataset"] == ".../photos"
    assert "on photos" in files["README.md"].decode()


def test_the_encoder_carries_the_seed_that_drew_its_held_out_images(hub, client, run):
    for record in (hub.files("tester/continued")["byol.json"], (run / "encoder" / "byol.json").read_bytes()):
        assert json.loads(record)["config"]["split_seed"] == 7
    code = """
    from byol_timm.encoders import fetch_encoder, read_record
    result = read_record(fetch_encoder("hf-hub:tester/continued"))["config"]["split_seed"]
    """
    assert client.run(code) == 7


def test_a_run_with_a_token_leaves_it_nowhere_and_its_encoder_starts_another_run(hub, client, run, tmp_path):
    assert len(written(run)) > 10 and "pushed to" in client.output
    assert_no_token([*written(run), *pushed(hub), client.output.encode()])
    files = hub.files("tester/continued")
    card, record = files["README.md"].decode(), json.loads(files["byol.json"])
    for text in ("license: mit", "name: 20-NN top-1", "![Training curves]", "![Map of the representation]"):
        assert text in card, text
    # In a clone, but not in an unpacked archive.
    cloned = (Path(__file__).parents[2] / ".git").exists()
    assert ("commit | " in card) == cloned and len((record["commit"] or "").rstrip("+")) == 40 * cloned
    changes = dict(backbone="hf-hub:tester/continued", image_size=32, dataset=str(run.parent / "photos"))
    client.run(PRETRAIN, changes=dict(changes, output_dir=str(tmp_path / "more")))
    assert "base_model: tester/continued" in (tmp_path / "more" / "encoder" / "README.md").read_text()


def test_revisions_other_sizes_and_registered_tags_come_from_the_hub(hub, client, stranger, tmp_path):
    encoder = build("test_vit", img_size=64)
    folder = save(encoder, tmp_path / "encoder", record=RECORD)
    push(client, folder, "tester/vit")
    first = load_file(folder / "model.safetensors")
    folder = save(build("test_vit", img_size=64), tmp_path / "encoder", record=RECORD)
    address = push(client, folder, "tester/vit", revision="v2")
    assert address == f"{hub.url}/tester/vit/tree/v2"
    second = load_file(folder / "model.safetensors")
    code = """
    import timm, torch
    from safetensors.torch import save_file
    encoder = timm.create_model(name, pretrained=True)
    larger = timm.create_model(name, pretrained=True, img_size=96)
    assert larger(torch.rand(1, 3, 96, 96)).shape == (1, 64)
    save_file(encoder.state_dict(), file)
    """
    for name, wanted in (("hf-hub:tester/vit", first), ("hf-hub:tester/vit@v2", second)):
        stranger.run(code, name=name, file=tmp_path / "loaded")
        found = load_file(tmp_path / "loaded")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    code = """
    import timm
    from safetensors.torch import save_file
    from byol_timm.encoders import register
    assert register("hf-hub:tester/vit@v2", tag="byol_digits") == "test_vit.byol_digits"
    assert timm.list_models("*.byol*", pretrained=True) == ["test_vit.byol_digits"]
    save_file(timm.create_model("test_vit.byol_digits", pretrained=True).state_dict(), file)
    """
    client.run(code, file=tmp_path / "loaded")
    found = load_file(tmp_path / "loaded")
    assert all(torch.equal(found[key], second[key]) for key in second)


def test_the_cache_serves_when_the_hub_does_not(hub, client, tmp_path):
    push(client, save(build(), tmp_path / "encoder"), "tester/cached")
    folder = fetch(client, "hf-hub:tester/cached")
    code = """
    import logging, io
    from huggingface_hub import constants
    from byol_timm.encoders import fetch_encoder
    said = io.StringIO()
    logging.getLogger("byol_timm").addHandler(logging.StreamHandler(said))
    endpoint, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
    try:
        result = [str(fetch_encoder(name)), said.getvalue()]
    finally:
        constants.ENDPOINT = endpoint
    """
    found, said = client.run(code, name="tester/cached")
    assert found == folder
    assert "cannot be reached" in said and "using the cached copy" in said
    with pytest.raises(Failed) as failed:
        client.run(code, name="tester/never-fetched")
    assert_one_line(failed, "is not in the cache and http://127.0.0.1:9 cannot be reached")
    code = """
    import timm
    from huggingface_hub import constants
    constants.HF_HUB_OFFLINE = True
    try:
        result = timm.create_model("hf-hub:tester/cached", pretrained=True).head_hidden_size
    finally:
        constants.HF_HUB_OFFLINE = False
    """
    assert client.run(code) == build().head_hidden_size


def test_pushing_again_is_one_commit_and_keeps_the_users_words(hub, client, tmp_path):
    folder = save(build(), tmp_path / "encoder", record=RECORD)
    push(client, folder, "tester/twice")
    card = hub.files("tester/twice")["README.md"].decode()
    assert "hf-hub:tester/twice" in card and "Not stated" in card
    edited = card.replace("---\n\n", "license: mit\n---\n\n# My birds\n\n", 1) + "\nAsk me anything.\n"
    hub.commit(
        "tester/twice",
        "main",
        [("file", dict(path="README.md", content=base64.b64encode(edited.encode()).decode()))],
        "words",
    )
    save(build(), folder, record={**RECORD, "steps": 77777})
    push(client, folder, "tester/twice", license=None)
    card = hub.files("tester/twice")["README.md"].decode()
    assert card.index("# My birds") < card.index("77,777") < card.index("Ask me anything.")
    assert "license: mit" in card and "Not stated" not in card
    assert len(hub.messages("tester/twice")) == 4
    assert hub.files("tester/twice")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    push(client, folder, "tester/twice", license="cc-by-4.0")
    assert "license: cc-by-4.0" in hub.files("tester/twice")["README.md"].decode()


def test_metadata_that_the_hub_refuses_are_reported_in_one_line(hub, client, tmp_path):
    folder = save(build(), tmp_path / "encoder")
    with pytest.raises(Failed) as failed:
        push(client, folder, "tester/nonsense", license="nonsense")
    assert_one_line(failed, '"license" must be one of', "to push it: python recipes/push_encoder.py")


def test_arguments_of_the_network_arrive_whatever_their_names(hub, client, tmp_path):
    # `reg_tokens` and `class_token` look like secrets.
    encoder = timm.create_model("test_vit", num_classes=0, img_size=64, reg_tokens=2, class_token=True).eval()
    folder = save(encoder, tmp_path / "encoder", record={"backbone_kwargs": {"reg_tokens": 2}})
    push(client, folder, "tester/registers")
    pushed = hub.files("tester/registers")
    assert (
        json.loads(pushed["config.json"])["model_args"]
        == json.loads((folder / "config.json").read_text())["model_args"]
    )
    assert json.loads(pushed["byol.json"])["backbone_kwargs"] == {"reg_tokens": 2}
    assert "| 2 |" in pushed["README.md"].decode()


def test_what_forbids_a_push_is_reported_before_training(hub, client, tmp_path):
    assert check(client, "fresh") == "tester/fresh"
    assert hub.repositories["tester/fresh"]["private"]
    assert check(client, "tester/open", public=True) == "tester/open"
    assert not hub.repositories["tester/open"]["private"]
    hub.create("somebody/public", private=False)
    cases = [
        (dict(repo_id="tester/x", token=""), ["no Hugging Face token", "hf auth login"]),
        (dict(repo_id="tester/x", token="hf_expired" + "x" * 30), ["token is not valid"]),
        (dict(repo_id="tester/x", token=READER), ["tester may not write to tester/x", "write permission"]),
        (dict(repo_id="somebody/x"), ["tester may not write to somebody/x"]),
        (dict(repo_id="somebody/public"), ["tester may not write to somebody/public"]),
        (dict(repo_id="tester/fresh", public=True), ["exists and is private", "--public"]),
        (dict(repo_id="tester/open"), ["exists and is public", "--public"]),
    ]
    for name in ("../x", "a/b/c", "a/..", "a/b c", "a/b\nc", "-a/b", "", "a/b.git", "https://hub/a/b"):
        cases.append((dict(repo_id=name), ["is not the name of a Hub repository", "user/name"]))
    for arguments, texts in cases:
        with pytest.raises(Failed) as failed:
            check(client, **arguments)
        assert_one_line(failed, *texts)
    assert "tester/x" not in hub.repositories
    # A run asks first of all.
    with pytest.raises(Failed) as failed:
        client.run(PRETRAIN, changes=dict(output_dir=str(tmp_path / "run"), push_to_hub="somebody/public"))
    assert_one_line(failed, "tester may not write to somebody/public")
    assert not (tmp_path / "run").exists()


def test_a_failing_hub_loses_nothing_and_the_message_holds_the_command(hub, client, tmp_path):
    folder = save(build(), tmp_path / "my encoder")
    for fault, status in (["POST", "/api/repos/create", 503, 99], 503), (["POST", "/commit/", 400, 99], 400):
        hub.faults[:] = [fault]
        with pytest.raises(Failed) as failed:
            push(client, folder, "tester/faulty", revision="v2", license="mit")
        command = f"python recipes/push_encoder.py '{folder}' tester/faulty --revision v2 --license mit"
        assert_one_line(failed, f"the Hub answered {status}", "is safe in", command, exit_code=3)
    hub.faults.clear()
    push(client, folder, "tester/faulty", revision="v2", license="mit")
    assert create_encoder(f"local-dir:{folder}")


def test_a_hub_that_stumbles_once_is_asked_again(hub, client, tmp_path):
    torch.manual_seed(1)  # weights that the Hub does not hold yet
    folder = save(build(), tmp_path / "encoder")
    hub.faults[:] = [["PUT", "/lfs/", 503, 1]]
    push(client, folder, "tester/stumble")
    assert hub.faults[0][3] == 0
    assert hub.files("tester/stumble")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [["PUT", "/lfs/", 503, 99], ["POST", "/commit/", 500, 99]])
def test_a_hub_that_fails_in_the_middle_of_an_upload_leaves_the_encoder(hub, client, tmp_path, fault):
    torch.manual_seed(fault[2])
    folder = save(build(), tmp_path / "encoder")
    hub.faults[:] = [list(fault)]
    with pytest.raises(Failed) as failed:
        push(client, folder, "tester/middle")
    assert_one_line(failed, f"the Hub answered {fault[2]}", f"push_encoder.py {folder} tester/middle", exit_code=3)
    assert create_encoder(f"local-dir:{folder}")


@pytest.mark.slow
def test_a_hub_that_is_busy_is_not_taken_for_a_missing_repository(hub, client):
    hub.create("somebody/busy", private=False, files={"config.json": b"{}"})
    hub.faults[:] = [["HEAD", "/resolve/", 429, 99]]
    with pytest.raises(Failed) as failed:
        fetch(client, "somebody/busy")
    assert_one_line(failed, "somebody/busy", "429", "Try again later")


def test_without_a_network_the_message_comes_within_five_seconds(hub, client):
    assert PROBE_SECONDS + 1 < 5
    code = """
    from huggingface_hub import constants
    from byol_timm.encoders import check_push
    endpoint, constants.ENDPOINT = constants.ENDPOINT, url
    try:
        check_push("tester/x")
    finally:
        constants.ENDPOINT = endpoint
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url in (
            "http://127.0.0.1:9",
            "http://no-such-host.invalid",
            f"http://127.0.0.1:{silent.getsockname()[1]}",
        ):
            start = time.monotonic()
            with pytest.raises(Failed) as failed:
                client.run(code, url=url)
            # Twice as long where other tests keep the processors busy.
            assert time.monotonic() - start < 10
            assert_one_line(failed, url, "Push later", exit_code=3)


def test_without_a_network_what_is_in_the_cache_loads_and_the_rest_is_one_line(tmp_path):
    network = timm.create_model("test_resnet")
    commit = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k" / "snapshots" / "0123abc"
    commit.mkdir(parents=True)
    save_file(network.state_dict(), commit / "model.safetensors")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    load = """
    from byol_timm.encoders import create_encoder
    result = next(create_encoder(name, pretrained=True).parameters()).sum().item()
    """
    read = "from byol_timm.data import open_dataset; open_dataset(name)"
    stream = "from byol_timm.data import open_stream; open_stream(name)"
    with Client(tmp_path, "http://127.0.0.1:9") as alone:
        assert alone.run(load, name="test_resnet") == next(network.parameters()).sum().item()
        for code, name in (load, "test_vit"), (read, "somebody/images"), (stream, "somebody/images"):
            start = time.monotonic()
            with pytest.raises(Failed) as failed:
                alone.run(code, name=name)
            # Most of it are imports; the client by itself tries for half a minute and more.
            assert time.monotonic() - start < 20
            assert_one_line(failed, name, "http://127.0.0.1:9 cannot be reached")
        assert not alone.output


def test_what_is_not_there_or_not_for_us_is_reported_in_one_line(hub, client, tmp_path):
    hub.create("somebody/secret", private=True)
    hub.create("somebody/gated", private=False, gated=True, files={"config.json": b"{}"})
    hub.create("somebody/text", private=False, files={"a.txt": b"hello"})
    config = (save(build(), tmp_path / "encoder") / "config.json").read_bytes()
    marker = tmp_path / "ran"
    planted = pickle.dumps(Planted(marker))
    hub.create("somebody/pickle", private=False, files={"config.json": config, "pytorch_model.bin": planted})
    hub.create("somebody/odd", private=False, files={"config.json": b"[]", "model.safetensors": b"x"})
    for name, texts in {
        "somebody/nothing": ["not on the Hub, or private, or gated"],
        "somebody/secret": ["not on the Hub, or private, or gated"],
        "somebody/gated": ["accept its terms at", "/somebody/gated"],
        "somebody/text": ["has no config.json: is it a timm model?"],
        "somebody/text@v9": ["has no revision 'v9'"],
        "somebody/pickle": ["has no model.safetensors", "unsafe"],
        "somebody/odd": ["does not name an architecture"],
        "../../etc/passwd": ["is not the name of a Hub repository"],
    }.items():
        with pytest.raises(Failed) as failed:
            fetch(client, f"hf-hub:{name}")
        assert_one_line(failed, *texts)
    assert not marker.exists()


def test_images_of_a_data_set_on_the_hub_come_by_its_id_and_nothing_stands_in_for_one_that_is_not_there(
    hub, client, tmp_path
):
    table = digits_table(60)
    files = {}
    for split, rows in (("train", range(40)), ("test", range(40, 60))):
        table.select(rows).to_parquet(tmp_path / f"{split}.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / f"{split}.parquet").read_bytes()
    hub.create("tester/scans", files=files)
    code = """
    from byol_timm.data import hub_id, open_dataset
    splits = open_dataset(name, split=split)
    labels = [images.labels.tolist() for images in (splits.train, splits.test)]
    result = [hub_id(name), splits.note, *labels, splits.train.decode(0)[0].tolist()]
    """
    name, note, train, test, pixels = client.run(code, name="tester/scans", split="train")
    assert name == "tester/scans"
    assert "split train, 10 classes" in note and "evaluation on split test (20 images)" in note
    assert (train, test) == (DIGITS.target[:40].tolist(), DIGITS.target[40:60].tolist())
    assert pixels == (DIGITS.images[0] * 15).astype(int).tolist()
    for name, split, texts in (
        ("tester/nothing", "train", ["tester/nothing is not a folder here and cannot be loaded from the Hub"]),
        ("tester/scans", "val", ["no split val", "train, test"]),
    ):
        with pytest.raises(Failed) as failed:
            client.run(code, name=name, split=split)
        assert_one_line(failed, *texts)


def test_a_table_of_the_hub_reads_no_local_picture_and_a_folder_of_images_there_is_read(hub, client, tmp_path):
    photo(12, 10).save(tmp_path / "private.png")
    rows = [{"bytes": encoded(photo(12, 10, place)), "path": None} for place in range(3)]
    rows.append({"bytes": None, "path": str(tmp_path / "private.png")})
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    # Not `to_parquet`, which would put the picture inside.
    pyarrow.parquet.write_table(table.data.table, tmp_path / "a.parquet")
    hub.create("tester/spy", files={"a.parquet": (tmp_path / "a.parquet").read_bytes()})
    hub.create("tester/folder", files={f"train/{name}.png": encoded(photo(12, 10)) for name in ("cat", "dog")})
    code = """
    from byol_timm.data import BadImage, open_dataset
    images, result = open_dataset(name).train, []
    for index in range(len(images)):
        try:
            result.append(list(images.decode(index).shape))
        except BadImage as reason:
            result.append(str(reason))
    """
    *shapes, reason = client.run(code, name="tester/spy")
    assert shapes == [[3, 10, 12]] * 3 and "names a file on this machine" in reason
    assert client.run(code, name="tester/folder") == [[3, 10, 12]] * 2


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_the_recipe_prints_what_it_would_push_then_pushes(hub, client, tmp_path):
    save(build(), tmp_path / "run" / "encoder", record=RECORD)

    def recipe(*arguments):
        code = """
        import contextlib, io, os, runpy, sys
        os.environ["HF_TOKEN"] = token
        sys.argv = [recipe, *eval(arguments)]
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(recipe, run_name="__main__")
            except SystemExit as stop:
                status = stop.code
        result = [status, out.getvalue(), err.getvalue()]
        """
        return client.run(code, recipe=RECIPE, token=TOKEN, arguments=[str(tmp_path / "run"), *arguments])

    status, out, err = recipe("tester/recipe", "--dry_run")
    assert status == 0 and "model.safetensors" in out and "private" in out, err
    assert "tester/recipe" not in hub.repositories and "--license" in out
    status, out, err = recipe("tester/recipe", "--public")
    assert "states no licence" in out
    assert status == 0 and f"pushed to {hub.url}/tester/recipe" in out and "hf-hub:tester/recipe" in out, err
    assert "states no licence" not in recipe("tester/recipe", "--public", "--license", "mit")[1]
    # What the Hub has stays.
    assert "states no licence" not in recipe("tester/recipe", "--public")[1]
    status, _, err = recipe("tester/re cipe")
    assert status == 2 and err.startswith("byol_timm: error: 'tester/re cipe' is not the name") and err.count("\n") == 1
    hub.faults[:] = [["POST", "/api/repos/create", 503, 99]]
    status, _, err = recipe("tester/recipe2")
    assert status == 3 and err.startswith("byol_timm: error: the Hub answered 503") and err.count("\n") == 1
