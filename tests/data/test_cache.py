"""Decoded images in one file that workers and processes share."""

import dataclasses
import multiprocessing
import os
import pickle
import shutil
import signal
import types
from pathlib import Path

import psutil
import pytest
import torch
from pictures import VIEWS, one_line, photo, pixels_of, take, write_folder

from byol_timm.data import BadImage, TrainingBatches, cache, fingerprint, open_cache, open_dataset
from byol_timm.errors import ByolTimmError

EITHER = pytest.mark.parametrize("kind", ["ram", "disk"])
SETTINGS = dict(batch_size=8, global_batch=8, cut=VIEWS.cut, workers=0)


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


@pytest.mark.parametrize(("kind", "workers"), [("ram", 2), ("disk", 0)])
def test_cached_images_are_the_decoded_ones_and_need_no_files_any_more(photos, tmp_path, kind, workers):
    images = open_dataset(photos, hold_out=False).train
    expected, mark = pixels_of(images), fingerprint(images)
    cached = open_cache(images, kind, tmp_path / "cache", workers=workers)
    assert fingerprint(cached) == mark
    assert cached.describe(3) == images.describe(3) and cached.labels.tolist() == images.labels.tolist()
    batches = [take(TrainingBatches(source, **SETTINGS | {"workers": workers}), 10) for source in (images, cached)]
    for batch, again in zip(*batches, strict=True):
        assert torch.equal(batch.ordinals, again.ordinals) and torch.equal(batch.crops, again.crops)
    shutil.rmtree(photos)
    assert all(torch.equal(*pair) for pair in zip(pixels_of(cached), expected, strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(cached)).decode(3), expected[3])
    pixels_of(cached)[0].zero_()
    assert torch.equal(cached.decode(0), expected[0])


@pytest.mark.parametrize(("kind", "whole"), [("ram", True), (None, True), ("disk", True), ("none", False)])
def test_images_of_one_shape_come_whole_from_any_cache(tmp_path, kind, whole):
    images = open_dataset(write_folder(tmp_path / "photos", [f"{place}.png" for place in range(24)])).train
    batches = TrainingBatches(open_cache(images, kind, tmp_path / "cache").subset(range(3, 20)), **SETTINGS)
    assert batches.in_memory == whole
    for batch in take(batches, 4) if whole else ():
        assert batch.images.is_contiguous()
        for pixels, ordinal in zip(batch.images, batch.ordinals.tolist(), strict=True):
            assert torch.equal(pixels, images.decode(3 + ordinal % 17))


def test_only_one_shape_is_cached_by_default_and_only_where_it_is_small(photos, tmp_path, monkeypatch):
    images = open_dataset(photos, hold_out=False).train
    assert open_cache(images, None) is images
    # All of one shape but for an image that no sample has.
    names = [f"{place}.png" for place in range(100)]
    folder = write_folder(tmp_path / "one", names, lambda place: photo(20, 17 if place == 3 else 16, place))
    images = open_dataset(folder).train
    assert open_cache(images, None) is images
    assert torch.equal(open_cache(images, "ram").decode(3), images.decode(3))
    rest = images.subset([index for index in range(100) if index != 3])
    assert open_cache(rest, None) is not rest
    monkeypatch.setattr(cache, "SMALL_BYTES", 1000)
    assert open_cache(rest, None) is rest
    assert not TrainingBatches(open_cache(rest, "disk", tmp_path / "cache"), **SETTINGS).in_memory
    assert TrainingBatches(open_cache(rest, "ram"), **SETTINGS).in_memory


def test_a_file_on_disk_is_used_again_and_other_images_get_their_own(photos, tmp_path):
    folder = tmp_path / "cache"
    images = open_dataset(photos, hold_out=False).train
    inodes = [open_cache(images, "disk", folder, workers=0).source.file.stat().st_ino for _ in range(2)]
    assert inodes[0] == inodes[1] and len(written(folder)) == 1
    photo(32, 32, 5).save(Path(photos, "0", "0.png"))
    again = open_dataset(photos, hold_out=False).train
    assert torch.equal(open_cache(again, "disk", folder, workers=0).decode(0), again.decode(0))
    assert len(written(folder)) == 2


@EITHER
def test_bad_images_stay_bad_and_are_replaced_by_the_same_ones(photos, tmp_path, kind):
    spoil(photos, ["0/4.png"])
    images = open_dataset(photos, hold_out=False).train
    cached = open_cache(images, kind, tmp_path / "cache", workers=0)
    [bad] = [index for index in range(40) if images.describe(index) == "0/4.png"]
    reasons = []
    for source in (images, cached):
        with pytest.raises(BadImage) as reason:
            source.decode(bad)
        reasons.append(str(reason.value))
    assert reasons[0] == reasons[1]
    notes = [TrainingBatches(source, **SETTINGS) for source in (images, cached)]
    first, second = (torch.cat([batch.crops for batch in take(batches, 5)]) for batches in notes)
    assert torch.equal(first, second) and notes[0].bad == notes[1].bad and len(notes[1].bad) == 1


@pytest.mark.parametrize(("count", "rule"), [(1, "error"), (5, "skip")])
def test_too_many_bad_images_leave_nothing_behind(photos, tmp_path, count, rule):
    spoil(photos, [f"0/{2 * place}.png" for place in range(count)])
    images = open_dataset(photos, hold_out=False).train
    with pytest.raises(ByolTimmError, match=r"0/\d+\.png: ") as error:
        open_cache(images, "disk", tmp_path / "cache", workers=0, on_bad_image=rule)
    one_line(error)
    assert written(tmp_path / "cache") == []


def _open_killed(images, folder):
    open_cache(images, "disk", folder, workers=0, poll=lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_kill_while_it_is_written_leaves_nothing_that_is_taken_for_whole(photos, tmp_path):
    images = open_dataset(photos, hold_out=False).train
    process = multiprocessing.get_context("fork").Process(target=_open_killed, args=(images, tmp_path / "cache"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [name.startswith(".tmp-") for name in written(tmp_path / "cache")] == [True]
    cached = open_cache(images, "disk", tmp_path / "cache", workers=0)
    assert torch.equal(cached.decode(39), images.decode(39))
    assert [name.startswith(".tmp-") for name in written(tmp_path / "cache")] == [False]


@dataclasses.dataclass(frozen=True)
class Counted:
    """A source of images that counts what is read of it."""

    source: object
    count: object

    def read(self, *arguments):
        with self.count.get_lock():
            self.count.value += 1
        return self.source.read(*arguments)

    def describe(self, row):
        return self.source.describe(row)

    def identity(self, rows):
        return self.source.identity(rows)


def _open_at_once(barrier, answers, images, kind, folder):
    """Report the pixels, and the file that they are in."""
    os.environ["WORLD_SIZE"] = "3"
    barrier.wait()
    cached = open_cache(images, kind, folder, workers=0)
    answers.put((sum(int(image.sum()) for image in pixels_of(cached)), os.stat(cached.source.file).st_ino))
    barrier.wait()


@EITHER
def test_of_several_processes_one_decodes_and_all_read_one_file(photos, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(cache, "WAIT", 0.01)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    images = open_dataset(photos, hold_out=False).train
    fork = multiprocessing.get_context("fork")
    barrier, answers, reads = fork.Barrier(3), fork.Queue(), fork.Value("i", 0)
    counted = dataclasses.replace(images, source=Counted(images.source, reads))
    arguments = (barrier, answers, counted, kind, tmp_path / "cache")
    processes = [fork.Process(target=_open_at_once, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    sums, inodes = zip(*[answers.get(timeout=60) for _ in processes], strict=True)
    for process in processes:
        process.join()
    assert set(sums) == {sum(int(image.sum()) for image in pixels_of(images))}
    assert len(set(inodes)) == 1 and reads.value <= len(images) + cache.SAMPLE
    if kind == "disk":
        assert len(written(tmp_path / "cache")) == 1


def _open_and_die(sender, images):
    os.environ["WORLD_SIZE"] = "2"
    cached = open_cache(images, "ram", workers=0)
    sender.send((os.stat(cached.source.file).st_nlink, int(cached.decode(7).sum())))
    os.kill(os.getpid(), signal.SIGKILL)


def test_memory_is_free_again_however_the_process_ends(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    images = open_dataset(photos, hold_out=False).train
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_open_and_die, args=(sender, images))
    process.start()
    links, total = receiver.recv()
    process.join()
    assert process.exitcode == -signal.SIGKILL and total == int(images.decode(7).sum())
    # The file has no name, so its memory belongs to the processes that have it open.
    left = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
    assert links == 0 and sum(path.stat().st_size for path in left) < 100


def test_no_room_a_file_in_the_way_and_damage_are_reported_in_one_line(photos, tmp_path, monkeypatch):
    images = open_dataset(photos, hold_out=False).train
    (tmp_path / "file").write_text("")
    with pytest.raises(ByolTimmError, match=r"cannot write to --cache_dir .*Choose another folder") as error:
        open_cache(images, "disk", tmp_path / "file")
    one_line(error)
    cached = open_cache(images, "disk", tmp_path / "cache", workers=0)
    os.truncate(cached.source.file, 100)
    with pytest.raises(BadImage, match="decoded images"):
        cached.decode(39)
    with pytest.raises(ByolTimmError, match=r"is damaged \(.*\)\. Delete it") as error:
        open_cache(images, "disk", tmp_path / "cache")
    one_line(error)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(
        ByolTimmError, match=r"take about .* GB, --cache_dir has .* GB free\. Use --cache none"
    ) as error:
        open_cache(images, "disk", tmp_path / "full", workers=0)
    one_line(error)
    assert written(tmp_path / "full") == []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10))
    with pytest.raises(ByolTimmError, match=r"take about .* GB, memory has .* GB free\. Use --cache none"):
        open_cache(images, "ram", workers=0)
