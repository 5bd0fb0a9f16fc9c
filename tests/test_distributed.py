"""Two processes on one machine, launched as users launch them."""

import os
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEP = """
    import copy, sys
    import timm, torch
    from accelerate import Accelerator
    from safetensors.torch import save_file
    from torch import nn
    from byol_timm import BYOL
    from byol_timm.launch import create_accelerator
    from byol_timm.pretraining import train_step

    accelerator = create_accelerator((), ".")
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    byol = BYOL(timm.create_model("test_vit", num_classes=0, img_size=32), hidden_dim=16, projection_dim=8)
    byol.projector = nn.Linear(byol.projector[0].in_features, 8)
    byol.predictor = nn.Linear(8, 8)
    byol.target_projector = copy.deepcopy(byol.projector).requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in byol.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(byol, optimizer)
    for step in range(3):
        views = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        view1, view2 = views[:, rank * (8 // world) : (rank + 1) * (8 // world)]
        train_step(accelerator, model, optimizer, [(view1, view2)], target_decay=0.9)
    save_file(byol.state_dict(), f"{sys.argv[1]}-{rank}.safetensors")
    accelerator.end_training()
"""

TRAIN = """
    import sys
    import torch
    from safetensors.torch import save_file
    from byol_timm.config import PretrainConfig, parse, run
    from byol_timm.pretraining import pretrain

    def main():
        import os
        encoder = pretrain(parse(PretrainConfig))
        state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
        save_file(state, f"rank-{os.environ['RANK']}.safetensors")

    run(main)
"""

SETTINGS = (
    "--backbone test_resnet --image_size 32 --epochs 1 --hidden_dim 64 --projection_dim 32 --output_dir run".split()
)


def launch(folder, script, *arguments, processes=2, **variables):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    return subprocess.run(
        [sys.executable, *launcher, str(path), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_take_the_steps_of_one(tmp_path):
    for processes in (1, 2):
        result = launch(tmp_path, STEP, f"of-{processes}", processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    first, second = load_file(tmp_path / "of-2-0.safetensors"), load_file(tmp_path / "of-2-1.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, tensor in load_file(tmp_path / "of-1-0.safetensors").items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_run_of_two_processes_ends_in_the_same_weights_on_both(tmp_path):
    result = launch(tmp_path, TRAIN, *SETTINGS, "--batch_size", "128")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes" in result.stdout
    assert "256 = 128 x 2 processes" in result.stdout
    assert "no SyncBatchNorm for CPUs" in result.stdout
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1)]
    shipped = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    initial = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert shipped.keys() == initial.keys()
    for name, tensor in shipped.items():
        assert torch.equal(ranks[0][name], tensor) and torch.equal(ranks[1][name], tensor)


def test_processes_with_different_settings_are_refused_once(tmp_path):
    script = TRAIN.replace(
        "encoder = pretrain(parse(PretrainConfig))",
        "encoder = pretrain(parse(PretrainConfig, [*sys.argv[1:], '--seed', os.environ['RANK']]))",
    )
    result = launch(tmp_path, script, *SETTINGS, "--batch_size", "128")
    assert result.returncode != 0
    assert result.stderr.count("byol_timm: error:") == 1
    assert "process 1 was started with other settings than process 0" in result.stderr


def test_a_bad_image_of_any_process_ends_all_with_its_name(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(32):
        Image.new("L", (8 + index % 2, 8), index * 8).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    settings = [*SETTINGS, "--dataset", "images", "--batch_size", "8", "--on_bad_image", "error", "--workers", "0"]
    result = launch(tmp_path, TRAIN, *settings)
    assert result.returncode != 0
    assert result.stderr.count("byol_timm: error:") == 1
    assert "7.png" in result.stderr
