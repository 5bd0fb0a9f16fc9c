import dataclasses
import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from byol_timm.config import EvaluationConfig
from byol_timm.data import open_dataset
from byol_timm.encoders import create_encoder, save_encoder
from byol_timm.errors import ByolTimmError
from byol_timm.evaluation import (
    PROTOCOLS,
    Preparation,
    Protocol,
    classification_metrics,
    dataset_features,
    evaluate,
    extract_features,
    fit_linear,
    knn,
    label_subset,
    metrics_lines,
    neighbours,
    open_evaluation,
    train_classifier,
)
from byol_timm.evaluation.classifier import CROP_AND_FLIP, augmented
from byol_timm.evaluation.metrics import confidence_interval
from byol_timm.evaluation.neighbours import knn_scores, nearest_neighbours
from byol_timm.views import EvaluationTransform

MEAN, STD = (0.2,), (0.3,)
DIGITS = load_digits()
FEATURES = torch.tensor(DIGITS.data, dtype=torch.float32)
LABELS = torch.tensor(DIGITS.target)
PREPARATION = Preparation(EvaluationTransform(16, crop_pct=1.0), MEAN, STD, workers=0)
SHORT_LINEAR = Protocol(frozen=True, lrs=(0.02, 0.1), epochs=(2,), batch_size=32, standardize=True)
SHORT = Protocol(frozen=False, lrs=(0.02, 0.1), epochs=(1,), batch_size=32, min_steps=6, augmentation=CROP_AND_FLIP)


@pytest.fixture(scope="module")
def splits():
    splits = open_dataset("digits", in_chans=1)
    few = np.flatnonzero(splits.train.labels < 4)[:120]
    return replace(splits, train=splits.train.subset(few), test=splits.test.subset(range(60)))


def tiny_encoder(name="test_resnet"):
    return (
        create_encoder(name, image_size=32, in_chans=1, output_stride=8)
        if name == "test_resnet"
        else create_encoder(name, image_size=32, in_chans=1)
    )


@pytest.fixture
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def pixels():
    images = torch.tensor(DIGITS.images[:40] * 255 / 16).to(torch.uint8)[:, None]
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Features


def test_features_are_the_same_to_the_last_bit_twice(encoder, pixels):
    first = extract_features(encoder, pixels, mean=MEAN, std=STD)
    assert first.shape == (40, encoder.head_hidden_size) and first.dtype == torch.float32
    assert torch.equal(extract_features(encoder, pixels, mean=MEAN, std=STD), first)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_features_do_not_depend_on_the_cut_into_batches(name, batch_size, pixels):
    encoder = tiny_encoder(name)
    whole = extract_features(encoder, pixels if name == "test_resnet" else resized(pixels), mean=MEAN, std=STD)
    cut = (pixels if name == "test_resnet" else resized(pixels)).split(batch_size)
    torch.testing.assert_close(extract_features(encoder, cut, mean=MEAN, std=STD), whole, rtol=1e-4, atol=1e-5)


def resized(pixels):
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_extraction_leaves_modes_gradients_and_statistics_as_they_are(encoder, pixels):
    encoder.train()
    encoder.bn1.eval()
    modes, before = [module.training for module in encoder.modules()], state(encoder)
    features = extract_features(encoder, pixels, mean=MEAN, std=STD)
    assert [module.training for module in encoder.modules()] == modes
    assert same_bits(state(encoder), before)
    assert not features.requires_grad and all(p.requires_grad for p in encoder.parameters())


def test_modes_come_back_after_an_interruption(encoder, pixels):
    def poll():
        raise KeyboardInterrupt

    encoder.train()
    with pytest.raises(KeyboardInterrupt):
        extract_features(encoder, pixels, mean=MEAN, std=STD, poll=poll)
    assert all(module.training for module in encoder.modules())


def test_polling_happens_before_every_batch(encoder, pixels):
    polls = []
    extract_features(encoder, pixels, mean=MEAN, std=STD, batch_size=16, poll=lambda: polls.append(1))
    assert len(polls) == 3


def test_features_are_float32_under_autocast_and_in_any_layout(encoder, pixels):
    plain = extract_features(encoder, pixels, mean=MEAN, std=STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract_features(encoder, pixels, mean=MEAN, std=STD), plain)
    last = extract_features(encoder, pixels, mean=MEAN, std=STD, channels_last=True)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batches", [[], torch.empty(0, 1, 16, 16, dtype=torch.uint8)], ids=["iterable", "tensor"])
def test_no_images_have_no_features(encoder, batches):
    assert extract_features(encoder, batches, mean=MEAN, std=STD).shape == (0, encoder.head_hidden_size)


def test_preparation_is_what_timm_knows_of_the_encoder():
    small = Preparation.of(create_encoder("test_resnet", image_size=32, in_chans=1), in_chans=1, workers=0)
    assert small.transform.size == (32, 32) and small.transform.crop_pct == 1.0
    assert len(small.mean) == len(small.std) == 1 and small.workers == 0
    large = Preparation.of(timm.create_model("resnet18", num_classes=0))
    assert (
        large.transform.size == (224, 224)
        and large.transform.crop_pct
        == timm.data.resolve_model_data_config(timm.create_model("resnet18", num_classes=0))["crop_pct"]
    )
    assert large.mean == timm.data.IMAGENET_DEFAULT_MEAN


def test_an_encoder_with_random_weights_is_the_same_every_time_and_another_for_another_seed():
    config = EvaluationConfig(encoder="test_resnet", image_size=32, in_chans=1)
    encoders = [open_evaluation(replace(config, seed=seed))[0] for seed in (0, 0, 1)]
    first, second, third = (state(encoder) for encoder in encoders)
    assert same_bits(first, second) and not same_bits(first, third)


# Nearest neighbours


def brute_force(bank, labels, queries, k, temperature, center):
    bank, queries = bank.double().numpy(), queries.double().numpy()
    if center:
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    bank, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, queries))
    predictions = []
    for query in queries:
        similarity = bank @ query
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes = np.zeros(10)
        for i in nearest:
            votes[labels[i]] += math.exp(similarity[i] / temperature)
        predictions.append(votes.argmax())
    return np.array(predictions)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_agrees_with_brute_force(center, k):
    bank, queries = FEATURES[:700], FEATURES[700:900]
    expected = brute_force(bank, LABELS[:700].numpy(), queries, k, 0.07, center)
    scores = knn_scores(bank, LABELS[:700], queries, k=k, center=center)
    assert np.array_equal(scores.argmax(1).numpy(), expected)
    accuracy = knn(bank, LABELS[:700], queries, LABELS[700:900], k=k, center=center)
    assert accuracy == (expected == LABELS[700:900].numpy()).mean()


def test_knn_takes_arrays_and_is_the_same_to_the_last_bit_twice():
    first = knn_scores(FEATURES[:500], LABELS[:500].numpy(), FEATURES[500:])
    assert torch.equal(knn_scores(FEATURES[:500], LABELS[:500], FEATURES[500:]), first)


def test_centring_takes_a_common_offset_out():
    offset = torch.full((64,), 300.0)
    close = dict(rtol=1e-3, atol=1e-3)
    plain = knn_scores(FEATURES[:500], LABELS[:500], FEATURES[500:600])
    torch.testing.assert_close(
        knn_scores(FEATURES[:500] + offset, LABELS[:500], FEATURES[500:600] + offset), plain, **close
    )


def test_neighbours_do_not_depend_on_the_chunks(monkeypatch):
    whole = nearest_neighbours(FEATURES[:600], FEATURES[600:], k=7)
    monkeypatch.setattr(neighbours, "KNN_VALUES", 601)
    cosines, places = nearest_neighbours(FEATURES[:600], FEATURES[600:], k=7)
    torch.testing.assert_close(cosines, whole[0])
    assert torch.equal(places, whole[1])


def test_of_equally_similar_images_the_first_of_the_bank_counts():
    bank = torch.eye(4).repeat(50, 1)
    cosines, places = nearest_neighbours(bank, torch.eye(4), k=10, center=False)
    assert torch.equal(places, torch.arange(4)[:, None] + 4 * torch.arange(10))
    assert torch.equal(cosines, torch.ones(4, 10))


def test_of_a_collapsed_network_the_first_images_of_the_bank_vote():
    labels = torch.tensor([2, 2, 1, *[0] * 97])
    scores = knn_scores(torch.ones(100, 8), labels, torch.ones(5, 8), k=3)
    assert scores.argmax(1).tolist() == [2] * 5


def test_a_bank_of_fewer_than_k_images_votes_as_a_whole():
    few = dict(bank=FEATURES[:12], bank_labels=LABELS[:12], queries=FEATURES[100:200])
    assert torch.equal(knn_scores(**few, k=20), knn_scores(**few, k=12))


def test_unlabelled_images_neither_vote_nor_count():
    labels, query_labels = LABELS[:600].clone(), LABELS[600:700].clone()
    labels[::3], query_labels[::2] = -1, -1
    kept = labels >= 0
    assert knn(FEATURES[:600], labels, FEATURES[600:700], query_labels) == knn(
        FEATURES[:600][kept], labels[kept], FEATURES[601:700:2], query_labels[1::2]
    )


def test_one_class_is_always_found_and_an_unseen_class_never():
    zeros = torch.zeros(50, dtype=torch.int64)
    assert knn(FEATURES[:50], zeros, FEATURES[50:60], zeros[:10]) == 1.0
    assert knn(FEATURES[:50], zeros, FEATURES[50:60], zeros[:10] + 7) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_do_not_spoil_the_others(value):
    bank = FEATURES[:600].clone()
    bank[5] = value
    assert knn(bank, LABELS[:600], FEATURES[600:800], LABELS[600:800]) > 0.9


def test_knn_without_labels_is_an_error_in_one_line():
    none = torch.full((20,), -1)
    with pytest.raises(ByolTimmError, match="none of the 20 images to learn from has a label"):
        knn(FEATURES[:20], none, FEATURES[20:40], LABELS[20:40])
    with pytest.raises(ByolTimmError, match="none of the 20 images to classify has a label"):
        knn(FEATURES[:20], LABELS[:20], FEATURES[20:40], none)
    with pytest.raises(ByolTimmError, match="none of the 0 images to learn from"):
        knn(FEATURES[:0], LABELS[:0], FEATURES[20:40], LABELS[20:40])


# Labels


def test_shares_of_labels_are_balanced_nested_and_fixed_by_the_seed():
    shares = [set(label_subset(LABELS, fraction, seed=3).tolist()) for fraction in (0.01, 0.1, 0.5, 0.8, 1.0)]
    for smaller, larger in pairwise(shares):
        assert smaller < larger
    assert shares[-1] == set(range(len(LABELS)))
    counts = torch.bincount(LABELS)
    for fraction, chosen in zip((0.01, 0.1, 0.5), shares, strict=False):
        taken = torch.bincount(LABELS[list(chosen)], minlength=10)
        assert (taken - (fraction * counts).clamp(min=1)).abs().max() <= 0.5
    assert set(label_subset(LABELS, 0.1, seed=4).tolist()) != shares[1]


def test_a_share_holds_every_class_and_no_unlabelled_image():
    labels = np.array([0] * 50 + [1] * 2 + [-1] * 30 + [7])
    assert sorted(labels[label_subset(labels, 0.01, seed=0)]) == [0, 1, 7]
    assert (labels[label_subset(labels, 1.0, seed=0)] >= 0).all()


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, math.nan])
def test_a_share_of_labels_lies_above_0_and_up_to_1(fraction):
    with pytest.raises(ByolTimmError, match="the share of labels must be above 0"):
        label_subset(LABELS, fraction, seed=0)


# Figures


def test_figures_of_scores():
    scores = torch.eye(6)[[0, 1, 2, 3, 4, 5, 0, 1]] + 0.1 * torch.arange(6).flip(0)
    metrics = classification_metrics(scores, torch.tensor([0, 1, 2, 3, 4, 5, 5, 0]))
    assert metrics["images"] == 8 and metrics["top1"] == 6 / 8 and metrics["top5"] == 7 / 8
    assert metrics["per_class"] == [0.5, 1, 1, 1, 1, 0.5]
    assert metrics["confusion"][5][0] == 1 and metrics["confusion"][0][1] == 1 and np.sum(metrics["confusion"]) == 8
    assert metrics["mean_per_class"] == pytest.approx(5 / 6)
    assert metrics["top1_interval"] == confidence_interval(6, 8)
    assert json.loads(json.dumps(metrics, allow_nan=False))["top1"] == 0.75


def test_top5_is_left_out_where_it_says_nothing_and_unlabelled_images_do_not_count():
    metrics = classification_metrics(torch.eye(3), torch.tensor([0, -1, 1]))
    assert metrics["images"] == 2 and metrics["top5"] is None and metrics["top1"] == 0.5
    assert metrics["per_class"] == [1, 0, None]


def test_a_class_that_the_classifier_does_not_have_is_never_right():
    metrics = classification_metrics(torch.zeros(4, 2), torch.tensor([0, 1, 6, 6]))
    assert metrics["top1"] == 0.25 and metrics["top5"] == 0.5 and metrics["per_class"][6] == 0
    votes = knn_scores(FEATURES[:5], torch.zeros(5, dtype=torch.int64), FEATURES[:2], num_classes=7)
    assert classification_metrics(votes, torch.tensor([0, 1]))["top5"] == 0.5


def test_equal_scores_go_to_the_first_class():
    metrics = classification_metrics(torch.zeros(10, 10), torch.arange(10))
    assert metrics["top1"] == 0.1 and metrics["top5"] == 0.5


def test_figures_of_a_diverged_classifier_are_an_error():
    with pytest.raises(ByolTimmError, match="diverged"):
        classification_metrics(torch.full((2, 2), math.nan), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_the_interval_is_wilsons(correct, total, low, high):
    assert confidence_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


# Linear classifiers on features


@pytest.mark.parametrize("classes", [2, 10])
def test_logistic_regression_is_that_of_scikit_learn(classes):
    chosen = LABELS < classes
    features, labels = FEATURES[chosen], LABELS[chosen]
    direct = LogisticRegression(C=1 / 0.5, max_iter=1000).fit(features.double().numpy(), labels.numpy())
    head, record = fit_linear(features, labels, protocol=Protocol(frozen=True, l2=(0.5,)))
    assert record == {"chosen": {"l2": 0.5}, "trials": []}
    with torch.no_grad():
        shares = head(features.double()).softmax(1)
    np.testing.assert_allclose(shares.numpy(), direct.predict_proba(features.double().numpy()), atol=1e-12)


def test_logistic_regression_chooses_on_held_out_images_and_fits_on_all():
    grid = (1e-3, 1.0, 1e5)
    features, labels = FEATURES[:600], LABELS[:600]
    head, record = fit_linear(features, labels, protocol=Protocol(frozen=True, l2=grid), seed=1)
    held_out = label_subset(labels, 0.2, seed=1)
    rest = np.setdiff1d(np.arange(600), held_out)
    by_hand = []
    for l2 in grid:
        model = LogisticRegression(C=1 / l2, max_iter=1000).fit(features[rest].double().numpy(), labels[rest].numpy())
        by_hand.append(model.score(features[held_out].double().numpy(), labels[held_out].numpy()))
    assert [trial["accuracy"] for trial in record["trials"]] == pytest.approx(by_hand)
    best = record["chosen"]["l2"]
    assert by_hand[grid.index(best)] == max(by_hand)
    direct = LogisticRegression(C=1 / best, max_iter=1000).fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(head.weight.detach().numpy(), direct.coef_, atol=1e-12)


def test_a_linear_classifier_is_the_same_to_the_last_bit_twice():
    first, record = fit_linear(FEATURES[:600], LABELS[:600], seed=5)
    again, _ = fit_linear(FEATURES[:600], LABELS[:600], seed=5)
    assert same_bits(state(first), state(again))
    metrics = classification_metrics(first(FEATURES[600:]), LABELS[600:])
    assert metrics["top1"] > 0.88
    assert len(record["trials"]) == len(PROTOCOLS["quick-linear"].settings)


def test_the_quick_probe_does_not_care_for_the_scale_and_offset_of_features():
    plain, _ = fit_linear(FEATURES[:300], LABELS[:300])
    moved, _ = fit_linear(FEATURES[:300] * 1e-3 + 5, LABELS[:300])
    agreement = plain(FEATURES[300:]).argmax(1) == moved(FEATURES[300:] * 1e-3 + 5).argmax(1)
    assert agreement.float().mean() > 0.97


def test_features_that_are_all_the_same_give_a_classifier_all_the_same():
    head, _ = fit_linear(torch.full((40, 8), 3.0), LABELS[:40])
    assert head(torch.full((2, 8), 3.0)).isfinite().all()


def test_where_nothing_can_be_held_out_the_middle_setting_is_taken():
    _, record = fit_linear(FEATURES[:10], torch.arange(10))
    assert record == {"chosen": {"lr": 0.1, "epochs": 30}, "trials": []}


def test_a_class_without_training_images_is_never_chosen():
    known = LABELS[:300] != 3
    for protocol in ("quick", Protocol(frozen=True, l2=(1.0,))):
        head, _ = fit_linear(FEATURES[:300][known], LABELS[:300][known], protocol=protocol, num_classes=12)
        predicted = head(FEATURES[300:].to(head.weight.dtype)).argmax(1)
        assert not torch.isin(predicted, torch.tensor([3, 10, 11])).any()


def test_unlabelled_features_are_left_out():
    labels = LABELS[:300].clone()
    labels[100:] = -1
    head, _ = fit_linear(FEATURES[:300], labels, protocol=SHORT_LINEAR)
    other, _ = fit_linear(FEATURES[:100], LABELS[:100], protocol=SHORT_LINEAR)
    assert same_bits(state(head), state(other))


# Encoders with a classifier


def test_protocols_are_those_of_the_paper():
    linear, semi1, semi10 = (PROTOCOLS[f"byol-{name}"] for name in ("linear", "semi-1", "semi-10"))
    assert linear.frozen and set(linear.lrs) == {0.4, 0.3, 0.2, 0.1, 0.05} and linear.epochs == (80,)
    assert linear.batch_size == 1024 and linear.labels == 1.0 and not linear.standardize
    for semi, share in ((semi1, 0.01), (semi10, 0.1)):
        assert not semi.frozen and set(semi.lrs) == {0.01, 0.02, 0.05, 0.1, 0.005} and semi.epochs == (30, 50)
        assert semi.labels == share and len(semi.settings) == 10
    for protocol in (linear, semi1, semi10):
        augmentation = protocol.augmentation
        assert augmentation.crop_scale == (0.08, 1.0) and augmentation.flip == 0.5
        assert augmentation.interpolation == "bicubic" and augmentation.rotate == 0
        assert (augmentation.jitter, augmentation.grayscale, *augmentation.blur, *augmentation.solarize) == (0,) * 6
        assert protocol.min_steps == 0
    transfer = PROTOCOLS["byol-transfer-linear"]
    assert transfer.frozen and transfer.augmentation is None and len(transfer.l2) == 45
    assert transfer.l2[0] == pytest.approx(1e-6) and transfer.l2[-1] == pytest.approx(1e5)
    np.testing.assert_allclose(np.diff(np.log10(transfer.l2)), 11 / 44)


@pytest.mark.parametrize(
    "protocol",
    [
        SHORT_LINEAR,
        replace(SHORT, frozen=True),
        Protocol(frozen=True, l2=(0.1, 1.0)),
    ],
    ids=["features", "augmented", "logistic"],
)
def test_frozen_means_frozen_to_the_last_bit(encoder, splits, protocol):
    encoder.train()
    before, modes = state(encoder), [module.training for module in encoder.modules()]
    first = train_classifier(encoder, splits.train, splits.test, PREPARATION, frozen=True, protocol=protocol)
    assert same_bits(state(encoder), before)
    assert [module.training for module in encoder.modules()] == modes
    assert first.classifier[0] is encoder
    again = train_classifier(encoder, splits.train, splits.test, PREPARATION, frozen=True, protocol=protocol)
    assert same_bits(state(first.classifier), state(again.classifier)) and first.metrics == again.metrics


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_fine_tuning_trains_a_copy_the_same_to_the_last_bit_twice(name, splits):
    encoder = tiny_encoder(name)
    preparation = PREPARATION if name == "test_resnet" else replace(PREPARATION, transform=EvaluationTransform(32))
    before = state(encoder)
    first = train_classifier(encoder, splits.train, splits.test, preparation, frozen=False, protocol=SHORT, seed=2)
    assert same_bits(state(encoder), before)
    trained = state(first.classifier[0])
    assert all(not torch.equal(trained[key], value) for key, value in before.items() if key.endswith("weight"))
    torch.manual_seed(99)
    again = train_classifier(encoder, splits.train, splits.test, preparation, frozen=False, protocol=SHORT, seed=2)
    assert same_bits(state(first.classifier), state(again.classifier)) and first.metrics == again.metrics


def test_training_leaves_the_random_numbers_of_the_caller_alone(encoder, splits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_linear(FEATURES[:100], LABELS[:100], protocol=SHORT_LINEAR)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_test_images_choose_nothing(encoder, splits, frozen):
    protocol = SHORT_LINEAR if frozen else SHORT
    other = dataclasses.replace(splits.test, labels=splits.test.labels[::-1].copy())
    first = train_classifier(encoder, splits.train, splits.test, PREPARATION, frozen=frozen, protocol=protocol)
    second = train_classifier(encoder, splits.train, other, PREPARATION, frozen=frozen, protocol=protocol)
    assert same_bits(state(first.classifier), state(second.classifier))
    assert first.metrics["top1"] != second.metrics["top1"]


def test_what_is_written_down_is_enough_to_know_what_was_done(encoder, splits):
    protocol = replace(SHORT_LINEAR, labels=0.5)
    metrics = train_classifier(encoder, splits.train, splits.test, PREPARATION, frozen=True, protocol=protocol).metrics
    assert (
        metrics["train_images"] == len(label_subset(splits.train.labels, 0.5, 0))
        and metrics["frozen"]
        and metrics["seed"] == 0
    )
    assert metrics["chosen"] in protocol.settings and len(metrics["trials"]) == len(protocol.settings)
    assert metrics["images"] == 60 and len(metrics["confusion"]) == 10
    assert json.loads(json.dumps(metrics, allow_nan=False)) == json.loads(json.dumps(metrics))
    quick = train_classifier(encoder, splits.train, splits.test, PREPARATION, frozen=True).metrics
    assert quick["protocol"] == "quick-linear"


def test_a_trained_classifier_classifies_images(encoder, splits):
    seen = splits.test.subset(np.flatnonzero(splits.test.labels < 4))
    trained = train_classifier(encoder, splits.train, seen, PREPARATION, frozen=True)
    scores, indices = dataset_features(trained.classifier, seen, PREPARATION)
    assert classification_metrics(scores, seen.labels[indices])["top1"] == trained.metrics["top1"] > 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of many sizes in folders by class, one of them broken."""
    root = tmp_path_factory.mktemp("animals")
    for label, name in enumerate(("cat", "dog")):
        for index, place in enumerate(np.flatnonzero(DIGITS.target == label)[:40]):
            path = root / ("train" if index < 30 else "test") / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((DIGITS.images[place] * 15).astype(np.uint8))
            picture.resize((24 + index % 5, 20)).save(path)
    (root / "train" / "dog" / "7.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("frozen", [True, False])
def test_a_folder_of_images_of_many_sizes_one_broken_can_be_learned_from(encoder, folder, frozen):
    splits = open_dataset(str(folder), in_chans=1)
    assert splits.train.class_names == ("cat", "dog")
    protocol = replace(SHORT, frozen=frozen)
    metrics = train_classifier(
        encoder, splits.train, splits.test, PREPARATION, frozen=frozen, protocol=protocol
    ).metrics
    assert len(metrics["per_class"]) == 2 and 0 <= metrics["top1"] <= 1


def test_what_stands_in_for_a_broken_image_teaches_no_label(folder):
    images = open_dataset(str(folder), in_chans=1).train
    broken = next(index for index in range(len(images)) if images.describe(index).endswith("dog/7.png"))
    protocol = replace(SHORT, batch_size=len(images))
    _, labels = next(augmented(images, PREPARATION, protocol, torch.device("cpu"), 0))
    assert (labels == -1).sum() == 1
    assert labels.clamp(min=0).sum() == images.labels.sum() - images.labels[broken]


@pytest.mark.parametrize(
    ("frozen", "protocol", "message"),
    [
        (True, "byol", "unknown protocol 'byol'. Choose quick, byol-linear"),
        (True, "byol-semi-1", "protocol byol-semi-1 is for fine-tuned encoders, not frozen ones"),
        (False, "byol-linear", "protocol byol-linear is for frozen encoders, not fine-tuned ones"),
    ],
)
def test_a_protocol_that_does_not_fit_is_an_error(encoder, splits, frozen, protocol, message):
    with pytest.raises(ByolTimmError, match=message):
        train_classifier(encoder, splits.train, splits.test, PREPARATION, frozen=frozen, protocol=protocol)


@pytest.mark.parametrize("frozen", [True, False])
def test_images_that_nothing_can_be_learned_from_are_an_error_in_one_line(encoder, splits, frozen):
    def train(train=splits.train, test=splits.test):
        train_classifier(encoder, train, test, PREPARATION, frozen=frozen)

    with pytest.raises(ByolTimmError, match="images of digits to learn from have no labels"):
        train(train=dataclasses.replace(splits.train, labels=None))
    with pytest.raises(ByolTimmError, match="images of digits to classify have no labels"):
        train(test=dataclasses.replace(splits.test, labels=None))
    with pytest.raises(ByolTimmError, match="none of the 120 images to learn from has a label"):
        train(train=dataclasses.replace(splits.train, labels=np.full(120, -1)))
    with pytest.raises(ByolTimmError, match=r"are of one class \(2\)"):
        train(train=splits.train.subset(np.flatnonzero(splits.train.labels == 2)))


# From names to metrics


def saved_encoder(folder, **config):
    """Save an untrained encoder with a record of how its images were split."""
    record = {"config": {"dataset": "digits", **config}} if config else None
    encoder = create_encoder("test_resnet", image_size=32, in_chans=1, output_stride=8)
    save_encoder(encoder, folder, image_size=32, mean=MEAN, std=STD, record=record)
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("recorded", "used"),
    [(dict(seed=0, split_seed=0), 0), (dict(seed=3, split_seed=5), 5), (dict(seed=3), 3), ({}, 0)],
    ids=["default", "split_seed", "from-before-split_seed", "unknown"],
)
def test_no_test_image_was_trained_on_whatever_the_seed(recorded, used, tmp_path):
    encoder = saved_encoder(tmp_path / "encoder", **recorded)
    trained_on = open_dataset("digits", in_chans=1, split_seed=used).train.rows
    for seed in (0, 1):
        _, splits, _ = open_evaluation(EvaluationConfig(encoder=encoder, seed=seed))
        assert np.intersect1d(splits.test.rows, trained_on).size == 0


def test_another_split_than_that_of_the_training_is_a_warning(tmp_path, caplog):
    encoder = saved_encoder(tmp_path / "encoder", split_seed=5)
    for split_seed in (None, 5):
        open_evaluation(EvaluationConfig(encoder=encoder, split_seed=split_seed))
    assert caplog.messages == []
    _, splits, _ = open_evaluation(EvaluationConfig(encoder=encoder, split_seed=1))
    assert np.array_equal(splits.test.rows, open_dataset("digits", split_seed=1).test.rows)
    [message] = caplog.messages
    assert "was trained with split_seed 5" in message and "\n" not in message


def test_an_encoder_is_evaluated_the_same_by_name_and_as_a_module(tmp_path, splits):
    name = saved_encoder(tmp_path / "encoder")
    by_name = evaluate(name, "digits", "knn", k=5, raw_pixels=True, workers=0, output=str(tmp_path / "knn"))
    assert json.loads((tmp_path / "knn" / "results.json").read_text())["confusion"] == by_name["confusion"]
    encoder = create_encoder(name).train()
    for dataset in ("digits", open_dataset("digits", in_chans=1)):
        by_module = evaluate(encoder, dataset, k=5, workers=0)
        assert by_module["top1"] == by_name["top1"] and by_module["confusion"] == by_name["confusion"]
    assert encoder.training and by_name["raw_pixels_top1"] > 0.95
    assert metrics_lines(by_name)[0].startswith(f"5-NN accuracy of {name} on digits, 1,438 images")
    assert metrics_lines(by_name)[-1].startswith("  raw pixels 9")
    part = splits.train.subset(range(60))
    linear = evaluate(encoder, part, "linear", workers=0)
    assert linear["frozen"] and linear["train_images"] + linear["images"] == 60
    assert metrics_lines(linear)[0] == "linear probe (quick-linear) of ResNet on digits"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("svm", {}, "method must be knn, linear or finetune"),
        ("linear", {"k": 3}, "linear has no option 'k'"),
        ("knn", {"temprature": 1.0}, "knn has no option 'temprature'. Did you mean temperature?"),
        ("knn", {"image_size": 64}, r"image_size \(64\) needs encoder and dataset given by name"),
        ("knn", {"k": 0}, r"--k must be positive \(0\)"),
    ],
)
def test_what_an_evaluation_cannot_do_is_an_error_before_the_work(encoder, method, options, message):
    with pytest.raises(ByolTimmError, match=message):
        evaluate(encoder, "no_such_folder/at_all/", method, **options)
