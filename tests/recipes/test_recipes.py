"""What the README and the recipes promise, typed as a user types it."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
from command_line import exit_code_of, fresh_process, type_command, type_recipe
from PIL import Image

from byol_timm import PretrainConfig
from byol_timm.errors import ByolTimmError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# quickstart.py has no command line, and some recipes have further files.
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py") if "parse(" in path.read_text(encoding="utf-8"))
RECIPES.append("pretrain.py")
BIN = Path(sys.executable).parent


def call(arguments, folder, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **variables}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_command_ends_with_its_exit_code(tmp_path):
    result = call([sys.executable, ROOT / "recipes" / "pretrain.py", "--bacbone", "resnet18"], tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("byol_timm: error: unknown flag --bacbone")


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_says_how_to_use_it(recipe, capsys):
    assert exit_code_of(recipe, "--help") == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_wrong_flag_is_one_line_and_exit_code_2(recipe, capsys):
    assert exit_code_of(recipe, "--bacbone", "resnet18") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("byol_timm: error: unknown flag --bacbone")


def test_help_of_pretrain_does_not_wait_for_torch():
    script = (
        "import sys, runpy; sys.argv = ['pretrain.py', '--help']\n"
        "try: runpy.run_path('recipes/pretrain.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    assert call([sys.executable, "-c", script], ROOT).returncode == 0


def test_help_in_a_pager_that_was_left_says_nothing():
    command = [sys.executable, ROOT / "recipes" / "pretrain.py", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.slow
def test_quickstart_is_a_notebook_cell_that_runs_twice(tmp_path, monkeypatch, capsys):
    cell = (ROOT / "recipes" / "quickstart.py").read_text(encoding="utf-8")
    cell = cell.replace('"resnet18"', '"test_resnet", epochs=1, hidden_dim=32, workers=0')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "x.json"])
    with fresh_process():
        for _ in range(2):
            exec(cell, {"__name__": "__main__"})
    output = capsys.readouterr().out
    assert output.count("20-NN accuracy\n") == 2 and output.count("parameters\n") == 2


def test_evaluations_leave_metrics_a_confusion_matrix_and_the_labelled_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    encoder = ["--encoder", "test_resnet", "--image_size", "32", "--in_chans", "1", "--workers", "0"]
    type_recipe("knn.py", *encoder, "--output", "knn", "--raw_pixels")
    assert "raw pixels 9" in capsys.readouterr().out
    type_recipe("linear_probe.py", *encoder, "--output", "linear_probe")
    for recipe, files in (("knn", set()), ("linear_probe", {"labelled.json"})):
        assert {file.name for file in (tmp_path / recipe).iterdir()} == {"results.json", "confusion.png", *files}
        metrics = json.loads((tmp_path / recipe / "results.json").read_text())
        assert metrics["top1"] > 0.5 and len(metrics["confusion"]) == 10
        if recipe == "knn":
            assert metrics["raw_pixels_top1"] > 0.95
    assert len(json.loads((tmp_path / "linear_probe" / "labelled.json").read_text())) == 1438


@pytest.mark.parametrize("recipe", ["knn.py", "linear_probe.py", "finetune.py"])
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "checkpoints/step-1/manifest.json"])
def test_an_evaluation_leaves_the_results_of_a_pretraining_run_alone(recipe, file, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / file).parent.mkdir(parents=True)
    for name in (file, "results.json"):
        (run / name).write_text("{}")
    with pytest.raises(ByolTimmError, match=r"run is a pretraining run .* such as .*/run-evaluation"):
        type_recipe(recipe, "--encoder", "no_such_encoder", "--output", str(run))
    assert (run / "results.json").read_text() == "{}"


@pytest.mark.parametrize("recipe", ["knn.py", "linear_probe.py", "finetune.py", "benchmark.py", "backbones.py"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    work = {"benchmark.py": ["--backbone"], "backbones.py": ["--filter"]}
    work = [*work.get(recipe, ["--encoder"]), "no_such_backbone"]
    with pytest.raises(ByolTimmError, match=r"cannot write to .*file.* Choose another --output"):
        type_recipe(recipe, *work, "--output", str(tmp_path / "file" / "table.csv"))


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("knn.py --k 0", "--k must be positive (0)"),
        ("knn.py --k -3", "--k must be positive (-3)"),
        ("knn.py --temperature 0", "--temperature must be positive (0.0)"),
        ("linear_probe.py --workers -1", "--workers must not be negative (-1)"),
        ("knn.py --encoder resnt50", "timm has no backbone 'resnt50'. Nearest names: resnet50"),
        ("convert.py FILE out --backbone resnet18.foo", "resnet18 has no pretrained tag 'foo'. It has: "),
        ("pretrain.py --opt adamx --backbone test_resnet", "unknown optimizer 'adamx'. Did you mean adamax?"),
        ("pretrain.py --opt LARS --backbone test_resnet", "unknown optimizer 'LARS'. Did you mean lars?"),
        ("pretrain.py --opt lbfgs --backbone test_resnet", "unknown optimizer 'lbfgs'. Did you mean lars?"),
        ("pretrain.py --opt adahessian --backbone test_resnet", "adahessian needs second derivatives"),
        ("pretrain.py --opt fusedsgd --lr 0.1 --backbone test_resnet", "optimizer fusedsgd cannot be used ("),
        ("frozen_vs_unfrozen.py --training_state x", "--training_state (x) is for a single run"),
        ("pretrain.py --workers -1", "--workers must be finite and not negative (-1)"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(command, line, tmp_path, monkeypatch):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "FILE")
    monkeypatch.chdir(tmp_path)
    recipe, *arguments = command.split()
    with pytest.raises(ByolTimmError, match=re.escape(line)):
        type_recipe(recipe, *arguments)


@pytest.mark.parametrize(
    "command",
    ["extract_features.py --encoder test_resnet --image_size 64 --part_images 1", "backbones.py --filter res*"],
)
def test_ctrl_c_is_one_line_and_exit_code_130(command, tmp_path):
    recipe, *arguments = command.split()
    process = subprocess.Popen(
        [sys.executable, ROOT / "recipes" / recipe, *arguments],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell starts what it runs in the background deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        # At work: a file is written, a process of the pool has started.
        while not [*tmp_path.glob("features/part-*")] and not psutil.Process(process.pid).children():
            time.sleep(0.1)
        time.sleep(0.5)
        # As a terminal does, to the process and those that it has started.
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    # Behind the progress bar.
    assert re.split(r"[\r\n]", error.decode().strip())[-1] == "byol_timm: error: interrupted"
    assert "Traceback" not in error.decode() and process.returncode == 130


def test_the_folders_of_an_output_file_are_made(tmp_path, monkeypatch):
    table = ["--filter", "test_vit", "--sizes", "--processes", "1", "--output"]
    type_recipe("backbones.py", *table, str(tmp_path / "new" / "page.md"))
    assert "test_vit" in (tmp_path / "new" / "page.md").read_text()
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(ByolTimmError, match=r"folder\.md is a folder"):
        type_recipe("backbones.py", *table, str(tmp_path / "folder.md"))


def test_features_of_unlabelled_images_are_extracted_and_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for index in range(5):
        Image.new("L", (8, 8), 40 * index).save(tmp_path / "images" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    words = "--encoder test_resnet --image_size 32 --dataset images --part_images 2 --workers 0".split()
    for parts in (3, 0):
        assert exit_code_of("extract_features.py", *words) == 0
        output = capsys.readouterr().out
        assert output.count("part-") == parts and "features of 5 images in 3 files" in output


@pytest.mark.slow
def test_the_readmes_commands_lead_from_images_to_a_probe(tmp_path, monkeypatch, capsys):
    """The first command with a smaller network, then what its last lines say to type next."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    [first] = re.findall(r"&& (accelerate launch recipes/pretrain\.py --backbone resnet18)$", README, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe, *words = first.replace("resnet18", "test_resnet").split()[2:]
    assert exit_code_of(recipe, *words, "--epochs", "1", "--hidden_dim", "64", "--workers", "0") == 0
    written = capsys.readouterr()
    assert "Traceback" not in written.err
    table, following = written.out.split("20-NN accuracy", 1)[1].split("next\n")
    assert re.search(r"raw pixels\s+9\d\.\d %", table)
    assert (tmp_path / "runs/test_resnet-digits/encoder/model.safetensors").exists()
    own_data, probe, push = (line.strip() for line in following.strip().splitlines())
    assert own_data == "accelerate launch recipes/pretrain.py --backbone test_resnet --dataset path/to/images"
    type_command(probe, "--workers", "0")
    assert re.search(r"top-1 +\d\d\.\d%", capsys.readouterr().out)
    type_command(push, "--dry_run")
    assert "model.safetensors" in capsys.readouterr().out


def test_every_setting_that_launching_names_exists():
    text = (ROOT / "recipes/launching.md").read_text(encoding="utf-8")
    launchers = """
        multi_gpu num_processes num_machines machine_rank main_process_ip main_process_port mixed_precision cpu
        num_cpu_threads_per_process gradient_accumulation_steps nnodes nproc_per_node node_rank master_addr master_port
        nodes ntasks gpus cpus time
    """
    ours = set(re.findall(r"--([a-z_]+)", text)) - set(launchers.split())
    assert ours <= {field.name for field in dataclasses.fields(PretrainConfig)}
