"""Every code block of README and docs: Python runs, commands are ones that the recipes and the launcher take."""

import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from byol_timm.config import PretrainConfig, parse
from byol_timm.encoder import create_encoder
from byol_timm.hub import save_encoder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.md"))]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the docs is after the first command: beside a run of resnet18 on digits."""
    folder = tmp_path_factory.mktemp("reader")
    encoder = create_encoder("resnet18", image_size=32)
    save_encoder(encoder, folder / "runs/resnet18-digits/encoder", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    return folder


@pytest.mark.parametrize("block", [*blocks("python")])
def test_python_blocks_run(block, folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block]
    result = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{block}\n{result.stderr}"


@pytest.mark.parametrize("command", [*commands(r"recipes/\w+\.py")])
def test_recipes_take_the_flags_of_the_docs(command):
    place = next(number for number, word in enumerate(command) if re.fullmatch(r"recipes/\w+\.py", word))
    scope = runpy.run_path(str(ROOT / command[place]), run_name="recipe")
    own = [c for c in scope.values() if dataclasses.is_dataclass(c) and c.__module__ == "recipe"]
    parse(own[-1] if own else PretrainConfig, command[place + 1 :])


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
