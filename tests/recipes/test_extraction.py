import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from extract_features_writer import save_features
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

from byol_timm.data import open_dataset
from byol_timm.encoders import create_encoder
from byol_timm.errors import ByolTimmError
from byol_timm.evaluation import Preparation, dataset_features
from byol_timm.views import EvaluationTransform

PREPARATION = Preparation(EvaluationTransform(16, crop_pct=1.0), (0.2,), (0.3,), workers=0)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder("test_resnet", image_size=32, in_chans=1, output_stride=8)


@pytest.fixture(scope="module")
def images():
    return open_dataset("digits", in_chans=1, hold_out=False).train.subset(range(50, 150))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_images_of_a_split_are_there_when_nothing_is_held_out():
    splits = open_dataset("digits", in_chans=1, hold_out=False)
    assert len(splits.train) == 1797 and splits.test is None


def test_parquet_has_names_rows_labels_and_features_in_order(encoder, images, tmp_path):
    paths = save_features(encoder, images, PREPARATION, tmp_path, part_images=40)
    assert [path.name for path in paths] == [f"part-0000{number}-of-00003.parquet" for number in range(3)]
    table = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in paths]).to_pydict()
    assert table["row"] == list(range(50, 150))
    assert table["image"][3] == "image 53"
    assert table["label"] == images.labels.tolist()
    features, _ = dataset_features(encoder, images, PREPARATION, batch_size=256)
    torch.testing.assert_close(torch.tensor(table["features"]), features, rtol=1e-4, atol=1e-5)


def test_datasets_reads_the_parquet(encoder, images, tmp_path):
    import datasets

    [path] = save_features(encoder, images, PREPARATION, tmp_path)
    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")).with_format("numpy")
    finally:
        datasets.enable_progress_bars()
    assert table["features"][:].shape == (100, 96) and table["features"][:].dtype == np.float32


def test_safetensors_has_the_same_numbers(encoder, images, tmp_path):
    [table] = save_features(encoder, images, PREPARATION, tmp_path / "parquet")
    [path] = save_features(encoder, images, PREPARATION, tmp_path / "safetensors", form="safetensors")
    rows = pyarrow.parquet.read_table(table).to_pydict()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["images"]) == rows["image"]
        assert file.get_tensor("rows").tolist() == rows["row"]
        assert file.get_tensor("labels").tolist() == rows["label"]
        assert torch.equal(file.get_tensor("features"), torch.tensor(rows["features"]))


@pytest.mark.parametrize("world", [2, 3, 7])
def test_several_processes_write_the_same_bytes_as_one(encoder, images, world, tmp_path):
    save_features(encoder, images, PREPARATION, tmp_path / "one", part_images=30)
    for rank in reversed(range(world)):
        save_features(encoder, images, PREPARATION, tmp_path / "many", part_images=30, rank=rank, world=world)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_only_missing_parts_are_written_again(encoder, images, tmp_path):
    paths = save_features(encoder, images, PREPARATION, tmp_path, part_images=40)
    before = contents(tmp_path)
    paths[0].write_bytes(b"kept as it is")
    paths[1].unlink()
    save_features(encoder, images, PREPARATION, tmp_path, part_images=40)
    assert paths[0].read_bytes() == b"kept as it is"
    assert paths[1].read_bytes() == before[paths[1].name]
    assert sorted(before) == sorted(path.name for path in tmp_path.iterdir())


def test_features_of_something_else_are_not_mixed_in(encoder, images, tmp_path):
    save_features(encoder, images, PREPARATION, tmp_path)
    other = create_encoder("test_resnet", image_size=32, in_chans=1, output_stride=8)
    for changes in (dict(encoder=other), dict(images=images.subset(range(10))), dict(part_images=7)):
        arguments = dict(encoder=encoder, images=images, preparation=PREPARATION, folder=tmp_path) | changes
        with pytest.raises(ByolTimmError, match="holds other features"):
            save_features(**arguments)
    with pytest.raises(ByolTimmError, match=r"holds other features \(image_size"):
        save_features(encoder, images, replace(PREPARATION, transform=EvaluationTransform(32)), tmp_path)


def test_unlabelled_images_and_bad_ones(encoder, tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for index in range(6):
        pixels = (load_digits().images[index] * 15).astype("uint8")
        Image.fromarray(pixels).save(tmp_path / "images" / "deep" / f"{index}.png")
    (tmp_path / "images" / "deep" / "2.png").write_bytes(b"broken")
    images = open_dataset(str(tmp_path / "images"), in_chans=1, hold_out=False).train
    paths = save_features(encoder, images, PREPARATION, tmp_path / "out", part_images=4)
    rows = [pyarrow.parquet.read_table(path).to_pydict() for path in paths]
    assert [table["image"] for table in rows] == [
        ["deep/0.png", "deep/1.png", "deep/3.png"],
        ["deep/4.png", "deep/5.png"],
    ]
    assert [table["label"] for table in rows] == [[-1] * 3, [-1] * 2]


def test_a_folder_that_cannot_be_written_is_told_in_one_line(encoder, images, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ByolTimmError, match=r"cannot write to .*file"):
        save_features(encoder, images, PREPARATION, tmp_path / "file")
