"""Two hosts with addresses of their own, joined by a cable: network namespaces of this machine."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

import byol_timm.byol
from byol_timm import PretrainConfig, pretrain
from byol_timm.training import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]

SCRIPT = """
    import byol_timm.byol
    from byol_timm.config import PretrainConfig
    from byol_timm.cli import parse, run
    from test_two_hosts import layer_norm_head

    def main():
        from byol_timm import pretrain
        byol_timm.byol.mlp = layer_norm_head
        pretrain(parse(PretrainConfig))

    run(main)
"""
CONFIG = PretrainConfig(
    backbone="test_vit",
    image_size=32,
    epochs=3,
    batch_size=64,
    opt="sgd",
    lr=0.01,
    projection_dim=32,
    save_every=5,
    log_every=1,
    knn_every=3,
)


def layer_norm_head(in_dim, hidden_dim, out_dim, num_layers=2):
    """A head with LayerNorm: of BatchNorm, on CPUs, every process has its own."""
    return nn.Sequential(nn.Linear(in_dim, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, out_dim, bias=False))


class Host:
    """A network namespace with the interface eth0."""

    def __init__(self, name, address):
        self.name, self.address = name, address

    def start(self, command, **kwargs):
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **kwargs)

    def kill(self):
        """End every process of the host at once, as a power cut does."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)


def ip(arguments):
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    first, second = (Host(f"byol-{os.getpid()}-{n}", f"10.81.9.{n}") for n in (1, 2))
    try:
        try:
            for host in (first, second):
                ip(f"netns add {host.name}")
            ip(f"link add eth0 netns {first.name} type veth peer name eth0 netns {second.name}")
            for host in (first, second):
                ip(f"-n {host.name} addr add {host.address}/24 dev eth0")
                ip(f"-n {host.name} link set eth0 up")
                ip(f"-n {host.name} link set lo up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine gives no network namespaces ({error.stderr.strip()})")
        yield first, second
    finally:
        for host in (first, second):
            host.kill()
            # Its end of the cable goes with it, and so does the other one.
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def flags(config):
    values = dataclasses.asdict(config).items() - dataclasses.asdict(PretrainConfig()).items()
    return [text for name, value in values for text in (f"--{name}", str(value))]


def run_here(folder, monkeypatch, **changes):
    monkeypatch.setattr(byol_timm.byol, "mlp", layer_norm_head)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(dataclasses.replace(CONFIG, output_dir=str(folder), **changes))
    AcceleratorState._reset_state(reset_partial_state=True)


def start_on(host, rank, main, folder, settings):
    """`accelerate launch` with one process on each of two machines, as recipes/launching.md has it."""
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    launcher = "-m accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --main_process_port 29500"
    place = ["--machine_rank", str(rank), "--main_process_ip", main.address]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, *launcher.split(), *place, "script.py", *settings]
    with open(folder / f"host-{rank}.log", "w") as log:
        return host.start(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def losses(folder):
    if not (folder / "metrics.jsonl").exists():
        return {}
    return {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}


def test_a_host_dies_and_one_process_ends_the_run_as_if_it_had_been_alone(hosts, tmp_path, monkeypatch):
    run_here(tmp_path / "alone", monkeypatch)

    settings = flags(dataclasses.replace(CONFIG, batch_size=32, output_dir="run"))
    first, second = hosts
    with start_on(first, 0, first, tmp_path, settings) as main, start_on(second, 1, first, tmp_path, settings):
        try:
            while max(losses(tmp_path / "run"), default=0) < 12 and main.poll() is None:
                time.sleep(0.02)
            second.kill()
            assert main.wait(60) != 0
        finally:
            first.kill()
    log = (tmp_path / "host-0.log").read_text()
    print(log)
    assert "64 = 32 x 2 processes" in log
    assert log.count("byol_timm: error:") == 1
    assert "byol_timm: error: another process of this run is gone" in log
    assert 12 <= max(losses(tmp_path / "run")) < 66

    run_here(tmp_path / "run", monkeypatch, resume=True)
    alone, cut = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert list(cut) == list(alone) == list(range(1, 67))
    for row, other in zip(alone.values(), cut.values(), strict=True):
        assert (row["lr"], row["target_decay"]) == (other["lr"], other["target_decay"])
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    shipped = [load_file(tmp_path / run / "encoder/model.safetensors") for run in ("alone", "run")]
    for name, tensor in shipped[0].items():
        torch.testing.assert_close(shipped[1][name], tensor, rtol=1e-3, atol=1e-4)
