import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from byol_timm import PretrainConfig, pretrain
from byol_timm.cli import parse
from byol_timm.config import EvaluationConfig
from byol_timm.encoders import freeze_parts
from byol_timm.errors import ByolTimmError
from byol_timm.evaluation import dataset_features, extract_features, heldout, knn, open_evaluation
from byol_timm.pretraining import open_images, plan, redraw, resolve
from byol_timm.training import (
    Interrupted,
    Schedule,
    load_latest,
    read_metrics,
    save_checkpoint,
)
from byol_timm.training.processes import _cores

QUICK = PretrainConfig(
    backbone="test_resnet", image_size=32, epochs=1, batch_size=256, hidden_dim=64, projection_dim=32, knn_every=1
)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def quick(folder, **changes):
    return dataclasses.replace(QUICK, output_dir=str(folder), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, pretrain(quick(folder))


def weights(folder):
    return (folder / "encoder" / "model.safetensors").read_bytes()


def digits_folder(folder, count, labelled):
    digits = load_digits()
    for index in range(count):
        place = folder / str(digits.target[index]) if labelled else folder / "deep" / "er"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).astype("uint8")).save(place / f"{index}.png")
    return folder


# What a run leaves


def test_a_run_leaves_everything_it_promises(run):
    folder, _ = run
    promised = "config.yaml environment.json metrics.jsonl checkpoints encoder results.json report.html"
    promised += " curves.png views.png embedding.png neighbours.png confusion.png"
    assert {name for name in promised.split() if not (folder / name).exists()} == set()
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} <= {
        "", ".yaml", ".json", ".jsonl", ".png", ".md", ".safetensors", ".html"
    }  # fmt: skip
    results = json.loads((folder / "results.json").read_text())["results"]
    rows = read_metrics(folder / "metrics.jsonl")
    assert results["knn_byol"] == 100 * rows[-1]["knn"]
    assert results["knn_random"] == 100 * rows[0]["knn"]
    assert results["linear_byol"] == 100 * rows[-1]["linear"]
    assert "linear" not in rows[0]
    assert 90 < results["knn_raw_pixels"] <= 100


def test_plain_timm_loads_the_encoder_to_the_same_bits_without_byol_timm(run, tmp_path):
    folder, encoder = run
    images = torch.rand(4, 3, 32, 32)
    save_file({"images": images}, tmp_path / "images.safetensors")
    script = f"""
import sys
sys.modules["byol_timm"] = None
import timm, torch
from safetensors.torch import load_file, save_file
encoder = timm.create_model("local-dir:{folder}/encoder", pretrained=True).eval()
with torch.no_grad():
    save_file({{"features": encoder(load_file("images.safetensors")["images"])}}, "features.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = encoder.to(memory_format=torch.contiguous_format)(images)
    assert torch.equal(load_file(tmp_path / "features.safetensors")["features"], expected)


def test_the_online_encoder_is_shipped_and_its_target_has_followed(run):
    folder, _ = run
    state = load_latest(folder / "checkpoints").tensors["byol"]
    shipped = load_file(folder / "encoder" / "model.safetensors")
    assert all(torch.equal(state[f"encoder.{name}"], tensor) for name, tensor in shipped.items())
    moved = [name for name in state if name.startswith("encoder.") and state[name].is_floating_point()]
    assert any(not torch.equal(state[name], state[f"target_{name}"]) for name in moved)
    torch.manual_seed(0)
    initial = timm.create_model("test_resnet", num_classes=0).state_dict()
    for name, parameter in timm.create_model("test_resnet", num_classes=0).named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(state[f"target_encoder.{name}"], initial[name])


def test_the_last_accuracy_is_that_of_the_shipped_encoder_and_not_of_its_target(run):
    folder, _ = run
    encoder, splits, preparation = open_evaluation(EvaluationConfig(encoder=f"local-dir:{folder}/encoder", workers=0))
    state = load_latest(folder / "checkpoints").tensors["byol"]
    target = copy.deepcopy(encoder)
    target.load_state_dict({name: state[f"target_encoder.{name}"] for name in target.state_dict()})
    accuracies = []
    for network in (encoder, target):
        bank, queries = (dataset_features(network, part, preparation)[0] for part in (splits.train, splits.test))
        accuracies.append(knn(bank, splits.train.labels, queries, splits.test.labels))
    assert accuracies[0] == read_metrics(folder / "metrics.jsonl")[-1]["knn"] != accuracies[1]


def test_learning_rate_and_target_decay_follow_the_paper(run):
    folder, _ = run
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    schedule = Schedule(5, 5, warmup_steps=0, global_batch=256, peak_lr=2.5, base_target_decay=0.95)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["target_decay"] for row in rows] == [schedule.target_decay(step) for step in range(5)]
    assert rows[0]["lr"] == 2.5


def test_config_yaml_repeats_the_run_to_the_same_bits_and_another_seed_gives_others(run, tmp_path):
    folder, _ = run
    for name, flags in (("again", []), ("other", ["--seed", "1"])):
        config = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / name), *flags]
        pretrain(parse(PretrainConfig, config))
    assert weights(tmp_path / "again") == weights(folder)
    assert weights(tmp_path / "other") != weights(folder)


def test_resuming_a_finished_run_changes_nothing(run):
    folder, _ = run
    before, rows = weights(folder), read_metrics(folder / "metrics.jsonl")
    pretrain(quick(folder, resume=True))
    assert weights(folder) == before
    assert read_metrics(folder / "metrics.jsonl") == rows


def test_what_auto_chose_is_told_written_down_and_the_same_when_resumed(tmp_path, caplog):
    caplog.set_level("INFO")
    config = quick(tmp_path / "run", backbone_kwargs=("norm_layer=batchnorm2d", "auto"))
    pretrain(config)
    assert "--backbone_kwargs auto: norm_layer=batchnorm2d output_stride=8" in caplog.messages
    pairs = ["norm_layer=batchnorm2d", "output_stride=8"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["backbone_kwargs"] == pairs
    record = json.loads((tmp_path / "run" / "encoder" / "byol.json").read_text())
    assert record["backbone_kwargs"] == {"norm_layer": "batchnorm2d", "output_stride": 8}
    assert "output_stride" in (tmp_path / "run" / "encoder" / "README.md").read_text()
    before = weights(tmp_path / "run")
    pretrain(dataclasses.replace(config, resume=True))
    assert weights(tmp_path / "run") == before
    # As byol_timm 0.1 left it.
    state = load_latest(tmp_path / "run" / "checkpoints")
    state.state["config"]["backbone_kwargs"] = ["norm_layer=batchnorm2d", "auto"]
    shutil.rmtree(state.path)
    save_checkpoint(state.path.parent, state.step, state.tensors, state.state)
    pretrain(dataclasses.replace(config, resume=True))
    assert weights(tmp_path / "run") == before


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits_and_figures(run, tmp_path):
    folder, _ = run
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    for path in (again / "checkpoints" / "step-5", again / "encoder"):
        shutil.rmtree(path)
    (again / "results.json").unlink()
    pretrain(quick(again, resume=True))
    assert weights(again) == weights(folder)
    clocks = {"seconds": 0, "images_per_second": 0}
    first, second = ([row | clocks for row in read_metrics(place / "metrics.jsonl")] for place in (folder, again))
    assert first == second
    assert [row["step"] for row in first if "linear" in row] == [5]


def test_an_optimizer_that_reduces_over_its_state_resumes_to_the_same_bits(tmp_path):
    changes = dict(backbone="test_convnext", opt="lamb", lr=0.002, save_every=3, knn_every=9)
    pretrain(quick(tmp_path / "run", **changes))
    wanted = weights(tmp_path / "run")
    for path in ("checkpoints/step-5", "encoder"):
        shutil.rmtree(tmp_path / "run" / path)
    pretrain(quick(tmp_path / "run", **changes, resume=True))
    assert weights(tmp_path / "run") == wanted


def test_a_failed_command_costs_no_earlier_run_and_leaves_no_folder(run, tmp_path):
    again = Path(shutil.copytree(run[0], tmp_path / "run"))
    with pytest.raises(ByolTimmError, match="no/such/folder"):
        pretrain(quick(again, overwrite=True, dataset="no/such/folder"))
    assert weights(again) == weights(run[0])
    with pytest.raises(ByolTimmError, match="no/such/folder"):
        pretrain(quick(tmp_path / "new", dataset="no/such/folder"))
    assert not (tmp_path / "new").exists()

    pretrain(quick(again, overwrite=True, seed=1))
    assert weights(again) != weights(run[0])
    assert not [entry for entry in again.iterdir() if entry.name.startswith(".earlier")]


def test_figures_are_means_over_the_steps_since_the_last_line_whatever_the_interval_was(run, tmp_path):
    folder, _ = run
    again = tmp_path / "run"
    pretrain(quick(again, log_every=5, save_every=3))
    shutil.rmtree(again / "checkpoints" / "step-5")
    (again / "metrics.jsonl").unlink()
    pretrain(quick(again, log_every=1, resume=True))
    losses = {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}
    resumed = {row["step"]: row["loss"] for row in read_metrics(again / "metrics.jsonl") if "loss" in row}
    assert resumed[4] == pytest.approx(sum(losses[step] for step in (1, 2, 3, 4)) / 4)
    assert resumed[5] == losses[5]


def test_a_run_whose_optimizer_held_other_parameters_is_not_resumed(run, tmp_path, monkeypatch):
    again = tmp_path / "run"
    shutil.copytree(run[0], again)
    shutil.rmtree(again / "checkpoints" / "step-5")
    # As if a part meant other parameters when the run began.
    monkeypatch.setattr(plan, "freeze_parts", lambda encoder, _: freeze_parts(encoder, ("stem",)))
    with pytest.raises(ByolTimmError, match=r"something else is frozen\. Use another --output_dir"):
        pretrain(quick(again, resume=True))


def test_the_map_of_a_finished_run_is_drawn_again_by_another_method_and_back(run):
    folder, _ = run
    pictures = [folder / name for name in ("embedding.png", "neighbours.png")]
    before = [path.read_bytes() for path in pictures]
    redraw(folder, method="tsne")
    assert pictures[0].read_bytes() != before[0]
    redraw(folder, method="pca")
    assert [path.read_bytes() for path in pictures] == before


def test_the_probe_leaves_no_trace_in_the_encoder(run, tmp_path, monkeypatch):
    folder, _ = run

    def unlabelled(config):
        splits = open_images(config)
        return dataclasses.replace(splits, train=dataclasses.replace(splits.train, labels=None), test=None)

    monkeypatch.setattr(resolve, "open_images", unlabelled)
    pretrain(quick(tmp_path / "run"))
    assert not any("linear" in row for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert weights(tmp_path / "run") == weights(folder)


def test_a_share_of_the_images_is_part_of_a_larger_one_and_never_held_out():
    shares = [open_images(PretrainConfig(image_share=share)) for share in (0.1, 0.5, 1.0)]
    rows = [set(splits.train.rows.tolist()) for splits in shares]
    assert rows[0] < rows[1] < rows[2]
    assert [len(part) for part in rows] == [144, 719, 1438]
    for splits in shares:
        assert set(splits.test.rows.tolist()) == set(shares[-1].test.rows.tolist())
        assert not rows[2] & set(splits.test.rows.tolist())


def test_images_without_labels_train_and_say_so(tmp_path, caplog):
    folder = digits_folder(tmp_path / "images", 40, labelled=False)
    caplog.set_level("INFO")
    pretrain(quick(tmp_path / "run", dataset=str(folder), batch_size=8, in_chans=1))
    assert "No labels" in caplog.text
    for line in (
        r"device +.+, 1 process, float32",
        r"images +40 of \S+/images, unlabelled: no evaluation",
        r"encoder +test_resnet, 0\.4 M parameters, width 96, images 1 x 32 x 32",
        r"views +small, .*; without saturation, hue, grayscale, which need RGB",
        r"batch +8 = 8 x 1 process; 1 epoch of 5 steps, 5 steps",
        r"optimizer +lars, lr 0\.03125 \(1 per 256 images\), weight decay 1e-06, .* tau from 0\.99",
        r"folder +\S+/run",
    ):
        assert re.search(line, caplog.text), line
    assert "results" not in json.loads((tmp_path / "run" / "results.json").read_text())
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"embedding.png", "neighbours.png", "report.html"} <= left and "confusion.png" not in left
    encoder = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, 96)


def test_bad_images_are_replaced_and_named_at_the_end(tmp_path, caplog):
    folder = digits_folder(tmp_path / "images", 64, labelled=True)
    for broken in (folder / "3" / "3.png", folder / "5" / "5.png"):
        broken.write_bytes(broken.read_bytes()[:60])
    pretrain(quick(tmp_path / "run", dataset=str(folder), batch_size=16, workers=0, cache="none"))
    assert "2 images could not be read" in caplog.text and "bad_images.txt" in caplog.text
    named = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in named) == ["3/3.png", "5/5.png"]
    # The names stay on this machine, in that file.
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "bad_images.txt"]
    assert not [path for path in left if b"3/3.png" in path.read_bytes() or b"5/5.png" in path.read_bytes()]
    # They stay counted when the run is resumed, here from its end.
    pretrain(quick(tmp_path / "run", dataset=str(folder), batch_size=16, workers=0, cache="none", resume=True))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["bad_images"] == 2
    assert (tmp_path / "run" / "bad_images.txt").read_text().splitlines() == named
    with pytest.raises(ByolTimmError, match=r"3/3\.png|5/5\.png"):
        pretrain(quick(tmp_path / "other", dataset=str(folder), batch_size=16, on_bad_image="error"))


def test_frozen_parts_do_not_move(tmp_path):
    pretrain(quick(tmp_path / "run", freeze=("stem",)))
    torch.manual_seed(0)
    initial = timm.create_model("test_resnet", num_classes=0).state_dict()
    trained = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    assert torch.equal(trained["conv1.0.weight"], initial["conv1.0.weight"])
    assert not torch.equal(trained["layer1.0.conv1.weight"], initial["layer1.0.conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "convnext_atto",
        "vit_tiny_patch16_224",
        "efficientnet_b0",
        "swin_tiny_patch4_window7_224",
        "mobilenetv4_conv_small",
        "regnetx_002",
        "nf_regnet_b0",
        "test_mambaout",
    ],
)
def test_the_same_command_line_takes_any_backbone(tmp_path, backbone):
    folder = digits_folder(tmp_path / "images", 32, labelled=True)
    settings = (
        f"--dataset {folder} --image_size 64 --epochs 1 --batch_size 8 --hidden_dim 64 --save_every 2 "
        f"--output_dir {tmp_path}/run"
    )
    trained = pretrain(parse(PretrainConfig, ["--backbone", backbone, *settings.split()]))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    encoder = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(images), trained.to(memory_format=torch.contiguous_format)(images))


def test_a_transformer_trains_with_its_own_defaults(tmp_path):
    pretrain(quick(tmp_path / "run", backbone="test_vit", dataset="digits"))
    chosen = (tmp_path / "run" / "config.yaml").read_text()
    assert "opt: adamw" in chosen and "num_head_layers: 3" in chosen and "- stem" in chosen


def test_images_of_several_shapes_give_the_same_weights_with_any_cache(tmp_path):
    folder = digits_folder(tmp_path / "images", 40, labelled=False)
    Image.open(folder / "deep/er/3.png").resize((9, 8)).save(folder / "deep/er/3.png")
    settings = dict(dataset=str(folder), batch_size=8)
    pretrain(quick(tmp_path / "none", workers=0, **settings))
    pretrain(quick(tmp_path / "ram", workers=2, cache="ram", **settings))
    pretrain(quick(tmp_path / "disk", workers=0, cache="disk", cache_dir=str(tmp_path / "decoded"), **settings))
    assert weights(tmp_path / "none") == weights(tmp_path / "ram") == weights(tmp_path / "disk")
    [file] = (tmp_path / "decoded").glob("[!.]*")
    assert file.stat().st_size > 40 * 3 * 8 * 8


def test_dry_run_takes_the_folder_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pretrain(quick(".", dry_run=True))
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*")] == ["here-dry_run/views.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ByolTimmError, match=r"cannot write to .*file/run-dry_run"):
        pretrain(quick(tmp_path / "file" / "run", dry_run=True))


def test_dry_run_trains_nothing_shows_the_views_measures_the_run_and_compares_it_with_the_papers(tmp_path, caplog):
    caplog.set_level("INFO")
    began = time.perf_counter()
    encoder = pretrain(quick(tmp_path / "run", dry_run=True, epochs=100, batch_size=128, projection_dim=256))
    took = time.perf_counter() - began
    [(rate, step, count)] = re.findall(
        r"([\d,]+) images/s, ([\d.]+) s per step, measured over (\d+) steps", caplog.text
    )
    assert 1 < int(count) and int(count) * float(step) < took
    assert float(rate.replace(",", "")) * float(step) == pytest.approx(128, rel=0.05)
    assert re.search(r"memory +peak of [\d.]+ GB .*measured", caplog.text)
    assert re.search(r"about .* for 1,100 steps", caplog.text)
    assert re.search(r"changed +global_batch +128 \(paper: 4096\)", caplog.text)
    assert re.search(r"same +projection_dim +256", caplog.text)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*")] == ["run-dry_run/views.png"]
    torch.manual_seed(0)
    initial = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in encoder.state_dict().items())


def test_a_collapsed_run_stops_where_asked(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(64):
        Image.new("L", (8, 8), 128).save(tmp_path / "images" / f"{index}.png")
    same = dict(dataset=str(tmp_path / "images"), batch_size=16, crop_scale=(1.0, 1.0), jitter=0.0, solarize=(0.0, 0.0))
    with pytest.raises(ByolTimmError, match="collapsed by step 3: projection std"):
        pretrain(quick(tmp_path / "run", backbone="test_vit", log_every=1, on_collapse="stop", **same))


def test_a_signal_in_the_last_evaluation_is_no_end_of_the_run(run, tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 3:  # bank and queries before training, then the bank after it
            signal.raise_signal(signal.SIGTERM)
        return extract_features(*arguments, **settings)

    monkeypatch.setattr(heldout, "extract_features", interrupted)
    with pytest.raises(Interrupted, match="terminated, stopped at step 5"):
        pretrain(quick(tmp_path / "run"))
    assert not (tmp_path / "run" / "results.json").exists()
    pretrain(quick(tmp_path / "run", resume=True))
    assert weights(tmp_path / "run") == weights(run[0])
    results = [json.loads((folder / "results.json").read_text())["results"] for folder in (tmp_path / "run", run[0])]
    assert results[0] == results[1]


def test_what_is_missing_from_a_finished_run_is_written_again_as_far_as_it_is_known(run, tmp_path, caplog):
    folder = shutil.copytree(run[0], tmp_path / "run")
    for name in ("metrics.jsonl", "results.json", "config.yaml", "environment.json", "curves.png", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "encoder")
    pretrain(quick(folder, resume=True))
    assert weights(folder) == weights(run[0])
    assert "metrics.jsonl has no metrics of steps 1 to 5; curves and results omit them" in caplog.text
    now, then = (json.loads((place / "results.json").read_text()) for place in (folder, run[0]))
    assert {name: now["results"].get(name) for name in then["results"]} == {**then["results"], "knn_random": None}
    assert now["health"] == {} and now["seconds"] > load_latest(folder / "checkpoints").state["seconds"] > 0
    assert {path.name for path in folder.iterdir()} == {path.name for path in run[0].iterdir()}

    unlabelled = dict(dataset=str(digits_folder(tmp_path / "images", 256, labelled=False)))
    pretrain(quick(tmp_path / "other", **unlabelled))
    (tmp_path / "other" / "metrics.jsonl").unlink()
    pretrain(quick(tmp_path / "other", resume=True, **unlabelled))
    assert read_metrics(tmp_path / "other" / "metrics.jsonl") == []


def test_a_finished_run_without_checkpoints_is_not_trained_anew(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(
        ByolTimmError, match=r"has an encoder but no checkpoint to resume from\. Replace .* --overwrite"
    ):
        pretrain(quick(folder, resume=True))
    assert weights(folder) == weights(run[0])


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_what_is_damaged_in_a_finished_encoder_is_named(run, tmp_path, name):
    folder = shutil.copytree(run[0], tmp_path / "run")
    damaged = folder / "encoder" / name
    damaged.unlink()
    if name == "README.md":
        damaged.write_bytes(b"My w\xf6rds.")
    with pytest.raises(ByolTimmError, match=r"is not UTF-8 text|is not an encoder folder\. Move it") as caught:
        pretrain(quick(folder, resume=True))
    assert str(folder / "encoder") in str(caught.value) and "\n" not in str(caught.value)


def test_images_of_one_pixel_train_with_a_word_about_them(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for index in range(64):
        size = [(1, 1), (1, 300), (300, 1), (40, 30)][index % 4]
        Image.new("L", size, 4 * index).resize(size).save(tmp_path / "images" / f"{index}.png")
    pretrain(quick(tmp_path / "run", dataset=str(tmp_path / "images"), batch_size=16, workers=0))
    assert "25 % of the images are smaller than a quarter of --image_size 32" in caplog.text


def test_recomputed_activations_change_no_bit_of_the_run(run, tmp_path):
    folder, _ = run
    pretrain(quick(tmp_path / "run", grad_checkpointing=True))
    assert weights(tmp_path / "run") == weights(folder)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch._dynamo's own look at non-leaf tensors
def test_a_compiled_run_takes_the_same_first_step_and_ships_to_plain_timm(run, tmp_path):
    folder, _ = run
    pretrain(quick(tmp_path / "run", compile=True))
    first, compiled = (read_metrics(place / "metrics.jsonl")[1] for place in (folder, tmp_path / "run"))
    for name in ("loss", "feature_std", "projection_std"):
        assert compiled[name] == pytest.approx(first[name], rel=1e-4)
    encoder = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 96)


# Continued from networks that others trained


def test_all_networks_start_from_a_training_state(run, tmp_path, caplog):
    folder, _ = run
    caplog.set_level("INFO")
    state = sorted((folder / "checkpoints").glob("step-*"))[-1]
    # Nothing moves without learning rate, and neither does the target.
    still = dict(lr=0.0, weight_decay=0.0, target_decay=1.0, hidden_dim=None, opt="sgd")
    pretrain(quick(tmp_path / "run", training_state=str(state), **still))
    assert f"all networks start from {state}, step 5" in caplog.text
    before, after = (load_latest(f / "checkpoints").tensors["byol"] for f in (folder, tmp_path / "run"))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    kept = [name for name in before if not name.endswith(statistics)]
    assert {name.partition(".")[0] for name in kept} == {
        "encoder", "projector", "predictor", "target_encoder", "target_projector"
    }  # fmt: skip
    assert all(torch.equal(before[name], after[name]) for name in kept)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["knn"] == read_metrics(folder / "metrics.jsonl")[-1]["knn"]


def test_a_training_state_that_does_not_fit_is_refused_in_one_line(run, tmp_path):
    folder, _ = run
    state = str(sorted((folder / "checkpoints").glob("step-*"))[-1])
    for changes, message in [
        (
            dict(projection_dim=64),
            r"made with projection_dim 32, you asked for 64\. Give another .* or --projection_dim 32",
        ),
        (dict(backbone="test_efficientnet"), "was made with test_resnet and does not fit test_efficientnet"),
        (dict(training_state=str(folder)), r"is not a good checkpoint \(manifest\.json is missing\)"),
    ]:
        with pytest.raises(ByolTimmError, match=message) as caught:
            pretrain(quick(tmp_path / "run", **{"training_state": state, **changes}))
        assert "\n" not in str(caught.value)


def test_a_run_is_resumed_without_the_training_state_it_started_from(run, tmp_path):
    state = shutil.copytree(load_latest(run[0] / "checkpoints").path, tmp_path / "step-5")
    # The heads are those of the training state.
    settings = dict(training_state=str(state), hidden_dim=None, save_every=3)
    pretrain(quick(tmp_path / "run", **settings))
    before = weights(tmp_path / "run")
    shutil.rmtree(load_latest(tmp_path / "run" / "checkpoints").path)
    shutil.rmtree(state)
    pretrain(quick(tmp_path / "run", resume=True, **settings))
    assert weights(tmp_path / "run") == before


def test_a_run_is_resumed_without_the_pretrained_weights_it_started_from(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    checkpoint = load_latest(folder / "checkpoints")
    shutil.rmtree(checkpoint.path)
    # As if it had started from weights of the Hub, which no test can reach.
    checkpoint.state["config"]["pretrained"] = True
    save_checkpoint(folder / "checkpoints", checkpoint.step, checkpoint.tensors, checkpoint.state)
    pretrain(quick(folder, pretrained=True, resume=True))
    assert weights(folder) == weights(run[0])


def test_another_batch_size_under_batch_norm_is_one_warning(run, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(run[0], tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    pretrain(quick(folder, batch_size=128, resume=True))
    assert [line for line in caplog.messages if "--batch_size 256 -> 128: BatchNorm statistics" in line]


# Refused before anything is trained


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=2000), r"2000"),
        (dict(batch_size=1), r"--batch_size must be 2 or more \(1\)"),
        (dict(report_to=("tensorbord",)), "unknown tracker 'tensorbord'"),
        (dict(report_to=("aim",)), "aim needs a package that is not installed"),
        (dict(warmup_epochs=1.0), "--warmup_epochs 1"),
        (
            dict(cache="disk", cache_dir="cache", streaming=True),
            r"--cache disk does not work with --streaming",
        ),
        (dict(cache="ram", fast_jpeg=True), "--fast_jpeg does not work with --cache ram"),
        (dict(cache="disk"), "--cache disk needs --cache_dir"),
        (dict(cache_dir="cache"), r"--cache_dir \(cache\) needs --cache disk"),
        (dict(image_share=0.5, streaming=True), r"--image_share \(0\.5\) does not work with --streaming"),
        (dict(image_share=0.0), r"--image_share must be above 0 and at most 1 \(0\.0\)"),
        (dict(pretrained=True, training_state="x"), r"--training_state \(x\) replaces all weights"),
        (dict(epochs=-1), r"--epochs must be positive \(-1\)"),
        (dict(target_decay=1.2), r"--target_decay must be between 0 and 1 \(1\.2\)"),
        (dict(backbone="resnet_18"), "resnet18"),
        (dict(freeze=("stm",)), "stm"),
        (dict(backbone="dla46x_c", grad_checkpointing=True), "DLA cannot recompute activations"),
        (dict(dataset="no/such/folder"), "no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(ByolTimmError, match=message) as caught:
        pretrain(quick(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 needs a GPU"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU refuses")
def test_launches_that_cannot_train_are_refused(tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ByolTimmError, match=message):
        pretrain(quick(tmp_path / "run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
@pytest.mark.parametrize("wish", [[], ["--num_cpu_threads_per_process", "1"], ["OMP_NUM_THREADS=1"]], ids=str)
def test_a_launch_on_a_cpu_takes_all_cores_unless_it_says_how_many(tmp_path, wish):
    script = tmp_path / "threads.py"
    script.write_text(
        "import pathlib, torch\n"
        "from byol_timm.training import create_accelerator\n"
        "create_accelerator((), pathlib.Path())\n"
        "print(torch.get_num_threads())\n"
    )
    flags = [word for word in wish if word.startswith("-") or word.isdecimal()]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= dict(word.split("=") for word in wish if "=" in word)
    call = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)]
    result = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout) == (1 if wish else _cores())


# Machines at their limits


def test_too_little_memory_is_told_in_one_line_with_advice(tmp_path, monkeypatch):
    class Hungry(timm.models.ResNet):
        def forward(self, images):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    def create(settings, weights):
        encoder = timm.create_model("test_resnet", num_classes=0)
        encoder.__class__ = Hungry
        return encoder

    monkeypatch.setattr(plan, "initial_encoder", create)
    message = (
        r"out of memory with 256 images of 32x32 at once \(CUDA out of memory\. Tried .*\)\. Lower --batch_size and"
    )
    with pytest.raises(ByolTimmError, match=message) as caught:
        pretrain(quick(tmp_path / "run", dataset=str(digits_folder(tmp_path / "images", 256, labelled=False))))
    assert "\n" not in str(caught.value) and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in str(caught.value)
    with pytest.raises(ByolTimmError, match=message):
        pretrain(quick(tmp_path / "other", dataset=str(tmp_path / "images"), dry_run=True))


def test_too_little_memory_of_a_cpu_is_told_too(tmp_path):
    with pytest.raises(ByolTimmError, match=r"out of memory .*you tried to allocate"):
        pretrain(quick(tmp_path / "run", hidden_dim=10**12))
