import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from byol_timm.errors import ByolTimmError
from byol_timm.report import (
    save_confusion,
    save_curves,
    save_embedding,
    save_neighbours,
    save_report,
    save_views,
)
from byol_timm.views import AUGMENTATIONS, TwoViews

ROW = dict(
    epoch=0.0,
    loss=1.2,
    lr=0.1,
    target_decay=0.99,
    feature_std=0.5,
    projection_std=0.8,
    effective_rank=30.0,
    agreement=0.5,
    images_per_second=1000.0,
)
ROWS = [{**ROW, "step": step, "epoch": step / 10, "loss": 4 / (1 + step)} for step in range(40)]
WITH_KNN = [{**row, "knn": 0.9 + row["epoch"] / 100} if row["step"] % 10 == 0 else row for row in ROWS]
DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images * 255 / 16).to(torch.uint8)[:, None]
NAMES = [str(label) for label in range(10)]


def size_of(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        picture.load()
        return picture.size


@pytest.mark.parametrize(
    "rows",
    [
        WITH_KNN,
        ROWS,
        ROWS[:1],
        [],
        [{**row, "loss": math.nan} for row in ROWS],
        [*ROWS[:20], *({**row, "loss": math.nan, "effective_rank": math.inf} for row in ROWS[20:])],
        [{"step": 0, "knn": 0.8, "seconds": 1.0}, *ROWS],
        [{"step": 1, "epoch": 0.1}],
    ],
    ids="all unlabelled first-row no-row never-finite diverged evaluated-first bare".split(),
)
def test_curves_of_whatever_a_run_wrote(rows, tmp_path):
    path = save_curves(rows, tmp_path / "curves.png", baselines={"raw pixels": 0.97, "random": 0.9})
    assert size_of(path) == (1260, 648)


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (1, 8), (2, 3), (3, 1), (4, 3), (7, 1)])
def test_views_of_any_number_of_images_and_channels(channels, count, tmp_path):
    images = IMAGES[:count].repeat(1, channels, 1, 1)
    views = TwoViews(AUGMENTATIONS["digits"], 32, mean=[0.0], std=[1.0])(images, torch.arange(count))
    width, height = size_of(save_views(images, *views, tmp_path / "views.png"))
    assert width > 200 and height > 200


def test_views_of_images_of_different_sizes_and_of_more_than_fit(tmp_path):
    images = [torch.zeros(3, 20 + index, 30, dtype=torch.uint8) for index in range(20)]
    views = torch.rand(20, 3, 16, 16)
    assert size_of(save_views(images, views, views, tmp_path / "many.png")) == size_of(
        save_views(images[:8], views[:8], views[:8], tmp_path / "eight.png")
    )


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map_of_an_embedding(method, tmp_path):
    features, labels = torch.tensor(DIGITS.data[:120]), DIGITS.target[:120]
    assert size_of(save_embedding(features, labels, NAMES, tmp_path / "map.png", method=method)) == (900, 744)


@pytest.mark.parametrize(
    "labels", [None, np.full(60, -1), np.arange(60) % 3 - 1, np.zeros(60, int), np.arange(60)], ids=repr
)
def test_map_of_an_embedding_with_whatever_labels(labels, tmp_path):
    size_of(save_embedding(torch.tensor(DIGITS.data[:60]), labels, ["a"], tmp_path / "map.png"))


@pytest.mark.parametrize(
    "features", [torch.zeros(9, 4), torch.randn(1, 4), torch.randn(9, 1), torch.full((9, 2), math.nan)]
)
def test_map_of_a_degenerate_embedding(features, tmp_path):
    size_of(save_embedding(features, None, [], tmp_path / "map.png"))


def test_neighbours_with_and_without_labels(tmp_path):
    neighbours = [IMAGES[index + 1 : index + 9] for index in range(3)]
    labels = [DIGITS.target[index + 1 : index + 9] for index in range(3)]
    plain = save_neighbours(IMAGES[:3], neighbours, tmp_path / "plain.png")
    labelled = save_neighbours(
        IMAGES[:3],
        neighbours,
        tmp_path / "labelled.png",
        query_labels=DIGITS.target[:3],
        neighbour_labels=labels,
        class_names=NAMES,
    )
    size_of(plain)
    size_of(labelled)
    size_of(save_neighbours(IMAGES[:1], [IMAGES[1:2]], tmp_path / "one.png"))


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 120])
def test_confusion_of_any_number_of_classes(classes, tmp_path):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
    counts[0] = 0
    size_of(save_confusion(counts, [f"class {index}" for index in range(classes)], tmp_path / "confusion.png"))


def test_names_of_classes_are_text_and_nothing_else(tmp_path):
    names = ["$x", "$\\frac{1}$", "犬", "a\nb", "", "<b>", "_^{"]
    size_of(save_confusion(np.eye(7, dtype=int), names, tmp_path / "confusion.png"))
    size_of(save_embedding(torch.tensor(DIGITS.data[:70]), np.arange(70) % 7, names, tmp_path / "map.png"))


def test_a_picture_has_the_same_bytes_twice(tmp_path):
    first = save_curves(WITH_KNN, tmp_path / "a.png").read_bytes()
    assert save_curves(WITH_KNN, tmp_path / "b.png").read_bytes() == first


def test_a_picture_that_cannot_be_written_is_an_error_in_one_line(tmp_path):
    with pytest.raises(ByolTimmError, match=r"cannot write .*curves\.png"):
        save_curves(ROWS, tmp_path / "missing" / "curves.png")


def test_pictures_leave_pyplot_and_the_settings_of_matplotlib_alone(tmp_path):
    script = (
        "import sys; from byol_timm.report import save_curves; assert 'matplotlib' not in sys.modules\n"
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        f"save_curves([dict(step=1, epoch=1, loss=1.0)], {str(tmp_path / 'curves.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams.copy() == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


class Page(HTMLParser):
    """Elements with their attributes, and the text, of a page that closes what it opens."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = save_embedding(torch.tensor(DIGITS.data[:50]), None, [], tmp_path_factory.mktemp("map") / "map.png")
    return path.read_bytes()


@pytest.fixture
def run_folder(tmp_path, picture):
    folder = tmp_path / "resnet18 <i>digits"
    folder.mkdir()
    for name in ("curves.png", "a_map.png"):
        (folder / name).write_bytes(picture)
    results = {
        "config": {"backbone": "resnet18<script>", "dataset": str(Path.home() / "pictures")},
        "results": {"knn_byol": 97.123456789, "protocol": "20-NN <script>alert(1)</script> & more"},
        "confusion": np.eye(50).tolist(),
        "token": "hf_" + "a" * 30,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(f"backbone: resnet18\noutput_dir: {Path.home()}/runs/x\n")
    (folder / "environment.json").write_text(
        json.dumps({"torch": "2.6", "command": "python /home/somebody/pretrain.py"})
    )
    return folder


def test_a_report_holds_every_picture_and_number_and_asks_for_nothing_else(run_folder):
    page = Page(save_report(run_folder))
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "a", "i", "b"} == set()
    assert not any({"href", "srcset", "onload", "action"} & attributes.keys() for _, attributes in page.elements)
    assert "url(" not in page.text and "@import" not in page.text
    for text in ("resnet18 <i>digits", "97.123456789", "after BYOL 97.1 %", "<script>alert(1)</script> & more"):
        assert text in page.text
    assert "output_dir" in page.text and "2.6" in page.text


def test_a_report_tells_no_secret_and_no_home(run_folder):
    text = save_report(run_folder).read_text()
    assert str(Path.home()) not in text and "somebody" not in text and "hf_aaa" not in text


def test_a_report_comes_out_the_same_twice(run_folder):
    first = save_report(run_folder).read_bytes()
    assert save_report(run_folder).read_bytes() == first


def test_a_report_takes_what_is_there_and_refuses_other_folders(run_folder, tmp_path):
    (run_folder / "results.json").unlink()
    (run_folder / "environment.json").unlink()
    assert "Settings" in Page(save_report(run_folder)).text
    (run_folder / "results.json").write_text('{"results": ')
    with pytest.raises(ByolTimmError, match=r"results\.json is not JSON"):
        save_report(run_folder)
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ByolTimmError, match="is not the folder of a run"):
            save_report(folder)
