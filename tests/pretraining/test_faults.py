"""Whole runs that are killed, signalled, starved and misused, as a user would meet it."""

import contextlib
import fcntl
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
from accelerate.state import AcceleratorState

from byol_timm import ByolTimmError, PretrainConfig, pretrain
from byol_timm.cli import parse
from byol_timm.training import load_latest, read_metrics

RECIPE = Path(os.environ.get("RECIPE", Path(__file__).parents[2] / "recipes" / "pretrain.py"))
# Each life of the soak test ends at a random moment; `BYOL_TIMM_KILLS=30` is the long form.
KILLS = int(os.environ.get("BYOL_TIMM_KILLS", 2))
SETTINGS = (
    "--backbone test_resnet --dataset digits --image_size 32 --batch_size 32 --hidden_dim 64 --projection_dim 32 "
    f"--save_every 7 --log_every 1 --knn_every 100 --epochs {max(2, KILLS // 2)}"
).split()
# Ways to make the same global batch.
LAUNCHES = {
    "one process": {},
    "two processes": dict(flags=("--batch_size", 16), processes=2),
    "accumulation": dict(flags=("--batch_size", 16), env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}),
}
LAUNCHED = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK")
PATIENCE = 240

pytestmark = pytest.mark.slow


def environment(**changes):
    usual = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    usual |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    usual |= {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in usual.items() if changes.get(name, "") is not None}


def command(folder, *more, flags=(), processes=1, launcher=None):
    if launcher is None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] * (processes > 1)
    arguments = [*SETTINGS, "--output_dir", folder, *flags, *more]
    return [sys.executable, *map(str, launcher), str(RECIPE), *map(str, arguments)]


def run(folder, *more, code=0, prefix=(), env=None, **launch):
    """Run to the end, check the exit code and give back what stood on stderr."""
    result = subprocess.run(
        [*prefix, *command(folder, *more, **launch)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(**(env or {})),
        timeout=2 * PATIENCE,
    )
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stderr


@contextlib.contextmanager
def started(folder, *more, env=None, **launch):
    """A run in the background, killed at the end if it still lives; its output is in `folder.log`."""
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(
            command(folder, *more, **launch),
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


def is_saving(folder):
    return any((folder / "checkpoints").glob(".tmp-step-*"))


def wait_until(condition, process, folder, pause=0.01):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"the run ended before its time\n{log_of(folder)[-4000:]}"
        assert time.monotonic() < end, f"nothing happened in {PATIENCE} s\n{log_of(folder)[-4000:]}"
        time.sleep(pause)


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


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: the folder that `make(folder)` filled, one for all tests and the processes they run in."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    base.mkdir(exist_ok=True)

    def get(name, make):
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / f"{name}.made").exists():
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return get


@pytest.fixture
def uninterrupted(once):
    """What a launch of that kind comes to when nothing stops it."""
    return lambda kind: outcome(once(kind, lambda folder: run(folder, **LAUNCHES[kind])))


def stop(folder):
    with started(folder) as process:
        wait_until(lambda: last_step(folder) >= 15, process, folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143


@pytest.fixture
def stopped(once, tmp_path):
    """A copy of a run that SIGTERM stopped on its way."""
    original = once("stopped", stop)
    shutil.copy(f"{original}.log", tmp_path / "run.log")
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def in_process(monkeypatch):
    """`in_process(folder, *flags)`: the run, or its error, without the seconds of a new process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda folder, *flags: pretrain(parse(PretrainConfig, [*SETTINGS, "--output_dir", str(folder), *flags]))
    AcceleratorState._reset_state(reset_partial_state=True)


# Killed


@pytest.mark.parametrize("kind", LAUNCHES)
def test_soak_of_kills_ends_in_the_same_bits(tmp_path, kind, uninterrupted):
    """`BYOL_TIMM_KILLS` kills of one run, by turns at a random moment and inside a save."""
    folder, inside, lives = tmp_path / "run", 0, 0
    random.seed(kind)
    while lives < KILLS or not inside:
        assert lives < KILLS + 5, "no kill fell into a save"
        with started(folder, "--resume", **LAUNCHES[kind]) as process:
            before = last_step(folder)
            wait_until(lambda before=before: last_step(folder) != before, process, folder)
            if lives % 2:
                wait_until(lambda: is_saving(folder), process, folder, pause=0.001)
            else:
                time.sleep(random.uniform(0, 0.3))
            assert process.poll() is None, "the run was over before it was killed: give it more steps"
        lives, inside = lives + 1, inside + is_saving(folder)
    run(folder, "--resume", **LAUNCHES[kind])
    assert outcome(folder) == uninterrupted(kind)
    print(f"{kind}: {lives} kills, {inside} inside a save, {last_step(folder)} steps, same bits")


# Asked to stop


def test_sigterm_and_ctrl_c_stop_at_the_next_step_with_a_checkpoint_and_lose_nothing(stopped, uninterrupted):
    def assert_stopped_with_a_checkpoint():
        assert f"stopped at step {last_step(stopped)}. Continue with --resume" in one_error(log_of(stopped))
        assert load_latest(stopped / "checkpoints").step == last_step(stopped)

    assert_stopped_with_a_checkpoint()
    before = last_step(stopped)
    with started(stopped, "--resume") as process:
        wait_until(lambda: last_step(stopped) >= before + 3, process, stopped)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    assert_stopped_with_a_checkpoint()
    run(stopped, "--resume")
    assert outcome(stopped) == uninterrupted("one process")


def test_one_signalled_process_of_two_stops_both_at_the_same_step(tmp_path, uninterrupted):
    folder, two = tmp_path / "run", LAUNCHES["two processes"]
    with started(folder, **two) as process:
        wait_until(lambda: last_step(folder) >= 10, process, folder)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [second] = [int(child) for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
        os.kill(second, signal.SIGTERM)
        assert process.wait(PATIENCE) != 0
    step = last_step(folder)
    assert load_latest(folder / "checkpoints").step == step
    assert len(errors_of(log_of(folder))) == 1

    # One process goes on where it can make the same global batch, and says so where it does not.
    alone = shutil.copytree(folder, tmp_path / "alone")
    error = one_error(run(alone, "--resume", "--batch_size", 16, code=2))
    assert (
        f"checkpoint step-{step} was made with a global batch of 32, this launch has 16. Change --batch_size" in error
    )
    run(alone, "--resume")
    assert [row["step"] for row in read_metrics(alone / "metrics.jsonl") if "loss" in row] == list(range(1, 89))

    run(folder, "--resume", **two)
    assert outcome(folder) == uninterrupted("two processes")


def test_the_launchers_death_ends_the_run_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    with started(folder, "--epochs", 1000, launcher=launcher) as process:
        wait_until(lambda: last_step(folder) >= 3, process, folder)
        process.terminate()
        process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and "stopped at step" not in log_of(folder):
            time.sleep(0.05)
    assert "the launcher died, stopped at step" in one_error(log_of(folder))
    assert load_latest(folder / "checkpoints").step == last_step(folder)


def test_max_time_stops_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    stderr = run(folder, "--max_time", "0.05", "--epochs", "1000", code=142)
    assert "--max_time is up, stopped at step" in one_error(stderr)
    assert load_latest(folder / "checkpoints").step == last_step(folder)


# Disks, folders, checkpoints


def can_mount():
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return os.geteuid() == 0 and shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0


def on_a_small_disk(folder, size, kept, fill="true"):
    """What to write before a command so that `folder` is a file system of that size; `kept` is then a copy of it."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && {fill}'
    script = f'{mount} && "$@"; code=$?; cp -r "{folder}" "{kept}"; exit $code'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def test_a_full_disk_is_one_line_and_leaves_a_good_checkpoint(tmp_path):
    if not can_mount():
        pytest.skip("mounting a small disk takes root")
    folder, kept = tmp_path / "run", tmp_path / "kept"
    stderr = run(folder, "--save_every", 3, code=2, prefix=on_a_small_disk(folder, "12m", kept))
    pattern = (
        r"disk full while saving step (\d+) \(needs [\d.]+ MB, [\d.]+ free in .*\); last good checkpoint: step-(\d+)"
    )
    step, good = map(int, re.search(pattern, one_error(stderr)).groups())
    assert good < step
    assert load_latest(kept / "checkpoints").step == good


def test_a_disk_that_is_full_at_the_end_is_one_line_and_costs_no_training(tmp_path, once):
    if not can_mount():
        pytest.skip("mounting a small disk takes root")
    folder, kept = tmp_path / "run", tmp_path / "kept"
    finished = once("one process", lambda made: run(made))
    checkpoint = load_latest(finished / "checkpoints").path
    size = sum(file.stat().st_size for file in checkpoint.iterdir()) + 2**19
    fill = f'cp "{finished}/metrics.jsonl" "{folder}" && mkdir "{folder}/checkpoints"'
    fill += f' && cp -r "{checkpoint}" "{folder}/checkpoints"'
    error = one_error(run(folder, "--resume", code=2, prefix=on_a_small_disk(folder, size, kept, fill)))
    assert re.search(r"disk full \(.*No space left on device.*\)\. Free some space and continue with --resume", error)
    assert load_latest(kept / "checkpoints").path.name == checkpoint.name


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(stopped, uninterrupted):
    newest = load_latest(stopped / "checkpoints").path
    data = bytearray((newest / "byol.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "byol.safetensors").write_bytes(data)
    with started(stopped, "--resume") as process:
        assert process.wait(PATIENCE) == 0
    assert f"{newest.name}: byol.safetensors does not have the contents that were saved" in log_of(stopped)
    assert outcome(stopped) == uninterrupted("one process")


def test_resuming_with_another_backbone_is_refused(stopped, in_process):
    message = (
        r"checkpoint step-\d+ was made with backbone test_resnet, you asked for test_vit\. "
        r"Use another --output_dir or --backbone test_resnet"
    )
    with pytest.raises(ByolTimmError, match=message):
        in_process(stopped, "--resume", "--backbone", "test_vit")


def test_two_runs_do_not_share_a_folder(tmp_path, in_process):
    folder = tmp_path / "run"
    with started(folder, "--epochs", 1000) as process:
        wait_until(lambda: last_step(folder) >= 1, process, folder)
        with pytest.raises(ByolTimmError, match=r"is not empty\. Continue with --resume"):
            in_process(folder)
        for flag in ("--resume", "--overwrite"):
            with pytest.raises(ByolTimmError, match=f"is in use by process {process.pid} on "):
                in_process(folder, flag)
        assert process.poll() is None


def test_odd_folder_names_in_a_plain_locale(tmp_path):
    folder = tmp_path / "naïve ☃ 猫"
    run(folder, "--epochs", "1", env=dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert (folder / "encoder" / "model.safetensors").exists()


# Machines and numbers


def test_processes_that_do_not_see_each_other_are_refused(tmp_path):
    env = dict(
        ACCELERATE_USE_CPU=None, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    error = one_error(run(tmp_path / "run", code=2, env=env))
    assert "ACCELERATE_USE_CPU=true" in error


def test_a_killed_data_worker_ends_the_run_with_a_checkpoint_and_exit_code_1(tmp_path):
    folder = tmp_path / "run"
    with started(folder, "--epochs", 1000, "--cache", "none", "--workers", 1) as process:
        wait_until(lambda: last_step(folder) >= 3, process, folder)
        [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        assert process.wait(PATIENCE) == 1
    assert re.search(r"data loading worker .*(killed|exited).*retry with --workers 0", one_error(log_of(folder)))
    assert load_latest(folder / "checkpoints").step == last_step(folder)


def test_a_loss_that_is_no_number_stops_the_run_with_what_is_known(tmp_path, in_process):
    folder = tmp_path / "run"
    with pytest.raises(ByolTimmError, match=r"loss or gradient is not finite at step \d+ .*Lower --lr"):
        in_process(folder, "--opt", "sgd", "--lr", "1e30", "--warmup_epochs", "0", "--save_every", "1")
    saved = load_latest(folder / "checkpoints").tensors["byol"]
    assert all(tensor.isfinite().all() for tensor in saved.values() if tensor.is_floating_point())
    [debug] = (folder / "debug").glob("step-*.json")
    facts = json.loads(debug.read_text())
    assert facts.keys() == {"step", "lr", "loss", "grad_norm", "images"}
    assert facts["lr"] > 1e20
    assert len(facts["images"]) == 32 and re.fullmatch(r"image \d+", facts["images"][0])
