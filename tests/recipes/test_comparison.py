"""The whole comparison on digits, small; and the words of its conclusion."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from frozen_vs_unfrozen_cells import Comparison, Origin, cells, compare, find_encoder
from frozen_vs_unfrozen_report import conclusion, results_table, save_bars, save_label_efficiency
from PIL import Image

from byol_timm.config import PretrainConfig
from byol_timm.data import fingerprint
from byol_timm.errors import ByolTimmError
from byol_timm.evaluation import PROTOCOLS, Protocol
from byol_timm.pretraining import initial_encoder, open_images

SMALL = Comparison(
    PretrainConfig(
        backbone="test_resnet",
        image_size=32,
        in_chans=1,
        epochs=1,
        batch_size=128,
        hidden_dim=32,
        projection_dim=16,
        knn_every=100,
    ),
    label_shares=(0.1, 1.0),
    image_shares=(0.1,),
    seeds=(3,),
    linear=Protocol(frozen=True, lrs=(0.1,), epochs=(5,), batch_size=128, standardize=True),
    finetune=Protocol(frozen=False, lrs=(0.05,), epochs=(1,), batch_size=128),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparisons") / "small"
    return folder, compare(SMALL, folder)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_every_encoder_meets_every_share_of_the_labels_frozen_and_fine_tuned(finished):
    folder, rows = finished
    seen = [(row["start"], row["images"], row["mode"], row["labels"], row["seed"]) for row in rows]
    expected = [
        (start, images, mode, labels, 3)
        for start, images in (("random", 0.0), ("byol", 1.0))
        for mode in ("frozen", "fine-tuned")
        for labels in (0.1, 1.0)
    ]
    expected += [("byol", 0.1, mode, 1.0, 3) for mode in ("frozen", "fine-tuned")]
    # Whether there are pretrained weights depends on the machine.
    assert [cell for cell in seen if cell[0] != "pretrained"] == expected
    assert {row["test_images"] for row in rows} == {359}
    with open(folder / "results.csv", newline="") as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [row["top1"] for row in rows]
    text = (folder / "conclusion.md").read_text()
    assert "residual branches starting at 0 (--zero_init_last)" in text and rows[0]["zero_init_last"] is True
    assert conclusion(rows) in text and results_table(rows) in text
    assert {"bars.png", "label_efficiency.png"} <= {file.name for file in folder.iterdir()}


def test_pretraining_sees_its_share_of_the_training_images_for_as_many_steps_and_no_test_image(finished):
    folder, _ = finished
    records = [json.loads((folder / name / "results.json").read_text()) for name in ("byol-100-seed3", "byol-10-seed3")]
    assert [record["data"]["images"] for record in records] == [1438, 144]
    assert records[0]["steps"] == 11 and records[1]["steps"] == 10
    for record in records:
        config = PretrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()})
        splits = open_images(config)
        assert record["data"]["fingerprint"] == fingerprint(splits.train)
        assert not set(splits.train.rows) & set(splits.test.rows)
        assert np.array_equal(splits.test.rows, open_images(dataclasses.replace(SMALL.pretraining, seed=3)).test.rows)


def test_the_labelled_images_are_saved_and_nested(finished):
    folder, rows = finished
    tenth, everything = (json.loads((folder / "labelled" / f"{name}-seed3.json").read_text()) for name in (10, 100))
    assert set(tenth) < set(everything)
    assert {row["train_images"] for row in rows if row["labels"] == 0.1} == {len(tenth)}
    assert {row["train_images"] for row in rows if row["labels"] == 1.0} == {len(everything)}


def test_what_is_finished_is_not_computed_again_and_what_is_lost_comes_out_the_same(finished, tmp_path, monkeypatch):
    folder, rows = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    lost = [again / "cells" / f"{name}-seed3.json" for name in ("byol-100-frozen-10", "random-fine-tuned-100")]
    for path in lost:
        path.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (again / "cells").iterdir()}

    def refuse(config):
        raise AssertionError("this was pretrained already")

    monkeypatch.setattr("frozen_vs_unfrozen_cells.pretrain", refuse)
    assert without_seconds(compare(SMALL, again)) == without_seconds(rows)
    after = {path.name: path.stat().st_mtime_ns for path in (again / "cells").iterdir()}
    assert after.keys() - before.keys() == {path.name for path in lost}
    assert all(after[name] == time for name, time in before.items())


def test_a_folder_of_another_comparison_is_refused_and_more_shares_are_not(finished, tmp_path):
    folder, _ = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    other = dataclasses.replace(SMALL, pretraining=dataclasses.replace(SMALL.pretraining, epochs=2))
    with pytest.raises(ByolTimmError, match="made with epochs 1, you asked for 2"):
        compare(other, again)
    fewer = dataclasses.replace(SMALL, label_shares=(1.0,), image_shares=())
    assert {row["labels"] for row in compare(fewer, again)} == {1.0}


def test_random_is_what_byol_starts_from_and_differs_between_seeds():
    config = dataclasses.replace(SMALL.pretraining, seed=3)
    torch.rand(7)
    first, second = initial_encoder(config), initial_encoder(config)
    other = initial_encoder(dataclasses.replace(config, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1[0].weight, other.conv1[0].weight)


def test_pretrained_weights_that_do_not_exist_are_left_out_with_a_warning(tmp_path, caplog):
    settings = dataclasses.replace(SMALL.pretraining, backbone="lcnet_035")
    assert find_encoder(tmp_path, settings, Origin("pretrained")) is None
    assert "pretrained weights are left out: 'lcnet_035' could not be loaded" in caplog.text
    assert find_encoder(tmp_path, settings, Origin("random")) is not None


def test_encoders_of_fewer_images_are_compared_with_the_largest_share_of_the_labels():
    chosen = cells(SMALL, Origin("byol", 0.1), 0)
    assert [(cell.frozen, cell.labels) for cell in chosen] == [(True, 1.0), (False, 1.0)]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(label_shares=(0.1, 0.1)), "different values"),
        (dict(label_shares=(0.0,)), "label_shares lie above 0"),
        (dict(image_shares=(1.5,)), "image_shares lie above 0"),
        (dict(seeds=()), "--seeds takes different values, at least one"),
        (dict(image_shares=(0.01,)), "1 % of the images are 14, fewer than the batch of 128"),
        (dict(linear=PROTOCOLS["byol-linear"]), "without augmentation"),
        (dict(pretraining=PretrainConfig(backbone="hf-hub:user/name")), "no random weights"),
        (dict(pretraining=PretrainConfig(streaming=True)), "Leave --streaming out"),
        (dict(pretraining=PretrainConfig(epochs=-1)), "--epochs must be positive"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_slow(changes, message, tmp_path):
    with pytest.raises(ByolTimmError, match=message) as caught:
        compare(dataclasses.replace(SMALL, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_comparison_in_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ByolTimmError, match="one process"):
        compare(SMALL, tmp_path / "run")


# Words


def row(start, images, mode, labels, top1, seed=0):
    return dict(start=start, images=images, mode=mode, labels=labels, seed=seed, top1=top1, test_images=10_000)


def rows_of(random, byol, mode, seeds=(0, 1)):
    """Rows of accuracies in percent with 1 and 100 % of the labels; the seed counts tenths of a point."""
    return [
        row(*start, mode, labels, (accuracy + seed / 10) / 100, seed)
        for start, accuracies in ((("random", 0.0), random), (("byol", 1.0), byol))
        for labels, accuracy in zip((0.01, 1.0), accuracies, strict=True)
        for seed in seeds
    ]


def test_the_conclusion_is_three_sentences_computed_from_the_without_seconds():
    rows = rows_of((60, 80), (72, 83), "frozen") + rows_of((50, 90), (70, 89.9), "fine-tuned")
    for share, accuracy in ((0.5, 0.82), (0.1, 0.81), (0.8, 0.83)):
        rows += [row("byol", share, mode, 1.0, accuracy) for mode in ("frozen", "fine-tuned")]
    assert conclusion(rows) == (
        "With the encoder frozen, BYOL is better than random weights with 1 % (+12.0 points) and 100 % (+3.0 points) "
        "of the labels. "
        "With the encoder fine-tuned, BYOL is better than random weights with 1 % (+20.0 points) of the labels and "
        "makes no measurable difference with 100 % (-0.1 points). "
        "The highest accuracy comes with 1 % of the labels from BYOL, frozen (72.0 %), and with all labels from "
        "random, fine-tuned (90.0 %); BYOL on 10 % of the images instead of all changes its frozen accuracy by -2.0 "
        "points."
    )


def test_pretrained_weights_have_their_rows_and_may_be_the_best():
    rows = rows_of((60, 80), (72, 83), "frozen") + rows_of((50, 90), (70, 89.9), "fine-tuned")
    rows += [row("pretrained", 0.0, mode, labels, 0.95) for mode in ("frozen", "fine-tuned") for labels in (0.01, 1.0)]
    assert "| pretrained | frozen | 95.0 | 95.0 |" in results_table(rows)
    assert "with 1 % of the labels from pretrained, frozen (95.0 %)" in conclusion(rows)


def test_the_conclusion_says_where_pretraining_harms():
    rows = rows_of((80, 80), (70, 80), "frozen") + rows_of((80, 80), (80, 75), "fine-tuned")
    text = conclusion(rows)
    assert "is worse than random weights with 1 % (-10.0 points) of the labels" in text
    assert "is worse than random weights with 100 % (-5.0 points)" in text
    assert text.count(". ") == 2


def test_seeds_that_disagree_make_a_difference_unmeasurable():
    calm = rows_of((60, 80), (65, 85), "frozen") + rows_of((60, 80), (65, 85), "fine-tuned")
    wild = [{**r, "top1": r["top1"] + (0.2 if r["seed"] and r["start"] == "byol" else 0)} for r in calm]
    assert "no measurable difference" not in conclusion(calm)
    assert "makes no measurable difference with 1 % " in conclusion(wild)


def test_a_difference_is_as_clear_as_students_interval_over_the_pairs_of_seeds_says():
    def said(differences, test_images=10**9):
        rows = [
            row(start, images, mode, 1.0, (50 + offset + seed + (start == "byol") * difference) / 100, seed)
            for seed, difference in enumerate(differences)
            for start, images, offset in (("random", 0.0, 0), ("byol", 1.0, 0))
            for mode in ("frozen", "fine-tuned")
        ]
        return conclusion([{**r, "test_images": test_images} for r in rows])

    # 12.7 standard errors of two pairs, 4.3 of three; what both encoders of a pair share does not count.
    assert "no measurable" in said((1, 1.18)) and "is better" in said((1, 1.16))
    assert "no measurable" in said((1, 2, 3.1)) and "is better" in said((2, 3, 4))
    assert "no measurable" in said((20,)) and "is better" in said((5, 5)) and "no measurable" in said((5, 5), 300)


def test_the_table_shows_means_and_deviations():
    lines = results_table(rows_of((60.1, 80.1), (72.1, 83.1), "frozen", seeds=(1, 3))).splitlines()
    assert lines[0] == "| encoder | | 1 % of the labels | 100 % of the labels |"
    assert lines[2] == "| random | frozen | 60.3 ± 0.1 | 80.3 ± 0.1 |"
    assert lines[4] == "| BYOL | frozen | 72.3 ± 0.1 | 83.3 ± 0.1 |"


def test_pictures_of_one_run_and_of_several(tmp_path):
    bars = {"1 %": {"random": [0.3, 0.35], "BYOL": [0.6]}, "100 %": {"BYOL": [0.9, 0.91, 0.92]}}
    save_bars(bars, tmp_path / "bars.png", title="Frozen")
    save_bars({"all": {"one": [0.0]}}, tmp_path / "zero.png", title="Nothing learned")
    lines = {"random": {0.01: [0.3, 0.4], 1.0: [0.8]}, "BYOL": {0.01: [0.6], 0.8: [0.9], 1.0: [0.9, 0.95]}}
    colors = dict.fromkeys(("random", "BYOL", "one"), "black")
    save_label_efficiency(lines, tmp_path / "lines.png", title="Labels", colors=colors)
    save_label_efficiency({"one": {0.1: [0.5]}}, tmp_path / "point.png", title="Labels", colors=colors)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
            picture.load()
