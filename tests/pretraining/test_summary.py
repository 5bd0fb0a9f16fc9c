"""What a run says at its end is what works."""

import ast
import dataclasses
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import datasets
import pytest
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from pictures import digits_table, write_folder

import byol_timm
from byol_timm.cli import parse
from byol_timm.config import PretrainConfig
from byol_timm.pretraining import closing, summary

ROOT = Path(__file__).parents[2]
TINY = "--backbone test_resnet --image_size 32 --in_chans 1 --epochs 1 --batch_size 16 --output_dir".split()


def typed(folder, *command, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **variables}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{shlex.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def following(said):
    """The commands that a run says to type next."""
    return [shlex.split(line) for line in said.split("next\n")[1].splitlines()]


def takes(recipe, arguments):
    scope = runpy.run_path(str(recipe), run_name="recipe")
    own = [value for value in scope.values() if dataclasses.is_dataclass(value)]
    return parse(own[-1] if own else PretrainConfig, arguments)


def labelled_images(folder):
    """Shards whose columns of images and of labels are not told by their types, beside others."""
    (folder / "my shards").mkdir()
    table = digits_table(120).rename_columns({"image": "photo", "label": "kind"})
    other = table.select_columns("photo").rename_column("photo", "other")
    table = datasets.concatenate_datasets([table, other], axis=1)
    table.cast_column("kind", datasets.Value("int64")).to_parquet(folder / "my shards" / "part.parquet")
    return ["--dataset", "my shards", "--image_column", "photo", "--label_column", "kind", "--split_seed", "3"]


def test_a_clone_that_is_not_installed_knows_its_version(monkeypatch):
    def version(name):
        if name == "byol_timm":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(summary, "version", version)
    assert summary.environment(Accelerator(cpu=True))["versions"]["byol_timm"] == byol_timm.__version__


@pytest.mark.slow
def test_a_run_on_labelled_images_says_commands_that_work(tmp_path):
    images = labelled_images(tmp_path)
    said = typed(tmp_path, sys.executable, ROOT / "recipes/pretrain.py", *TINY, "my run", *images)
    assert re.search(r"images +\d+ of my shards, 10 classes; \d+ more, 10% of every class, held out", said)
    pretrain, probe, push = following(said)
    assert launch_command_parser().parse_args(pretrain[2:]).training_script == str(ROOT / "recipes/pretrain.py")
    takes(pretrain[2], pretrain[3:])
    probing = takes(probe[1], probe[2:])
    assert (probing.split_seed, probing.label_column, probing.encoder) == (3, "kind", "local-dir:my run/encoder")
    assert "top-1" in typed(tmp_path, sys.executable, *probe[1:])
    assert "model.safetensors" in typed(tmp_path, sys.executable, *push[1:], "--dry_run")


@pytest.mark.slow
def test_a_run_on_unlabelled_images_says_how_to_extract_features(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    write_folder(tmp_path / "images", [f"{n}.png" for n in range(40)])
    said = typed(tmp_path, sys.executable, "recipes/pretrain.py", *TINY, "run", "--dataset", "images")
    assert "images     40 of images, unlabelled: no evaluation" in said
    pretrain, features, _ = following(said)
    assert pretrain[:3] == ["accelerate", "launch", "recipes/pretrain.py"]
    assert "features of 40 images" in typed(tmp_path, sys.executable, *features[1:])


def test_the_range_of_values_goes_with_the_images(tmp_path):
    config = PretrainConfig(dataset="scans", value_range=(-1024.0, 3071.0))
    results = {"knn_raw_pixels": 9.0, "knn_byol": 10.0, "k": 20, "protocol": "20-NN"}
    said = "\n".join(closing(config, tmp_path, {"seconds": 1.0, "steps": 1, "results": results}))
    _, probe, _ = following(said)
    assert takes(probe[1], probe[2:]).value_range == (-1024.0, 3071.0)


def test_a_run_on_streamed_images_names_no_recipe_that_would_read_all_of_them(tmp_path):
    config = PretrainConfig(dataset="shards", streaming=True, label_column="kind")
    results = {"knn_raw_pixels": 9.0, "knn_byol": 10.0, "k": 20, "protocol": "20-NN"}
    said = "\n".join(closing(config, tmp_path, {"seconds": 1.0, "steps": 1, "results": results}))
    _, features, _ = following(said)
    assert takes(features[1], features[2:]).dataset == "path/to/images" and "1 step in" in said


@pytest.mark.slow
def test_where_only_the_package_is_installed_the_commands_work_too(tmp_path):
    shutil.copytree(ROOT / "byol_timm", tmp_path / "site" / "byol_timm")
    site, images = {"PYTHONPATH": str(tmp_path / "site")}, labelled_images(tmp_path)
    said = typed(tmp_path, sys.executable, "-m", "byol_timm", *TINY, "run's", *images, **site)
    pretrain, probe, push = following(said)
    launched = launch_command_parser().parse_args(pretrain[2:])
    assert launched.module and launched.training_script == "byol_timm"
    parse(PretrainConfig, launched.training_script_args)
    assert 0 <= float(typed(tmp_path, sys.executable, *probe[1:], **site)) <= 1
    [call] = [node for node in ast.walk(ast.parse(push[2])) if isinstance(node, ast.Call)]
    arguments = [ast.literal_eval(argument) for argument in call.args]
    inspect.signature(byol_timm.push_encoder).bind(*arguments)
    assert push[:2] == ["python", "-c"] and arguments == ["run's", "user/name"]
