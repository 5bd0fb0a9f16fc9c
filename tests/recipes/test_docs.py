"""Every code block of README and docs: Python runs, commands are ones that the recipes and the launcher take."""

import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.commands.launch import launch_command_parser
from pictures import digits_table, encoded, photo, write_folder, write_tar

from byol_timm.cli import parse
from byol_timm.config import PretrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.md"))]

FIRST = ["accelerate", "launch", "recipes/pretrain.py", "--backbone", "resnet18"]
# Commands that need neither the Hub nor other packages, nor minutes.
ALONE = r"recipes/(?!finetune)\w+\.py(?!.*( user/|--against))"
FEW_STEPS = "--epochs 1 --batch_size 256 --hidden_dim 32 --projection_dim 16".split()
# What makes a command of the docs end within seconds, on few small images; everything else is run as it is written.
SHORT = {
    "pretrain.py": "--image_size 32 --epochs 1 --batch_size 16 --hidden_dim 32 --projection_dim 16 --overwrite",
    "frozen_vs_unfrozen.py": "--dataset path/to/images --image_size 32 --epochs 1 --batch_size 8 --hidden_dim 32 "
    "--projection_dim 16 --label_shares 1 --image_shares 0.5 --seeds 0 --finetune_epochs 1 --finetune_lrs 0.1 "
    "--finetune_steps 2",
    "benchmark.py": "--backbone test_resnet --image_size 32 --batch_size 8 --hidden_dim 32 --rounds 1 --seconds 0.01",
}


def blocks(language):
    """The code blocks of all pages in that language, with the name of their page and their number."""
    for page in PAGES:
        found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        yield from (pytest.param(block, id=f"{page.stem}-{number}") for number, block in enumerate(found))


def commands(pattern):
    """The commands of all pages that the pattern finds, split as a shell splits them."""
    for block in blocks("sh"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            for command in line.split("#")[0].split("&&"):
                if re.search(pattern, command):
                    yield pytest.param(shlex.split(command), id=f"{block.id}: {command.strip()[:60]}")


def reader(folder, *command):
    """What the command says and leaves, typed in a folder that sees the recipes as a clone does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the docs is after the first command, with images of every kind that the docs speak of."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    write_folder(folder / "path/to/images", [f"{kind}/{n}.png" for kind in "ab" for n in range(16)])
    for name, columns in {"path/to/shards": ("photo", "species"), "fashion_mnist": ("image", "label")}.items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            table = digits_table(60).rename_columns(dict(zip(("image", "label"), columns, strict=True)))
            table.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    files = []
    for n in range(24):
        image, label = (f"{n:03}.png", encoded(photo(20, 16, n))), (f"{n:03}.cls", b"0")
        files += [label, image]
    write_tar(folder / "path/to/tars/train-0.tar", files)
    torch.save(timm.create_model("resnet18").state_dict(), folder / "path/to/checkpoint.ckpt")
    first = reader(folder, *FIRST, *FEW_STEPS)
    assert first.returncode == 0, first.stderr
    return folder


@pytest.mark.parametrize("block", [*blocks("python")])
def test_python_blocks_run(block, folder):
    result = reader(folder, sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block)
    assert result.returncode == 0, f"{block}\n{result.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands(ALONE) if command.values[0] != FIRST])
def test_commands_run(command, folder):
    """All but the first, which made the folder, and those that do not run alone, which are parsed below."""
    recipe = next(Path(word).name for word in command if word.startswith("recipes/"))
    short = FEW_STEPS if "--resume" in command else SHORT.get(recipe, "").split()
    if "--num_images" in command:
        short = [*short, "--num_images", "24"]
    result = reader(folder, *command, *short)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"


@pytest.mark.slow
def test_the_table_of_collapses_is_made_by_its_command(folder):
    [command] = [command.values[0] for command in commands(r"tests/collapse\.py")]
    few = "--backbones test_resnet --runs healthy --epochs 1".split()
    result = reader(folder, *command[:1], str(ROOT / command[1]), *few)
    assert re.search(r"^\| test_resnet \| healthy \|.*\| none \|$", result.stdout, re.MULTILINE), result.stderr


@pytest.mark.parametrize("command", [*commands(r"recipes/\w+\.py")])
def test_recipes_take_the_flags_of_the_docs(command):
    place = next(number for number, word in enumerate(command) if re.fullmatch(r"recipes/\w+\.py", word))
    name = Path(command[place]).stem
    recipe = importlib.import_module(name)
    configs = [c for c in vars(recipe).values() if dataclasses.is_dataclass(c) and c.__module__ == name]
    [config] = [c for c in configs if "debug" in c.__dataclass_fields__] or [PretrainConfig]
    parse(config, command[place + 1 :])


@pytest.mark.parametrize("command", [*commands("accelerate launch")])
def test_the_launcher_takes_the_flags_of_the_docs(command):
    launched = command[command.index("launch") + 1 :]
    arguments = launch_command_parser().parse_args(launched)
    assert (ROOT / arguments.training_script).exists() or arguments.module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target
