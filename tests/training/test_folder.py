import logging
import os
import signal

import pytest
from forking import CONTEXT, exit_code_of, forked

from byol_timm.errors import ByolTimmError
from byol_timm.training import check_resumable, claim_folder, compare_config


def overwrite_and_die(folder):
    with claim_folder(folder, overwrite=True):
        (folder / "config.yaml").write_text("new")
        os.kill(os.getpid(), signal.SIGKILL)


def hold(folder, pipe):
    with claim_folder(folder):
        pipe.send("locked")
        pipe.recv()


def claim_as_nobody(folder, pipe):
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        with claim_folder(folder):
            pipe.send("claimed")
    except ByolTimmError as error:
        pipe.send(str(error))


def finished_run(folder):
    """A folder that a run has left."""
    with claim_folder(folder):
        (folder / "checkpoints" / "step-5").mkdir(parents=True)
        (folder / "encoder").mkdir()
        (folder / "encoder" / "model.safetensors").write_text("years of work")
        (folder / "config.yaml").write_text("old")
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def is_old(folder):
    files = files_of(folder)
    del files[".lock"]
    return files == {"encoder/model.safetensors": "years of work", "config.yaml": "old"}


def test_a_folder_has_one_run_at_a_time(tmp_path):
    ours, theirs = CONTEXT.Pipe()
    with forked(hold, tmp_path, theirs) as other:
        assert ours.recv() == "locked"
        with pytest.raises(ByolTimmError, match=rf"is in use by process {other.pid} on .*--output_dir"):
            with claim_folder(tmp_path):
                pass
        (tmp_path / "config.yaml").write_text("")
        with pytest.raises(ByolTimmError, match="is in use"):
            with claim_folder(tmp_path, overwrite=True):
                pass
        assert (tmp_path / "config.yaml").exists()
    with claim_folder(tmp_path, resume=True):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_new_or_empty_folder_is_created_and_left_empty(tmp_path):
    for path in (tmp_path / "a" / "naïve ☃", tmp_path / "b"):
        for resume in (False, True, False):
            with claim_folder(path, resume=resume):
                assert [entry.name for entry in path.iterdir()] == [".lock"]


def test_a_failed_command_removes_the_folder_that_it_has_created_and_no_other(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, left in [("new", False), ("empty", True), ("written", True)]:
        with pytest.raises(ZeroDivisionError), claim_folder(tmp_path / name):
            if name == "written":
                (tmp_path / name / "metrics.jsonl").write_text("")
            raise ZeroDivisionError
        assert (tmp_path / name).exists() == left


def test_a_folder_that_is_not_empty_is_refused_unless_resumed_or_overwritten(tmp_path):
    finished_run(tmp_path)
    with pytest.raises(ByolTimmError, match=r"is not empty\. Continue with --resume, replace it with --overwrite"):
        with claim_folder(tmp_path):
            pass
    with claim_folder(tmp_path, resume=True):
        assert is_old(tmp_path)
    with claim_folder(tmp_path, overwrite=True):
        assert not (tmp_path / "encoder").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


def test_overwrite_keeps_the_earlier_run_until_the_new_one_has_a_checkpoint(tmp_path):
    finished_run(tmp_path)
    with pytest.raises(ZeroDivisionError), claim_folder(tmp_path, overwrite=True):
        (tmp_path / "config.yaml").write_text("new")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "debug").mkdir()
        (tmp_path / "debug" / "step-3.json").write_text("{}")
        raise ZeroDivisionError
    assert (tmp_path / "checkpoints" / "step-5").exists()
    assert (tmp_path / "debug" / "step-3.json").read_text() == "{}"
    assert files_of(tmp_path)["encoder/model.safetensors"] == "years of work"

    with pytest.raises(ZeroDivisionError), claim_folder(tmp_path, overwrite=True) as commit:
        (tmp_path / "config.yaml").write_text("new")
        commit()
        commit()
        assert not (tmp_path / ".earlier").exists()
        raise ZeroDivisionError
    assert files_of(tmp_path).keys() == {".lock", "config.yaml"}


def test_a_killed_overwrite_gives_the_earlier_run_back_to_the_next_command(tmp_path):
    finished_run(tmp_path)
    assert exit_code_of(overwrite_and_die, tmp_path) == -signal.SIGKILL
    assert (tmp_path / "config.yaml").read_text() == "new"
    with claim_folder(tmp_path, resume=True):
        assert is_old(tmp_path)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_while_contents_move_loses_none_of_them(tmp_path, moved):
    """Into the hidden folder or out of it: the state on the disk is the same."""
    finished_run(tmp_path)
    (tmp_path / ".earlier-moving").mkdir()
    for name in ("encoder", "config.yaml")[:moved]:
        (tmp_path / name).rename(tmp_path / ".earlier-moving" / name)
    with claim_folder(tmp_path, resume=True):
        assert is_old(tmp_path)


def test_overwrite_replaces_runs_only(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ByolTimmError, match="holds no run to resume"):
        with claim_folder(tmp_path, resume=True):
            pass
    with pytest.raises(ByolTimmError, match="--overwrite replaces earlier runs only"):
        with claim_folder(tmp_path, overwrite=True):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_copy_of_a_run_without_its_hidden_files_is_resumed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with claim_folder(tmp_path, resume=True):
        pass


def test_overwrite_does_not_follow_links(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image.png").write_text("")
    with claim_folder(tmp_path / "run"):
        (tmp_path / "run" / "link").symlink_to(tmp_path / "data")
    for fails in (True, False):
        with pytest.raises(ZeroDivisionError), claim_folder(tmp_path / "run", overwrite=True) as commit:
            if not fails:
                commit()
            raise ZeroDivisionError
        assert (tmp_path / "run" / "link").is_symlink() == fails
    assert (tmp_path / "data" / "image.png").exists()


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, problem in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "run", r"cannot write to .*Not a directory"),
        (tmp_path / ("long" * 100), r"cannot write to .{10,80}\.\.\. \(File name too long\)"),
    ]:
        with pytest.raises(ByolTimmError, match=problem + r".*Choose another --output_dir"):
            with claim_folder(path):
                pass


def test_an_unwritable_folder_is_refused(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    ours, theirs = CONTEXT.Pipe()
    with forked(claim_as_nobody, folder, theirs):
        assert ours.recv() == f"cannot write to {folder} (Permission denied). Choose another --output_dir"


@pytest.mark.parametrize("name", ["resnet18-digts", "resnet18_digits", "Resnet18-digits"])
def test_a_mistyped_run_is_not_a_new_one(tmp_path, name):
    finished_run(tmp_path / "resnet18-digits")
    (tmp_path / "resnet18-digitz").mkdir()
    with pytest.raises(ByolTimmError, match=rf"no run in .*{name} to resume\. Did you mean .*resnet18-digits\?"):
        check_resumable(tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["resnet50-digits", "vit-flowers", "resnet18-digits-2"])
def test_a_job_may_start_with_resume(tmp_path, caplog, name):
    caplog.set_level(logging.INFO, "byol_timm")
    finished_run(tmp_path / "resnet18-digits")
    check_resumable(tmp_path / "resnet18-digits")
    assert caplog.messages == []
    check_resumable(tmp_path / name)
    assert caplog.messages == [f"no run in {tmp_path / name} yet: starting from step 0"]


SAVED = dict(backbone="resnet18", image_size=32, blur=[1.0, 0.1], lr=0.2, flip=None, pretrained=False, kwargs={"a": 1})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(backbone="resnet50"),
            "checkpoint step-100 was made with backbone resnet18, you asked for resnet50. "
            "Use another --output_dir or --backbone resnet18",
        ),
        (dict(blur=(1.0, 0.2)), r"made with blur 1.0 0.1, you asked for 1.0 0.2. .* or --blur 1.0 0.1"),
        (dict(flip=0.5), r"made with flip None, you asked for 0.5. .* or no --flip"),
        (dict(pretrained=True), r"made with pretrained False, you asked for True. .* or --no_pretrained"),
        (dict(kwargs={}), r"made with kwargs a=1, you asked for none. .* or --kwargs a=1"),
    ],
)
def test_another_setting_than_the_checkpoints_is_named(change, message):
    with pytest.raises(ByolTimmError, match=message):
        compare_config(SAVED, {**SAVED, **change}, may_change={"lr"}, checkpoint="checkpoint step-100")


def test_settings_that_may_change_and_those_of_other_versions_pass():
    compare_config({**SAVED, "old": 1}, {**SAVED, "blur": (1.0, 0.1), "lr": 0.3, "new": 2}, may_change={"lr"})


def test_a_setting_that_matters_changes_with_one_warning(caplog):
    matters = {"batch_size": "BatchNorm statistics differ from the interrupted run's"}
    changed = {**SAVED, "batch_size": 64}
    compare_config({**SAVED, "batch_size": 32}, changed, may_change={"batch_size"}, matters=matters)
    assert caplog.messages == ["--batch_size 32 -> 64: BatchNorm statistics differ from the interrupted run's"]
    compare_config(changed, changed, may_change=(), matters=matters)
    assert len(caplog.messages) == 1
