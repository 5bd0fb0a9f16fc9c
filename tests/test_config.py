import dataclasses
import subprocess
import sys

import pytest

from byol_timm.cli import parse
from byol_timm.config import ORDERS, PretrainConfig, to_yaml
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
        PretrainConfig(backbone_kwargs=("output_stride=8",), channels_last=False, blur=(0.5, 0.25)),
        PretrainConfig(dataset="my images/猫", lr=1e-7, freeze=(), report_to=("tensorboard", "trackio")),
        PretrainConfig(freeze=("stem", "layer1"), channels_last=True, zero_init_last=False, value_range=(0.0, 4095.0)),
    ],
)
def test_a_written_config_reads_back_to_the_same_values(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse(PretrainConfig, ["--config", str(tmp_path / "config.yaml")]) == config


def test_a_written_config_holds_no_orders(tmp_path):
    orders = dict(output_dir="runs/x", resume=True, overwrite=True, max_time=0.5, dry_run=True, debug=True)
    orders |= dict(push_to_hub="user/name", public=True)
    assert orders.keys() == ORDERS
    (tmp_path / "config.yaml").write_text(to_yaml(PretrainConfig(lr=0.5, **orders)), encoding="utf-8")
    assert parse(PretrainConfig, ["--config", str(tmp_path / "config.yaml")]) == PretrainConfig(lr=0.5)


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_a_file_that_holds_an_order_is_refused_by_its_name(tmp_path, order):
    path = tmp_path / "config.yaml"
    path.write_text(f"lr: 0.5\n{order}: false\n")
    message = rf"config.yaml holds orders \({order}\)\. Remove these lines; use --{order}$"
    with pytest.raises(ByolTimmError, match=message):
        parse(PretrainConfig, ["--config", str(path)])


def test_values_of_a_file_become_the_types_of_the_fields(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "weight_decay: 1e-6\nlr: 1\nfreeze: stem\nbackbone_kwargs: {output_stride: 8}\ndataset: 100\nblur: [1, 0]\n"
    )
    config = parse(PretrainConfig, ["--config", str(tmp_path / "config.yaml")])
    assert (config.weight_decay, config.lr, config.dataset) == (1e-6, 1.0, "100")
    assert (config.freeze, config.backbone_kwargs, config.blur) == (("stem",), ("output_stride=8",), (1.0, 0.0))


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
        ("epochs: often\n", "must be int | None ('often')"),
        ("epochs: 1.5\n", "epochs in "),
        ("blur: [0.1]\n", "blur in "),
        ("resume_from: x\n", "unknown key"),
        ("pretrained: 1\n", "pretrained in "),
        ("on_collapse: cry\n", "must be Literal['warn', 'stop'] ('cry')"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ByolTimmError) as caught:
        parse(PretrainConfig, ["--config", str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
