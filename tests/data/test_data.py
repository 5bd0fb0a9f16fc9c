import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import VIEWS, digits_table, one_line, photo, take, write_folder

from byol_timm.data import (
    BadImage,
    TrainingBatches,
    copied_ahead,
    epoch_order,
    evaluation_batches,
    load_pixels,
    open_cache,
    open_dataset,
    subset_indices,
    workers,
)
from byol_timm.errors import ByolTimmError
from byol_timm.views import EvaluationTransform

# Order


def test_order_of_an_epoch_is_a_permutation_that_seed_and_epoch_decide():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(100))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(epoch_order(1, 2, 100), orders[5])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_images_of_a_step_do_not_depend_on_how_it_is_cut(world, accumulation):
    images, global_batch = open_dataset().train, 240
    batch_size = global_batch // (world * accumulation)
    ranks = [
        take(
            TrainingBatches(
                images, batch_size=batch_size, global_batch=global_batch, rank=rank, world=world, cut=VIEWS.cut
            ),
            12 * accumulation,
        )
        for rank in range(world)
    ]
    steps_per_epoch = len(images) // global_batch
    for step in range(12):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        # Micro-batch after micro-batch, and in each rank after rank.
        batches = [batch for batches in zip(*(batches[micro] for batches in ranks), strict=True) for batch in batches]
        assert all(len(batch.ordinals) == batch_size for batch in batches)
        ordinals = torch.cat([batch.ordinals for batch in batches])
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(0, epoch, len(images))[place * global_batch :][:global_batch]
        assert torch.equal(ordinals, order + epoch * len(images))


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_resuming_gives_the_rest_of_the_same_batches(cache):
    images = open_cache(open_dataset().train.subset(range(50)), cache)
    settings = dict(batch_size=5, global_batch=20, cut=VIEWS.cut, seed=3, workers=0)
    whole = take(TrainingBatches(images, **settings), 28)
    rest = take(TrainingBatches(images, start_step=5, **settings), 8)
    for batch, again in zip(whole[20:], rest, strict=True):
        assert torch.equal(batch.ordinals, again.ordinals)
        for first, second in ((batch.images, again.images), (batch.crops, again.crops)):
            assert first is second is None or torch.equal(first, second)


def test_iterating_again_starts_again():
    batches = TrainingBatches(open_dataset().train, batch_size=8, global_batch=8, cut=VIEWS.cut)
    first, again = next(iter(batches)), next(iter(batches))
    assert torch.equal(first.ordinals, again.ordinals)


# Paths


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """300 photographs of one size, more than are read without workers."""
    return write_folder(tmp_path_factory.mktemp("photos"), [f"{place}.png" for place in range(300)])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_memory_hold_the_decoded_images(photos, workers):
    images = open_dataset(photos).train
    cached = open_cache(images, None, workers=workers)
    batches = TrainingBatches(cached, batch_size=10, global_batch=20, cut=VIEWS.cut)
    assert batches.in_memory
    for batch in take(batches, 20):
        assert batch.crops is None and batch.images.dtype == torch.uint8
        for pixels, ordinal in zip(batch.images, batch.ordinals.tolist(), strict=True):
            assert torch.equal(pixels, images.decode(ordinal % len(images)))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_crops_of_the_same_images(photos, workers):
    images = open_dataset(photos).train
    settings = dict(batch_size=10, global_batch=20, cut=VIEWS.cut)
    batches, whole = (
        TrainingBatches(images, workers=workers, **settings),
        TrainingBatches(open_cache(images, None), **settings),
    )
    assert not batches.in_memory
    for batch, held in zip(take(batches, 20), take(whole, 20), strict=True):
        assert batch.images is None and torch.equal(batch.ordinals, held.ordinals)
        assert batch.crops.shape == (10, 2, 3, 16, 16) and batch.crops.dtype == torch.uint8
        for crops, pixels, ordinal in zip(batch.crops, held.images, batch.ordinals.tolist(), strict=True):
            # Only the memory layout of the pixels differs, and with it the last bit of the resize.
            assert (crops.int() - VIEWS.cut(pixels, ordinal).int()).abs().max() <= 1


def test_one_image_of_another_shape_sends_all_to_the_workers(photos, tmp_path):
    write_folder(tmp_path, [f"{place}.png" for place in range(40)])
    photo(16, 20).save(tmp_path / "13.png")
    images = open_dataset(str(tmp_path)).train
    assert images.decode(13).shape == (3, 20, 16)
    assert open_cache(images, None, workers=0) is images
    batches = TrainingBatches(
        open_cache(images, "ram", workers=0), batch_size=40, global_batch=40, cut=VIEWS.cut, workers=0
    )
    assert not batches.in_memory
    assert take(batches, 1)[0].crops.shape == (40, 2, 3, 16, 16)


def test_images_travel_to_spawned_workers(photos, tmp_path):
    digits_table(20).to_parquet(tmp_path / "digits.parquet")
    sources = [open_dataset().test, open_dataset(photos).train, open_dataset(str(tmp_path / "digits.parquet")).train]
    expected = [images.decode(5) for images in sources]
    again = pickle.loads(pickle.dumps(sources))
    assert [len(images) for images in again] == [len(images) for images in sources]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answers = [pool.apply(images.decode, (5,)) for images in sources]
    for results in (answers, [images.decode(5) for images in again]):
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_evaluation_gives_every_image_in_order(photos):
    images = open_dataset(photos).train
    transform = EvaluationTransform(16)
    indices = np.arange(len(images))[::-1][:290]
    batches = list(evaluation_batches(images, transform, batch_size=64, indices=indices, workers=2))
    assert [len(found) for _, found in batches] == [64, 64, 64, 64, 34]
    pixels, found = load_pixels(images, transform, indices=indices, workers=0)
    assert found.tolist() == indices.tolist() and pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.cat([part for part, _ in batches]))
    assert torch.equal(pixels[3], transform(images.decode(int(indices[3]))))


def test_reduced_decoding_changes_only_crops_that_are_shrunk_and_these_a_little(tmp_path):
    # Of the small ones no crop is shrunk, of the large ones every crop by a factor of four and more.
    sizes = [(20, 16), (400, 300)]
    write_folder(tmp_path, [f"{place}.jpg" for place in range(20)], lambda place: photo(*sizes[place % 2], place))
    images = open_dataset(str(tmp_path)).train
    settings = dict(batch_size=20, global_batch=20, cut=VIEWS.cut, workers=0)
    [exact] = take(TrainingBatches(images, **settings), 1)
    [reduced] = take(TrainingBatches(images, reduction=VIEWS.reduction, **settings), 1)
    assert torch.equal(exact.ordinals, reduced.ordinals)
    difference = (exact.crops.int() - reduced.crops.int()).abs()
    small = exact.ordinals % 2 == 0
    assert difference[small].max() == 0
    assert all(0 < float(crops.float().mean()) < 6 for crops in difference[~small])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["none", "ram"])
def test_batches_travel_ahead_to_a_gpu_as_they_are(photos, cache):
    images, device = open_cache(open_dataset(photos).train, cache), torch.device("cuda")
    settings = dict(batch_size=10, global_batch=10, cut=VIEWS.cut, workers=0, pin=True)
    sent = []
    with TrainingBatches(images, **settings) as batches:
        for batch in itertools.islice(copied_ahead(iter(batches), device), 40):
            pixels = batch.images if batch.crops is None else batch.crops
            assert pixels.device.type == "cuda" and batch.ordinals.device.type == "cpu"
            # Work that is still waiting when the memory of the batch is let go of.
            torch.cuda._sleep(10**6)
            sent.append((pixels.int().sum(), batch.ordinals))
    for (total, ordinals), batch in zip(sent, take(TrainingBatches(images, **settings), 40), strict=True):
        assert torch.equal(ordinals, batch.ordinals)
        assert total.item() == (batch.images if batch.crops is None else batch.crops).int().sum().item()


def test_on_a_cpu_batches_are_handed_on_untouched(photos):
    images = open_cache(open_dataset(photos).train, None)
    with TrainingBatches(images, batch_size=10, global_batch=10, cut=VIEWS.cut) as batches:
        stream = iter(batches)
        assert copied_ahead(stream, torch.device("cpu")) is stream
        batch = next(stream)
        assert batch.to(torch.device("cpu")).images is batch.images
        # Also on a machine with a GPU that this run does not use.
        assert not batch.images.is_pinned()


# Bad images


def spoil(folder, names):
    for name in names:
        path = Path(folder, name)
        path.write_bytes(path.read_bytes()[:-30])


@pytest.fixture
def spoilt(tmp_path):
    """60 photographs of one size, of which number 7, 8 and 59 are truncated."""
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(60)])
    spoil(folder, ["7.png", "8.png", "59.png"])
    return open_dataset(folder).train


@pytest.mark.parametrize(("cache", "workers"), [("ram", 0), ("none", 0), ("none", 2)])
def test_bad_images_are_replaced_by_the_next_that_can_be_read(spoilt, cache, workers, caplog):
    batches = TrainingBatches(
        open_cache(spoilt, cache, workers=workers),
        batch_size=20,
        global_batch=60,
        cut=lambda image, _: image.expand(2, -1, -1, -1),
        workers=workers,
    )
    seen = {}
    for batch in take(batches, 6):
        pixels = batch.images if batch.images is not None else batch.crops[:, 0]
        seen |= dict(zip(batch.ordinals.tolist(), pixels, strict=True))
    assert sorted(seen) == list(range(120))
    for ordinal, pixels in seen.items():
        index = ordinal % 60
        assert torch.equal(pixels, spoilt.decode({7: 9, 8: 9, 59: 0}.get(index, index)))
    assert sorted(batches.bad) == [7, 8, 59] and batches.bad[7].startswith("7.png: ")
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1 and ".png: " in messages[0]


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_bad_image_is_an_error_where_asked_for(spoilt, cache):
    with pytest.raises(ByolTimmError, match=r"(7|8|59)\.png: .*--on_bad_image") as error:
        take(
            TrainingBatches(
                open_cache(spoilt, cache, workers=0, on_bad_image="error"),
                batch_size=20,
                global_batch=60,
                cut=VIEWS.cut,
                workers=0,
                on_bad_image="error",
            ),
            3,
        )
    one_line(error)


@pytest.mark.parametrize(
    ("bad", "cache", "workers"),
    [
        *((bad, cache, 0) for bad in (range(4), range(0, 60, 2), range(30)) for cache in ("ram", "none")),
        (range(4), "none", 2),
    ],
)
def test_too_many_bad_images_stop_the_run(tmp_path, bad, cache, workers):
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(60)])
    spoil(folder, [f"{place}.png" for place in bad])
    with pytest.raises(ByolTimmError, match=r"of \d+ images of .* cannot be read; the first: \d+\.png: ") as error:
        take(
            TrainingBatches(
                open_cache(open_dataset(folder).train, cache, workers=workers),
                batch_size=20,
                global_batch=60,
                cut=VIEWS.cut,
                workers=workers,
            ),
            3,
        )
    one_line(error)


def test_a_cluster_of_bad_images_counts_once_each(tmp_path):
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(400)])
    spoil(folder, [f"{place}.png" for place in range(100, 118)])
    images = open_dataset(folder).train
    batches = TrainingBatches(images, batch_size=100, global_batch=100, cut=VIEWS.cut, workers=0)
    take(batches, 12)
    assert sorted(batches.bad) == list(range(100, 118))


def test_nothing_readable_is_an_error(tmp_path):
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(5)])
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    images = open_dataset(folder).train
    for attempt in (
        images.side,
        lambda: open_cache(images, None),
        lambda: next(iter(TrainingBatches(images, batch_size=2, global_batch=2, cut=VIEWS.cut))),
        lambda: load_pixels(images, EvaluationTransform(16)),
    ):
        with pytest.raises(ByolTimmError, match=r"no image of .* can be read \(4\.png: the file is empty") as error:
            attempt()
        one_line(error)


def test_unreadable_files_are_bad_with_their_name(tmp_path):
    write_folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    images = open_dataset(str(tmp_path)).train
    with pytest.raises(BadImage, match="No such file"):
        images.decode(2)
    assert images.describe(2) == "dangling.png"


def test_evaluation_leaves_bad_images_out_with_one_warning(spoilt, caplog):
    pixels, indices = load_pixels(spoilt, EvaluationTransform(16))
    assert indices.tolist() == [index for index in range(60) if index not in (7, 8, 59)]
    assert torch.equal(pixels[7], EvaluationTransform(16)(spoilt.decode(9)))
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "3 of 60 images cannot be read and are skipped"
    ]


# Workers


def kill_worker(image, ordinal):
    if torch.utils.data.get_worker_info() is not None and ordinal % 7 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return VIEWS.cut(image, ordinal)


def hang(image, ordinal):
    if torch.utils.data.get_worker_info() is not None:
        time.sleep(60)
    return VIEWS.cut(image, ordinal)


def test_a_killed_worker_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(workers, "WORKER_POLL", 0.5)
    images = open_dataset().train
    with pytest.raises(workers.WorkerError, match=r"data loading worker.*--workers 0") as error:
        take(TrainingBatches(images, batch_size=8, global_batch=8, cut=kill_worker, workers=2), 50)
    one_line(error)
    assert error.value.exit_code == 1
    assert not multiprocessing.active_children()


def test_the_death_of_a_worker_does_not_interrupt_the_main_process(monkeypatch):
    monkeypatch.setattr(workers, "WORKER_POLL", 0.5)
    batches = TrainingBatches(open_dataset().train, batch_size=8, global_batch=8, cut=VIEWS.cut, workers=1)
    with batches:
        stream = iter(batches)
        next(stream)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(workers.WorkerError, match="--workers 0"):
            for _ in stream:
                pass


def test_a_hanging_worker_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(workers, "WORKER_POLL", 0.5)
    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 1.0)
    images = open_dataset().train
    with pytest.raises(workers.WorkerError, match=r"no data from the workers for 1 s.*--workers 0") as error:
        take(TrainingBatches(images, batch_size=8, global_batch=8, cut=hang, workers=1), 1)
    one_line(error)
    assert not multiprocessing.active_children()


def test_workers_end_with_the_batches(photos):
    batches = TrainingBatches(open_dataset(photos).train, batch_size=8, global_batch=8, cut=VIEWS.cut, workers=2)
    take(batches, 3)
    assert not multiprocessing.active_children()


def test_workers_are_out_of_reach_of_ctrl_c():
    batches = TrainingBatches(open_dataset().train, batch_size=8, global_batch=8, cut=VIEWS.cut, workers=1)
    with batches:
        next(iter(batches))
        assert os.getpgid(multiprocessing.active_children()[0].pid) != os.getpgid(0)


def test_too_little_shared_memory_is_reported_before_workers_start(tmp_path, monkeypatch):
    workers._check_shared_memory(2**10, str(tmp_path))
    with pytest.raises(ByolTimmError, match=r"need about 1099511627776 MB of shared memory.*--workers 0") as error:
        workers._check_shared_memory(2**60, str(tmp_path))
    one_line(error)


# The rest


def test_a_data_set_smaller_than_the_global_batch_is_refused():
    images = open_dataset().train.subset(range(50))
    with pytest.raises(ByolTimmError, match=r"50 images but the global batch is 256 \(128 x 2\)") as error:
        TrainingBatches(images, batch_size=128, global_batch=256, cut=VIEWS.cut)
    one_line(error)


def test_subsets_are_balanced():
    labels = np.repeat([-1, 0, 1, 2], [50, 5, 100, 1000])
    indices = subset_indices(labels, 65, seed=0)
    assert np.bincount(labels[indices]).tolist() == [5, 30, 30]
    assert np.array_equal(indices, np.unique(indices))
    assert np.array_equal(indices, subset_indices(labels, 65, seed=0))
    assert not np.array_equal(indices, subset_indices(labels, 65, seed=1))
    assert subset_indices(labels, 10_000, seed=0).tolist() == list(range(50, 1155))
