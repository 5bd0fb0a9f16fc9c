import dataclasses
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from pictures import deep, encoded, one_line, photo, take, write_tar
from PIL import Image
from safetensors.torch import load_file
from streaming_memory import generate, measure
from test_distributed import SETTINGS, TRAIN, launch

from byol_timm.config import PretrainConfig, check, to_yaml
from byol_timm.data import StreamBatches, fingerprint, open_dataset, open_stream, stream_batches
from byol_timm.errors import ByolTimmError
from byol_timm.pretraining import pretrain
from byol_timm.training import load_latest

COUNT, GLOBAL_BATCH = 410, 40
STEPS = COUNT // GLOBAL_BATCH


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def numbered(number):
    """A photograph whose first pixel is its number."""
    pixels = np.array(photo(12, 10, number))
    pixels[0, 0] = number % 256, number // 256, 0
    return encoded(Image.fromarray(pixels))


def first_pixel(image, ordinal):
    return image[:, :1, :1].expand(2, -1, -1, -1)


def numbers(batch):
    red, green, _ = batch.crops[:, 0, :, 0, 0].long().T
    return (red + 256 * green).tolist()


def write_parquet(path, contents, labels=None, rows=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [{"bytes": content, "path": None} for content in contents]}
    features = {"image": datasets.Image()}
    if labels is not None:
        table["label"], features["label"] = labels, datasets.ClassLabel(names=list("0123456789"))
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(path, batch_size=rows)


def write_shards(folder, kind, contents, labels=None):
    """Shards of unequal length, 15 as parquet, else five."""
    sizes = [20, 40, 21, 39, 22, 38, 30, 10, 45, 15, 28, 32, 25, 17] if kind == "parquet" else [37, 150, 88, 60]
    ends = np.cumsum([0, *sizes, len(contents) - sum(sizes)])
    for shard, (start, end) in enumerate(itertools.pairwise(ends)):
        part = contents[start:end]
        if kind == "parquet":
            write_parquet(folder / f"train-{shard}.parquet", part, None if labels is None else labels[start:end])
        elif kind == "arrow":
            table = datasets.Dataset.from_dict({"image": [{"bytes": content} for content in part]})
            table = table.cast_column("image", datasets.Image())
            table.save_to_disk(folder / "saved")
            os.replace(folder / "saved" / "data-00000-of-00001.arrow", folder / f"train-{shard}.arrow")
            for path in (folder / "saved").iterdir():
                path.unlink()
            (folder / "saved").rmdir()
        else:
            files = [(f"{row:05d}.png", content) for row, content in enumerate(part)]
            if labels is not None:
                files += [(f"{row:05d}.cls", str(label).encode()) for row, label in enumerate(labels[start:end])]
            write_tar(folder / f"train-{shard}.tar", sorted(files))
    return str(folder)


def open_shards(folder, kind, **settings):
    return open_stream(folder, num_images=COUNT if kind == "tar" else None, **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    contents = [numbered(number) for number in range(COUNT)]
    place = tmp_path_factory.mktemp("shards")
    return {kind: write_shards(place / kind, kind, contents) for kind in ("parquet", "arrow", "tar")}


def batches(splits, *, world=1, accumulation=1, rank=0, **settings):
    return StreamBatches(
        splits.train,
        splits.bank,
        batch_size=GLOBAL_BATCH // (world * accumulation),
        global_batch=GLOBAL_BATCH,
        rank=rank,
        world=world,
        **{"cut": first_pixel, "workers": 0, "shuffle_buffer": 100, **settings},
    )


def steps_of(splits, count, *, world=1, accumulation=1, **settings):
    """The images and ordinals of whole steps, put together from all processes."""
    ranks = [
        take(batches(splits, world=world, accumulation=accumulation, rank=rank, **settings), count * accumulation)
        for rank in range(world)
    ]
    steps = []
    for step in range(count):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        parts = [batch for row in zip(*(rank[micro] for rank in ranks), strict=True) for batch in row]
        steps.append(([n for part in parts for n in numbers(part)], torch.cat([p.ordinals for p in parts]).tolist()))
    return steps


def test_reduced_decoding_reaches_the_stream(tmp_path):
    write_parquet(tmp_path / "large.parquet", [encoded(photo(320, 200, place), "JPEG") for place in range(8)])
    stream = open_stream(str(tmp_path / "large.parquet"))
    shapes = []

    def cut(image, ordinal):
        shapes.append(tuple(image.shape))
        return first_pixel(image, ordinal)

    settings = dict(batch_size=4, global_batch=4, cut=cut, workers=0)
    take(
        StreamBatches(stream.train, stream.bank, reduction=lambda ordinal, height, width: height // 100, **settings), 2
    )
    assert shapes == [(3, 200, 320), *[(3, 100, 160)] * 8]


def test_a_value_range_reaches_the_stream(tmp_path):
    write_parquet(tmp_path / "x.parquet", [encoded(Image.fromarray(deep(n))) for n in range(60)])
    crushed, spread = (
        open_stream(str(tmp_path), in_chans=1, value_range=value_range) for value_range in (None, (0, 4095))
    )
    assert fingerprint(crushed.train) != fingerprint(spread.train)
    expected = torch.from_numpy(np.rint(deep() * (255 / 4095)))
    assert torch.equal(spread.bank.decode(0)[0], expected.byte()) and crushed.bank.highest() is not None
    brightest = [
        take(batches(splits, cut=lambda image, ordinal: image[None].repeat(2, 1, 1, 1)), 1)[0].crops.max()
        for splits in (crushed, spread)
    ]
    assert brightest[0] < 17 and brightest[1] > 200


# Order

KINDS = pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])


@KINDS
def test_an_epoch_has_every_image_once_but_for_those_that_fill_no_batch(folders, kind):
    steps = steps_of(open_shards(folders[kind], kind), 3 * STEPS)
    orders = [[n for numbers, _ in steps[epoch * STEPS :][:STEPS] for n in numbers] for epoch in range(3)]
    for order in orders:
        assert len(order) == len(set(order)) == STEPS * GLOBAL_BATCH and set(order) <= set(range(COUNT))
    # What one epoch leaves out another has.
    assert set().union(*orders) == set(range(COUNT))
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(
    ("kind", "world", "accumulation", "workers"),
    [("parquet", 2, 2, 0), ("parquet", 2, 1, 2), ("arrow", 5, 1, 0), ("tar", 2, 2, 0)],
)
def test_images_of_a_step_do_not_depend_on_how_it_is_cut(folders, kind, world, accumulation, workers):
    splits = open_shards(folders[kind], kind)
    whole = steps_of(splits, STEPS + 2)
    assert steps_of(splits, STEPS + 2, world=world, accumulation=accumulation, workers=workers) == whole


@pytest.mark.parametrize(("kind", "workers"), [("parquet", 0), ("arrow", 0), ("tar", 0), ("parquet", 2)])
def test_resuming_gives_the_rest_of_the_same_batches(folders, kind, workers):
    splits = open_shards(folders[kind], kind)
    whole = steps_of(splits, 2 * STEPS + 3)
    for start in (1, 4, STEPS - 1, STEPS, STEPS + 3)[:: 1 + workers]:
        assert steps_of(splits, 5, start_step=start, workers=workers) == whole[start : start + 5]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_images_are_shuffled_by_the_seed(folders, kind):
    splits = open_shards(folders[kind], kind)
    orders = [[n for numbers, _ in steps_of(splits, STEPS, seed=seed) for n in numbers] for seed in (0, 1, -1)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert np.mean(np.diff(order) == 1) < 0.2


def test_a_batch_has_images_from_all_over_the_stream(folders):
    splits = open_shards(folders["parquet"], "parquet")
    for step, _ in steps_of(splits, STEPS):
        assert len({number // 30 for number in step}) >= 8


def test_ordinals_of_an_epoch_are_all_different(folders):
    ordinals = [n for _, step in steps_of(open_shards(folders["parquet"], "parquet"), 2 * STEPS) for n in step]
    assert len(set(ordinals)) == len(ordinals)


class Watched:
    """Shards that remember which of them were read."""

    def __init__(self, shards):
        self.shards, self.counts, self.read = shards, shards.counts, set()

    def __len__(self):
        return len(self.shards)

    def cells(self, shard, start, column):
        self.read.add(shard)
        return self.shards.cells(shard, start, column)


def watched(splits):
    shards = Watched(splits.train.shards)
    return dataclasses.replace(splits, train=dataclasses.replace(splits.train, shards=shards)), shards.read


def test_shards_before_the_position_are_not_read(folders):
    splits = open_shards(folders["parquet"], "parquet")
    order = np.random.default_rng(0).permutation(len(splits.train.shards))
    whole = list(splits.train.rows(order, 0))
    assert len(whole) == COUNT
    for start in (0, 29, 30, 31, 200, COUNT - 1):
        again, read = watched(splits)
        assert list(itertools.islice(again.train.rows(order, start), 20)) == whole[start:][:20]
        assert len(read) <= 3


def test_processes_share_the_reading(folders):
    read = []
    for rank in (0, 1):
        splits, shards = watched(open_shards(folders["parquet"], "parquet"))
        # The thread that reads is up to four steps ahead.
        take(batches(splits, shuffle_buffer=8, world=2, rank=rank), STEPS - 5)
        read.append(shards)
    # The shard in the middle of the epoch is read by both.
    assert len(read[0] & read[1]) <= 1 and len(read[0] | read[1]) > 15 / 2


def test_iterating_again_starts_again_and_closing_ends_the_reading(folders):
    stream = batches(open_shards(folders["parquet"], "parquet"))
    assert numbers(next(iter(stream))) == numbers(next(iter(stream)))
    stream.close()
    assert not any(thread.name.endswith("(read)") for thread in stream_batches.threading.enumerate())


# Bad images


@pytest.fixture
def spoilt(tmp_path):
    """Numbered images, of which number 7 is truncated and number 300 no image."""
    contents = [numbered(number) for number in range(COUNT)]
    contents[7], contents[300] = contents[7][:-30], b"nothing"
    return {kind: write_shards(tmp_path / kind, kind, contents) for kind in ("parquet", "tar")}


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_bad_images_are_replaced_by_the_same_however_the_step_is_cut(spoilt, kind, caplog):
    splits = open_shards(spoilt[kind], kind)
    stream = batches(splits)
    seen = [n for batch in take(stream, 2 * STEPS) for n in numbers(batch)]
    assert len(seen) == 2 * STEPS * GLOBAL_BATCH and not {7, 300} & set(seen)
    name = f"row 7 of train-0.{kind}: "
    assert len(stream.bad) == 2 and any(reason.startswith(name) for reason in stream.bad.values())
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    cut = steps_of(splits, 2 * STEPS, world=2, accumulation=2, workers=2 if kind == "parquet" else 0)
    assert [n for numbers, _ in cut for n in numbers] == seen


def test_a_bad_image_is_an_error_where_asked_for(spoilt):
    with pytest.raises(ByolTimmError, match=r"row \d+ of train-\d+\.parquet: .*--on_bad_image") as error:
        take(batches(open_stream(spoilt["parquet"]), on_bad_image="error"), 2 * STEPS)
    one_line(error)


def test_too_many_bad_images_stop_the_run(tmp_path):
    contents = [numbered(number) if number % 9 else b"nothing" for number in range(1, COUNT + 1)]
    splits = open_stream(write_shards(tmp_path, "parquet", contents))
    with pytest.raises(ByolTimmError, match=r"of \d+ images of .* cannot be read; the first: row \d+ of") as error:
        take(batches(splits), STEPS)
    one_line(error)


def test_paths_in_rows_are_not_followed(tmp_path):
    photo(12, 10).save(tmp_path / "elsewhere.png")
    rows = [{"bytes": numbered(n), "path": None} for n in range(99)] + [
        {"bytes": None, "path": str(tmp_path / "elsewhere.png")}
    ]
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    (tmp_path / "shards").mkdir()
    # As it is: `to_parquet` would put the file inside.
    pyarrow.parquet.write_table(table.data.table, tmp_path / "shards" / "a.parquet")
    stream = batches(open_stream(str(tmp_path / "shards")))
    take(stream, 6)
    assert list(stream.bad.values()) == ["row 99 of a.parquet: the row has no image"]


def test_a_broken_shard_is_reported_by_its_name(tmp_path):
    folder = write_shards(tmp_path, "tar", [numbered(number) for number in range(COUNT)])
    (tmp_path / "train-3.tar").write_bytes((tmp_path / "train-3.tar").read_bytes()[:20_000])
    with pytest.raises(ByolTimmError, match=r"reading stopped at row \d+ of train-3\.tar") as error:
        take(batches(open_stream(folder, num_images=COUNT)), STEPS)
    one_line(error)


# Tar files


def test_names_in_a_tar_are_not_paths(tmp_path):
    names = ["../up", "/tmp/byol-timm-absolute", "deep/down/x"]
    files = [(f"{name}{number:03d}.png", numbered(number)) for name in names for number in range(20)]
    write_tar(tmp_path / "inside" / "a.tar", files)
    before = sorted(tmp_path.rglob("*"))
    seen = take(batches(open_stream(str(tmp_path / "inside"), num_images=60)), 1)
    assert len(numbers(seen[0])) == GLOBAL_BATCH
    assert sorted(tmp_path.rglob("*")) == before and not list(Path("/tmp").glob("byol-timm-absolute*"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pickle", "npy"])
def test_nothing_in_a_tar_is_run(tmp_path, suffix):
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    files = [(f"{n:03d}.{end}", numbered(n) if end == "png" else payload) for n in range(60) for end in ("png", suffix)]
    write_tar(tmp_path / "a.tar", sorted(files))
    try:
        take(batches(open_stream(str(tmp_path / "a.tar"), num_images=60)), 1)
    except ByolTimmError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


# Labels


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_labelled_images_are_held_out_and_never_trained_on(tmp_path, kind):
    labels = [number // 41 for number in range(COUNT)]
    column = {"label_column": "cls"} if kind == "tar" else {}
    folder = write_shards(tmp_path, kind, [numbered(number) for number in range(COUNT)], labels)
    splits = open_shards(folder, kind, **column)
    held_out = [int(splits.test.decode(i)[0, 0, 0]) + 256 * int(splits.test.decode(i)[1, 0, 0]) for i in range(40)]
    assert len(splits.train) + len(splits.test) == COUNT and "held out" in splits.note
    assert [int(splits.test.class_names[label]) for label in splits.test.labels[:40]] == [n // 41 for n in held_out]
    seen = {n for numbers, _ in steps_of(splits, 4 * (len(splits.train) // GLOBAL_BATCH)) for n in numbers}
    assert not seen & set(held_out) and len(seen) == len(splits.train)
    assert not set(map(tuple, splits.bank.source.places)) & set(map(tuple, splits.test.source.places))
    # Although the data set is sorted by class.
    assert len(set(splits.test.labels)) >= (9 if kind == "parquet" else 4)


def test_a_test_split_is_evaluated_on(tmp_path):
    contents = [numbered(number) for number in range(200)]
    write_parquet(tmp_path / "train-0.parquet", contents[:150], [n % 10 for n in range(150)])
    write_parquet(tmp_path / "test-0.parquet", contents[150:], [n % 10 for n in range(150, 200)])
    splits = open_stream(str(tmp_path))
    assert len(splits.train) == 150 and len(splits.bank) == 150 and len(splits.test) == 50
    assert splits.test.labels.tolist() == [n % 10 for n in range(150, 200)]
    whole = open_dataset(str(tmp_path))
    assert all(torch.equal(splits.test.decode(i), whole.test.decode(i)) for i in (0, 31, 49))
    assert splits.test.class_names == whole.test.class_names
    swapped = open_stream(str(tmp_path), split="test")
    assert len(swapped.train) + len(swapped.test) == 50


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    contents = [numbered(number) for number in range(200)]
    write_parquet(tmp_path / "train-0.parquet", contents[:100], [n % 10 for n in range(100)])
    write_parquet(tmp_path / "test-0.parquet", contents[100:150], [-1] * 50)
    splits = open_stream(str(tmp_path))
    assert len(splits.train) + len(splits.test) == 100 and "held out" in splits.note
    write_parquet(tmp_path / "validation-0.parquet", contents[150:], [n % 10 for n in range(50)])
    splits = open_stream(str(tmp_path))
    assert len(splits.train) == 100 and splits.test.labels.tolist() == [n % 10 for n in range(50)]


def test_without_labels_nothing_is_held_out(folders):
    splits = open_stream(folders["parquet"])
    assert len(splits.train) == COUNT and splits.test is None and splits.bank.labels is None
    assert splits.bank.side() == 12


def test_other_images_have_another_fingerprint(folders, tmp_path):
    digests = {fingerprint(open_shards(folders[kind], kind).train) for kind in folders}
    digests |= {fingerprint(open_shards(folders["tar"], "tar", in_chans=1).train)}
    assert len(digests) == 4
    moved = write_shards(tmp_path / "moved", "parquet", [numbered(number) for number in range(COUNT)])
    assert fingerprint(open_stream(moved).train) in digests
    other = write_shards(tmp_path / "other", "parquet", [numbered(number + 1) for number in range(COUNT)])
    assert fingerprint(open_stream(other).train) not in digests


# What is refused


def test_a_number_of_images_that_nobody_knows_is_asked_for(folders):
    with pytest.raises(ByolTimmError, match=r"the number of images of .* --num_images") as error:
        open_stream(folders["tar"])
    one_line(error)


def test_a_wrong_number_of_images_is_refused(folders):
    with pytest.raises(ByolTimmError, match=r"--num_images \(17\) is wrong: .* has 410 rows") as error:
        open_stream(folders["parquet"], num_images=17)
    one_line(error)
    splits = open_stream(folders["tar"], num_images=500)
    with pytest.raises(ByolTimmError, match=r"ended after 410 images.* --num_images 410") as error:
        take(batches(splits), 13)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "Remove it"),
        ("nothing/here/at/all", "does not exist"),
        ("images", "read one by one without --streaming"),
        ("saved", "read from disk without --streaming"),
        ("empty", r"no shards found .*\.parquet \.arrow \.tar"),
        ("mixed", r"holds 1 \.parquet and 1 \.tar"),
        ("text.txt", "is not a shard"),
        ("arrays", "holds arrays"),
        ("user/name", "cannot be loaded from the Hub"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "empty", "mixed", "arrays"):
        Path(folder).mkdir()
    photo(9, 9).save("images/a.png")
    Path("text.txt").write_text("text")
    write_parquet(Path("mixed/a.parquet"), [numbered(1)])
    write_tar(Path("mixed/a.tar"), [("1.png", numbered(1))])
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk("saved")
    array = datasets.Features({"image": datasets.Array2D((4, 4), "uint8")})
    datasets.Dataset.from_dict({"image": [np.zeros((4, 4), np.uint8)]}, features=array).to_parquet("arrays/a.parquet")
    with pytest.raises(ByolTimmError, match=message) as error:
        open_stream(name)
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_images=5), r"--num_images \(5\) needs --streaming"),
        (dict(shuffle_buffer=5), r"--shuffle_buffer \(5\) needs --streaming"),
        (dict(streaming=True, cache="ram"), "Use --shuffle_buffer"),
        (dict(streaming=True, image_share=0.5), "does not work with --streaming"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ByolTimmError, match=message) as error:
        check(PretrainConfig(**settings))
    one_line(error)


def test_a_folder_of_tars_without_streaming_names_the_flag(folders):
    with pytest.raises(ByolTimmError, match=r"found 5 \.tar\)\. Only pretraining reads tar shards, with --streaming"):
        open_dataset(folders["tar"])


# Whole runs

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain.py"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    contents, labels = [numbered(number) for number in range(COUNT)], [number % 10 for number in range(COUNT)]
    return write_shards(tmp_path_factory.mktemp("labelled"), "parquet", contents, labels)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits_with_other_workers(labelled, tmp_path):
    whole, killed = (
        PretrainConfig(
            backbone="test_resnet",
            image_size=32,
            dataset=labelled,
            streaming=True,
            epochs=3,
            batch_size=16,
            hidden_dim=64,
            projection_dim=32,
            save_every=3,
            workers=workers,
            output_dir=str(tmp_path / name),
        )
        for name, workers in (("whole", 0), ("killed", 2))
    )
    pretrain(whole)
    (tmp_path / "killed.yaml").write_text(to_yaml(killed))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, RECIPE, "--config", tmp_path / "killed.yaml", "--output_dir", killed.output_dir]
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None and not list((tmp_path / "killed").glob("checkpoints/step-*")):
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 0 < load_latest(tmp_path / "killed" / "checkpoints").step < 3 * (369 // 16)
    pretrain(dataclasses.replace(killed, workers=1, resume=True))
    first, second = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_stream_to_the_same_weights(labelled, tmp_path):
    result = launch(tmp_path, TRAIN, *SETTINGS, "--dataset", labelled, "--streaming", "--batch_size", "16")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "streamed from" in result.stdout and "held out" in result.stdout
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """`tests/helpers/streaming_memory.py` measures the same with 200,000 images."""
    generate(tmp_path / "small", 2_000)
    generate(tmp_path / "large", 20_000)
    _, _, small = measure(tmp_path / "small")
    digests, _, large = measure(tmp_path / "large", 0, 40)
    rest, _, resumed = measure(tmp_path / "large", 30, 45)
    assert rest[:10] == digests[30:]
    assert max(large, resumed) < 1.1 * small
