import dataclasses
import subprocess
import sys

import pytest

from byol_timm.cli import parse
from byol_timm.config import PretrainConfig, to_yaml
from byol_timm.errors import ByolTimmError


def test_every_field_is_a_flag_with_help():
    result = subprocess.run(
        [sys.executable, "-m", "byol_timm", "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "PATH": ""},
    )
    assert result.returncode == 0
    for field in dataclasses.fields(PretrainConfig):
        assert f"--{field.name}" in result.stdout, field.name


def test_without_flags_every_default_holds():
    assert parse(PretrainConfig, []) == PretrainConfig()


def test_flags_take_underscores_and_dashes_alike():
    assert parse(PretrainConfig, ["--image_size", "64"]) == parse(PretrainConfig, ["--image-size", "64"])


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig(),
        PretrainConfig(backbone_kwargs=("output_stride=8",), channels_last=False, resume=True, blur=(0.5, 0.25)),
        PretrainConfig(dataset="my images/猫", lr=1e-7, freeze=(), report_to=("tensorboard", "trackio")),
        PretrainConfig(freeze=("stem", "layer1"), channels_last=True, zero_init_last=False, max_time=0.5),
    ],
)
def test_a_written_config_reads_back_to_the_same_values(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse(PretrainConfig, ["--config", str(tmp_path / "config.yaml")]) == config


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 0.5\nepochs: 3\n")
    config = parse(PretrainConfig, ["--lr", "0.1", f"--config={tmp_path / 'config.yaml'}"])
    assert (config.lr, config.epochs) == (0.1, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bacbone", "resnet18"], "unknown flag --bacbone. Did you mean backbone"),
        (["--epochs", "many"], "epochs"),
        (["--on_collapse", "cry"], "on_collapse"),
        (["--lr"], "lr"),
        (["--config"], "--config takes a YAML file"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(arguments, message):
    with pytest.raises(ByolTimmError) as caught:
        parse(PretrainConfig, arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("bacth_size: 3\n", "unknown key 'bacth_size'"),
        ("- 1\n- 2\n", "must hold `key: value` lines"),
        ("lr: [1\n", "is not YAML"),
        ("epochs: often\n", "epochs"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ByolTimmError) as caught:
        parse(PretrainConfig, ["--config", str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
