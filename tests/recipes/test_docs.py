"""Every code block of README and docs: Python runs, commands are ones that the recipes and the launcher take."""

import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path

import collapse
import pytest
import timm
import torch
from accelerate.commands.launch import launch_command_parser
from command_line import type_command
from pictures import digits_table, encoded, photo, write_folder, write_tar

from byol_timm.cli import parse
from byol_timm.config import PretrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.md"))]

FIRST = "accelerate launch recipes/pretrain.py --backbone resnet18"
FEW_STEPS = "--image_share 0.2 --epochs 1 --batch_size 256 --hidden_dim 32 --projection_dim 16 --workers 0".split()
# Commands that need neither the Hub nor other packages, nor minutes.
ALONE = r"recipes/(?!finetune)\w+\.py(?!.*( user/|--against))"
# What makes a command of the docs end within seconds, on few small images; everything else is run as it is written.
SHORT = {
    "pretrain.py": "--image_size 32 --epochs 1 --batch_size 16 --hidden_dim 32 --projection_dim 16 --overwrite "
    "--workers 0",
    "knn.py": "--workers 0",
    "linear_probe.py": "--workers 0",
    "frozen_vs_unfrozen.py": "--dataset path/to/images --image_size 32 --epochs 1 --batch_size 8 --hidden_dim 32 "
    "--projection_dim 16 --label_shares 1 --image_shares 0.5 --seeds 0 --finetune_epochs 1 --finetune_lrs 0.1 "
    "--finetune_steps 2 --workers 0",
    "benchmark.py": "--backbone test_resnet --image_size 32 --batch_size 8 --hidden_dim 32 --rounds 1 --seconds 0.01 "
    "--workers 0",
}


def blocks(language, pages=PAGES):
    """The code blocks of the pages in that language, with the name of their page and their number."""
    for page in pages:
        found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        yield from (pytest.param(block, id=f"{page.stem}-{number}") for number, block in enumerate(found))


def commands(pattern, pages=PAGES):
    """The commands of the pages that the pattern finds, split as a shell splits them."""
    for block in blocks("sh", pages):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            for command in line.split("#")[0].split("&&"):
                if re.search(pattern, command):
                    yield pytest.param(shlex.split(command), id=f"{block.id}: {command.strip()[:60]}")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        type_command(FIRST, *FEW_STEPS)
    return folder


@pytest.fixture
def folder(reader, monkeypatch):
    monkeypatch.chdir(reader)
    return reader


@pytest.mark.parametrize("block", [*blocks("python")])
def test_python_blocks_run(block, folder):
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_commands_of_a_page_run_in_their_order(page, folder):
    """All but the first, which the fixture ran, and those that do not run alone, which are parsed below."""
    for command in [command.values[0] for command in commands(ALONE, [page])]:
        if command == shlex.split(FIRST):
            continue
        print("+", shlex.join(command))
        recipe = next(Path(word).name for word in command if word.startswith("recipes/"))
        short = FEW_STEPS if "--resume" in command else SHORT.get(recipe, "").split()
        if "--num_images" in command:
            short = [*short, "--num_images", "24"]
        type_command(command, *short)


@pytest.mark.slow
def test_the_table_of_collapses_is_made_by_its_command(capsys, monkeypatch):
    [command] = [command.values[0] for command in commands(r"tests/\w+/collapse\.py")]
    assert (ROOT / command[1]).samefile(collapse.__file__)
    few = "--backbones test_resnet --runs healthy --epochs 1".split()
    monkeypatch.setattr(sys, "argv", [*command[1:], *few])
    collapse.main()
    assert re.search(r"^\| test_resnet \| healthy \|.*\| none \|$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", [*commands(r"recipes/\w+\.py")])
def test_recipes_take_the_flags_of_the_docs(command):
    place = next(number for number, word in enumerate(command) if re.fullmatch(r"recipes/\w+\.py", word))
    name = Path(command[place]).stem
    recipe = importlib.import_module(name)
    configs = [c for c in vars(recipe).values() if dataclasses.is_dataclass(c) and "debug" in c.__dataclass_fields__]
    own = [config for config in configs if config.__module__ == name]
    [config] = own or configs or [PretrainConfig]
    parse(config, command[place + 1 :])


@pytest.mark.parametrize("command", [*commands("accelerate launch")])
def test_the_launcher_takes_the_flags_of_the_docs(command):
    launched = command[command.index("launch") + 1 :]
    arguments = launch_command_parser().parse_args(launched)
    assert (ROOT / arguments.training_script).exists() or arguments.module


def test_the_files_and_names_that_contributing_lists_exist():
    text = (ROOT / "recipes" / "contributing.md").read_text(encoding="utf-8")
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "byol_timm").rglob("*.py")}
    for name in re.findall(r"`([\w./]+)`", text.partition("## Where a new thing goes")[2]):
        if name.endswith((".py", "/", ".md")):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "byol_timm")), name
        else:
            assert any(re.search(rf"\b{name}\b", source) for source in sources.values()), name


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
