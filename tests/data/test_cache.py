"""Images that are kept decoded on disk."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pictures import VIEWS, one_line, photo, pixels_of, take, write_folder

from byol_timm.data import BadImage, TrainingBatches, cache, fingerprint, open_cache, open_dataset, shrink
from byol_timm.errors import ByolTimmError


@pytest.fixture
def photos(tmp_path):
    """40 photographs of four sizes in two classes."""
    names = [f"{place % 2}/{place}.png" for place in range(40)]
    return write_folder(tmp_path / "photos", names, lambda place: photo(20 + 7 * (place % 4), 16 + place % 4, place))


def spoil(folder, names):
    for name in names:
        path = Path(folder, name)
        path.write_bytes(path.read_bytes()[:-30])


def written(folder):
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith(".lock"))


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_the_decoded_ones_and_need_no_files_any_more(photos, tmp_path, workers):
    images = open_dataset(photos, hold_out=False).train
    expected, mark = pixels_of(images), fingerprint(images)
    cached = open_cache(images, tmp_path / "cache", workers=workers)
    assert fingerprint(cached) == mark
    assert cached.describe(3) == images.describe(3) and cached.labels.tolist() == images.labels.tolist()
    settings = dict(batch_size=8, global_batch=8, cut=VIEWS.cut, workers=0)
    batches = [take(TrainingBatches(source, **settings), 10) for source in (images, cached)]
    for batch, again in zip(*batches, strict=True):
        assert torch.equal(batch.ordinals, again.ordinals) and torch.equal(batch.crops, again.crops)
    shutil.rmtree(photos)
    assert all(torch.equal(*pair) for pair in zip(pixels_of(cached), expected, strict=True))
    pixels_of(cached)[0].zero_()
    assert torch.equal(cached.decode(0), expected[0])


def test_a_side_shrinks_what_is_larger_and_nothing_else(photos, tmp_path):
    images = open_dataset(photos, hold_out=False).train
    cached = open_cache(images, tmp_path / "cache", side=17, workers=0)
    shapes = {
        tuple(image.shape): tuple(small.shape)
        for image, small in zip(pixels_of(images), pixels_of(cached), strict=True)
    }
    assert shapes == {
        (3, 16, 20): (3, 16, 20),
        (3, 17, 27): (3, 17, 27),
        (3, 18, 34): (3, 17, 32),
        (3, 19, 41): (3, 17, 37),
    }
    assert torch.equal(cached.decode(0), images.decode(0))
    assert shrink(torch.zeros(3, 400, 300, dtype=torch.uint8), 75).shape == (3, 100, 75)


def test_what_is_there_is_used_again_and_other_images_get_their_own(photos, tmp_path):
    folder = tmp_path / "cache"
    images = open_dataset(photos, hold_out=False).train
    inodes = [open_cache(images, folder, workers=0).source.file.stat().st_ino for _ in range(2)]
    assert inodes[0] == inodes[1] and len(written(folder)) == 1
    open_cache(images, folder, side=17, workers=0)
    assert len(written(folder)) == 2
    photo(32, 32, 5).save(Path(photos, "0", "0.png"))
    again = open_dataset(photos, hold_out=False).train
    assert torch.equal(open_cache(again, folder, workers=0).decode(0), again.decode(0))
    assert len(written(folder)) == 3


def test_bad_images_stay_bad_and_are_replaced_alike(photos, tmp_path):
    spoil(photos, ["0/4.png"])
    images = open_dataset(photos, hold_out=False).train
    cached = open_cache(images, tmp_path / "cache", workers=0)
    [bad] = [index for index in range(40) if images.describe(index) == "0/4.png"]
    reasons = []
    for source in (images, cached):
        with pytest.raises(BadImage) as reason:
            source.decode(bad)
        reasons.append(str(reason.value))
    assert reasons[0] == reasons[1]
    settings = dict(batch_size=8, global_batch=8, cut=VIEWS.cut, workers=0)
    notes = [TrainingBatches(source, **settings) for source in (images, cached)]
    first, second = (torch.cat([batch.crops for batch in take(batches, 5)]) for batches in notes)
    assert torch.equal(first, second) and notes[0].bad == notes[1].bad and len(notes[1].bad) == 1


@pytest.mark.parametrize(("count", "rule"), [(1, "error"), (5, "skip")])
def test_too_many_bad_images_leave_nothing_behind(photos, tmp_path, count, rule):
    spoil(photos, [f"0/{2 * place}.png" for place in range(count)])
    images = open_dataset(photos, hold_out=False).train
    with pytest.raises(ByolTimmError, match=r"0/\d+\.png: ") as error:
        open_cache(images, tmp_path / "cache", workers=0, on_bad_image=rule)
    one_line(error)
    assert written(tmp_path / "cache") == []


def _open_killed(images, folder):
    open_cache(images, folder, workers=0, poll=lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_kill_while_it_is_written_leaves_nothing_that_is_taken_for_whole(photos, tmp_path):
    images = open_dataset(photos, hold_out=False).train
    process = multiprocessing.get_context("fork").Process(target=_open_killed, args=(images, tmp_path / "cache"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [name.startswith(".tmp-") for name in written(tmp_path / "cache")] == [True]
    cached = open_cache(images, tmp_path / "cache", workers=0)
    assert torch.equal(cached.decode(39), images.decode(39))
    assert [name.startswith(".tmp-") for name in written(tmp_path / "cache")] == [False]


def _open_at_once(barrier, answers, images, folder):
    barrier.wait()
    answers.put(sum(int(image.sum()) for image in pixels_of(open_cache(images, folder, workers=0))))


def test_of_several_processes_one_writes_and_all_read(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WAIT", 0.01)
    images = open_dataset(photos, hold_out=False).train
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(3), fork.Queue()
    processes = [
        fork.Process(target=_open_at_once, args=(barrier, answers, images, tmp_path / "cache")) for _ in range(3)
    ]
    for process in processes:
        process.start()
    sums = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sums == [sum(int(image.sum()) for image in pixels_of(images))] * 3
    assert len(written(tmp_path / "cache")) == 1


def test_no_room_a_file_in_the_way_and_damage_are_told_in_one_line(photos, tmp_path, monkeypatch):
    images = open_dataset(photos, hold_out=False).train
    (tmp_path / "file").write_text("")
    with pytest.raises(ByolTimmError, match=r"cannot write to --decoded_cache .*Choose another folder") as error:
        open_cache(images, tmp_path / "file")
    one_line(error)
    cached = open_cache(images, tmp_path / "cache", workers=0)
    with open(cached.source.file, "r+b") as file:
        file.truncate(100)
    with pytest.raises(BadImage, match="decoded cache"):
        cached.decode(39)
    with pytest.raises(ByolTimmError, match=r"is damaged \(100 bytes of \d+\)\. Delete it") as error:
        open_cache(images, tmp_path / "cache")
    one_line(error)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(ByolTimmError, match=r"take about .* GB free\. Lower --decoded_side") as error:
        open_cache(images, tmp_path / "full", workers=0)
    one_line(error)
    assert written(tmp_path / "full") == []
