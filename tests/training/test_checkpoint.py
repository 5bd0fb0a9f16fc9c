import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import load_file

from byol_timm.errors import ByolTimmError
from byol_timm.training import (
    CheckpointWriter,
    create_optimizer,
    load_checkpoint,
    load_latest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)

FILES = ("byol.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 3, 4, 4, generator=generator)
    return {
        "byol": {"weight": weight, "tied": weight, "row": weight[0], "scalar": torch.tensor(step)},
        "optimizer": {"half": weight.to(torch.bfloat16), "flag": torch.tensor([True, False]), "empty": weight[:0]},
    }


def save(folder, *steps, **kwargs):
    for step in steps:
        save_checkpoint(folder, step, tensors_of(step), {"step": step, "samples_seen": 64 * step}, **kwargs)


def assert_same(tensors, step):
    wanted = tensors_of(step)
    assert tensors.keys() == wanted.keys()
    for group in wanted:
        assert tensors[group].keys() == wanted[group].keys()
        for name, tensor in wanted[group].items():
            assert tensors[group][name].dtype == tensor.dtype
            assert torch.equal(tensors[group][name], tensor)


def sealed(manifest):
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest})


def run_python(code, *arguments, **kwargs):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    save(tmp_path / "checkpoints", 7)
    checkpoint = load_latest(tmp_path / "checkpoints")
    assert (checkpoint.step, checkpoint.state, checkpoint.skipped) == (7, {"step": 7, "samples_seen": 448}, ())
    assert checkpoint.path.name == "step-7"
    assert_same(checkpoint.tensors, 7)


def test_files_are_plain_safetensors_and_json(tmp_path):
    save(tmp_path, 1)
    assert sorted(entry.name for entry in (tmp_path / "step-1").iterdir()) == sorted(FILES)
    assert torch.equal(load_file(tmp_path / "step-1" / "byol.safetensors")["row"], tensors_of(1)["byol"]["row"])
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    assert manifest["format"] == 1
    for name, entry in manifest["files"].items():
        data = (tmp_path / "step-1" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_strided_tensors_keep_their_values(tmp_path):
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path, 1, {"byol": {"image": image, "transposed": image[0, 0].T}}, {})
    loaded = load_latest(tmp_path).tensors["byol"]
    assert torch.equal(loaded["image"], image)
    assert torch.equal(loaded["transposed"], image[0, 0].T)


@pytest.mark.parametrize("keep, left", [(0, [30, 40]), (2, [30, 40]), (3, [20, 30, 40])])
def test_old_checkpoints_go_but_two_always_stay(tmp_path, keep, left):
    save(tmp_path, 10, 20, 30, 40, keep=keep)
    assert sorted(int(entry.name.removeprefix("step-")) for entry in tmp_path.iterdir()) == left


def test_order_is_by_number_not_by_name_or_time(tmp_path):
    save(tmp_path, 9, 100)
    os.utime(tmp_path / "step-100", (0, 0))
    assert load_latest(tmp_path).step == 100


def test_pruning_leaves_the_newest_good_one_below_damaged_newer_ones(tmp_path):
    save(tmp_path, 100, 120, 130, keep=3)
    for step in (120, 130):
        (tmp_path / f"step-{step}" / "state.json").write_text("")
    save(tmp_path, 110)
    assert load_latest(tmp_path).step == 110


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", ["none", "half", "all but one"])
def test_a_truncated_file_sends_us_to_the_previous_checkpoint(tmp_path, name, length):
    save(tmp_path, 100, 120)
    path = tmp_path / "step-120" / name
    data = path.read_bytes()
    path.write_bytes(data[: {"none": 0, "half": len(data) // 2, "all but one": len(data) - 1}[length]])
    checkpoint = load_latest(tmp_path)
    assert checkpoint.step == 100
    assert_same(checkpoint.tensors, 100)
    [skipped] = checkpoint.skipped
    assert skipped.startswith(f"step-120: {name} ")
    if name == "byol.safetensors":
        size = len(path.read_bytes())
        assert skipped == f"step-120: byol.safetensors has {size:,} of {len(data):,} bytes"


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, name):
    save(tmp_path, 100, 120)
    path = tmp_path / "step-120" / name
    data = path.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
        checkpoint = load_latest(tmp_path)
        assert checkpoint.step == 100
        assert len(checkpoint.skipped) == 1
    path.write_bytes(data)
    assert load_latest(tmp_path).step == 120


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    save(tmp_path, 100, 120)
    (tmp_path / "step-120" / name).unlink()
    checkpoint = load_latest(tmp_path)
    assert (checkpoint.step, checkpoint.skipped) == (100, (f"step-120: {name} is missing",))


def test_when_all_are_damaged_nothing_starts_anew_by_itself(tmp_path):
    save(tmp_path, 100, 120)
    for step in (100, 120):
        (tmp_path / f"step-{step}" / "manifest.json").unlink()
    with pytest.raises(ByolTimmError, match=r"no good checkpoint in .*step-120.*step-100.*--overwrite"):
        load_latest(tmp_path)


def test_without_any_checkpoint_there_is_none(tmp_path):
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None


def test_a_newer_format_is_refused_in_one_line(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-1" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["format"] = 2
    path.write_text(sealed(manifest))
    with pytest.raises(ByolTimmError, match=r"step-1 has checkpoint format 2, newer than 1\. Upgrade"):
        load_latest(tmp_path)


def test_leftovers_of_a_killed_save_are_swept(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / ".tmp-step-2")
    assert load_latest(tmp_path).step == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again_and_a_good_one_stays(tmp_path):
    save(tmp_path, 100, 120)
    (tmp_path / "step-120" / "byol.safetensors").write_bytes(b"")
    save(tmp_path, 120)
    assert load_latest(tmp_path).step == 120
    save_checkpoint(tmp_path, 120, {}, {})
    assert_same(load_latest(tmp_path).tensors, 120)


def test_a_checkpoint_of_anybody_is_read_by_its_path(tmp_path):
    save(tmp_path, 7)
    (tmp_path / "step-7").rename(tmp_path / "training_state")
    (tmp_path / "training_state" / "optimizer.safetensors").unlink()
    checkpoint = load_checkpoint(tmp_path / "training_state", {"byol"})
    assert (checkpoint.step, checkpoint.state["samples_seen"]) == (7, 448)
    assert checkpoint.tensors.keys() == {"byol"}
    assert torch.equal(checkpoint.tensors["byol"]["weight"], tensors_of(7)["byol"]["weight"])


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        [],
        {"format": 1, "step": 7, "files": {}},
        {"format": 1, "step": 7, "files": ["state.json"]},
        {"format": 1, "step": 7, "files": {"../secret": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}},
        {"format": 1, "step": 7, "files": {"state.json": {"bytes": "many"}}},
        {"format": 1, "step": 7, "files": {"state.json": None}},
    ],
)
def test_a_manifest_that_was_made_up_is_refused_in_one_line(tmp_path, manifest):
    save(tmp_path, 7)
    (tmp_path / "secret").write_bytes(b"abc")
    content = sealed(manifest) if isinstance(manifest, dict) else json.dumps(manifest)
    (tmp_path / "step-7" / "manifest.json").write_text(content)
    for load in (lambda: load_checkpoint(tmp_path / "step-7", {"byol"}), lambda: load_latest(tmp_path)):
        with pytest.raises(ByolTimmError, match=r"(no|not a) good checkpoint") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_odd_folder_names(tmp_path):
    folder = tmp_path / "naïve ☃ 猫\nline two" / "checkpoints"
    save(folder, 1)
    assert load_latest(folder).step == 1


def test_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    code = """
        import os, random, signal, sys, time
        from pathlib import Path
        import torch
        from byol_timm.training import load_latest, save_checkpoint

        torch.set_num_threads(1)
        folder, kills = Path(sys.argv[1]), int(sys.argv[2])
        folder.mkdir()
        random.seed(0)
        step, inside = 0, 0
        for _ in range(kills):
            before = os.listdir(folder)
            child = os.fork()
            if child == 0:
                while True:
                    step += 1
                    weight = torch.full((100_000,), float(step))
                    save_checkpoint(folder, step, {"byol": {"weight": weight}}, {"at": step})
            while os.listdir(folder) == before:
                pass
            time.sleep(random.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            inside += any(folder.glob(".tmp-*"))
            checkpoint = load_latest(folder)
            assert not list(folder.glob(".tmp-*"))
            if checkpoint is not None:
                assert checkpoint.skipped == ()
                assert checkpoint.step >= step and checkpoint.state == {"at": checkpoint.step}
                assert (checkpoint.tensors["byol"]["weight"] == checkpoint.step).all()
                step = checkpoint.step
        print(step, inside)
    """
    kills = int(os.environ.get("BYOL_TIMM_SAVE_KILLS", 25))
    result = run_python(code, tmp_path / "checkpoints", kills)
    assert result.returncode == 0, result.stderr
    steps, inside = map(int, result.stdout.split())
    assert steps > 0
    assert inside > 0


FULL_DISK = """
    import sys
    from pathlib import Path
    import torch
    from byol_timm.training import CheckpointWriter, load_latest
    from byol_timm.errors import ByolTimmError

    folder = Path(sys.argv[1])
    tensors = {"byol": {"weight": torch.zeros(75_000)}}
    writer = CheckpointWriter(folder)
    writer.save(100, tensors, {})
    writer.save(110, tensors, {})
    writer.save(120, {**tensors, "optimizer": {"momentum": torch.zeros(500_000)}}, {})
    try:
        writer.close()
    except ByolTimmError as error:
        print(error)
    checkpoint = load_latest(folder)
    print(checkpoint.step, checkpoint.skipped, [entry.name for entry in folder.glob(".tmp-*")])
"""


def in_small_disk(folder, size, command):
    """Run a command with `folder` as a file system of its own of `size`."""
    folder.mkdir(exist_ok=True)
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", size, str(folder), *command]


def can_mount():
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return os.geteuid() == 0 and shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0


def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(tmp_path):
    if not can_mount():
        pytest.skip("mounting a small disk takes root")
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "out")]
    result = subprocess.run(
        in_small_disk(tmp_path / "out", "1500k", command), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    message, loaded = result.stdout.splitlines()
    assert message == (
        f"disk full while saving step 120 (needs 2.3 MB, 0.9 free in {tmp_path}/out/); last good checkpoint: step-110"
    )
    assert loaded == "110 () []"


def test_the_writer_takes_its_copy_at_once(tmp_path):
    weight, state = torch.zeros(1000), {"step": 1}
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, {"byol": {"weight": weight}}, state)
        weight.fill_(1)
        state["step"] = 2
    checkpoint = load_latest(tmp_path)
    assert not checkpoint.tensors["byol"]["weight"].any()
    assert checkpoint.state == {"step": 1}


def test_every_save_of_the_writer_is_on_disk_when_it_closes(tmp_path):
    with CheckpointWriter(tmp_path, keep=5) as writer:
        for step in range(1, 6):
            writer.save(step, tensors_of(step), {})
    assert len(list(tmp_path.glob("step-*"))) == 5
    assert_same(load_latest(tmp_path).tensors, 5)


def test_an_error_of_the_background_thread_surfaces_at_the_next_call(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    writer = CheckpointWriter(folder)
    writer.save(1, {}, {})
    with pytest.raises(ByolTimmError, match=r"cannot save step 1 in .*file \(File exists\); no earlier checkpoint"):
        writer.save(2, {}, {})
    writer.close()


def test_the_first_error_of_a_run_is_not_hidden_by_that_of_the_writer(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "file") as writer:
        writer.save(1, {}, {})
        raise ZeroDivisionError


def test_the_writer_says_which_steps_are_on_the_disk(tmp_path):
    seen = []
    with CheckpointWriter(tmp_path, saved=lambda step: seen.append((step, load_latest(tmp_path).step))) as writer:
        writer.save(1, {}, {})
        writer.save(2, {}, {})
    assert seen == [(1, 1), (2, 2)]


def step_of(module, optimizer, seed):
    optimizer.zero_grad()
    module(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("opt", ["lars", "sgd", "momentum", "adamw", "lamb", "adafactorbv", "nadamw", "muon"])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, opt):
    def create():
        torch.manual_seed(1)
        module = timm.create_model("test_resnet", num_classes=0).to(memory_format=torch.channels_last)
        return module, create_optimizer(opt, module, lr=0.01, weight_decay=0.01)

    module, optimizer = create()
    for seed in range(3):
        step_of(module, optimizer, seed)
    save_checkpoint(tmp_path, 3, {"byol": module.state_dict(), "optimizer": optimizer_tensors(optimizer)}, {})
    for seed in range(3, 6):
        step_of(module, optimizer, seed)

    resumed, resumed_optimizer = create()
    checkpoint = load_latest(tmp_path)
    resumed.load_state_dict(checkpoint.tensors["byol"])
    restore_optimizer(resumed_optimizer, checkpoint.tensors["optimizer"])
    for seed in range(3, 6):
        step_of(resumed, resumed_optimizer, seed)
    for (name, wanted), got in zip(module.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


def test_restored_state_keeps_the_memory_format_of_the_network_and_the_place_of_the_step():
    module = timm.create_model("test_resnet", num_classes=0)
    optimizer = create_optimizer("adamw", module, lr=0.01, weight_decay=0.01)
    step_of(module, optimizer, 0)
    saved = {name: tensor.contiguous() for name, tensor in optimizer_tensors(optimizer).items()}

    module.to(memory_format=torch.channels_last)
    other = create_optimizer("adamw", module, lr=0.01, weight_decay=0.01)
    restore_optimizer(other, saved)
    for parameter, state in other.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
        assert (state["step"].device.type, state["step"].dtype) == ("cpu", torch.float32)
        assert state["step"] == 1


def test_an_optimizer_before_its_first_step_has_a_state_too():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.125, betas=(0.5, 0.75))
    other = torch.optim.AdamW([parameter], lr=1.0)
    restore_optimizer(other, optimizer_tensors(optimizer))
    assert other.state_dict() == optimizer.state_dict()


def test_optimizer_state_that_would_need_pickle_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    optimizer.param_groups[0]["callback"] = print
    with pytest.raises(ByolTimmError, match=r"callback is a builtin_function_or_method.*--opt"):
        optimizer_tensors(optimizer)
