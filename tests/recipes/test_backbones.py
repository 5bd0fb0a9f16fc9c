from pathlib import Path

import pytest
import timm
from command_line import exit_code_of, type_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TARGETS = {"32 px": 1330, "64 px": 1339, "96 px": 1344, "own size": 1370}


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    header, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in cells}


@pytest.fixture(scope="module")
def committed():
    text = (RECIPES / "backbones.md").read_text()
    if f"timm {timm.__version__}," not in text:
        pytest.skip(f"the committed table is that of another timm than {timm.__version__}")
    return text


def test_the_committed_table_has_every_backbone_of_timm(committed):
    assert rows(committed).keys() == set(timm.list_models())


@pytest.mark.parametrize("images", TARGETS)
def test_nearly_every_backbone_trains_on_small_images(committed, images):
    count = sum(bool(row[images]) for row in rows(committed).values())
    assert count >= TARGETS[images]
    assert f"{count:,} at {images.replace('own', 'their own')}" in committed


def test_the_command_writes_the_rows_of_the_committed_table(committed, capsys):
    type_recipe("backbones.py", "--filter", "test_*net", "test_vit", "crossvit_9_240", "mobilenetv5_300m_enc")
    fresh = rows(capsys.readouterr().out)
    assert len(fresh) == 8
    assert fresh == {name: rows(committed)[name] for name in fresh}


def test_sizes_channels_and_csv_are_choices(tmp_path):
    path = tmp_path / "table.csv"
    type_recipe("backbones.py", "--filter", "test_vit", "--sizes", "48", "--in_chans", "1", "--output", str(path))
    header, row = path.read_text().splitlines()
    assert header == "backbone,width,parameters,48 px,own size,set,auto"
    assert row == "test_vit,64,0.3 M,3x3,160x160: 10x10,img_size=SIZE,"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--filter", "resnt18"), "no timm backbone matches 'resnt18'. Nearest names: resnet18"),
        (("--output", "table.xlsx"), "written as .md or .csv (table.xlsx)"),
        (("--size", "32"), "unknown flag --size. Did you mean sizes?"),
    ],
)
def test_a_fault_of_the_command_is_one_line(arguments, reason, capsys):
    assert exit_code_of("backbones.py", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error
