"""Start a script as users do: with torchrun, several processes on one machine's CPU."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parents[1]


def launch(folder, script, *arguments, processes=2, **variables):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    places = [str(TESTS / "training"), str(TESTS / "helpers"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(places),
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


def errors_of(result):
    """The lines that a launch printed as errors."""
    return [line for line in result.stderr.splitlines() if line.startswith("byol_timm: error:")]
