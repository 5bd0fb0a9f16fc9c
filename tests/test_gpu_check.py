"""The acceptance program for GPUs: its quick sections on a CPU, all of it on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "gpu_check.py"
QUICK = ["env", "views", "ahead", "equal", "precision", "triton", "graph"]


def verdicts_of(folder, sections):
    command = [sys.executable, str(PROGRAM), *sections]
    result = subprocess.run(command, env={**os.environ, "OUT": str(folder)}, capture_output=True, text=True)
    sections = json.loads((folder / "gpu_check.json").read_text())
    return {name: section["verdict"] for name, section in sections.items()}, result.stdout


@pytest.mark.slow
def test_quick_sections_pass_on_a_cpu(tmp_path):
    verdicts, lines = verdicts_of(tmp_path, QUICK)
    assert verdicts == dict.fromkeys(QUICK, "ok"), lines


@pytest.mark.gpu
def test_all_sections_pass_on_a_gpu(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    verdicts, lines = verdicts_of(tmp_path, [])
    assert set(verdicts.values()) <= {"ok", "left"}, lines
