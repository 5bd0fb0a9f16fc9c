"""Whole runs that are killed, signalled, starved and misused, as a user would meet it."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byol_timm.checkpoint import load_latest
from byol_timm.metrics import read_metrics

RECIPE = Path(os.environ.get("RECIPE", Path(__file__).parents[1] / "recipes" / "pretrain.py"))
SETTINGS = (
    "--backbone test_resnet --dataset digits --image_size 32 --batch_size 64 --hidden_dim 64 --projection_dim 32 "
    "--epochs 4 --save_every 7 --log_every 1 --knn_every 100"
).split()
LAUNCHED = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# Each life of the soak test ends at a random moment; `BYOL_TIMM_KILLS=30` is the long form.
KILLS = int(os.environ.get("BYOL_TIMM_KILLS", 4))


def environment(**changes):
    usual = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    usual |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    usual |= {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in usual.items() if changes.get(name, "") is not None}


def command(folder, *flags, processes=1, recipe=RECIPE):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*map(str, launcher), str(recipe), *SETTINGS, "--output_dir", str(folder), *map(str, flags)]


def run(folder, *flags, code=0, prefix=(), env=None, **kwargs):
    """Run to the end, check the exit code and give back what stood on stderr."""
    result = subprocess.run(
        [*prefix, *command(folder, *flags, **kwargs)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(**(env or {})),
        timeout=300,
    )
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stderr


@contextlib.contextmanager
def started(folder, *flags, env=None, prefix=(), **kwargs):
    """A run in the background, killed at the end if it still lives; its output is in `folder.log`."""
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(
            [*prefix, *command(folder, *flags, **kwargs)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(**(env or {})),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def log_of(folder):
    return Path(f"{folder}.log").read_text(errors="replace")


def last_step(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def wait_until(condition, process, folder, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended before its time\n{log_of(folder)[-4000:]}"
        assert time.monotonic() < end, f"nothing happened in {seconds} s\n{log_of(folder)[-4000:]}"
        time.sleep(0.002)


def errors_of(text):
    return [line for line in text.splitlines() if line.startswith("byol_timm: error:")]


def one_error(text):
    [line] = errors_of(text)
    assert "Traceback" not in text
    return line


def outcome(folder):
    """What must not depend on how often a run was stopped: the weights, and every figure but time."""
    timing = ("seconds", "images_per_second")
    rows = [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(folder / "metrics.jsonl")]
    return (folder / "encoder" / "model.safetensors").read_bytes(), json.dumps(rows)


def kill_and_resume(folder, kills, *flags, seed=0, **kwargs):
    """Kill a run `kills` times at random moments, every other time inside a save; the saves that a kill cut short."""
    random.seed(seed)
    inside = 0
    for kill in range(kills):
        with started(folder, "--resume", *flags, **kwargs) as process:
            before = last_step(folder)
            wait_until(lambda before=before: last_step(folder) != before, process, folder)
            if kill % 2:
                wait_until(lambda: any((folder / "checkpoints").glob(".tmp-step-*")), process, folder)
            else:
                time.sleep(random.uniform(0, 0.5))
            assert process.poll() is None, "the run was over before it was killed: give it more steps"
        inside += any((folder / "checkpoints").glob(".tmp-step-*"))
    run(folder, "--resume", *flags, **kwargs)
    return inside


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(folder)
    return outcome(folder)


@pytest.mark.slow
def test_same_seed_same_bits(tmp_path, uninterrupted):
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == uninterrupted


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_ends_in_the_same_bits(tmp_path, uninterrupted):
    inside = kill_and_resume(tmp_path / "run", 4)
    assert outcome(tmp_path / "run") == uninterrupted
    assert inside > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one process", "two processes", "accumulation"])
def test_soak(tmp_path, kind):
    """`BYOL_TIMM_KILLS` kills of a run long enough for them."""
    flags = ["--epochs", str(4 + 2 * KILLS)]
    options = {"one process": {}, "two processes": dict(processes=2), "accumulation": {}}[kind]
    if kind == "accumulation":
        options["env"] = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
        flags = ["--epochs", str(4 + 4 * KILLS)]
    run(tmp_path / "uninterrupted", *flags, **options)
    inside = kill_and_resume(tmp_path / "run", KILLS, *flags, **options)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "uninterrupted")
    print(f"{kind}: {KILLS} kills, {inside} inside a save, {last_step(tmp_path / 'run')} steps, same bits")


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint_and_loses_nothing(tmp_path, number, code, uninterrupted):
    folder = tmp_path / "run"
    with started(folder) as process:
        wait_until(lambda: last_step(folder) >= 10, process, folder)
        process.send_signal(number)
        assert process.wait(60) == code
    step = last_step(folder)
    assert f"stopped at step {step}. Continue with --resume" in one_error(log_of(folder))
    assert load_latest(folder / "checkpoints").step == step
    run(folder, "--resume")
    assert outcome(folder) == uninterrupted


@pytest.mark.slow
def test_one_signalled_process_of_two_stops_both_at_the_same_step(tmp_path):
    run(tmp_path / "uninterrupted", processes=2)
    folder = tmp_path / "run"
    with started(folder, processes=2) as process:
        wait_until(lambda: last_step(folder) >= 10, process, folder)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [second] = [int(child) for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
        os.kill(second, signal.SIGTERM)
        assert process.wait(90) != 0
    assert load_latest(folder / "checkpoints").step == last_step(folder)
    assert len(errors_of(log_of(folder))) == 1
    run(folder, "--resume", processes=2)
    assert outcome(folder) == outcome(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_the_launchers_death_ends_the_run_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    prefix = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch = [*prefix, *command(folder)[1:]]
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(launch, stdout=log, stderr=log, env=environment(), start_new_session=True)
        wait_until(lambda: last_step(folder) >= 10, process, folder)
        process.terminate()
        process.wait(30)
    end = time.monotonic() + 60
    while time.monotonic() < end and "stopped at step" not in log_of(folder):
        time.sleep(0.05)
    assert "the launcher died, stopped at step" in one_error(log_of(folder))
    assert load_latest(folder / "checkpoints").step == last_step(folder)


@pytest.mark.slow
def test_max_time_stops_with_a_checkpoint(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    stderr = run(folder, "--max_time", "0.1", "--epochs", "2000", code=142)
    assert "--max_time is up, stopped at step" in one_error(stderr)
    assert load_latest(folder / "checkpoints").step == last_step(folder)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_a_good_checkpoint(tmp_path):
    mount = ["unshare", "--mount", "sh", "-c"]
    probe = [*mount, "mount -t tmpfs tmpfs /mnt"]
    if os.geteuid() != 0 or not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    folder, kept = tmp_path / "run", tmp_path / "kept"
    folder.mkdir()
    script = (
        f'mount -t tmpfs -o size=24m tmpfs "{folder}" && shift && "$@"; code=$?; '
        f'cp -r "{folder}/checkpoints" "{kept}"; exit $code'
    )
    stderr = run(folder, "--save_every", "3", code=2, prefix=[*mount, script, "sh", "sh"])
    error = one_error(stderr)
    pattern = (
        r"disk full while saving step (\d+) \(needs [\d.]+ MB, [\d.]+ free in .*\); last good checkpoint: step-(\d+)"
    )
    step, good = map(int, re.search(pattern, error).groups())
    assert good < step
    assert load_latest(kept).step == good


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    with started(folder) as process:
        wait_until(lambda: last_step(folder) >= 30, process, folder)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    newest = load_latest(folder / "checkpoints").path
    data = bytearray((newest / "byol.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "byol.safetensors").write_bytes(data)
    with started(folder, "--resume") as process:
        process.wait(120)
    assert f"{newest.name}: byol.safetensors has other contents than were saved" in log_of(folder)
    assert outcome(folder) == uninterrupted


@pytest.mark.slow
def test_resuming_with_another_backbone_is_refused(tmp_path):
    folder = tmp_path / "run"
    with started(folder) as process:
        wait_until(lambda: any((folder / "checkpoints").glob("step-*")), process, folder)
    error = one_error(run(folder, "--resume", "--backbone", "test_vit", code=2))
    assert re.search(
        r"checkpoint step-\d+ was made with backbone test_resnet, you asked for test_vit\. "
        r"Use another --output_dir or --backbone test_resnet",
        error,
    )


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "run"
    with started(folder) as process:
        wait_until(lambda: last_step(folder) >= 1, process, folder)
        assert "is not empty. Continue with --resume" in one_error(run(folder, code=2))
        for flag in ("--resume", "--overwrite"):
            assert f"is in use by process {process.pid} on " in one_error(run(folder, flag, code=2))


@pytest.mark.slow
def test_processes_that_do_not_see_each_other_are_refused(tmp_path):
    env = dict(
        ACCELERATE_USE_CPU=None, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    error = one_error(run(tmp_path / "run", code=2, env=env))
    assert "ACCELERATE_USE_CPU=true" in error


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_with_what_is_known(tmp_path):
    folder = tmp_path / "run"
    error = one_error(run(folder, "--opt", "sgd", "--lr", "1e30", "--warmup_epochs", "0", code=2))
    assert re.search(r"loss|gradient", error)
    [debug] = (folder / "debug").glob("step-*.json")
    facts = json.loads(debug.read_text())
    assert {"step", "lr", "loss"} <= facts.keys()
    assert facts["lr"] > 1e20


@pytest.mark.slow
def test_odd_folder_names_in_a_plain_locale(tmp_path):
    folder = tmp_path / "naïve ☃ 猫"
    run(folder, "--epochs", "1", env=dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert (folder / "encoder" / "model.safetensors").exists()
