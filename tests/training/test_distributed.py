"""Two processes on one machine."""

import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from cut_steps import take_steps
from forking import run_together
from launching import errors_of, launch
from safetensors.torch import load_file, save_file

from byol_timm import PretrainConfig, cli, pretrain
from byol_timm.cli import parse

pytestmark = pytest.mark.slow

# As users launch it.
TRAIN = """
    from test_distributed import train
    train()
"""
SETTINGS = (
    "--backbone test_resnet --image_size 32 --epochs 1 --hidden_dim 64 --projection_dim 32 --output_dir run".split()
)


def train(*flags, change=lambda rank: ()):
    """Train as the recipe does; `change` gives flags to one of the processes."""

    def main():
        rank = int(os.environ["RANK"])
        arguments = [*SETTINGS, *(flags or sys.argv[1:]), *change(rank)]
        state = pretrain(parse(PretrainConfig, arguments)).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, f"rank-{rank}.safetensors")

    cli.run(main)


def own_seed(rank):
    return ["--seed", str(rank)]


def own_dataset(rank):
    return ["--dataset", "no/such/folder"] if rank else []


def train_with_own_seeds():
    train("--batch_size", "128", change=own_seed)


def train_elsewhere(folder):
    if os.environ["RANK"] == "1":
        os.chdir(folder)
    train("--batch_size", "128", "--resume")


@pytest.fixture(scope="module")
def cut_in_two(tmp_path_factory):
    """Steps of two processes, 32 images each."""
    folder = tmp_path_factory.mktemp("two")
    result = run_together(folder, take_steps, Path("steps"), 32)
    assert result.returncode == 0, result.stderr[-3000:]
    return steps_of(folder / "steps")


def steps_of(output):
    return json.loads(output.with_suffix(".json").read_text()), load_file(output.with_suffix(".safetensors"))


def in_this_process(folder, monkeypatch, batch_size, accumulation):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation))
    AcceleratorState._reset_state(reset_partial_state=True)
    take_steps(folder / "steps", batch_size)
    AcceleratorState._reset_state(reset_partial_state=True)
    return steps_of(folder / "steps")


@pytest.mark.parametrize("batch_size, accumulation", [(64, 1), (32, 2)])
def test_a_step_is_the_same_however_its_batch_is_cut(tmp_path, monkeypatch, cut_in_two, batch_size, accumulation):
    rows, tensors = in_this_process(tmp_path, monkeypatch, batch_size, accumulation)
    two_rows, two_tensors = cut_in_two
    for row, other in zip(rows, two_rows, strict=True):
        assert (row["order"], row["lr"], row["tau"]) == (other["order"], other["lr"], other["tau"])
        assert len(set(row["order"])) == 64
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert tensors.keys() == two_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(two_tensors[name], tensor, rtol=1e-4, atol=1e-5 * tensor.abs().max().item())


def test_two_processes_hold_the_same_bits_after_every_step(cut_in_two):
    rows, _ = cut_in_two
    assert [len(row["weights"]) for row in rows] == [2, 2, 2]
    assert all(first == second for first, second in (row["weights"] for row in rows))
    assert len({row["weights"][0] for row in rows}) == 3


def test_a_number_that_one_process_has_lost_lets_none_step(cut_in_two):
    rows, _ = cut_in_two
    assert rows[-1]["weights after a lost number"] == rows[-1]["weights"]


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """The folder and the output of a launch that trained."""
    folder = tmp_path_factory.mktemp("run")
    return folder, launch(folder, TRAIN, "--batch_size", "128")


def test_a_run_of_two_processes_ends_in_the_same_weights_on_both(run_of_two):
    folder, result = run_of_two
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes" in result.stdout
    assert "256 = 128 x 2 processes" in result.stdout
    assert "no SyncBatchNorm for CPUs" in result.stdout
    assert "Warning" not in result.stderr
    ranks = [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]
    shipped = load_file(folder / "run" / "encoder" / "model.safetensors")
    initial = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert shipped.keys() == initial.keys()
    for name, tensor in shipped.items():
        assert torch.equal(ranks[0][name], tensor) and torch.equal(ranks[1][name], tensor)


def test_processes_with_different_settings_are_refused_once(tmp_path):
    result = run_together(tmp_path, train_with_own_seeds)
    assert result.returncode != 0
    [line] = errors_of(result)
    assert "process 1 has other settings than process 0" in line


def test_hosts_that_share_no_disk_cannot_resume(run_of_two, tmp_path):
    folder, _ = run_of_two
    result = run_together(folder, train_elsewhere, tmp_path)
    assert result.returncode != 0
    [line] = errors_of(result)
    assert "process 1 finds other checkpoints in run than process 0" in line


def test_an_error_of_one_process_alone_is_its_one_line(tmp_path):
    script = TRAIN.replace("import train", "import own_dataset, train").replace("train()", "train(change=own_dataset)")
    result = launch(tmp_path, script, "--batch_size", "128")
    assert result.returncode != 0
    [line] = errors_of(result)
    assert "no/such/folder" in line


def test_a_bad_image_of_any_process_ends_all_with_its_name(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(32):
        Image.new("L", (8 + index % 2, 8), index * 8).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    flags = ["--dataset", "images", "--batch_size", "8", "--on_bad_image", "error", "--workers", "0"]
    result = run_together(tmp_path, train, *flags)
    assert result.returncode != 0
    [line] = errors_of(result)
    assert "7.png" in line
