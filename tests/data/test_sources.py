import hashlib
import math
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from pictures import DIGITS, decode, deep, digits_table, encoded, npy, one_line, photo, pixels_of, write_folder
from PIL import Image

from byol_timm.config import EvaluationConfig, PretrainConfig
from byol_timm.data import BadImage, fingerprint, open_dataset, warn_of_few_levels
from byol_timm.errors import ByolTimmError
from byol_timm.evaluation import open_evaluation
from byol_timm.pretraining import open_images


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """300 photographs of one size, more than are read without workers."""
    return write_folder(tmp_path_factory.mktemp("photos"), [f"{place}.png" for place in range(300)])


# Digits


def test_digits_are_the_scans_with_a_fifth_of_every_class_held_out():
    splits = open_dataset()
    assert len(splits.train) + len(splits.test) == 1797
    assert abs(len(splits.test) - 0.2 * 1797) <= 5
    counts = np.bincount(DIGITS.target)
    assert np.abs(np.bincount(splits.test.labels) - 0.2 * counts).max() <= 0.5
    assert not set(splits.train.rows) & set(splits.test.rows)
    for images in splits.train, splits.test:
        row = images.rows[5]
        assert torch.equal(
            images.decode(5), torch.tensor(np.rint(DIGITS.images[row] * 255 / 16)).byte().expand(3, 8, 8)
        )
        assert images.labels[5] == DIGITS.target[row] and images.class_names == tuple("0123456789")
    assert "held out" in splits.note


def test_held_out_images_depend_on_the_split_seed_alone():
    rows = open_dataset().test.rows
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "f71c9ddf317ebe27"
    assert np.array_equal(open_dataset(split_seed=1).test.rows, open_dataset(split_seed=1).test.rows)
    assert not np.array_equal(open_dataset(split_seed=1).test.rows, rows)
    for seed in (0, 1):
        _, evaluated, _ = open_evaluation(EvaluationConfig(encoder="test_resnet", seed=seed))
        for splits in (evaluated, open_images(PretrainConfig(seed=seed))):
            assert np.array_equal(splits.test.rows, rows)
    _, evaluated, _ = open_evaluation(EvaluationConfig(encoder="test_resnet", split_seed=1))
    for splits in (evaluated, open_images(PretrainConfig(split_seed=1))):
        assert np.array_equal(splits.test.rows, open_dataset(split_seed=1).test.rows)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_digits_have_as_many_channels_as_asked(channels):
    images = open_dataset(in_chans=channels).train
    assert images.channels == channels and images.decode(0).shape == (channels, 8, 8)


# Folders


def test_names_are_in_natural_order_whatever_the_machine(tmp_path):
    names = ["1.png", "2.png", "10.png", "a1.png", "a2/x.png", "a10.png", "a.png", "b/9.png", "b/11.png", "b/é.png"]
    write_folder(tmp_path, names[::-1])
    images = open_dataset(str(tmp_path)).train
    assert [images.describe(index) for index in range(len(names))] == names
    assert images.labels is None and images.class_names == ()


def test_every_extension_is_found_at_any_depth_and_hidden_files_are_not(tmp_path):
    names = [
        "a.JPG",
        "x/b.jpeg",
        "x/y/z/c.png",
        "d.webp",
        "e.bmp",
        "f.tif",
        "g.tiff",
        "h.gif",
        "i.ppm",
        "j.pgm",
        "k.jp2",
    ]
    write_folder(tmp_path, names, lambda place: photo(20, 16).convert("L" if names[place] == "j.pgm" else "RGB"))
    np.save(tmp_path / "l.npy", np.zeros((4, 5, 3), np.uint8))
    write_folder(tmp_path, [".hidden.png", ".cache/m.png", "x/._b.png"])
    (tmp_path / "notes.txt").write_text("no image")
    images = open_dataset(str(tmp_path)).train
    assert {images.describe(index) for index in range(len(images))} == {*names, "l.npy"}
    assert {image.shape[0] for image in pixels_of(images)} == {3}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "data", ["a/1.png", "b/2.png"])
    write_folder(tmp_path / "elsewhere", ["3.png"])
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data" / "self")
    images = open_dataset(str(tmp_path / "data")).train
    assert [images.describe(index) for index in range(len(images))] == ["a/1.png", "b/2.png", "c/3.png"]


def test_first_level_folders_are_classes(tmp_path):
    names = [
        f"{name}/{sub}{place}.png" for name in ("cat", "dog 2", "dog 10") for sub in ("", "s/") for place in range(10)
    ]
    splits = open_dataset(write_folder(tmp_path, names))
    assert splits.train.class_names == ("cat", "dog 2", "dog 10")
    assert np.bincount(splits.test.labels).tolist() == [2, 2, 2] and len(splits.train) == 54
    for images in (splits.train, splits.test):
        for index in range(len(images)):
            assert images.describe(index).startswith(images.class_names[images.labels[index]] + "/")
    assert "6 more, 10% of every class, held out" in splits.note


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["all/1.png", "all/2.png"], ["a/1.png", "b/2.png", "3.png"]])
def test_folders_without_classes_are_unlabelled(tmp_path, names):
    splits = open_dataset(write_folder(tmp_path, names))
    assert splits.train.labels is None and splits.test is None and len(splits.train) == len(names)
    assert "unlabelled" in splits.note


@pytest.mark.parametrize("test_name", ["test", "val", "validation", "valid"])
def test_folders_named_as_splits_are_splits(tmp_path, test_name):
    names = [f"{split}/{label}/{place}.png" for split in ("train", test_name) for label in "ab" for place in range(3)]
    folder = write_folder(tmp_path, [*names, f"{test_name}/new/1.png"])
    splits = open_dataset(folder)
    assert len(splits.train) == 6 and splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1, -1] and splits.test.class_names == ("a", "b")
    assert f"split {test_name}" in splits.note
    other = open_dataset(folder, split=test_name)
    assert len(other.train) + len(other.test) == 7 and other.train.describe(0).startswith(test_name)


def test_train_among_other_folders_is_a_class(tmp_path):
    names = [f"{label}/{place}.png" for label in ("bus", "train") for place in range(4)]
    splits = open_dataset(write_folder(tmp_path, names))
    assert splits.train.class_names == ("bus", "train")


def test_names_beyond_ascii_are_read_and_printed(tmp_path):
    name = os.fsdecode(b"na\xc3\xafve \xe2\x98\x83/\xff 1\n2.png")
    photo(20, 16).save(tmp_path / "1.png")
    (tmp_path / name).parent.mkdir()
    os.rename(tmp_path / "1.png", tmp_path / name)
    images = open_dataset(str(tmp_path)).train
    assert images.decode(0).shape == (3, 16, 20)
    assert images.describe(0) == "naïve ☃/\\udcff 1 2.png"
    images.describe(0).encode()
    fingerprint(images)


@pytest.mark.parametrize(
    ("names", "found"), [([], "no file"), (["a.txt", "b/c.txt", "d.csv"], r"2 \.txt, 1 \.csv"), ([".a.png"], "no file")]
)
def test_folders_without_images_say_what_they_hold(tmp_path, names, found):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises(ByolTimmError, match=rf"no images found in .* \(looked for \.jpg .*; found {found}\)") as error:
        open_dataset(str(tmp_path))
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "./nowhere"}, "data folder ./nowhere does not exist"),
        ({"dataset": "/no/such/folder"}, "data folder /no/such/folder does not exist"),
        ({"dataset": "a/b/c"}, "data folder a/b/c does not exist"),
        ({"dataset": "images.parquet"}, "data folder images.parquet does not exist"),
        ({"dataset": __file__}, "is a file. Give a folder"),
        ({"split": "test"}, "no split test. Choose one with --split: train"),
        ({"image_column": "image"}, r"--image_column \(image\) needs a table, which digits is not"),
        ({"dataset": "nobody/nothing"}, "is not a folder here and cannot be loaded from the Hub"),
        ({"dataset": "cifar10", "split": "test"}, "is not a folder here and cannot be loaded from the Hub"),
    ],
)
def test_what_cannot_be_opened_is_reported_in_one_line(settings, message):
    with pytest.raises(ByolTimmError, match=message) as error:
        open_dataset(**settings)
    one_line(error)


# Tables


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Digits with a train and a test split, as every kind of table that is read."""
    table = digits_table()
    train, test = table.select(range(150)), table.select(range(150, 200))
    folder = tmp_path_factory.mktemp("tables")
    for kind in ("parquet", "hub", "arrow"):
        (folder / kind / "data").mkdir(parents=True)
    train.to_parquet(folder / "parquet" / "train.parquet")
    test.to_parquet(folder / "parquet" / "test.parquet")
    for shard in range(3):
        train.shard(3, shard, contiguous=True).to_parquet(folder / "hub/data" / f"train-0000{shard}-of-00003.parquet")
    test.to_parquet(folder / "hub/data" / "test-00000-of-00001.parquet")
    for split, part in (("train", train), ("test", test)):
        with datasets.arrow_writer.ArrowWriter(
            path=str(folder / "arrow" / f"{split}.arrow"), features=part.features
        ) as w:
            for row in part.with_format("arrow").iter(50):
                w.write_table(row)
    datasets.DatasetDict(train=train, test=test).save_to_disk(folder / "disk")
    train.save_to_disk(folder / "disk, one split")
    return folder


def assert_digits(images, rows):
    assert len(images) == len(rows) and images.labels.tolist() == DIGITS.target[rows].tolist()
    assert images.class_names == tuple("0123456789")
    for index in (0, len(rows) // 2, len(rows) - 1):
        assert torch.equal(images.decode(index)[1], torch.tensor(DIGITS.images[rows[index]] * 15).byte())


@pytest.mark.parametrize("kind", ["parquet", "hub", "arrow", "disk"])
def test_tables_give_their_own_splits(saved, kind):
    splits = open_dataset(str(saved / kind))
    assert_digits(splits.train, np.arange(150))
    assert_digits(splits.test, np.arange(150, 200))
    assert splits.train.describe(17) == "row 17 of train" and splits.test.describe(3) == "row 3 of test"
    assert "evaluation on split test (50 images)" in splits.note


@pytest.mark.parametrize("name", ["parquet/train.parquet", "arrow/train.arrow", "disk, one split"])
def test_single_tables_hold_a_tenth_out(saved, name):
    splits = open_dataset(str(saved / name))
    assert len(splits.train) + len(splits.test) == 150 and "held out" in splits.note
    assert_digits(splits.test, splits.test.rows)
    assert np.bincount(splits.test.labels, minlength=10).min() >= 1


def test_another_split_can_be_trained_on(saved):
    splits = open_dataset(str(saved / "hub"), split="test")
    assert len(splits.train) + len(splits.test) == 50 and "split test" in splits.note
    with pytest.raises(
        ByolTimmError, match=r"no split val\. Choose one with --split: (test, train|train, test)"
    ) as error:
        open_dataset(str(saved / "hub"), split="val")
    one_line(error)


def test_no_progress_bars_where_nobody_watches(saved, capfd):
    open_dataset(str(saved / "hub"))
    assert capfd.readouterr().err == "" and not datasets.are_progress_bars_disabled()


def test_tables_and_images_in_one_folder_are_refused(tmp_path):
    digits_table(10).to_parquet(tmp_path / "train.parquet")
    write_folder(tmp_path, ["a.png"])
    with pytest.raises(ByolTimmError, match="1 tables and 1 images") as error:
        open_dataset(str(tmp_path))
    one_line(error)


def test_broken_tables_are_reported_in_one_line(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(ByolTimmError, match="cannot be loaded") as error:
        open_dataset(str(tmp_path))
    one_line(error)


def opened(table, tmp_path, **settings):
    table.to_parquet(tmp_path / "table.parquet")
    return open_dataset(str(tmp_path / "table.parquet"), **settings)


def test_image_columns_are_found_by_type_or_named(tmp_path):
    table = digits_table(30)
    both = table.add_column("second", [None] * 30).cast_column("second", datasets.Image())
    with pytest.raises(
        ByolTimmError, match=r"several image columns in .*columns: image, second.*--image_column"
    ) as error:
        opened(both, tmp_path)
    one_line(error)
    assert len(opened(both, tmp_path, image_column="image").train) == 20
    with pytest.raises(ByolTimmError, match=r"no image column in .*columns: label\..*--image_column"):
        opened(table.select_columns(["label"]), tmp_path)
    with pytest.raises(ByolTimmError, match="has no images"):
        opened(table, tmp_path, image_column="label")
    with pytest.raises(ByolTimmError, match=r"no column picture in .*columns: image, label"):
        opened(table, tmp_path, image_column="picture")
    with pytest.raises(ByolTimmError, match="no column klass in"):
        opened(table, tmp_path, label_column="klass")


def test_files_as_plain_bytes_are_images(tmp_path):
    contents = [encoded(photo(9, 7, place)) for place in range(12)]
    plain = datasets.Dataset.from_dict({"picture": contents, "text": ["x"] * 12})
    images = opened(plain, tmp_path).train
    assert np.array_equal(images.decode(3), decode(contents[3])) and images.labels is None


def test_images_stored_as_paths_are_read(tmp_path):
    write_folder(tmp_path, ["images/1.png"])
    paths = [str(tmp_path / "images/1.png"), str(tmp_path / "images/2.png")]
    table = datasets.Dataset.from_dict({"image": [{"path": path, "bytes": None} for path in paths]})
    table.save_to_disk(tmp_path / "table")
    images = open_dataset(str(tmp_path / "table")).train
    assert images.decode(0).shape == (3, 16, 20)
    with pytest.raises(BadImage, match=r"2\.png: No such file"):
        images.decode(1)


@pytest.mark.parametrize("channels", [3, 5])
def test_arrays_in_tables_are_images(tmp_path, channels):
    arrays = np.random.default_rng(0).integers(0, 256, (12, channels, 6, 7), dtype=np.uint8)
    features = datasets.Features({"pixels": datasets.Array3D((channels, 6, 7), "uint8")})
    table = datasets.Dataset.from_dict({"pixels": list(arrays)}, features=features)
    images = opened(table, tmp_path, in_chans=channels).train
    assert np.array_equal(torch.stack(pixels_of(images)), arrays) and images.side() == 7
    fingerprint(images)


DEEP = {
    "files": lambda folder: write_folder(folder, [f"{n}.png" for n in range(12)], lambda n: Image.fromarray(deep(n))),
    "arrays": lambda folder: [(folder / f"{n}.npy").write_bytes(npy(deep(n))) for n in range(12)],
    "table": lambda folder: datasets.Dataset.from_dict(
        {"pixels": [deep(n) for n in range(12)]},
        features=datasets.Features({"pixels": datasets.Array2D((16, 20), "uint16")}),
    ).to_parquet(folder / "x.parquet"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_the_values_of_deep_images_have_a_range(tmp_path, kind, caplog):
    DEEP[kind](tmp_path)
    crushed, spread, other = (
        open_dataset(str(tmp_path), in_chans=1, value_range=value_range).train
        for value_range in (None, (0, 4095), (0, 8191))
    )
    assert len(crushed.decode(0).unique()) <= 17
    expected = np.rint(deep() * (255 / 4095))
    for images in (spread, spread.subset([3, 0, 1]).subset([1])):
        assert np.array_equal(images.decode(0)[0], expected)
    assert len({fingerprint(images) for images in (crushed, spread, other)}) == 3
    for images in (spread, crushed):
        warn_of_few_levels(images)
    [warning] = caplog.messages
    assert "up to 4095 of 65535, so 17 of 256 grey levels" in warning
    assert "--value_range 0 4095" in warning and "\n" not in warning


def test_images_that_use_their_bits_are_not_warned_of(tmp_path, caplog):
    write_folder(tmp_path, ["8.png", "16.png"], lambda n: Image.fromarray(deep() * 16) if n else photo(20, 16))
    warn_of_few_levels(open_dataset(str(tmp_path)).train)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("dataset", "value_range", "message"),
    [("digits", (0, 4095), "digits have 4"), ("x", (9, 9), r"\(9 9\)"), ("x", (0, math.nan), r"\(0 nan\)")],
)
def test_a_value_range_that_cannot_be_is_refused(dataset, value_range, message):
    with pytest.raises(ByolTimmError, match=message) as error:
        open_dataset(dataset, value_range=value_range)
    assert "--value_range" in one_line(error)


def test_empty_cells_are_bad_images(tmp_path):
    table = digits_table(20)
    images = [
        None if row == 4 else cell
        for row, cell in enumerate(table.cast_column("image", datasets.Image(decode=False))["image"])
    ]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    images = opened(table, tmp_path).train
    with pytest.raises(BadImage, match="the cell is empty"):
        images.decode(4)
    assert images.decode(5).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("kind", "labels", "names", "expected"),
    [
        (datasets.Value("string"), ["b", "a", None, "c10", "c9"] * 4, ("a", "b", "c9", "c10"), [1, 0, -1, 3, 2]),
        (datasets.Value("int64"), [7, 100, -1, None, 7] * 4, ("7", "100"), [0, 1, -1, -1, 0]),
        (datasets.ClassLabel(names=["x", "y"]), [1, 0, -1, None, 1] * 4, ("x", "y"), [1, 0, -1, -1, 1]),
    ],
)
def test_labels_of_any_kind_become_numbers(tmp_path, kind, labels, names, expected):
    splits = opened(digits_table(20, labels, label=kind), tmp_path, label_column="label")
    assert splits.train.class_names == names
    for images in (splits.train, splits.test):
        assert images.labels.tolist() == [(expected * 4)[row] for row in images.rows]
    assert (splits.test.labels >= 0).all()
    assert len(splits.train) + len(splits.test) == 20


def test_only_class_labels_count_without_being_named(tmp_path):
    assert opened(digits_table(20, label=datasets.Value("int64")), tmp_path).test is None


def test_other_columns_are_no_labels(tmp_path):
    with pytest.raises(ByolTimmError, match="--label_column") as error:
        opened(digits_table(20, [0.5] * 20, label=datasets.Value("float32")), tmp_path, label_column="label")
    one_line(error)


def test_several_label_columns_are_a_warning(tmp_path, caplog):
    table = digits_table(20)
    table = table.add_column("coarse", [0] * 20).cast_column("coarse", datasets.ClassLabel(names=["digit"]))
    assert opened(table, tmp_path).train.labels is None
    assert "choose with --label_column: label, coarse" in caplog.text
    assert opened(table, tmp_path, label_column="label").train.labels is not None


def test_an_unlabelled_test_split_is_passed_over(tmp_path):
    digits_table(100).to_parquet(tmp_path / "train.parquet")
    digits_table(20, [-1] * 20).to_parquet(tmp_path / "test.parquet")
    splits = open_dataset(str(tmp_path))
    assert "held out" in splits.note and len(splits.train) + len(splits.test) == 100


def test_without_a_split_named_train_one_must_be_chosen(tmp_path):
    digits_table(10).save_to_disk(tmp_path / "one")
    tables = {"a": digits_table(10), "b": digits_table(20)}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "two")
    with pytest.raises(ByolTimmError, match=r"no split train, only a, b\. Choose one with --split") as error:
        open_dataset(str(tmp_path / "two"))
    one_line(error)
    splits = open_dataset(str(tmp_path / "two"), split="b")
    assert len(splits.train) + len(splits.test) == 20


def test_selected_rows_of_a_table_keep_their_order(tmp_path):
    digits_table(50).select([7, 3, 30, 12]).save_to_disk(tmp_path)
    images = open_dataset(str(tmp_path), hold_out=False).train
    assert images.labels.tolist() == DIGITS.target[[7, 3, 30, 12]].tolist()
    assert torch.equal(images.decode(2)[0], torch.tensor(DIGITS.images[30] * 15).byte())


def test_side_is_that_of_a_typical_image(tmp_path):
    write_folder(tmp_path, [f"{place}.png" for place in range(9)], lambda place: photo(20, 30 if place else 300))
    assert open_dataset(str(tmp_path)).train.side() == 30
    assert open_dataset().train.side() == 8


def test_fingerprint_tells_images_apart(photos, saved, tmp_path):
    train = open_dataset().train
    assert fingerprint(train) == fingerprint(open_dataset().train)
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(300)])
    assert fingerprint(open_dataset(folder).train) == fingerprint(open_dataset(photos).train)
    sources = [
        train,
        open_dataset(split_seed=1).train,
        open_dataset(in_chans=1).train,
        train.subset(range(100)),
        open_dataset(photos).train,
        open_dataset(str(saved / "hub")).train,
        open_dataset(str(saved / "hub")).test,
    ]
    prints = [fingerprint(images) for images in sources]
    photo(20, 16).save(tmp_path / "17.png", compress_level=0)
    prints.append(fingerprint(open_dataset(folder).train))
    assert len(set(prints)) == len(prints) == 8


def test_import_leaves_heavy_libraries_alone():
    code = "import sys, byol_timm.data; print([name for name in ('datasets', 'sklearn') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
